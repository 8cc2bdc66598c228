"""Test samples, cost model and compile budgets of `temporal_conv`."""

import math
import random
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._launch import empty_video
from .._opinfo import Budget, Cost, OpInfo, Sample, Size, TensorSpec
from .op import as_pixels, temporal_conv
from .reference import temporal_conv_reference

LAYOUTS = (
    "contiguous", "channels_last", "behind", "inset", "transposed", "offset", "strided", "expanded",
)  # fmt: skip


def _sample(
    reason: str, batch: int = 1, channels: int = 16, out: int | None = None, frames: int = 3,
    pixels: tuple[int, ...] = (2, 5), kernel: int = 3, stride: int = 1, past: str = "cache",
    depthwise: bool = False, bias: bool = True,
    layout: str = "channels_last", cache_layout: str | None = None, five: bool = True,
) -> Sample:  # fmt: skip
    """A call; `past` is "cache" or a start; no pixels: x has 3 dims; five: the weight has 5."""
    made = channels if out is None else out
    weight = (made, 1 if depthwise else channels, kernel, *((1, 1) if five else ()))
    kept = TensorSpec((batch, channels, kernel - 1, *pixels), layout=cache_layout or layout)
    arguments: dict[str, Any] = {
        "x": TensorSpec((batch, channels, frames, *pixels), layout=layout),
        "weight": TensorSpec(weight, "matrix"),
        "bias": TensorSpec((made,), "few") if bias else None,
        "cache": kept if past == "cache" else None,
        "stride": stride,
        "start": None if past == "cache" else past,
    }
    return Sample(reason, arguments)


_FLAT: dict[str, Any] = {"pixels": (), "layout": "contiguous", "five": False}

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("with a cache", {"batch": 2, "channels": 8, "out": 12, "pixels": (2, 14)}),
    ("replicated first frame", {"past": "replicate", "batch": 2}),
    ("zeros before", {"past": "zeros"}),
    ("contiguous", {"layout": "contiguous", "batch": 2, "pixels": (4, 8)}),
    ("contiguous, replicated", {"layout": "contiguous", "past": "replicate"}),
    ("one frame", {"frames": 1}),
    ("one frame, replicated", {"frames": 1, "past": "replicate", "kernel": 5}),
    ("no batch", {"batch": 0}),
    ("no bias", {"bias": False}),
    ("kernel 1", {"kernel": 1, "past": "replicate"}),
    ("kernel 1, empty cache", {"kernel": 1}),
    ("kernel 2", {"kernel": 2}),
    ("kernel 4, zeros before", {"kernel": 4, "past": "zeros", "frames": 6}),
    ("kernel 5", {"kernel": 5, "frames": 7}),
    ("kernel 5, fewer frames than padding", {"kernel": 5, "frames": 2, "past": "replicate"}),
    ("stride 2", {"stride": 2, "frames": 4}),
    ("stride 2, an odd number of frames", {"stride": 2, "frames": 5, "past": "replicate"}),
    ("stride 2, kernel 4, zeros before", {"stride": 2, "kernel": 4, "past": "zeros", "frames": 5}),
    ("stride 2, kernel 5", {"stride": 2, "kernel": 5, "frames": 6, "layout": "contiguous"}),
    ("stride 2, kernel 1", {"stride": 2, "kernel": 1, "frames": 3, "past": "zeros"}),
    ("3 channels", {"channels": 3, "out": 16}),
    ("17 channels", {"channels": 17, "out": 40, "layout": "contiguous"}),
    ("40 channels to 3", {"channels": 40, "out": 3, "past": "replicate"}),
    ("one channel", {"channels": 1, "out": 1, "kernel": 3}),
    ("one channel to many", {"channels": 1, "out": 16, "layout": "contiguous"}),
    ("more channels than a tile", {"channels": 144, "out": 136, "frames": 2, "pixels": (1, 3)}),
    ("more pixels than a tile", {"pixels": (9, 17), "frames": 2}),
    ("more pixels than a tile, contiguous", {"pixels": (9, 17), "layout": "contiguous"}),
    ("more tiles than share a stationary weight", {"pixels": (13, 17), "frames": 9, "channels": 8}),
    ("replicated, stride 2", {"past": "replicate", "stride": 2}),
    ("depthwise", {"depthwise": True, "batch": 2, "frames": 6}),
    ("depthwise, replicated", {"depthwise": True, "past": "replicate", "kernel": 4}),
    ("depthwise, zeros before", {"depthwise": True, "past": "zeros", "layout": "contiguous"}),
    ("depthwise, stride 2", {"depthwise": True, "stride": 2, "frames": 11, "kernel": 5}),
    ("depthwise, 17 channels", {"depthwise": True, "channels": 17}),
    ("depthwise, many pixels", {"depthwise": True, "pixels": (11, 31), "layout": "contiguous"}),
    ("depthwise, many channels", {"depthwise": True, "channels": 200, "pixels": (1, 7)}),
    ("samples without pixels", _FLAT | {"batch": 5}),
    ("samples without pixels, replicated", _FLAT | {"batch": 3, "past": "replicate", "out": 7}),
    ("samples without pixels, depthwise", _FLAT | {"batch": 19, "depthwise": True, "frames": 9}),
    ("one element per channel, strided", _FLAT | {"frames": 1, "layout": "strided"}),
    ("one element per channel, depthwise", _FLAT | {
        "frames": 1, "layout": "strided", "depthwise": True,
    }),
    ("transposed, without pixels", _FLAT | {"batch": 2, "layout": "transposed", "stride": 2}),
    ("frames of a longer buffer", {"layout": "behind", "cache_layout": "contiguous"}),
    ("pixels of a wider buffer", {"layout": "inset"}),
    ("a cache in another buffer", {"layout": "inset", "cache_layout": "channels_last"}),
    ("a cache of another layout", {"layout": "contiguous", "cache_layout": "channels_last"}),
    ("frames before channels", {"layout": "transposed", "batch": 2}),
    ("odd storage offset", {"layout": "offset"}),
    ("every other pixel", {"layout": "strided"}),
    ("expanded batch", {"layout": "expanded", "batch": 3}),
)  # fmt: skip


def _random(rng: random.Random) -> dict[str, Any]:
    channels = rng.choice((1, 3, 8, 16, 17, 40))
    depthwise = rng.random() < 0.35
    flat = rng.random() < 0.2
    layouts = ("contiguous", "transposed", "offset", "strided") if flat else LAYOUTS
    return {
        "batch": rng.choice((1, 1, 2)),
        "channels": channels,
        "out": None if depthwise else rng.choice((None, 3, 16, 24)),
        "frames": rng.choice((1, 2, 3, 5, 6)) if channels > 1 else 4,
        "pixels": () if flat else rng.choice(((1, 1), (2, 8), (3, 7), (4, 16))),
        "kernel": rng.choice((1, 2, 3, 3, 4, 5)),
        "stride": rng.choice((1, 1, 2)),
        "past": rng.choice(("cache", "cache", "replicate", "zeros")),
        "depthwise": depthwise,
        "bias": rng.random() < 0.7,
        "layout": rng.choice(layouts),
        "cache_layout": rng.choice((None, None, *layouts)),
        "five": rng.random() < 0.5,
    }


def _at_size(size: Size, narrower: int = 1, **options: Any) -> Sample:
    """A level of the VAE, 8 frames after 2 cached; sides / `narrower`, channels · `narrower`."""
    height, width = size.pixels
    return _sample(
        "a model's size",
        channels=size.channels * narrower,
        frames=8,
        pixels=(height // narrower, width // narrower),
        **options,
    )


def _cost(arguments: Mapping[str, Any]) -> tuple[Cost, Cost]:
    """Forward: all arguments and the result; backward: those and a gradient for each argument."""
    x, weight, stride = arguments["x"], arguments["weight"], arguments["stride"]
    batch, _, frames, *pixels = x.shape
    outputs = batch * ((frames - 1) // stride + 1) * math.prod(pixels)
    flops = 2 * outputs * math.prod(weight.shape)
    moved = sum(v.nbytes for v in arguments.values() if isinstance(v, Tensor))
    out = outputs * weight.shape[0] * x.element_size()
    return Cost(moved + out, flops), Cost(2 * moved + out, 2 * flops)


def _launch(kernel: Any, a: Mapping[str, Any]) -> None:
    """Launch forward and backward."""
    x, cache, weight, bias = a["x"], a["cache"], a["weight"].flatten(2), a["bias"]
    if x.dim() == 3:
        x, cache = as_pixels(x), None if cache is None else as_pixels(cache)
    stride, start = a["stride"], a["start"] or "zeros"
    out = empty_video(x, weight.shape[0], (x.shape[2] - 1) // stride + 1)
    kernel.temporal_conv_fwd(out, x, weight, bias, cache, stride, start)
    nothing = x.new_empty((0,))
    grads = (
        empty_video(x),
        weight.new_empty(weight.shape),
        nothing if bias is None else bias.new_empty(bias.shape),
        nothing if cache is None else empty_video(x, frames=cache.shape[2]),
    )
    kernel.temporal_conv_bwd(grads, out, x, weight, cache, stride, start)


# (registers, shared memory, bits of an access, narrower accesses). A stationary weight is 96 KB and
# three tiles are 48 KB; a streamed one takes three steps of 48 KB, on Hopper. Sums of three taps
# are 192 registers, their frames 40 KB a step. Narrow are biases and masked loads ahead; AMD's
# matrix units leave four elements of a row to a thread. The sums for a depthwise weight are one
# element per thread.
_STATIONARY = {
    "_dense_fwd_kernel": (200, 164 * 1024, 64, 32),
    "_dense_bwd_kernel": (200, 164 * 1024, 64, 32),
}
_STREAMED = {
    "_dense_fwd_kernel": (232, 148 * 1024, 64, 64),
    "_dense_bwd_kernel": (232, 148 * 1024, 64, 32),
}
_WEIGHT = {"dense_weight_kernel": (255, 128 * 1024, 128, 32)}
_DEPTHWISE = {
    "depthwise_fwd_kernel": (144, 4096, 128, 32),
    "depthwise_bwd_kernel": (168, 4096, 128, 32),
    "depthwise_weight_kernel": (128, 4096, 32, 0),
}
_LIMITS = {
    "": _STATIONARY | _WEIGHT,
    "256 channels": _STREAMED | _WEIGHT,
    "512 channels": _STREAMED | _WEIGHT,
    "depthwise": _DEPTHWISE,
}
_BUDGETS = tuple(
    Budget(kernel, size, *most, convention=convention)
    for size in ("5b-480x720-49f", "1.5-5b-768x1360-81f")
    for convention, kernels in _LIMITS.items()
    for kernel, most in kernels.items()
)


TEMPORAL_CONV = OpInfo(
    name="temporal_conv",
    op=temporal_conv,
    reference=temporal_conv_reference,
    samples=tuple(_sample(reason, **case) for reason, case in CASES),
    random_sample=lambda rng: _sample("fuzz", **_random(rng)),
    at_size=_at_size,
    conventions={
        "256 channels": lambda size: _at_size(size, 2),
        "512 channels": lambda size: _at_size(size, 4),
        "depthwise": lambda size: _at_size(size, depthwise=True),
    },
    videos=("x", "cache"),
    differentiable=("x", "weight", "bias", "cache"),
    summed=("weight", "bias"),
    products=True,
    resized=lambda batch, frames: _sample(
        "of another length", batch, 2, 5, frames, (1, 2), kernel=2, past="replicate"
    ),
    gradcheck=_sample("for finite differences", 2, 3, 2, 4, (1, 3), stride=2, past="replicate"),
    cost=_cost,
    torch_ops=("temporal_conv", "temporal_conv_backward"),
    launch=_launch,
    budgets=_BUDGETS,
)
