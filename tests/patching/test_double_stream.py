"""`patch` in models whose text and video are two streams: HunyuanVideo, FramePack and Mochi."""

import copy

import pytest
import torch

import cogvx_kernels as ck
from tests.patching.double_stream import (
    DIM,
    FIRST_LEN,
    VIDEO_LEN,
    Float64,
    block_inputs,
    in_float64,
    inputs,
    transformer,
)
from tests.patching.small import assert_untouched, double, relative

# Mochi turns autocast to fp32, which a CPU does not have and the angles do not need.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

HUNYUAN = ("text", "image", "framepack")
MODELS = (*HUNYUAN, "mochi")
BLOCKS = (
    ("text", "transformer_blocks"),
    ("text", "single_transformer_blocks"),
    ("image", "transformer_blocks"),
    ("image", "single_transformer_blocks"),
    ("mochi", "transformer_blocks"),
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ALL_MODELS = pytest.mark.parametrize("kind", MODELS)
ALL_BLOCKS = pytest.mark.parametrize(("kind", "blocks"), BLOCKS)


def assert_near(ours, theirs, fp64):
    """Within the rule of matrix products: twice the error of the model's own forward."""
    assert ours.dtype == theirs.dtype
    if not fp64.any():  # the gradient of what nothing comes of
        assert not ours.any()
        return
    assert relative(ours, fp64) <= 2 * relative(theirs, fp64) + 1e-7


# --- the same results ------------------------------------------------------------------------


@DTYPES
@ALL_MODELS
def test_model_error(kind, dtype):
    model = transformer(kind, dtype)
    arguments = inputs(kind, dtype)
    wide = {
        key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
        for key, x in arguments.items()
    }
    with torch.no_grad():
        with Float64():
            (fp64,) = double(model)(**wide)
        (theirs,) = model(**arguments)
        for only in [None, *([op] for op in ops_of(kind))]:
            with ck.patched(model, only):
                assert_near(model(**arguments)[0], theirs, fp64)


def ops_of(kind):
    return ("adaln",) if kind == "mochi" else ("adaln", "rope")


@DTYPES
@ALL_BLOCKS
def test_block_and_gradient_error(kind, blocks, dtype):
    model = transformer(kind, dtype)
    arguments = block_inputs(kind, blocks, dtype, grad=True)

    def outputs(model, arguments, number):
        block = getattr(model, blocks)[number]
        tensors = [x for x in arguments if torch.is_tensor(x) and x.requires_grad]
        tensors += [x for x in block.parameters() if x.requires_grad]
        given = block(*arguments)
        loss = sum((y * torch.arange(y.numel()).view_as(y).sin().to(y.dtype)).sum() for y in given)
        found = torch.autograd.grad(loss, tensors, allow_unused=True)
        return [*(y.detach() for y in given), *(x for x in found if x is not None)]

    for number in range(2):  # the last one of Mochi leaves the text as it is
        with Float64():
            fp64 = outputs(double(model), in_float64(arguments), number)
        theirs = outputs(model, arguments, number)
        with ck.patched(model):
            ours = outputs(model, arguments, number)
        assert len(ours) == len(theirs) == len(fp64) > 10
        for of_all in zip(ours, theirs, fp64, strict=True):
            assert_near(*of_all)


@DTYPES
@ALL_BLOCKS
def test_block_is_the_same_with_and_without_grad(kind, blocks, dtype):
    model = transformer(kind, dtype)
    ck.patch(model)
    for block in getattr(model, blocks):
        wanted = block(*block_inputs(kind, blocks, dtype, grad=True))
        with torch.no_grad():
            given = block(*block_inputs(kind, blocks, dtype))
        assert all(map(torch.equal, given, wanted))


@ALL_MODELS
def test_gradients_pass_through_checkpoints(kind):
    model = transformer(kind)
    arguments = inputs(kind)

    def gradients():
        model.zero_grad()
        model(**arguments)[0].square().sum().backward()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    with ck.patched(model):
        wanted = gradients()
        model.enable_gradient_checkpointing()
        found = gradients()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_mochi_rotary_gradient():
    model = transformer("mochi")

    def gradient():
        (y,) = model(**inputs("mochi"))
        return torch.autograd.grad(y.square().sum(), model.pos_frequencies)[0]

    wanted = gradient()
    with ck.patched(model):
        assert relative(gradient(), wanted.double()) < 1e-5
    assert wanted.abs().max() > 0


# --- padding, and tokens of the first frame --------------------------------------------------


@ALL_MODELS
def test_text_padding_does_not_affect_video(kind):
    model = transformer(kind)
    arguments = inputs(kind)
    other = dict(arguments)
    other["encoder_hidden_states"] = arguments["encoder_hidden_states"].clone()
    other["encoder_hidden_states"][0, 3:] += 100
    with torch.no_grad(), ck.patched(model):
        assert torch.equal(model(**other)[0], model(**arguments)[0])


@pytest.mark.parametrize("mask", [[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], ids=str)
@ALL_MODELS
def test_attention_masks(kind, mask):
    model = transformer(kind)
    arguments = inputs(kind)
    arguments["encoder_attention_mask"] = torch.tensor([mask, [1, 1, 0, 0, 0]]).bool()
    with torch.no_grad():
        (wanted,) = model(**arguments)
        with ck.patched(model):
            assert relative(model(**arguments)[0], wanted.double()) < 1e-5


def test_framepack_without_padding_has_no_mask():
    model = transformer("framepack")
    arguments = inputs("framepack", batch=1)
    with torch.no_grad():
        (wanted,) = model(**arguments)
        with ck.patched(model) as report:
            assert relative(model(**arguments)[0], wanted.double()) < 1e-5
        assert not report["rope"].fallbacks


@pytest.mark.parametrize("first_len", [0, 1, FIRST_LEN, VIDEO_LEN])
@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
def test_first_tokens_have_their_own_modulation(blocks, first_len):
    model = transformer("image")
    block = getattr(model, blocks)[0]
    *others, _ = block_inputs("image", blocks)
    with torch.no_grad():
        wanted = block(*others, first_len)
        with ck.patched(model) as report:
            given = block(*others, first_len)
        assert not report["adaln"].fallbacks
    for ours, theirs in zip(given, wanted, strict=True):
        assert relative(ours, theirs.double()) < 1e-6


# --- counting, and what is left alone --------------------------------------------------------


@ALL_MODELS
def test_every_site_is_hit_once(kind):
    model = transformer(kind)
    report = ck.patch(model)
    sites = {"adaln": 4} if kind == "mochi" else {"adaln": 6, "rope": 4}
    assert {row.op: row.sites for row in report.rows} == sites
    with torch.no_grad():
        model(**inputs(kind))
    for row in report.rows:
        assert row.hit == row.calls == row.sites
        assert not row.fallbacks
    assert not report.skipped


@ALL_MODELS
def test_unpatch_restores_bits_and_attributes(kind):
    model = transformer(kind)
    with torch.no_grad():
        (wanted,) = model(**inputs(kind))
        with assert_untouched(model):
            ck.patch(model)
            model(**inputs(kind))
            ck.unpatch(model)
        assert torch.equal(model(**inputs(kind))[0], wanted)


@ALL_MODELS
def test_a_copy_has_its_own_counts(kind):
    model = transformer(kind)
    report = ck.patch(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        (given,) = other(**inputs(kind))
        assert not any(row.calls for row in report.rows)
        assert all(row.calls == row.sites for row in ck.explain(other).rows)
        assert torch.equal(given, model(**inputs(kind))[0])


@ALL_BLOCKS
def test_a_hook_on_a_norm_still_runs(kind, blocks):
    model = transformer(kind)
    block = getattr(model, blocks)[0]
    norm = block.norm if "single" in blocks else block.norm1
    calls = []
    norm.register_forward_hook(lambda *of: calls.append(of))
    with torch.no_grad():
        wanted = block(*block_inputs(kind, blocks))
        with ck.patched(model, ["adaln"]) as report:
            given = block(*block_inputs(kind, blocks))
        assert len(calls) == 2
    assert all(map(torch.equal, given, wanted))
    assert report["adaln"].calls == 0
    assert list(report["adaln"].fallbacks.values()) == [1]


@pytest.mark.parametrize(("kind", "blocks"), BLOCKS[:-1])
def test_a_wider_embedding_falls_back(kind, blocks):
    model = transformer(kind)
    video, *others = block_inputs(kind, blocks)
    block = getattr(model, blocks)[0]
    with torch.no_grad():
        wanted = block(video.bfloat16(), *others)
        with ck.patched(model, ["adaln"]) as report:
            given = block(video.bfloat16(), *others)
    assert all(map(torch.equal, given, wanted))
    assert report["adaln"].fallbacks == {"temb is torch.float32 and tokens are torch.bfloat16": 1}


@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
def test_another_processor_falls_back(blocks):
    model = transformer("text")
    attn = getattr(model, blocks)[0].attn

    class Mine(type(attn.processor)):
        pass

    attn.processor = Mine()
    with torch.no_grad():
        wanted = getattr(model, blocks)[0](*block_inputs("text", blocks))
        with ck.patched(model, ["rope"]) as report:
            given = getattr(model, blocks)[0](*block_inputs("text", blocks))
    assert all(map(torch.equal, given, wanted))
    assert report["rope"].fallbacks == {"its processor is a Mine": 1}


@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
def test_tables_that_differ_within_a_pair_fall_back(blocks):
    model = transformer("text")
    *others, rotary, _, _ = block_inputs("text", blocks)
    rotary = rotary[0].clone(), rotary[1]
    rotary[0][:, 1] += 1
    block = getattr(model, blocks)[0]
    with torch.no_grad():
        wanted = block(*others, rotary)
        with ck.patched(model, ["rope"]) as report:
            given = block(*others, rotary)
    assert all(map(torch.equal, given, wanted))
    assert sum(report["rope"].fallbacks.values()) == 1


@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
def test_output_kept_by_a_hook_is_not_overwritten(blocks):
    model = transformer("text")
    attn = getattr(model, blocks)[0].attn
    kept = []
    attn.to_q.register_forward_hook(lambda module, x, y: kept.extend([y, y.clone()]))
    with torch.no_grad(), ck.patched(model):
        getattr(model, blocks)[0](*block_inputs("text", blocks))
    assert torch.equal(*kept)


def test_single_blocks_do_not_copy_their_stream():
    model = transformer("text")
    block = model.single_transformer_blocks[0]
    with torch.no_grad(), ck.patched(model):
        video, text = block(*block_inputs("text", "single_transformer_blocks"))
    assert video.untyped_storage().data_ptr() == text.untyped_storage().data_ptr()
    assert text.storage_offset() - video.storage_offset() == VIDEO_LEN * DIM


# --- torch.compile ---------------------------------------------------------------------------


@ALL_BLOCKS
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_block_compiles_as_one_graph(kind, blocks, grad):
    model = transformer(kind)
    ck.patch(model)
    block = getattr(model, blocks)[0]
    arguments = block_inputs(kind, blocks, grad=grad)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    # Attention of Mochi picks the tokens that its mask has.
    whole = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with torch.set_grad_enabled(grad), whole:
        wanted = block(*arguments)
        given = torch.compile(block, fullgraph=True, backend=backend)(*arguments)
    for ours, theirs in zip(given, wanted, strict=True):
        assert relative(ours.detach(), theirs.detach().double()) < 1e-6
        assert ours.requires_grad == grad
    (graph,) = graphs
    calls = {getattr(node.target, "__name__", node.target) for node in graph.graph.nodes}
    assert "layer_norm" not in calls  # the models' own forward
    assert ("zeros_like" in calls) == (kind == "mochi")  # and ours: Mochi's norms have no shift
