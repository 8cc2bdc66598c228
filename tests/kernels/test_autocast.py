"""Every op and module under torch.autocast equals the plain torch that it replaces.

On a CPU, whose norms keep the dtype of their input as the ops do.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cogvx_kernels as ck
from cogvx_kernels import _backend
from cogvx_kernels.modality import join, split
from cogvx_kernels.testing import as_tuple
from examples.mmdit_block import AfterBlock, BeforeBlock

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TEXT, DIM = 2, 8
COS, SIN = ck.rope3d_tables(ck.slice_positions((1, 2, 3)), split=(4, 2, 2))
BACKENDS = ("kernel", "reference") if _backend.INTERPRETED else ("reference",)

# Torch says that it leaves its fused kernel for norms whose weights are wider than their input.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


# --- the compositions of torch's layers that the ops stand for ---------------------------------


def adaln(x, shift, scale, text_shift, text_scale, weight, bias):
    text, video = split(F.layer_norm(x, (DIM,), weight, bias), TEXT)
    text = text * (1 + text_scale[:, None]) + text_shift[:, None]
    return join(text, video * (1 + scale[:, None]) + shift[:, None])


def residual(x, y, gate, text_gate):
    text, video = split(y, TEXT)
    return x + join(text_gate[:, None] * text, gate[:, None] * video)


def residual_adaln(x, y, gate, text_gate, **modulation):
    stream = residual(x, y, gate, text_gate)
    return stream, adaln(stream, **modulation)


def rope(x, cos, sin):
    """As diffusers: in fp32, then in the dtype of x."""
    text, video = split(x, TEXT)
    a, b = video[..., ::2].float(), video[..., 1::2].float()
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    return join(text, torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3).to(x))


def qk_norm_rope(q, k, q_weight, q_bias, k_weight, k_bias, cos, sin):
    q = F.layer_norm(q, (DIM,), q_weight, q_bias, 1e-6)
    return rope(q, cos, sin), rope(F.layer_norm(k, (DIM,), k_weight, k_bias, 1e-6), cos, sin)


def ffn(x, up, up_bias, down, down_bias):
    parts = split(x, TEXT)
    hidden = (F.linear(z, *w) for z, w in zip(parts, zip(up, up_bias, strict=True), strict=True))
    hidden = (F.gelu(z, approximate="tanh") for z in hidden)
    others = zip(down, down_bias, strict=True)
    return join(*(F.linear(z, *w) for z, w in zip(hidden, others, strict=True)))


def conv(x, weight, bias, cache):
    return F.conv3d(torch.cat([cache, x], 2), weight[..., None, None], bias)


def spatial_norm(x, weight, bias, y, b):
    y, b = (F.interpolate(z, scale_factor=(1.0, 2.0, 2.0)) for z in (y, b))
    return F.silu(F.group_norm(x, 2, weight, bias, 1e-6) * y + b)


def moments(x, h):
    total = x + h
    groups = total.float().unflatten(1, (2, -1)).flatten(2)
    var, mean = torch.var_mean(groups, 2, correction=0)
    return total, torch.stack((mean, var), -1)[:, None]


def cached(cache, frames):
    joined = torch.cat([cache, frames], 2)
    return joined, joined[:, :, -2:]


class Case(NamedTuple):
    """An op, the plain torch that it replaces, and shapes of its arguments by their origin.

    streams     residual streams, in the first dtype under test
    made        outputs of linear layers or convolutions, in the other dtype under test
    parameters  of layers, fp32
    """

    op: Callable[..., Any]
    plain: Callable[..., Any]
    streams: Mapping[str, tuple[int, ...]]
    made: Mapping[str, tuple[int, ...]] = {}
    parameters: Mapping[str, tuple[int, ...]] = {}
    constants: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}


ROWS, PER_SAMPLE = (2, TEXT + 6, DIM), (2, DIM)
MODULATION = dict.fromkeys(("shift", "scale", "text_shift", "text_scale"), PER_SAMPLE)
GATES = {"gate": PER_SAMPLE, "text_gate": PER_SAMPLE}
AFFINE = {"weight": (DIM,), "bias": (DIM,)}
QK_AFFINE = dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias"), (DIM,))
EXPERTS = {
    "up": (2, 12, DIM), "up_bias": (2, 12), "down": (2, DIM, 12), "down_bias": (2, DIM),
}  # fmt: skip
VIDEO, LATENTS, TABLES = (2, 4, 3, 4, 4), (2, 4, 3, 2, 2), {"cos": COS, "sin": SIN}
TEXT_LEN = {"text_len": TEXT}

CASES = {
    "expert_adaln": Case(
        ck.expert_adaln, adaln, {"x": ROWS}, MODULATION, AFFINE, settings=TEXT_LEN
    ),
    "gated_residual": Case(
        ck.gated_residual, residual, {"x": ROWS}, {"y": ROWS, **GATES}, settings=TEXT_LEN
    ),
    "gated_residual_adaln": Case(
        ck.gated_residual_adaln, residual_adaln, {"x": ROWS},
        {"y": ROWS, **GATES, **MODULATION}, AFFINE, settings=TEXT_LEN,
    ),
    "residual_adaln_wider": Case(
        ck.gated_residual_adaln, residual_adaln, {"x": ROWS, "y": ROWS, **GATES}, MODULATION,
        AFFINE, settings=TEXT_LEN,
    ),
    "rope3d": Case(
        ck.rope3d, rope, {"x": (2, TEXT + 6, 2, DIM)}, constants=TABLES, settings=TEXT_LEN
    ),
    "qk_norm_rope3d": Case(
        ck.qk_norm_rope3d, qk_norm_rope, {"q": (2, TEXT + 6, 2, DIM)},
        {"k": (2, TEXT + 6, 1, DIM)}, QK_AFFINE, TABLES, TEXT_LEN,
    ),
    "expert_ffn": Case(
        ck.expert_ffn, ffn, {"x": ROWS}, parameters=EXPERTS, settings=TEXT_LEN
    ),
    "temporal_conv": Case(
        ck.temporal_conv, conv, {"x": VIDEO}, {"cache": (2, 4, 2, 4, 4)},
        {"weight": (6, 4, 3), "bias": (6,)},
    ),
    "spatial_norm_silu": Case(
        ck.spatial_norm_silu, spatial_norm, {"x": VIDEO}, {"y": LATENTS, "b": LATENTS},
        {"weight": (4,), "bias": (4,)}, settings={"num_groups": 2},
    ),
    "residual_moments": Case(
        ck.residual_moments, moments, {"x": VIDEO}, {"h": VIDEO}, settings={"num_groups": 2}
    ),
    "frame_cache_join": Case(
        ck.frame_cache_join, cached, {"cache": (2, 4, 2, 4, 4)}, {"frames": VIDEO}
    ),
}  # fmt: skip


def results(
    function: Callable[..., Any], leaves: Mapping[str, Tensor], dtype: torch.dtype, **rest: Any
) -> dict[str, Tensor]:
    """Outputs and gradients of all leaves; the backward runs outside autocast, as torch advises."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    with torch.autocast("cpu", dtype):
        outputs = as_tuple(function(**leaves, **rest))
    loss = sum(x.float().sin().sum() for x in outputs)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    return found | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("stream", "made", "autocast"),
    [(FP32, BF16, BF16), (BF16, FP32, BF16), (BF16, BF16, BF16), (FP32, FP16, FP16)],
    ids=["fp32 stream", "fp32 modulation", "bf16", "fp16"],
)
@pytest.mark.parametrize("name", CASES)
def test_ops_are_their_compositions(name, stream, made, autocast, backend):
    """Results and gradients have the dtypes of plain torch, and are as close to fp64."""
    case = CASES[name]
    leaves = {n: torch.randn(shape) / 2 for n, shape in case.parameters.items()}
    leaves |= {n: torch.randn(shape).to(stream) for n, shape in case.streams.items()}
    leaves |= {n: torch.randn(shape).to(made) for n, shape in case.made.items()}
    ours = results(case.op, leaves, autocast, **case.constants, **case.settings, backend=backend)
    plain = results(case.plain, leaves, autocast, **case.constants)
    wide = {n: x.double() for n, x in leaves.items()}
    exact = results(case.plain, wide, autocast, **case.constants)
    assert ours.keys() == plain.keys()
    for what, x in ours.items():
        assert x.dtype is plain[what].dtype, f"{what}: {x.dtype}, plain torch {plain[what].dtype}"
        error, allowed = ((z.double() - exact[what]).norm() for z in (x, plain[what]))
        size = exact[what].norm()
        assert error <= 3 * allowed + 4 * torch.finfo(x.dtype).eps * size, f"{what}: {error / size}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_and_tables_of_any_dtype(backend):
    """bf16 weights, and tables from a matrix product, with an fp32 stream."""
    case = CASES["qk_norm_rope3d"]
    q, k = torch.randn(2, TEXT + 6, 2, DIM), torch.randn(2, TEXT + 6, 1, DIM)
    weights = {n: torch.randn(shape).bfloat16() for n, shape in case.parameters.items()}
    tables = {"cos": COS.bfloat16(), "sin": SIN.half()}
    with torch.autocast("cpu", BF16):
        ours = case.op(q, k, **weights, **tables, **TEXT_LEN, backend=backend)
    wide = {n: x.float() for n, x in (weights | tables).items()}
    for a, b in zip(ours, case.op(q, k, **wide, **TEXT_LEN, backend="reference"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_results_keep_their_dtype(backend):
    """As in x.add_(y), results in place and caches are rounded."""
    x, y, gate = torch.randn(2, 8, DIM).bfloat16(), torch.randn(2, 8, DIM), torch.randn(2, DIM)
    q, k = torch.randn(2, 8, 2, DIM).bfloat16(), torch.randn(2, 8, 2, DIM)
    cache, frames = torch.randn(1, 4, 2, 3, 3).bfloat16(), torch.randn(1, 4, 3, 3, 3)
    caches = [cache.clone() for _ in range(3)]
    with torch.no_grad(), torch.autocast("cpu", BF16):
        expected = ck.gated_residual(x, y, gate, backend=backend)
        both = ck.qk_norm_rope3d(q, k, **TABLES, **TEXT_LEN, backend=backend)
        stream = ck.gated_residual(x, y, gate, inplace=True, backend=backend)
        turned = ck.qk_norm_rope3d(q, k, **TABLES, **TEXT_LEN, inplace=True, backend=backend)
        joined = ck.frame_cache_append(caches[0], frames, backend=backend)
        ck.frame_cache_push(caches[1], frames, backend=backend)
        normed = ck.spatial_norm_silu(frames, num_groups=2, cache=caches[2], backend=backend)
    assert stream is x and x.dtype is BF16 and torch.equal(x, expected.bfloat16())
    assert turned[0] is q and turned[1] is k and (q.dtype, k.dtype) == (BF16, FP32)
    assert torch.equal(q, both[0]) and torch.equal(k, both[1])
    assert joined.dtype is FP32 and torch.equal(joined, torch.cat([cache, frames], 2))
    assert all(torch.equal(each, frames[:, :, -2:].bfloat16()) for each in caches[:2])
    assert normed.dtype is FP32 and torch.equal(normed[:, :, :2], cache.float())
    assert torch.equal(caches[2], normed[:, :, -2:].bfloat16())


def test_blocks_of_the_example():
    """An fp32 model in mixed precision, before and after its layers were replaced."""
    before, after = BeforeBlock(DIM * 2, 2, 32), AfterBlock(DIM * 2, 2, 32)
    for parameter in before.parameters():
        nn.init.normal_(parameter, std=0.2)
    after.load_state_dict(before.state_dict())
    text, video, temb = (torch.randn(2, *s, DIM * 2) for s in ((TEXT,), (6,), ()))
    gradients, outputs = [], []
    for block in (before, after):
        with torch.autocast("cpu", BF16):
            if block is before:
                out = join(*block(text, video, temb, COS, SIN))
            else:
                out = block(join(text, video), temb, COS, SIN, text_len=TEXT)
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad(out.sin().sum(), list(block.parameters())))
    assert outputs[0].dtype is outputs[1].dtype is FP32
    assert (outputs[0] - outputs[1]).norm() < 0.02 * outputs[0].norm()
    for plain, ours in zip(*gradients, strict=True):
        assert ours.dtype is FP32
        assert (plain - ours).norm() <= 0.05 * plain.norm() + 1e-6


def modules(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """One call of every module, in the order of a model."""
    with ck.module_backend(backend):
        norm, ffn = ck.ExpertAdaLayerNorm(DIM), ck.ExpertFFN(DIM, 16)
        qk, rotary = ck.QKNormRoPE3D(DIM), ck.RoPE3D()
        joins, conv = ck.FrameCacheJoin(), ck.TemporalConv(4, 6, 3)
        pixels = ck.SpatialNormSiLU(2, 4, zq_channels=5)
    linear = nn.Linear(DIM, DIM)

    def model(x: Tensor, heads: Tensor, video: Tensor, zq: Tensor) -> tuple[Tensor, ...]:
        rows = linear(x[:, 0])
        h = norm(x, rows, rows, rows, rows, TEXT)
        y = ffn(h, text_len=TEXT)
        x, h2 = norm.after_residual(x, y, rows, rows, rows, rows, rows, rows, TEXT)
        q, k = qk(heads, heads, COS, SIN, TEXT)
        frames = pixels(video, zq)
        return (
            h,
            y,
            x,
            h2,
            q,
            k,
            rotary(y.unflatten(2, (1, -1)), COS, SIN, TEXT),
            frames,
            conv(joins(frames)[0]),
        )

    return model


MODULE_DTYPES = [FP32, BF16, FP32, FP32, FP32, FP32, BF16, FP32, BF16]


def test_modules_in_a_compiled_function():
    """torch.compile(fullgraph=True) has the dtypes and values of eager, and gradients."""
    torch._dynamo.reset()
    model = modules(BACKENDS[0])
    inputs = (
        torch.randn(ROWS),
        torch.randn(2, 8, 2, DIM),
        torch.randn(VIDEO),
        torch.randn(2, 5, 3, 2, 2),
    )
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    losses = []
    for call in (model, compiled):
        leaves = [x.requires_grad_() for x in inputs]
        with torch.autocast("cpu", BF16):
            outputs = call(*leaves)
        assert [x.dtype for x in outputs] == MODULE_DTYPES
        loss = sum(x.float().sin().sum() for x in outputs)
        losses.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_autocast_dtypes_are_checked():
    """Also with autocast for another device, or with enabled=False."""
    x, y, gate = torch.randn(2, 8, DIM), torch.randn(2, 8, DIM).bfloat16(), torch.randn(2, DIM)
    for context in (
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", BF16, enabled=torch.cuda.is_available()),
    ):
        with context, pytest.raises(TypeError, match="y must be float32; got bfloat16"):
            ck.gated_residual(x, y, gate)
        with context, pytest.raises(TypeError, match="scale must be float32; got bfloat16"):
            ck.expert_adaln(x, gate, gate.bfloat16())


def test_uncastable_arguments_are_refused():
    x, gate = torch.randn(2, 8, DIM), torch.randn(2, DIM)
    weights = torch.randn(1, 12, DIM), torch.randn(1, 12), torch.randn(1, DIM, 12).double()
    with torch.autocast("cpu", BF16):
        with pytest.raises(TypeError, match="expert_ffn: down must be bfloat16; got float64"):
            ck.expert_ffn(x, *weights)
        with pytest.raises(TypeError, match="gated_residual: y must be a floating-point tensor"):
            ck.gated_residual(x, x.int(), gate)
        with pytest.raises(TypeError, match="expert_adaln: x must be a tensor"):
            ck.expert_adaln([1.0], gate, gate)
        meta = ck.gated_residual(*(z.to("meta") for z in (x, x, gate)))
    assert meta.shape == x.shape


@pytest.mark.skipif(not _backend.INTERPRETED, reason="about the interpreter")
def test_bfloat16_in_an_uncorrected_interpreter(monkeypatch):
    """The reference runs, because interpreted bfloat16 products are wrong."""
    monkeypatch.setattr(_backend, "interprets_bfloat16", False)
    x, ffn = torch.randn(ROWS), ck.ExpertFFN(DIM, 16)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        ffn(x, text_len=TEXT)
        assert "x is bfloat16, which Triton's interpreter" in str(_backend.last_reason())
        ffn.backend = "kernel"
        with pytest.raises(RuntimeError, match="cannot run: x is bfloat16.*install"):
            ffn(x, text_len=TEXT)
    ffn(x, text_len=TEXT)
