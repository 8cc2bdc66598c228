"""conv3d: both algorithms and smaller pieces give the same; known issues are avoided."""

import importlib
import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from cogvx_kernels.conv3d import Versions, conv3d, known_issue, library_versions
from cogvx_kernels.testing import LAYOUTS, check_close

# The function has the name of its module.
module = importlib.import_module("cogvx_kernels.conv3d")

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KERNELS = [(3, 3, 3), (1, 1, 1), (3, 1, 1), (2, 3, 2), (1, 3, 3), (5, 1, 3)]
PADDING = (0, 1, 1)


def filled(shape, layout="contiguous", dtype=torch.float32, device="cpu", integers=True):
    """Random, or of -1, 0 and 1, of which every sum is exact in any order."""
    x = LAYOUTS[layout](shape, lambda shape: torch.empty(shape, dtype=dtype, device=device))
    random_x = torch.randint(-1, 2, shape) if integers else torch.randn(shape)
    return x.copy_(random_x)


def weights(shape, dtype=torch.float32, device="cpu", integers=True):
    out, channels, *kernel = shape
    weight = filled(shape, dtype=dtype, device=device, integers=integers)
    if not integers:
        weight /= (channels * kernel[0] * kernel[1] * kernel[2]) ** 0.5
    return weight, filled((out,), dtype=dtype, device=device, integers=integers)


def padding_of(kernel):
    return (0, kernel[1] // 2, kernel[2] // 2)


@pytest.fixture
def pieces(monkeypatch):
    """(x, result) of each call of F.conv3d, as shapes."""
    seen = []

    def counted(x, *args, right=F.conv3d, **options):
        out = right(x, *args, **options)
        seen.append((tuple(x.shape), tuple(out.shape)))
        return out

    monkeypatch.setattr(F, "conv3d", counted)
    return seen


# --- both algorithms -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "behind", "inset", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_conv2d_sum_equals_conv3d(kernel, dtype, layout, device):
    """Bit for bit where sums are exact, with and without a bias, of one sample and of two."""
    for batch, with_bias in ((1, True), (2, False)):
        x = filled((batch, 4, 6, 5, 7), layout, DTYPES[dtype], device)
        weight, bias = weights((3, 4, *kernel), DTYPES[dtype], device)
        bias = bias if with_bias else None
        ours = conv3d(x, weight, bias, padding_of(kernel), algo="conv2d")
        expected = F.conv3d(x.double(), weight.double(), None if bias is None else bias.double(),
                         padding=padding_of(kernel))  # fmt: skip
        assert torch.equal(ours.double(), expected) and ours.dtype is DTYPES[dtype]


@pytest.mark.parametrize("algo", ["conv3d", "conv2d"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_tolerance(dtype, algo, device, seed):
    torch.manual_seed(seed)
    x = filled((1, 64, 6, 20, 24), "channels_last", DTYPES[dtype], device, integers=False)
    weight, bias = weights((48, 64, 3, 3, 3), DTYPES[dtype], device, integers=False)
    ours = conv3d(x, weight, bias, algo=algo)
    expected = F.conv3d(*(t.double() for t in (x, weight, bias)), padding=PADDING)
    plain = {"conv3d": F.conv3d, "conv2d": conv2d_sum}[algo]
    baseline = plain(*(t.float() for t in (x, weight, bias)), padding=PADDING).to(x.dtype)
    comparison = check_close("out", ours, baseline, expected, summed=True)
    assert comparison.ok, comparison


def conv2d_sum(x, weight, bias, padding):
    """The sum of torch's 2-D convolutions, frame by frame."""
    frames = range(x.shape[2] - weight.shape[2] + 1)
    planes = range(weight.shape[2])
    made = [
        sum(F.conv2d(x[:, :, t + k], weight[:, :, k], padding=padding[1:]) for k in planes)
        for t in frames
    ]
    return torch.stack(made, 2) + bias.view(-1, 1, 1, 1)


@pytest.mark.parametrize("algo", ["conv3d", "conv2d"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("channels", [(16, 8), (3, 16), (16, 3), (2, 2)], ids=str)
def test_the_memory_format_stays(channels, cut, algo, monkeypatch):
    x, (weight, bias) = (
        filled((2, channels[0], 5, 8, 8)),
        weights((channels[1], channels[0], 3, 3, 3)),
    )
    if cut:
        monkeypatch.setattr(module, "LIMIT", x.nbytes // 4)
    assert conv3d(x, weight, bias, algo=algo).is_contiguous()
    x = x.contiguous(memory_format=torch.channels_last_3d)
    out = conv3d(x, weight, bias, algo=algo)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("reason", [None, "it is Monday"])
def test_auto_avoids_known_issues(reason, monkeypatch, pieces):
    calls = []

    def known(device, dtype):
        calls.append((device, dtype))
        return reason

    monkeypatch.setattr(module, "known_issue", known)
    x, (weight, bias) = filled((1, 4, 5, 6, 6)), weights((4, 4, 3, 3, 3))
    conv3d(x, weight, bias)
    assert len(pieces) == (reason is None) and calls == [(CPU, torch.float32)]
    conv3d(x, weight, bias, algo="conv3d")
    conv3d(x, weight, bias, algo="conv2d")
    assert len(pieces) == (reason is None) + 1 and len(calls) == 1  # only for "auto"


# --- pieces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["conv3d", "conv2d"])
def test_pieces_equal_one_call(algo, monkeypatch, pieces, seed):
    """At any size and limit: bit for bit on integers, no piece too large, none too short."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        kernel = draw.choice(KERNELS)
        padding = (0, draw.randrange(kernel[1]), draw.randrange(kernel[2]))
        shape = (draw.randint(1, 3), draw.randint(1, 5), kernel[0] + draw.randint(0, 5),
                 kernel[1] + draw.randint(0, 9), kernel[2] + draw.randint(0, 9))  # fmt: skip
        x = filled(shape, draw.choice(["contiguous", "channels_last", "inset"]))
        weight, bias = weights((draw.randint(1, 5), shape[1], *kernel))
        expected = F.conv3d(x, weight, bias, padding=padding)
        pieces.clear()
        line = 4 * max(shape[1] * shape[4], expected.shape[1] * expected.shape[4])
        limit = draw.randint(1, 2 * line * shape[3] * shape[2])
        monkeypatch.setattr(module, "LIMIT", limit)
        ours = conv3d(x, weight, bias, padding, algo=algo)
        case = f"{shape} {tuple(weight.shape)} {padding} of {limit} bytes"
        assert torch.equal(ours, expected), case
        for read, made in pieces:
            size = 4 * max(torch.Size(read).numel(), torch.Size(made).numel())
            least = made[2] == 1 and made[3] <= max(1, 2 * padding[1]) and read[0] == 1
            assert size <= limit or least, f"{case}: {read} {made}"
            assert all(map(int.__ge__, read[2:3], kernel[:1])), f"{case}: {read}"


@pytest.mark.parametrize(
    ("frames", "cuts"), [(8, (2, 1, 1)), (4, (2, 3, 1)), (3, (2, 6, 1)), (2, (2, 6, 2))]
)
def test_what_is_cut_first(frames, cuts, monkeypatch, pieces):
    """Samples, then frames, and rows only if one output frame needs too much."""
    x, (weight, bias) = filled((2, 8, 8, 30, 20)), weights((8, 8, 3, 3, 3))
    monkeypatch.setattr(module, "LIMIT", frames * x[:1, :, :1].nbytes)
    conv3d(x, weight, bias)
    assert len(pieces) == cuts[0] * cuts[1] * cuts[2]
    assert tuple(map(len, module._cuts(x, weight, PADDING, apart=False))) == cuts


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pieces_have_the_bits_of_the_whole(dtype, layout, monkeypatch, pieces, seed):
    """On a CPU, of samples and frames, where torch takes one algorithm for both."""
    torch.manual_seed(seed)
    x = filled((2, 96, 6, 80, 20), layout, DTYPES[dtype], integers=False)
    weight, bias = weights((40, 96, 3, 3, 3), DTYPES[dtype], integers=False)
    whole = conv3d(x, weight, bias)
    monkeypatch.setattr(module, "LIMIT", x[:1, :, :3].nbytes)
    assert torch.equal(conv3d(x, weight, bias), whole) and len(pieces) == 1 + 2 * 4
    assert all(read[1] * read[2] * read[3] > 20480 for read, _ in pieces)


@pytest.mark.parametrize("algo", ["conv3d", "conv2d"])
def test_pieces_are_written_to_the_result(algo, monkeypatch):
    """Peak memory is the result and a piece; with conv2d also the terms of its sum."""
    from cogvx.memory import LiveBytes

    x, (weight, bias) = filled((1, 8, 18, 40, 40), "channels_last"), weights((8, 8, 3, 3, 3))
    monkeypatch.setattr(module, "LIMIT", x[:, :, :4].nbytes)
    with LiveBytes() as live, torch.no_grad():
        out = conv3d(x, weight, bias, algo=algo)
    piece = out[:, :, :2].nbytes
    assert live.peak <= out.nbytes + (2.1 if algo == "conv3d" else 4.1) * piece


@pytest.mark.parametrize("algo", ["conv3d", "conv2d"])
@pytest.mark.parametrize("pixels", [(480, 720), (768, 1360), (1536, 2720)], ids=str)
def test_no_size_fails(pixels, algo):
    """Shapes of decoders, on the meta device: diffusers' own fails from batch 2, 8 and 1."""
    for batch, frames, channels in itertools.product(
        (*range(1, 13),), (3, 4, 10, 11), ((256, 128), (128, 3))
    ):
        x = torch.empty((batch, channels[0], frames, *pixels), dtype=torch.bfloat16, device="meta")
        weight = torch.empty((channels[1], channels[0], 3, 3, 3), dtype=x.dtype, device="meta")
        out = conv3d(x, weight, algo=algo)
        assert out.shape == (batch, channels[1], frames - 2, *pixels)
        cuts = module._cuts(x, weight, PADDING, apart=False)
        assert [s[-1].stop for s in cuts] == [batch, frames - 2, pixels[0]]


@pytest.mark.parametrize("algo", ["conv3d", "conv2d"])
def test_no_samples(algo):
    weight, bias = weights((3, 4, 3, 3, 3))
    assert conv3d(torch.empty(0, 4, 5, 6, 6), weight, bias, algo=algo).shape == (0, 3, 3, 6, 6)


# --- gradients and compilers -----------------------------------------------------------------


@pytest.mark.parametrize("algo", ["conv3d", "conv2d"])
@pytest.mark.parametrize("frames", [100, 3, 1], ids="limit of {} frames".format)
def test_gradients(frames, algo, monkeypatch):
    x = torch.randn(2, 2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(module, "LIMIT", frames * x[:1, :, :1].nbytes)
    assert torch.autograd.gradcheck(lambda *a: conv3d(*a, algo=algo), (x, weight, bias))


def test_one_input_that_requires_grad(monkeypatch):
    x, (weight, bias) = filled((1, 2, 6, 4, 4)), weights((2, 2, 3, 3, 3))
    monkeypatch.setattr(module, "LIMIT", x[:, :, :4].nbytes)
    for wanted in (x, weight, bias):
        wanted.requires_grad_()
        assert conv3d(x, weight, bias).requires_grad
        wanted.requires_grad_(False)


@pytest.mark.parametrize("algo", ["auto", "conv2d"])
def test_compiles(algo, monkeypatch):
    x, (weight, bias) = filled((2, 2, 6, 4, 4)), weights((2, 2, 3, 3, 3))
    monkeypatch.setattr(module, "LIMIT", x[:1, :, :4].nbytes)

    def call(x):  # the second because on a CPU there is no trouble to look up
        return conv3d(x, weight, bias, algo=algo), known_issue(CUDA, torch.bfloat16)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x)[0], call(x)[0]) and compiled(x)[1] == call(x)[1]


@pytest.mark.parametrize("algo", ["conv3d", "conv2d"])
@pytest.mark.parametrize("grad", [False, True])
def test_under_autocast(grad, algo):
    """As any convolution: a 16-bit result for any input dtype."""
    x, (weight, bias) = filled((1, 2, 6, 4, 4)), weights((2, 2, 3, 3, 3))
    for given in (weight, weight.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            out = conv3d(x, given, bias, algo=algo)
        assert out.dtype is torch.bfloat16
        assert torch.equal(out.float(), F.conv3d(x, weight, bias, padding=PADDING))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "behind", "inset", "strided"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_without_gradients_the_result_is_the_same(kernel, layout):
    """oneDNN, called by name: bit for bit on integers, with and without a bias."""
    for batch, with_bias in ((1, True), (2, False)):
        x, (weight, bias) = filled((batch, 4, 6, 5, 7), layout), weights((3, 4, *kernel))
        bias = bias if with_bias else None
        with torch.no_grad():
            ours = conv3d(x, weight, bias, padding_of(kernel), algo="conv3d")
        assert torch.equal(ours, F.conv3d(x, weight, bias, padding=padding_of(kernel)))
        near = torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format
        assert ours.is_contiguous(memory_format=near)


def test_the_meta_device_keeps_layouts():
    x = torch.empty(2, 4, 5, 6, 7, device="meta").contiguous(memory_format=torch.channels_last_3d)
    weight = torch.empty(3, 4, 3, 3, 3, device="meta")
    with torch.no_grad():
        out = conv3d(x, weight)
    assert out.is_meta and out.shape == (2, 3, 3, 6, 7)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


# --- known issues ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("versions", "dtype", "known"),
    [
        (("2.13.0", 91501, None), torch.bfloat16, None),
        (("2.10.0+cu128", 91002, None), torch.bfloat16, "17 times"),
        (("2.9.1", 91400, None), torch.float16, "17 times"),
        (("2.9.1", 91501, None), torch.bfloat16, None),
        (("2.9.0+cu130", 92100, None), torch.bfloat16, "17 times"),  # with any cuDNN
        (("2.8.0", 91002, None), torch.bfloat16, "wrong"),
        (("2.8.0", 90701, None), torch.bfloat16, None),
        (("2.10.0", 91002, None), torch.float32, None),
        (("2.11.0a0+git123", None, None), torch.bfloat16, None),
        (("2.11.0+rocm7.1", 3005001, "7.1"), torch.bfloat16, "MIOpen"),
        (("2.11.0+rocm7.1", 3005001, "7.1"), torch.float32, "MIOpen"),
    ],
    ids=str,
)
def test_known_issue(versions, dtype, known):
    reason = known_issue(CUDA, dtype, Versions(*versions))
    assert (reason is None) if known is None else (known in reason)
    assert known_issue(CPU, dtype, Versions(*versions)) is None


def test_known_issue_of_the_installed_versions(monkeypatch):
    monkeypatch.setattr(module, "library_versions", lambda: Versions("2.9.1", 91002, None))
    assert "2.9.1" in known_issue(CUDA, torch.bfloat16)
    monkeypatch.undo()
    assert library_versions() == (
        torch.__version__,
        torch.backends.cudnn.version(),
        torch.version.hip,
    )


# --- wrong calls -----------------------------------------------------------------------------


def call(**changed):
    x, (weight, bias) = filled((1, 2, 5, 6, 6)), weights((3, 2, 3, 3, 3))
    return conv3d(**{"x": x, "weight": weight, "bias": bias, "padding": PADDING, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"x": torch.zeros(2, 5, 6, 6)}, ValueError, "x must have 5 dimensions"),
        ({"x": torch.zeros(1, 2, 5, 6, 6, dtype=torch.int32)}, TypeError, "x must be a float"),
        ({"x": torch.zeros(1, 4, 5, 6, 6)}, ValueError, "weight must be .* x of shape"),
        ({"x": torch.zeros(1, 2, 2, 6, 6)}, ValueError, "x must have .* at least"),
        ({"x": torch.zeros(1, 2, 5, 0, 6)}, ValueError, "x must have .* at least"),
        ({"x": torch.zeros(1, 2, 5, 6, 6).half()}, TypeError, "weight must be float16"),
        ({"weight": torch.zeros(3, 2, 3, 3)}, ValueError, "weight must have 5 dimensions"),
        ({"weight": None}, TypeError, "weight must be a tensor"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be \(out,\) = \(3,\)"),
        ({"bias": torch.zeros(3).double()}, TypeError, "bias must be float32"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "bias must be on the device"),
        ({"padding": (1, 1, 1)}, ValueError, r"padding\[0\] must be in \[0, 0\]"),
        ({"padding": (0, 3, 1)}, ValueError, r"padding\[1\] must be in \[0, 2\]"),
        ({"padding": (0, 1, -1)}, ValueError, r"padding\[2\] must be in"),
        ({"padding": (0, 1.0, 1)}, TypeError, r"padding\[1\] must be an integer"),
        ({"padding": (1, 1)}, ValueError, "padding must be .frames, rows, columns."),
        ({"algo": "winograd"}, ValueError, 'algo must be one of "auto", "conv3d", "conv2d"'),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_wrong_calls_are_named(changed, error, named):
    with pytest.raises(error, match=f"conv3d: {named}"):
        call(**changed)


# --- on a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("algo", ["auto", "conv2d"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(128, 12, 480, 720), (256, 11, 96, 170)], ids=str)
def test_16_bits_agree_with_32(shape, layout, algo):
    """Correct, without extra memory, on shapes with known wrong results or workspaces elsewhere."""
    torch.manual_seed(0)
    channels = shape[0]
    x = filled((1, *shape), layout, torch.bfloat16, "cuda", integers=False)
    weight, bias = weights((channels, channels, 3, 3, 3), torch.bfloat16, "cuda", integers=False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = conv3d(x, weight, bias, algo=algo)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before + x.nbytes
    if algo == "auto" and known_issue(CUDA, x.dtype) is None:
        assert peak <= 1.5 * (x.nbytes + out.nbytes)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = F.conv3d(x.float(), weight.float(), bias.float(), padding=PADDING)
    comparison = check_close(
        "out", *(t[..., ::5, ::7] for t in (out, expected.bfloat16(), expected)), summed=True
    )
    assert comparison.ok, comparison
    largest = float((out.float() - expected).abs().max())
    assert largest <= 2 * torch.finfo(x.dtype).eps * float(expected.abs().max())
