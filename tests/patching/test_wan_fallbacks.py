"""Wan modules that are called as modules, and calls that fall back to the model's own forward."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from torch import nn

from cogvx_kernels.patching import patch
from tests.patching.wan import LAYERS, assert_all_hit, conv, run, tokens, transformer, vae

# --- the transformer -------------------------------------------------------------------------


@torch.no_grad()
def test_fused_projections_are_used():
    model, inputs = transformer(), tokens()
    for part in model.blocks:
        part.attn1.fuse_projections()
    theirs = run(model, inputs)
    report = patch(model, ["rope"], backend="reference")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(model.blocks[0].attn1.to_q, "forward", None)
        assert torch.equal(run(model, inputs), theirs)
    assert_all_hit(report, "rope")


@torch.no_grad()
def test_norms_and_projections_are_called_as_modules():
    model, inputs = transformer(), tokens()
    patch(model)
    called = []
    attn = model.blocks[0].attn1
    parts = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, *attn.to_out, attn)
    parts = (*parts, model.blocks[0].attn2, model.blocks[0].ffn)
    for part in parts:
        part.register_forward_hook(lambda module, *_: called.append(module))
    run(model, inputs)
    assert {*called} == {*parts} and len(called) == len(parts)


def _hook(model):
    model.blocks[0].norm1.register_forward_hook(lambda *_: None)


def _half(model):
    model.blocks[0].norm3 = nn.Identity()


@pytest.mark.parametrize("change", [_hook, _half], ids=["hook", "another_norm"])
@torch.no_grad()
def test_a_modified_norm_falls_back(change):
    model, inputs = transformer(), tokens()
    change(model)
    theirs = run(model, inputs)
    report = patch(model, ["adaln"])
    assert torch.allclose(run(model, inputs), theirs, atol=1e-5)
    assert (report["adaln"].hit, report["adaln"].sites) == (2, 4)
    assert len(report["adaln"].fallbacks) == 1


@torch.no_grad()
def test_a_shared_modulation_falls_back():
    model = transformer()
    report = patch(model, ["adaln"])
    part, x, text = model.blocks[0], torch.randn(2, 12, 32), torch.randn(2, 5, 32)
    temb, tables = torch.randn(1, 6, 32), torch.randn(2, 1, 12, 1, 16).unbind()
    theirs = type(part).forward(part, x, text, temb, tables)
    assert torch.equal(part(x, text, temb, tables), theirs)
    assert (report["adaln"].calls, sum(report["adaln"].fallbacks.values())) == (0, 1)


@torch.no_grad()
def test_a_wrong_modulation_is_refused_by_the_model():
    model = transformer()
    patch(model, ["adaln"])
    part, x, text = model.blocks[0], torch.randn(2, 12, 32), torch.randn(2, 5, 32)
    with pytest.raises(RuntimeError, match="must match the size"):
        part(x, text, torch.randn(2, 6, 6, 32), torch.randn(2, 1, 12, 1, 16).unbind())


@torch.no_grad()
def test_a_hooked_norm_before_cross_attention_is_called():
    model, inputs = transformer(), tokens()
    theirs = run(model, inputs)
    report = patch(model, ["adaln"])
    called = []
    model.blocks[0].norm2.register_forward_hook(lambda *_: called.append(1))
    assert torch.allclose(run(model, inputs), theirs, atol=1e-5)
    assert called == [1]
    assert_all_hit(report, "adaln")


@torch.no_grad()
def test_another_processor_falls_back():
    class Another:
        def __call__(self, attn, hidden_states, *others):
            return hidden_states * 2

    model, inputs = transformer(), tokens()
    model.blocks[0].attn1.set_processor(Another())
    theirs = run(model, inputs)
    report = patch(model, ["rope"], backend="reference")
    assert torch.equal(run(model, inputs), theirs)
    assert report["rope"].fallbacks == {"its processor is a Another": 1}


@torch.no_grad()
def test_tables_per_sample_fall_back():
    model = transformer()
    report = patch(model, ["rope"])
    attn, x = model.blocks[0].attn1, torch.randn(2, 12, 32)
    tables = torch.randn(2, 2, 12, 1, 16).unbind()
    theirs = type(attn).forward(attn, x, None, None, tables)
    assert torch.equal(attn(x, None, None, tables), theirs)
    assert sum(report["rope"].fallbacks.values()) == 1


@torch.no_grad()
def test_attention_backend():
    from diffusers.models import attention_dispatch
    from diffusers.models.transformers import transformer_wan

    model, inputs = transformer(), tokens()
    backends = []
    dispatch = attention_dispatch.dispatch_attention_fn

    def watched(*args, backend=None, **kwargs):
        backends.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    model.set_attention_backend("_native_math")
    theirs = run(model, inputs)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (attention_dispatch, transformer_wan):  # ours, and that of attn2
            monkeypatch.setattr(module, "dispatch_attention_fn", watched)
        patch(model, ["rope"], backend="reference")
        assert torch.equal(run(model, inputs), theirs)
    assert len(backends) == 2 * LAYERS and {str(x.value) for x in backends} == {"_native_math"}


# --- the VAE ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "past"),
    [
        ({"kernel_size": 3, "padding": (1, 1, 0)}, torch.float32),
        ({"kernel_size": 3, "padding": (0, 1, 1)}, None),
        ({"kernel_size": 3, "padding": 1}, torch.float64),
    ],
    ids=["uneven", "no_time", "another_dtype"],
)
@torch.no_grad()
def test_another_convolution_falls_back(options, past):
    ours, theirs, report = conv(**options)
    x = torch.randn(1, 3, 4, 5, 6)
    past = None if past is None else torch.randn(1, 3, 2, 5, 6).to(past)
    if past is not None and past.dtype == torch.float64:
        for run_it in (ours, theirs):
            with pytest.raises(RuntimeError):  # torch refuses two dtypes
                run_it(x, past)
    else:
        assert torch.equal(ours(x, past), theirs(x, past))
    assert sum(report["cache"].fallbacks.values()) == 1 and report["cache"].calls == 0


@torch.no_grad()
def test_too_many_cached_frames_fall_back():
    ours, theirs, report = conv(3, padding=1)
    x, past = torch.randn(1, 3, 4, 5, 6), torch.randn(1, 3, 3, 5, 6)
    assert torch.equal(ours(x, past), theirs(x, past))
    assert sum(report["cache"].fallbacks.values()) == 1


@torch.no_grad()
def test_bilinear_upsampling_falls_back():
    model = vae(torch.bfloat16)
    report = patch(model, ["resample"])
    upsample = next(m for m in model.modules() if isinstance(m, WanUpsample))
    upsample.mode = "bilinear"
    x = torch.randn(2, 3, 5, 7).bfloat16()
    assert torch.equal(upsample(x), WanUpsample.forward(upsample, x))
    assert report["resample"].fallbacks == {"its mode is 'bilinear'": 1}
