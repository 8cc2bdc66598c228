"""Tests that need a GPU: real sizes, streams, CUDA graphs, launch options. Marked `gpu`."""

import dataclasses
import importlib
import itertools

import pytest
import torch

from cogvx_kernels._opinfo import OpInfo
from cogvx_kernels.testing import (
    OPS,
    SIZES,
    as_tuple,
    baseline_and_fp64,
    check_close,
    compare,
    evaluate,
    grad_outputs_like,
    materialize,
)

pytestmark = pytest.mark.gpu

EVERY_OP = pytest.mark.parametrize("info", OPS.values(), ids=str)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def forward_and_backward(info: OpInfo, arguments, grad_outputs):
    return evaluate(info.op, arguments, info.differentiable, grad_outputs, backend="kernel")


def grad_outputs_of(info: OpInfo, arguments):
    return grad_outputs_like(as_tuple(info.reference(**arguments)), 0)


def assert_same_bits(ours, theirs):
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name


@EVERY_OP
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(info, dtype, seed):
    for i, sample in enumerate(info.samples):
        comparisons = compare(info, sample, DTYPES[dtype], device="cuda", seed=seed % 1000 + i)
        wrong = [str(v) for v in comparisons if not v.ok]
        assert not wrong, f"{sample.reason}: {wrong}"


@EVERY_OP
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["2b-480x720-49f", "5b-480x720-49f", "card-480x720-49f"])
def test_models_sizes(info, dtype, size):
    if info.videos and not size.startswith("2b"):
        pytest.skip("one VAE for all models")
    if size.startswith("5b"):
        needs_gigabytes(80)  # most of it the fp64 reference
    comparisons = compare(info, info.at_size(SIZES[size]), DTYPES[dtype], device="cuda")
    wrong = [str(v) for v in comparisons if not v.ok]
    assert not wrong, wrong


def needs_gigabytes(count):
    if torch.cuda.mem_get_info()[0] < count * 2**30:
        pytest.skip(f"needs {count} GB of GPU memory")


def rows_near_two_to_the_31(seqlen, width):
    """The first rows, those around element 2**31, the last rows."""
    around = 2**31 // width
    assert around + 4 < seqlen - 8
    return slice(0, 8), slice(around - 4, around + 4), slice(seqlen - 8, seqlen)


def test_rope3d_of_more_than_two_to_the_31_elements():
    """A million tokens of 48 heads."""
    needs_gigabytes(20)
    info, seqlen = OPS["rope3d"], 1_000_000
    x = torch.empty(1, seqlen, 48, 64, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(x)
    angles = torch.randn(seqlen, 32, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    out = info.op(x, cos, sin, backend="kernel")
    for rows in rows_near_two_to_the_31(seqlen, 48 * 64):
        expected = info.reference(x[:, rows], cos[rows], sin[rows])
        torch.testing.assert_close(out[:, rows], expected, rtol=2**-7, atol=2**-9)


def test_adaln_of_more_than_two_to_the_31_elements():
    """A million tokens of 2304 dims: both outputs, and the gradients of x and y."""
    needs_gigabytes(60)
    info, seqlen, dim = OPS["gated_residual_adaln"], 1_000_000, 2304
    new = {"device": "cuda", "dtype": torch.bfloat16}
    x, y, *grad_outputs = (torch.empty(1, seqlen, dim, **new).normal_() for _ in range(4))
    modulation = dict(zip(("gate", "shift", "scale"), torch.randn(3, 1, dim, **new), strict=True))
    absent = dict.fromkeys(("text_gate", "text_shift", "text_scale", "weight", "bias"))
    arguments = {"x": x, "y": y, **modulation, **absent}
    ours = evaluate(info.op, arguments, ("x", "y"), tuple(grad_outputs), backend="kernel")
    for rows in rows_near_two_to_the_31(seqlen, dim):
        few = {**arguments, "x": x[:, rows], "y": y[:, rows]}
        some = dataclasses.replace(info, differentiable=("x", "y"))
        references = baseline_and_fp64(some, few, tuple(dout[:, rows] for dout in grad_outputs))
        for name, x_ours in ours.items():
            comparison = check_close(
                name, x_ours[:, rows], *(r[name] for r in references), rounds_between=True
            )
            assert comparison.ok, f"{rows}: {comparison}"


def test_adaln_of_a_hundred_thousand_programs():
    """A modulation for each token makes a program for each token, more than 65,535."""
    info, tokens, dim = OPS["expert_adaln"], 100_000, 64
    x, shift, scale = torch.randn(3, 1, tokens, dim, device="cuda").unbind()
    names = ("x", "shift", "scale", "text_shift", "text_scale", "weight", "bias")
    arguments = dict(zip(names, (x, shift, scale, None, None, None, None), strict=True))
    grad_outputs = grad_outputs_like((x,), 0)
    ours = forward_and_backward(info, arguments, grad_outputs)
    references = baseline_and_fp64(info, arguments, grad_outputs)
    comparisons = [check_close(name, ours[name], *(r[name] for r in references)) for name in ours]
    assert ours.keys() == {"out0", "dx", "dshift", "dscale"}
    assert all(v.ok for v in comparisons), [str(v) for v in comparisons]


@EVERY_OP
def test_side_stream(info):
    """Inputs are written late on a side stream, and the op runs after that write."""
    size = SIZES["tiny"]
    fresh = materialize(info.at_size(size), torch.float32, device="cuda", seed=1)
    grad_outputs = grad_outputs_of(info, fresh)
    expected = forward_and_backward(info, fresh, grad_outputs)
    stale = materialize(info.at_size(size), torch.float32, device="cuda", seed=2)
    torch.cuda.synchronize()
    for _ in range(50):
        arguments = {n: x.clone() if torch.is_tensor(x) else x for n, x in stale.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            for name, x in arguments.items():
                if torch.is_tensor(x):
                    x.copy_(fresh[name])
            ours = forward_and_backward(info, arguments, grad_outputs)
        torch.cuda.current_stream().wait_stream(stream)
        assert_same_bits(ours, expected)


@EVERY_OP
def test_cuda_graph_replays_with_new_inputs(info):
    arguments = materialize(info.at_size(SIZES["tiny"]), torch.bfloat16, device="cuda", seed=0)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm), torch.no_grad():
        info.op(**arguments, backend="kernel")
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = as_tuple(info.op(**arguments, backend="kernel"))
    for seed in range(1, 20):
        fresh = materialize(info.at_size(SIZES["tiny"]), torch.bfloat16, device="cuda", seed=seed)
        for name, x in arguments.items():
            if torch.is_tensor(x):
                x.copy_(fresh[name])
        graph.replay()
        for ours, eager in zip(captured, as_tuple(info.op(**fresh, backend="kernel")), strict=True):
            assert torch.equal(ours, eager)


@EVERY_OP
def test_same_bits_beside_a_busy_stream(info):
    arguments = materialize(info.at_size(SIZES["tiny"]), torch.bfloat16, device="cuda")
    grad_outputs = grad_outputs_of(info, arguments)
    expected = forward_and_backward(info, arguments, grad_outputs)
    busy, load = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(200):
        with torch.cuda.stream(busy):
            load @ load
        assert_same_bits(forward_and_backward(info, arguments, grad_outputs), expected)


def choices(**values):
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


# The launch constants of each op package, and the values that a tuning run may choose. Each choice
# is tested in the forward and in the backward.
CHOICES = {
    "rope3d": choices(TILE=(512, 1024, 2048, 4096), NUM_WARPS=(1, 2, 4, 8)),
    "expert_adaln": [
        {"TOKENS": tokens, "BACKWARD_TOKENS": tokens, "LANES_PER_WARP": lanes}
        for tokens, lanes in itertools.product((8, 24, 40), (384, 768, 1536))
    ],
    "expert_ffn": [
        {"BLOCK_ROWS": rows, "BLOCK_COLS": cols, "WARPS": warps, "STAGES": stages}
        for rows, cols, warps, stages in (
            (64, 128, 4, 3),
            (128, 64, 4, 4),
            (128, 128, 8, 3),
            (128, 128, 8, 4),
            (128, 256, 8, 3),
        )
    ],
}
LAUNCH_CHOICES = [(package, choice) for package, some in CHOICES.items() for choice in some]


@pytest.mark.parametrize(("package", "choice"), LAUNCH_CHOICES, ids=str)
def test_every_launch_choice(package, choice, monkeypatch):
    """Compilers have miscompiled single configurations, so each is checked."""
    kernel = importlib.import_module(f"cogvx_kernels.{package}.kernel")
    for name, value in choice.items():
        monkeypatch.setattr(kernel, name, value)
    for info in OPS.values():
        if info.op.__module__.startswith(f"cogvx_kernels.{package}."):
            for sample, dtype in itertools.product(info.samples[::3], DTYPES.values()):
                comparisons = compare(info, sample, dtype, device="cuda")
                wrong = [str(v) for v in comparisons if not v.ok]
                assert not wrong, f"{sample.reason}, {dtype}: {wrong}"


def test_every_package_with_launch_constants_is_listed():
    """Launch constants are integers in capitals in the module `kernel`."""
    for package in {info.op.__module__.split(".")[1] for info in OPS.values()}:
        kernel = vars(importlib.import_module(f"cogvx_kernels.{package}.kernel"))
        constants = {name for name, x in kernel.items() if name.isupper() and type(x) is int}
        assert bool(constants) == (package in CHOICES), package
        assert all(choice.keys() <= constants for choice in CHOICES.get(package, ())), package
