"""Out of `patch` again without a trace: unpatch, copies, pickles, memory."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

import cogvx_kernels as ck
from tests.patching.small import (
    assert_untouched,
    generate,
    inputs,
    pipeline,
    transformer,
)


def test_unpatch_restores_everything():
    pipe = pipeline()
    wanted = generate(pipe)
    with assert_untouched(pipe.vae), assert_untouched(pipe.transformer):
        ck.patch(pipe)
        generate(pipe)
        ck.unpatch(pipe)
    assert torch.equal(generate(pipe), wanted)
    block = pipe.transformer.transformer_blocks[0]
    assert block.forward.__func__ is type(block).forward
    assert "not patched" in str(ck.explain(pipe))


def test_patch_is_idempotent():
    model = transformer()
    first = ck.patch(model)
    with torch.no_grad():
        model(**inputs(model))
    again = ck.patch(model)
    assert again["rope"].calls == first["rope"].calls == 2
    ck.unpatch(model)
    ck.unpatch(model)
    assert not [k for m in model.modules() for k in vars(m) if "cogvx" in k or k == "forward"]


def test_other_options_replace_the_patch():
    model = transformer()
    ck.patch(model)
    report = ck.patch(model, ["rope"], "fast")
    assert [row.op for row in report.rows] == ["rope"] and report.mode == "fast"
    block = model.transformer_blocks[0]
    assert "forward" not in vars(block) and "forward" in vars(block.attn1)


def test_patched_restores_after_errors():
    model = transformer()
    ck.patch(model, ["adaln"])
    with pytest.raises(KeyboardInterrupt), ck.patched(model, ["rope"], mode="fast") as report:
        assert [row.op for row in report.rows] == ["rope"]
        raise KeyboardInterrupt
    assert [row.op for row in ck.explain(model).rows] == ["adaln"]
    with ck.patched(model), ck.patched(model, ["rope"]):
        pass
    assert [row.op for row in ck.explain(model).rows] == ["adaln"]
    ck.unpatch(model)
    with pytest.raises(RuntimeError, match="mine"), ck.patched(model):
        raise RuntimeError("mine")
    assert not ck.explain(model).rows


def test_state_dict_and_repr_stay(tmp_path):
    pipe = pipeline()
    keys, text = list(pipe.vae.state_dict()), repr(pipe.vae)
    with ck.patched(pipe):
        assert list(pipe.vae.state_dict()) == keys and repr(pipe.vae) == text
        pipe.vae.save_pretrained(tmp_path)
    again = AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.state_dict().values(), pipe.vae.state_dict().values()))


def test_a_copy_has_its_own_counts():
    model = transformer()
    ck.patch(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(other(**inputs(model)).sample, model(**inputs(model)).sample)
        model(**inputs(model))
    assert (ck.explain(model)["rope"].calls, ck.explain(other)["rope"].calls) == (4, 2)
    ck.unpatch(other)
    assert ck.explain(model).rows and not ck.explain(other).rows
    block = other.transformer_blocks[0]
    assert block.forward.__self__ is block


def test_pickle_has_no_patch():
    model = transformer()
    with torch.no_grad():
        wanted = model(**inputs(model)).sample
        ck.patch(model)
        pickled = pickle.dumps(model)
        assert b"cogvx" not in pickled.replace(b"_cogvx", b"")
        other = pickle.loads(pickled)
        assert torch.equal(other(**inputs(model)).sample, wanted)
    assert not ck.explain(other).rows
    assert ck.patch(other)["rope"].sites == 2


def test_no_leaked_objects():
    model = transformer()
    ck.patch(model)
    seen = weakref.ref(vars(model)["_cogvx_patch"])
    before = len(gc.get_objects())
    for _ in range(200):
        ck.patch(model)
        ck.unpatch(model)
    gc.collect()
    assert seen() is None
    assert len(gc.get_objects()) - before < 200


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_dropped_patched_model_is_freed(mode):
    pipe = pipeline()
    report = ck.patch(pipe, mode=mode)
    generate(pipe)
    modules = [*pipe.transformer.modules(), *pipe.vae.modules()]
    alive = [weakref.ref(module) for module in modules]
    del pipe, modules
    gc.collect()
    assert all(row.hit for row in report.rows)
    assert not any(module() is not None for module in alive)


def test_pipelines_that_share_a_transformer_share_its_patch():
    one = pipeline()
    two = CogVideoXPipeline(None, None, one.vae, one.transformer, one.scheduler)
    first, second = ck.patch(one), ck.patch(two)
    generate(one)
    assert [row.calls for row in first.rows] == [row.calls for row in second.rows]
    ck.unpatch(two)
    assert not ck.explain(one).rows
