"""What only a GPU can show: real sizes, streams, graphs, every launch choice. Marked `gpu`."""

import importlib
import itertools

import pytest
import torch

from cogvx_kernels._opinfo import OpInfo
from cogvx_kernels.testing import OPS, SIZES, as_tuple, compare, cotangents, evaluate, materialize

pytestmark = pytest.mark.gpu

EVERY_OP = pytest.mark.parametrize("info", OPS.values(), ids=str)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def forward_and_backward(info: OpInfo, arguments, douts):
    return evaluate(info.op, arguments, info.differentiable, douts, backend="kernel")


def douts_of(info: OpInfo, arguments):
    return cotangents(as_tuple(info.reference(**arguments)), 0)


def assert_same_bits(ours, theirs):
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name


@EVERY_OP
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(info, dtype, seed):
    for i, sample in enumerate(info.samples):
        verdicts = compare(info, sample, DTYPES[dtype], device="cuda", seed=seed % 1000 + i)
        wrong = [str(v) for v in verdicts if not v.ok]
        assert not wrong, f"{sample.reason}: {wrong}"


@EVERY_OP
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["2b-480x720-49f", "card-480x720-49f"])
def test_models_sizes(info, dtype, size):
    verdicts = compare(info, info.at_size(SIZES[size]), DTYPES[dtype], device="cuda")
    wrong = [str(v) for v in verdicts if not v.ok]
    assert not wrong, wrong


def test_more_than_two_to_the_31_elements():
    """A million tokens of 48 heads: rows around 2**31 elements, and the last ones."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of GPU memory")
    info, seqlen = OPS["rope3d"], 1_000_000
    x = torch.empty(1, seqlen, 48, 64, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(x)
    angles = torch.randn(seqlen, 32, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    out = info.op(x, cos, sin, backend="kernel")
    around = 2**31 // (48 * 64)
    for rows in (slice(0, 8), slice(around - 4, around + 4), slice(seqlen - 8, seqlen)):
        expected = info.reference(x[:, rows], cos[rows], sin[rows])
        torch.testing.assert_close(out[:, rows], expected, rtol=2**-7, atol=2**-9)


@EVERY_OP
def test_a_side_stream_sees_its_own_inputs(info):
    """Inputs are written late, on another stream than the default one: no launch overtakes it."""
    size = SIZES["tiny"]
    fresh = materialize(info.at_size(size), torch.float32, device="cuda", seed=1)
    douts = douts_of(info, fresh)
    expected = forward_and_backward(info, fresh, douts)
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
            ours = forward_and_backward(info, arguments, douts)
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
def test_the_same_bits_every_time_beside_another_stream_at_work(info):
    arguments = materialize(info.at_size(SIZES["tiny"]), torch.bfloat16, device="cuda")
    douts = douts_of(info, arguments)
    expected = forward_and_backward(info, arguments, douts)
    busy, load = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(200):
        with torch.cuda.stream(busy):
            load @ load
        assert_same_bits(forward_and_backward(info, arguments, douts), expected)


# The launch constants of each room, and the values that a tuning run may choose.
CHOICES = {
    "rope3d": {"TILE": (512, 1024, 2048, 4096), "NUM_WARPS": (1, 2, 4, 8)},
}
ROOM_CHOICES = [
    (room, dict(zip(names, values, strict=True)))
    for room, constants in CHOICES.items()
    for names in [tuple(constants)]
    for values in itertools.product(*constants.values())
]


@pytest.mark.parametrize(("room", "choice"), ROOM_CHOICES, ids=str)
def test_every_launch_choice(room, choice, monkeypatch):
    """Compilers have miscompiled single configurations: each is checked, not only the winner."""
    kernel = importlib.import_module(f"cogvx_kernels.{room}.kernel")
    for name, value in choice.items():
        monkeypatch.setattr(kernel, name, value)
    for info in OPS.values():
        if info.op.__module__.startswith(f"cogvx_kernels.{room}."):
            for sample, dtype in itertools.product(info.samples[::3], DTYPES.values()):
                verdicts = compare(info, sample, dtype, device="cuda")
                wrong = [str(v) for v in verdicts if not v.ok]
                assert not wrong, f"{sample.reason}, {dtype}: {wrong}"


def test_every_room_with_launch_constants_is_listed():
    for info in OPS.values():
        room = info.op.__module__.split(".")[1]
        kernel = importlib.import_module(f"cogvx_kernels.{room}.kernel")
        if hasattr(kernel, "NUM_WARPS"):
            assert set(CHOICES[room]) <= set(vars(kernel))
