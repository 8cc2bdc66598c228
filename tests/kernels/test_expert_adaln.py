"""Properties of `expert_adaln`, `gated_residual` and the two fused."""

import dataclasses
import importlib

import pytest
import torch
from torch import nn

import cogvx_kernels as ck
from cogvx_kernels import _backend
from cogvx_kernels.testing import (
    OPS,
    SIZES,
    check_close,
    compare,
    evaluate,
    grad_outputs_like,
    materialize,
)
from tests.harness.selection import rest

BATCH, TEXT, VIDEO, DIM = 2, 3, 12, 48
BACKENDS = pytest.mark.parametrize(
    "backend",
    [
        "reference",
        pytest.param(
            "kernel",
            marks=pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed"),
        ),
    ],
)
NEEDS_TRITON = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
EVERY_OP = pytest.mark.parametrize(
    "name", ["expert_adaln", "gated_residual", "gated_residual_adaln"]
)


def rows(seed=0, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, TEXT + VIDEO, dim, generator=generator)


def modulation(count, groups=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, DIM) if groups is None else (BATCH, groups, DIM)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def device():
    return "cpu" if _backend.INTERPRETED or not torch.cuda.is_available() else "cuda"


def on_device(*tensors):
    return [None if x is None else x.to(device()) for x in tensors]


@BACKENDS
def test_without_modulation_it_is_layer_norm(backend):
    [x] = on_device(rows())
    zero = x.new_zeros(BATCH, DIM)
    weight, bias = on_device(*modulation(2)[0])
    out = ck.expert_adaln(x, zero, zero, zero, zero, weight, bias, text_len=TEXT, backend=backend)
    expected = nn.functional.layer_norm(x, (DIM,), weight, bias, 1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=2e-6)


@BACKENDS
def test_zero_gate_is_the_identity(backend):
    """Bit for bit, as in a block with adaLN-zero initialization."""
    x, y = on_device(rows(0), rows(2))
    zero = x.new_zeros(BATCH, DIM)
    assert torch.equal(ck.gated_residual(x, y, zero, zero, text_len=TEXT, backend=backend), x)
    stream, _ = ck.gated_residual_adaln(
        x, y, zero, zero, zero, zero, zero, zero, None, None, text_len=TEXT, backend=backend
    )
    assert torch.equal(stream, x)


@BACKENDS
def test_each_modality_has_its_own_modulation(backend):
    """Text does not depend on video's shift, scale and gate, nor video on text's."""
    x, y = on_device(rows(0), rows(2))
    old, new = on_device(*modulation(3, seed=1)), on_device(*modulation(3, seed=5))

    def run(video, text):
        return ck.gated_residual_adaln(
            x, y, video[0], text[0], video[1], video[2], text[1], text[2], None, None,
            text_len=TEXT, backend=backend,
        )  # fmt: skip

    for base, other in zip(run(old, old), run(new, old), strict=True):
        assert torch.equal(base[:, :TEXT], other[:, :TEXT])
        assert not torch.eq(base[:, TEXT:], other[:, TEXT:]).any()
    for base, other in zip(run(old, old), run(old, new), strict=True):
        assert torch.equal(base[:, TEXT:], other[:, TEXT:])
        assert not torch.eq(base[:, :TEXT], other[:, :TEXT]).any()


@BACKENDS
@pytest.mark.parametrize("groups", [1, 3, VIDEO])
def test_modulation_of_a_frame_is_that_of_its_tokens(backend, groups):
    [x] = on_device(rows())
    shift, scale = on_device(*modulation(2, groups))
    text = on_device(*modulation(2, seed=3))
    spread = [m.repeat_interleave(VIDEO // groups, 1) for m in (shift, scale)]
    few = ck.expert_adaln(x, shift, scale, *text, None, None, text_len=TEXT, backend=backend)
    many = ck.expert_adaln(x, *spread, *text, None, None, text_len=TEXT, backend=backend)
    assert torch.equal(few, many)


@BACKENDS
@pytest.mark.parametrize("groups", [1, 3, VIDEO])
def test_gradient_of_a_frames_modulation_is_the_sum_over_its_tokens(backend, groups):
    """Gradients of gates, shifts and scales of video."""
    x, y, *grad_outputs = on_device(rows(0), rows(2), rows(4), rows(6))
    text = on_device(*modulation(3, seed=3))

    def gradients(video):
        leaves = [m.detach().requires_grad_() for m in video]
        out = ck.gated_residual_adaln(
            x, y, leaves[0], text[0], *leaves[1:], *text[1:], None, None,
            text_len=TEXT, backend=backend,
        )  # fmt: skip
        return torch.autograd.grad(out, leaves, grad_outputs)

    frames = on_device(*modulation(3, groups))
    of_frames = gradients(frames)
    of_tokens = gradients([m.repeat_interleave(VIDEO // groups, 1) for m in frames])
    for frame, token in zip(of_frames, of_tokens, strict=True):
        expected = token.double().unflatten(1, (groups, -1)).sum(2)
        torch.testing.assert_close(frame.double(), expected, rtol=1e-5, atol=1e-5)


@NEEDS_TRITON
@EVERY_OP
@pytest.mark.parametrize("dim", [3072, 1920, 1919, 4097, 2])
def test_any_hidden_size(name, dim):
    """Widths of models, odd ones, and one with more lanes than dims."""
    size = dataclasses.replace(
        SIZES["tiny"], frames=1, height=1, width=5, text_len=3, nheads=1, headdim=dim
    )
    # A LayerNorm of two nearly equal numbers is ill-conditioned.
    options = {"norm": "rms"} if dim == 2 and name != "gated_residual" else {}
    sample = OPS[name].at_size(size)
    sample = dataclasses.replace(sample, arguments={**sample.arguments, **options})
    for dtype in (torch.float32, torch.bfloat16):
        comparisons = compare(OPS[name], sample, dtype, device=device(), seed=dim)
        wrong = [str(v) for v in comparisons if not v.ok]
        assert not wrong, f"{dtype}: {wrong}"


def test_rows_too_long_for_a_program_run_the_reference():
    x, shift, scale = torch.randn(3, 1, 2, 16385).unbind()
    call = (x, shift[:, 0], scale[:, 0], None, None, None, None)
    assert torch.equal(ck.expert_adaln(*call), ck.expert_adaln_reference(*call))
    if _backend.HAS_TRITON:
        with pytest.raises(RuntimeError, match="x has dim 16385; the kernel takes at most 16384"):
            ck.expert_adaln(*call, backend="kernel")


@NEEDS_TRITON
@EVERY_OP
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_strips_cover_every_token_once(name, tokens, monkeypatch):
    """With any number of tokens a program: the same rows, and sums up to their order."""
    kernel = importlib.import_module("cogvx_kernels.expert_adaln.kernel")
    info = OPS[name]
    ragged = [s for s in info.samples if "strip" in s.reason or "frame" in s.reason]
    assert len(ragged) == 3
    for sample in ragged:
        arguments = materialize(sample, torch.float32, device=device())
        before = evaluate(info.op, arguments, backend="kernel")
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "TOKENS", tokens)
            patch.setattr(kernel, "BACKWARD_TOKENS", tokens)
            comparisons = compare(info, sample, torch.float32, device=device())
            after = evaluate(info.op, arguments, backend="kernel")
        assert all(v.ok for v in comparisons), [str(v) for v in comparisons if not v.ok]
        assert all(torch.equal(after[out], before[out]) for out in before)


@NEEDS_TRITON
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("scale, offset", [(0.0, 0.0), (1e-30, 0.0), (1e15, 0.0), (1e-2, 1e4)])
def test_ill_conditioned_rows(norm, scale, offset):
    """All zero, tiny, huge, a deviation far below the mean: as close as the reference."""
    x = torch.randn(1, 256, 64, device=device()) * scale + offset
    call = (x, *torch.randn(2, 1, 64, device=device()), *[None] * 4)
    ours = ck.expert_adaln(*call, norm=norm, backend="kernel")
    reference = ck.expert_adaln_reference(*call, norm=norm)
    wide = [None if t is None else t.double() for t in call]
    comparison = check_close("out", ours, reference, ck.expert_adaln_reference(*wide, norm=norm))
    assert comparison.ok, str(comparison)


@BACKENDS
def test_nan_stays_in_its_token(backend):
    x, y = on_device(rows(0), rows(2))
    six = on_device(*modulation(6))

    def run(y):
        return ck.gated_residual_adaln(x, y, *six, None, None, text_len=TEXT, backend=backend)

    before, bad = run(y), y.clone()
    bad[1, TEXT + 1, 7] = float("nan")
    stream, out = run(bad)
    assert out[1, TEXT + 1].isnan().all() and stream.isnan().sum() == 1
    stream[1, TEXT + 1], out[1, TEXT + 1] = before[0][1, TEXT + 1], before[1][1, TEXT + 1]
    assert torch.equal(stream, before[0]) and torch.equal(out, before[1])


@BACKENDS
def test_tokens_are_independent(backend):
    """A token alone has the same bits as among others."""
    [x] = on_device(rows())
    shift, scale = on_device(*modulation(2))
    whole = ck.expert_adaln(x, shift, scale, None, None, None, None, backend=backend)
    for place in (0, TEXT, TEXT + VIDEO - 1):
        alone = x[:, place : place + 1].contiguous()
        out = ck.expert_adaln(alone, shift, scale, None, None, None, None, backend=backend)
        assert torch.equal(out[:, 0], whole[:, place])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fused_equals_one_op_after_the_other(backend, dtype):
    """Bit for bit: the norm's input is the rounded stream."""
    x, y, *six = (t.to(dtype) for t in on_device(rows(0), rows(2), *modulation(6)))
    gate, shift, scale, text_gate, text_shift, text_scale = six
    weight = on_device(1 + rows(9)[0, 0])[0]
    stream, out = ck.gated_residual_adaln(
        x, y, gate, text_gate, shift, scale, text_shift, text_scale, weight, None,
        text_len=TEXT, norm="rms", backend=backend,
    )  # fmt: skip
    first = ck.gated_residual(x, y, gate, text_gate, text_len=TEXT, backend=backend)
    second = ck.expert_adaln(
        first, shift, scale, text_shift, text_scale, weight, None,
        text_len=TEXT, norm="rms", backend=backend,
    )  # fmt: skip
    assert torch.equal(stream, first)
    assert torch.equal(out, second)


@BACKENDS
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_is_invariant_to_scale(backend, norm):
    """Exactly for a power of two, with a negligible eps."""
    [x] = on_device(rows())
    shift, scale = on_device(*modulation(2))

    def run(x):
        return ck.expert_adaln(
            x, shift, scale, None, None, None, None, norm=norm, eps=1e-30, backend=backend
        )

    assert torch.equal(run(x), run(4 * x))


@BACKENDS
def test_gradients_of_a_modality_without_tokens_are_zero(backend):
    [x] = on_device(rows())
    shift, scale, text_shift, text_scale = (m.requires_grad_() for m in on_device(*modulation(4)))
    out = ck.expert_adaln(
        x, shift, scale, text_shift, text_scale, None, None, text_len=0, backend=backend
    )
    gradients = torch.autograd.grad(
        out.sum(), (shift, scale, text_shift, text_scale), allow_unused=True
    )
    assert all(g.abs().sum() > 0 for g in gradients[:2])
    assert all(g is None or not g.any() for g in gradients[2:])


@BACKENDS
def test_module_equals_the_function(backend):
    x, y = on_device(rows(0), rows(2))
    with ck.module_backend(backend):
        module = ck.ExpertAdaLayerNorm(DIM).to(device())
    nn.init.normal_(module.norm.weight)
    nn.init.normal_(module.norm.bias)
    assert list(module.state_dict()) == ["norm.weight", "norm.bias"]
    gate, text_gate, *four = on_device(*modulation(6))
    affine = module.norm.weight, module.norm.bias
    out = module(x, *four, text_len=TEXT)
    assert torch.equal(out, ck.expert_adaln(x, *four, *affine, text_len=TEXT, backend=backend))
    both = module.after_residual(x, y, gate, text_gate, *four, text_len=TEXT)
    expected = ck.gated_residual_adaln(
        x, y, gate, text_gate, *four, *affine, text_len=TEXT, backend=backend
    )
    assert all(torch.equal(a, b) for a, b in zip(both, expected, strict=True))


# --- in place, under autocast ----------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_on_a_slice_of_another_tensor(backend, dtype):
    """Only x is overwritten, with the same bits as out of place."""
    y, gate, text_gate = (t.to(dtype) for t in on_device(rows(2), *modulation(2)))
    wider = torch.randn(BATCH, TEXT + VIDEO + 2, 3 * DIM, device=device()).to(dtype)
    before, place = wider.clone(), (slice(None), slice(1, -1), slice(DIM, 2 * DIM))
    call = (y, gate, text_gate)
    expected = ck.gated_residual(before[place], *call, text_len=TEXT, backend=backend)
    x = wider[place]
    out = ck.gated_residual(x, *call, text_len=TEXT, inplace=True, backend=backend)
    assert out is x and torch.equal(x, expected)
    wider[place] = before[place]
    assert torch.equal(wider, before)


@BACKENDS
@pytest.mark.parametrize("wants", ["x", "y", "gate", "text_gate"])
def test_in_place_refuses_under_grad(backend, wants):
    x, y, gate, text_gate = on_device(rows(0), rows(2), *modulation(2))
    arguments = {"x": x, "y": y, "gate": gate, "text_gate": text_gate}
    before = arguments["x"].clone()
    arguments[wants].requires_grad_()
    call = {**arguments, "text_len": TEXT, "inplace": True, "backend": backend}
    with pytest.raises(RuntimeError, match=f"inplace=True overwrites x .* got {wants} with requir"):
        ck.gated_residual(**call)
    assert torch.equal(arguments["x"], before)
    with torch.no_grad():
        ck.gated_residual(**call)
    assert not torch.equal(arguments["x"], before)


def test_in_place_refuses_overlapping_elements():
    x = rows()[:1].expand(2, -1, -1)
    with pytest.raises(ValueError, match=r"needs x to have each element in a place .* strides \(0"):
        ck.gated_residual(x, rows(2), *modulation(2), text_len=TEXT, inplace=True)


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("compiler", ["aot_eager", rest("inductor")])
def test_in_place_compiled_changes_the_same_memory(compiler):
    torch._dynamo.reset()
    y, gate, text_gate = on_device(rows(2), *modulation(2))
    packed = torch.randn(BATCH, TEXT + VIDEO, 2 * DIM, device=device())
    expected = packed.clone()

    def step(packed):
        x, other = packed.chunk(2, -1)
        x = ck.gated_residual(x, y, gate, text_gate, text_len=TEXT, inplace=True, backend="kernel")
        return x.square().sum(-1), other

    with torch.no_grad():
        plain = step(expected)
        compiled = torch.compile(step, fullgraph=True, backend=compiler)(packed)
    assert torch.equal(packed, expected)
    torch.testing.assert_close(compiled, plain)


@NEEDS_TRITON
@pytest.mark.parametrize("changed", ["y", "scale", "weight", "stream"])
def test_saved_tensor_changed_before_the_backward_raises(changed):
    """Also the returned stream, which is saved."""
    info = OPS["gated_residual_adaln"]
    arguments = materialize(info.samples[0], torch.float32, device=device())
    moved = None
    if changed != "stream":
        moved = arguments[changed].requires_grad_() * 1
        arguments[changed] = moved
    else:
        arguments["x"].requires_grad_()
    stream, out = info.op(**arguments, backend="kernel")
    (stream if moved is None else moved).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (stream.sum() + out.sum()).backward()


@NEEDS_TRITON
def test_autocast_keeps_equal_dtypes():
    """Results and gradients have the arguments' dtypes, as without autocast; the norm's parameters
    may be fp32. Mixed dtypes are in test_autocast."""
    info = OPS["gated_residual_adaln"]
    arguments = materialize(info.samples[0], torch.bfloat16, device=device())
    for name in ("weight", "bias"):
        arguments[name] = arguments[name].float()
    grad_outputs = grad_outputs_like((arguments["x"], arguments["x"]), 0)
    call = (info.op, arguments, info.differentiable, grad_outputs)
    plain = evaluate(*call, backend="kernel")
    with torch.autocast(device(), torch.float16):
        cast = evaluate(*call, backend="kernel")
    for name, x in cast.items():
        assert x.dtype == (arguments[name[1:]] if name[0] == "d" else arguments["x"]).dtype
        assert torch.equal(x, plain[name]), name


WRONG = {
    "no shift for the video": ({"shift": None}, "shift must be .* for the 12 tokens"),
    "no shift for the text": ({"text_shift": None}, "text_shift must be .* for the 3 tokens"),
    "groups that do not divide": (
        {"shift": torch.zeros(2, 5, DIM), "scale": torch.zeros(2, 5, DIM)},
        "shift must have a number of groups that divides the 12 tokens.*got",
    ),
    "shift and scale unlike": (
        {"scale": torch.zeros(2, 3, DIM)},
        "scale must be the shape of shift",
    ),
    "another dtype": ({"scale": torch.zeros(2, DIM, dtype=torch.float64)}, "scale must be float32"),
    "unknown norm": ({"norm": "batch"}, 'norm must be one of "layer", "rms"'),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_modulation(case):
    changes, message = WRONG[case]
    shift, scale, text_shift, text_scale = modulation(4)
    arguments = {
        "x": rows(), "shift": shift, "scale": scale,
        "text_shift": text_shift, "text_scale": text_scale,
        "weight": None, "bias": None, "text_len": TEXT,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=f"expert_adaln: {message}"):
        ck.expert_adaln(**{**arguments, **changes})
