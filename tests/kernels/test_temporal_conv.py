"""Properties of `temporal_conv`: causality, chunks, equality with torch's convolutions."""

import functools
import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cogvx_kernels import (
    TemporalConv,
    _backend,
    module_backend,
    temporal_conv,
    temporal_conv_reference,
)
from cogvx_kernels.testing import check_close, grad_outputs_like

if not _backend.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

kernel, device_utils = (
    importlib.import_module(f"cogvx_kernels.temporal_conv.{name}")
    for name in ("kernel", "device_utils")
)

BACKENDS = pytest.mark.parametrize("backend", ["kernel", "reference"])
KERNELS = pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
STRIDES = pytest.mark.parametrize("stride", [1, 2])
KINDS = pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
STARTS = pytest.mark.parametrize("start", ["replicate", "zeros"])


def made(device, taps, depthwise=False, frames=7, channels=16, pixels=(2, 5), batch=2, last=True):
    """(x, weight, bias), channels-last or contiguous."""
    x = torch.randn(batch, channels, frames, *pixels, device=device)
    if last and pixels:
        x = x.to(memory_format=torch.channels_last_3d)
    weight = torch.randn(channels, 1 if depthwise else channels, taps, device=device)
    return x, weight, torch.randn(channels, device=device)


def integers(shape, device, most=3):
    return torch.randint(-most, most + 1, shape, device=device).float()


def past_of(x, taps, start):
    first = x[:, :, :1].expand(-1, -1, taps - 1, *x.shape[3:])
    return first if start == "replicate" else torch.zeros_like(first)


# --- equality with torch ---------------------------------------------------------------------


@STARTS
@STRIDES
@KINDS
@KERNELS
def test_equals_a_convolution_over_padded_frames(device, taps, depthwise, stride, start):
    """F.conv3d and its gradients, in fp32 within tolerance."""
    x, weight, bias = made(device, taps, depthwise)
    groups = x.shape[1] if depthwise else 1

    def padded(x, weight, bias):
        sequence = torch.cat([past_of(x, taps, start), x], 2)
        return F.conv3d(sequence, weight[..., None, None], bias, (stride, 1, 1), groups=groups)

    def ours(x, weight, bias):
        return temporal_conv(x, weight, bias, stride=stride, start=start, backend="kernel")

    arguments = x, weight, bias
    dout = grad_outputs_like((padded(*arguments),), 0)[0]
    fp64, baseline, result = (
        results(function, [x.to(dtype) for x in arguments], dout.to(dtype))
        for function, dtype in (
            (padded, torch.float64), (padded, torch.float32), (ours, torch.float32)
        )
    )  # fmt: skip
    for name, *triple in zip(("out", "dx", "dweight", "dbias"), result, baseline, fp64, strict=1):
        comparison = check_close(name, *triple, summed=True)
        assert comparison.ok, comparison


def results(function, arguments, dout):
    leaves = [x.detach().requires_grad_() for x in arguments]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dout)]


@STARTS
@STRIDES
@KINDS
@KERNELS
def test_the_reference_is_a_convolution_over_padded_frames(taps, depthwise, stride, start):
    """Equal to F.conv3d on small integers in fp64."""
    x, weight, bias = (integers(t.shape, "cpu").double() for t in made("cpu", taps, depthwise))
    sequence = torch.cat([past_of(x, taps, start), x], 2)
    groups = x.shape[1] if depthwise else 1
    expected = F.conv3d(sequence, weight[..., None, None], bias, (stride, 1, 1), groups=groups)
    out = temporal_conv_reference(x, weight, bias, stride=stride, start=start)
    assert torch.equal(out, expected)


@BACKENDS
@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("dims", [1, 3])
def test_the_module_loads_weights_of_torch_convolutions(device, dims, depthwise, backend):
    """State dicts of nn.Conv1d and nn.Conv3d, in both directions; the same initial values."""
    groups = 16 if depthwise else 1
    options = {"groups": groups, "device": device}
    torch.manual_seed(3)
    convs = {1: nn.Conv1d(16, 16, 3, **options), 3: nn.Conv3d(16, 16, (3, 1, 1), **options)}
    torch.manual_seed(3)
    fresh = TemporalConv(16, 16, 3, depthwise=depthwise, dims=1)
    assert torch.equal(fresh.weight, convs[1].weight.cpu())
    with module_backend(backend):
        ours = TemporalConv(16, 16, 3, depthwise=depthwise, dims=dims, start="zeros")
    ours.to(device)
    pixels = (2, 3) if dims == 3 else ()
    x = integers((2, 16, 4, *pixels), device)
    for conv in convs.values():
        integral = {n: integers(p.shape, device) for n, p in conv.state_dict().items()}
        ours.load_state_dict(integral)
        conv.load_state_dict(integral)
        assert ours.state_dict().keys() == conv.state_dict().keys()
        assert ours.weight.shape == convs[dims].weight.shape
        own = convs[dims]
        own.load_state_dict(ours.state_dict())
        pad = (0, 0, 0, 0, 2, 0) if dims == 3 else (2, 0)
        assert torch.equal(ours(x), own(F.pad(x, pad)))


def test_a_weight_of_another_shape_is_not_loaded():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        TemporalConv(4, 4, 3).load_state_dict(nn.Conv3d(4, 4, 3).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        TemporalConv(4, 4, 3, dims=1).load_state_dict(nn.Conv1d(4, 4, 2).state_dict())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="TemporalConv: kernel_size must be in"):
        TemporalConv(4, 4, 6)
    with pytest.raises(ValueError, match="TemporalConv: dims must be"):
        TemporalConv(4, 4, 3, dims=2)
    with pytest.raises(ValueError, match="TemporalConv: depthwise needs out_channels"):
        TemporalConv(4, 8, 3, depthwise=True)
    with pytest.raises(ValueError, match="temporal_conv: x must have a channel and a frame"):
        temporal_conv(torch.randn(1, 4, 0, 2, 2), torch.randn(4, 4, 3))
    with pytest.raises(ValueError, match=r"temporal_conv: weight must be \(out_channels, 4, kern"):
        temporal_conv(torch.randn(1, 4, 2, 2, 2), torch.randn(8, 1, 3))
    with pytest.raises(ValueError, match="temporal_conv: weight must be .* its spatial size is 1"):
        temporal_conv(torch.randn(1, 4, 2, 2, 2), torch.randn(4, 4, 3, 3, 3))
    with pytest.raises(ValueError, match="temporal_conv: start must be one of"):
        temporal_conv(torch.randn(1, 4, 2, 2, 2), torch.randn(4, 4, 3), start=None)


@BACKENDS
def test_by_hand(device, backend):
    """One pixel, two channels: 1, 2, 4 and 10, 20, 40; the weight takes the last two frames."""
    x = torch.tensor([[1.0, 2, 4], [10, 20, 40]], device=device).view(1, 2, 3, 1, 1)
    weight = torch.tensor([[[1.0, 2], [0, 3]]], device=device)  # to one channel
    bias = torch.tensor([100.0], device=device)

    def out(**options):
        return temporal_conv(x, weight, bias, backend=backend, **options).flatten().tolist()

    # before + 2 · now of the first channel, 3 · now of the second
    assert out() == [1 + 2 + 30 + 100, 1 + 4 + 60 + 100, 2 + 8 + 120 + 100]
    assert out(start="zeros") == [0 + 2 + 30 + 100, 165, 230]
    cache = torch.tensor([7.0, 70], device=device).view(1, 2, 1, 1, 1)
    assert out(cache=cache) == [7 + 2 + 30 + 100, 165, 230]
    assert out(stride=2) == [133, 230]


@BACKENDS
def test_gradients_by_hand(device, backend):
    """The first frame also gets the gradients of its copies before the clip."""
    x = torch.tensor([1.0, 2, 4], device=device).view(1, 1, 3, 1, 1).requires_grad_()
    weight = torch.tensor([1.0, 10, 100], device=device).view(1, 1, 3).requires_grad_()
    bias = torch.zeros(1, device=device, requires_grad=True)
    cache = torch.tensor([5.0, 6], device=device).view(1, 1, 2, 1, 1).requires_grad_()
    dout = torch.tensor([1.0, 2, 3], device=device).view(1, 1, 3, 1, 1)

    def grads(*leaves, **options):
        out = temporal_conv(x, weight, bias, backend=backend, **options)
        return [g.flatten().tolist() for g in torch.autograd.grad(out, leaves, dout)]

    #   frame 0 · 1, 2, 3 by the taps that see it; before it: 1·1 and 1·10 + 2·1
    own = [100 + 20 + 3, 200 + 30, 300]
    before = [1, 10 + 2]
    assert grads(x, start="replicate") == [[own[0] + sum(before), *own[1:]]]
    assert grads(x, start="zeros") == [own]
    assert grads(x, cache, cache=cache) == [own, before]
    assert grads(weight, bias, cache=cache) == [[5 + 12 + 3, 6 + 2 + 6, 1 + 4 + 12], [6]]
    assert grads(weight, start="replicate") == [[1 + 2 + 3, 1 + 2 + 6, 1 + 4 + 12]]


# --- causality -------------------------------------------------------------------------------


@BACKENDS
@STRIDES
@KINDS
def test_the_future_does_not_reach_the_past(device, depthwise, stride, backend):
    """A change of frame f changes the outputs that read it, and no bit of the others."""
    taps = 4
    x, weight, bias = made(device, taps, depthwise)

    def out(x):
        return temporal_conv(x, weight, bias, stride=stride, backend=backend)

    before = out(x)
    for f in range(1, x.shape[2]):
        other = x.clone()
        other[:, :, f] += 1
        changed = (out(other) != before).movedim(2, 0).flatten(1).any(1)
        seen = [stride * t <= f + taps - 1 and f <= stride * t for t in range(before.shape[2])]
        assert changed.tolist() == seen, f


@BACKENDS
@STARTS
@STRIDES
@KINDS
@KERNELS
def test_chunks_give_the_bits_of_the_whole(device, taps, depthwise, stride, start, backend):
    """At every valid cut, with a cache of the kernel - 1 frames before each chunk."""
    x, weight, bias = made(device, taps, depthwise, pixels=(1, 3), batch=1)
    options = {"stride": stride, "backend": backend}
    whole = temporal_conv(x, weight, bias, start=start, **options)
    cuts = [(2, 5), (1, 1, 1, 4), (6, 1), (3, 4)] if stride == 1 else [(2, 5), (4, 2, 1), (6, 1)]
    for cut in cuts:
        parts, cache = [], None
        for chunk in x.split(cut, 2):
            parts.append(temporal_conv(chunk, weight, bias, cache=cache, start=start, **options))
            seen = torch.cat([past_of(x, taps, start) if cache is None else cache, chunk], 2)
            cache = seen[:, :, seen.shape[2] - (taps - 1) :]
        assert torch.equal(torch.cat(parts, 2), whole), cut


@BACKENDS
@KINDS
def test_gradients_of_chunks_are_those_of_the_whole(device, depthwise, backend):
    """Small integers; the gradient of a cache reaches the chunk that it came from."""
    x, weight = (integers(t.shape, device) for t in made(device, 3, depthwise)[:2])
    x.requires_grad_()
    weight.requires_grad_()
    dout = integers(x.shape, device)

    def whole():
        return temporal_conv(x, weight, backend=backend)

    def chunks():
        first, second = x.split((4, 3), 2)
        out = temporal_conv(first, weight, backend=backend)
        rest = temporal_conv(second, weight, cache=first[:, :, -2:], backend=backend)
        return torch.cat([out, rest], 2)

    for ours, theirs in zip(
        *(torch.autograd.grad(f(), (x, weight), dout) for f in (chunks, whole)), strict=True
    ):
        assert torch.equal(ours, theirs)


@BACKENDS
@KINDS
def test_stride_2_is_every_other_output(device, depthwise, backend):
    x, weight, bias = made(device, 3, depthwise)
    every = temporal_conv(x, weight, bias, backend=backend)
    assert torch.equal(temporal_conv(x, weight, bias, stride=2, backend=backend), every[:, :, ::2])


# --- algebra ---------------------------------------------------------------------------------


@KINDS
@STARTS
def test_it_is_linear(device, start, depthwise):
    x, weight, _ = (integers(t.shape, device) for t in made(device, 3, depthwise))
    y = integers(x.shape, device)

    def conv(x, weight):
        return temporal_conv(x, weight, start=start, backend="kernel")

    assert torch.equal(conv(2 * x - 3 * y, weight), 2 * conv(x, weight) - 3 * conv(y, weight))
    assert torch.equal(conv(x, -4 * weight), -4 * conv(x, weight))


def test_depthwise_is_dense_with_a_diagonal(device):
    x, weight, bias = (integers(t.shape, device) for t in made(device, 3, True))
    dense = torch.diag_embed(weight[:, 0].T).permute(1, 2, 0)
    for start, stride in itertools.product(("replicate", "zeros"), (1, 2)):
        options = {"start": start, "stride": stride, "backend": "kernel"}
        ours = temporal_conv(x, weight, bias, **options)
        assert torch.equal(ours, temporal_conv(x, dense, bias, **options))


@KINDS
def test_pixels_and_samples_are_independent(device, depthwise):
    """A pixel has the same bits in any frame and batch, and without spatial dims."""
    x, weight, bias = made(device, 3, depthwise, pixels=(9, 17))
    if device == "cpu":  # NumPy's product sums the rows of a tile in several orders
        x, weight, bias = (integers(t.shape, device) for t in (x, weight, bias))

    def conv(x):
        return temporal_conv(x, weight, bias, backend="kernel")

    whole = conv(x)
    part = conv(x[1:, :, :, 4:6, 3:])
    assert torch.equal(part, whole[1:, :, :, 4:6, 3:])
    flat = conv(x[..., 8, 16].contiguous())
    assert torch.equal(flat, whole[..., 8, 16]) and flat.is_contiguous()


@KINDS
def test_gradients_are_rounded_once(device, depthwise):
    """In fp16: the sums over taps, channels and rows are not rounded in between."""
    x, weight, bias = (t.half() for t in made(device, 3, depthwise, frames=5))
    dout = torch.randn_like(x)

    def conv(x, weight, bias, backend="kernel"):
        return temporal_conv(x, weight, bias, backend=backend)

    ours = results(conv, (x, weight, bias), dout)
    wide = [t.double() for t in (x, weight, bias)]
    fp64 = results(lambda *a: conv(*a, backend="reference"), wide, dout.double())
    for a, b in zip(ours, fp64, strict=True):
        # Half an ulp of fp16, the fp32 of the sums, and fp16's own smallest numbers.
        allowed = b.abs() * 2**-11 * 1.01 + b.abs().max() * 2**-18 + 2**-24
        assert ((a.double() - b).abs() <= allowed).all()


@pytest.mark.parametrize("strips", [1, 3, 1000])
@KINDS
def test_gradients_of_weights_in_any_number_of_strips(device, depthwise, strips, monkeypatch):
    """Small integers: fewer strips than samples, as in a large batch, and one for each tile."""
    x, weight, bias = (
        integers(t.shape, device) for t in made(device, 3, depthwise, batch=4, pixels=(3, 17))
    )
    dout = integers(x.shape, device)
    _, _, *whole = results(temporal_conv, (x, weight, bias), dout)
    monkeypatch.setattr(kernel, "STRIPS", strips)
    for half in (x, x.half()):
        arguments = half, weight.to(half.dtype), bias.to(half.dtype)
        function = functools.partial(temporal_conv, backend="kernel")
        for ours, theirs in zip(
            results(function, arguments, dout.to(half.dtype))[2:], whole, strict=True
        ):
            assert torch.equal(ours.float(), theirs)


# --- memory ----------------------------------------------------------------------------------


@BACKENDS
@KINDS
def test_the_memory_format_stays(device, depthwise, backend):
    x, weight, bias = made(device, 3, depthwise)
    for form in (torch.channels_last_3d, torch.contiguous_format):
        y = x.clone(memory_format=form)
        assert temporal_conv(y, weight, bias, backend=backend).is_contiguous(memory_format=form)
        y.requires_grad_()
        [dx] = torch.autograd.grad(temporal_conv(y, weight, bias, backend="kernel").sum(), y)
        assert dx.is_contiguous(memory_format=form)


def test_supported_strides_are_not_copied(device):
    """Channels-last, contiguous, frames and rows of larger buffers; others are copied once."""
    x = torch.randn(2, 16, 5, 4, 6, device=device)
    last = x.to(memory_format=torch.channels_last_3d)
    for video, channels in (
        (last, True), (last[:, :, 2:], True), (last[:, :8], True), (last[..., :1], True),
        (x, False), (x[:, :, 2:], False), (x[:, ::2], False), (x[..., 1:3, :], False),
    ):  # fmt: skip
        assert device_utils.with_even_strides(video, channels) is video
    for video, channels in (
        (x, True), (last, False), (x[..., 1:], False), (last[..., 1:, :5], True),
        (x[..., ::2], False), (x[..., :1].expand_as(x), False), (x[:, :1].expand_as(x), True),
    ):  # fmt: skip
        copy = device_utils.with_even_strides(video, channels)
        assert copy is not video and torch.equal(copy, video)


@KINDS
def test_an_expanded_gradient(device, depthwise):
    """That of a sum has only strides of 0, which are not evenly spaced pixels."""
    for last in (True, False):
        x, weight, _ = (integers(t.shape, device) for t in made(device, 3, depthwise, last=last))
        leaves = (x.requires_grad_(), weight.requires_grad_())
        ours, theirs = (
            torch.autograd.grad(temporal_conv(*leaves, backend=b).sum(), leaves)
            for b in ("kernel", "reference")
        )
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
