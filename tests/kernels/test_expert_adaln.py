"""Laws of `expert_adaln`, `gated_residual` and the two in one."""

import pytest
import torch
from torch import nn

import cogvx_kernels as ck
from cogvx_kernels import _backend

BATCH, TEXT, VIDEO, DIM = 2, 3, 12, 48
BOTH_WAYS = pytest.mark.parametrize(
    "backend",
    [
        "reference",
        pytest.param(
            "kernel",
            marks=pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed"),
        ),
    ],
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


@BOTH_WAYS
def test_without_modulation_it_is_layer_norm(backend):
    [x] = on_device(rows())
    zero = x.new_zeros(BATCH, DIM)
    weight, bias = on_device(*modulation(2)[0])
    out = ck.expert_adaln(x, zero, zero, zero, zero, weight, bias, text_len=TEXT, backend=backend)
    expected = nn.functional.layer_norm(x, (DIM,), weight, bias, 1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=2e-6)


@BOTH_WAYS
def test_a_gate_of_zero_is_the_identity(backend):
    """Bit for bit: a block whose modulation begins at zero passes its input on."""
    x, y = on_device(rows(0), rows(2))
    zero = x.new_zeros(BATCH, DIM)
    assert torch.equal(ck.gated_residual(x, y, zero, zero, text_len=TEXT, backend=backend), x)
    stream, _ = ck.gated_residual_adaln(
        x, y, zero, zero, zero, zero, zero, zero, None, None, text_len=TEXT, backend=backend
    )
    assert torch.equal(stream, x)


@BOTH_WAYS
def test_each_modality_has_its_own_modulation(backend):
    """Text does not move when video's shift, scale and gate do, and the other way about."""
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


@BOTH_WAYS
@pytest.mark.parametrize("groups", [1, 3, VIDEO])
def test_a_modulation_for_each_frame_is_one_for_each_of_its_tokens(backend, groups):
    [x] = on_device(rows())
    shift, scale = on_device(*modulation(2, groups))
    text = on_device(*modulation(2, seed=3))
    spread = [m.repeat_interleave(VIDEO // groups, 1) for m in (shift, scale)]
    few = ck.expert_adaln(x, shift, scale, *text, None, None, text_len=TEXT, backend=backend)
    many = ck.expert_adaln(x, *spread, *text, None, None, text_len=TEXT, backend=backend)
    assert torch.equal(few, many)


@BOTH_WAYS
def test_no_token_sees_another(backend):
    """A token alone gives the bits that it gives in company."""
    [x] = on_device(rows())
    shift, scale = on_device(*modulation(2))
    whole = ck.expert_adaln(x, shift, scale, None, None, None, None, backend=backend)
    for place in (0, TEXT, TEXT + VIDEO - 1):
        alone = x[:, place : place + 1].contiguous()
        out = ck.expert_adaln(alone, shift, scale, None, None, None, None, backend=backend)
        assert torch.equal(out[:, 0], whole[:, place])


@BOTH_WAYS
def test_two_in_one_are_the_one_after_the_other(backend):
    x, y = on_device(rows(0), rows(2))
    gate, shift, scale, text_gate, text_shift, text_scale = on_device(*modulation(6))
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


@BOTH_WAYS
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_scale_of_a_row_does_not_matter(backend, norm):
    """eps aside: the norm of 4x is the norm of x, exactly, 4 being a power of two."""
    [x] = on_device(rows())
    shift, scale = on_device(*modulation(2))

    def run(x):
        return ck.expert_adaln(
            x, shift, scale, None, None, None, None, norm=norm, eps=1e-30, backend=backend
        )

    assert torch.equal(run(x), run(4 * x))


@BOTH_WAYS
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


@BOTH_WAYS
def test_the_module_is_the_function(backend):
    x, y = on_device(rows(0), rows(2))
    module = ck.ExpertAdaLayerNorm(DIM, backend=backend).to(device())
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
    "a norm that is none": ({"norm": "batch"}, 'norm must be one of "layer", "rms"'),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_modulation_is_refused_by_name(case):
    changes, said = WRONG[case]
    shift, scale, text_shift, text_scale = modulation(4)
    arguments = {
        "x": rows(), "shift": shift, "scale": scale,
        "text_shift": text_shift, "text_scale": text_scale,
        "weight": None, "bias": None, "text_len": TEXT,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=f"expert_adaln: {said}"):
        ck.expert_adaln(**{**arguments, **changes})
