"""Test samples and cost model of `frame_cache_join`; the in-place ops have tests of their own.

Elements are only copied, so every tolerance means equal bits.
"""

import random
from collections.abc import Mapping
from typing import Any

from .._opinfo import Cost, OpInfo, Sample, Size, TensorSpec
from .op import frame_cache_join
from .reference import frame_cache_join_reference

LAYOUTS = ("contiguous", "channels_last", "behind", "inset", "transposed", "offset", "strided")


def _sample(
    reason: str, batch: int = 1, channels: int = 8, kept: int = 2, frames: int = 3,
    pixels: tuple[int, int] = (2, 14), start: str | None = None, layout: str = "contiguous",
    cache_layout: str | None = None,
) -> Sample:  # fmt: skip
    """A clip that continues, or one that begins, with `start` and without a cache."""
    cache = TensorSpec((batch, channels, kept, *pixels), layout=cache_layout or layout)
    return Sample(
        reason,
        {
            "cache": cache if start is None else None,
            "frames": TensorSpec((batch, channels, frames, *pixels), layout=layout),
            "kept": kept,
            "start": start,
        },
    )


CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("continued clip", {"batch": 2}),
    ("new clip, replicated", {"batch": 2, "start": "replicate"}),
    ("new clip, zeros", {"start": "zeros"}),
    ("one frame, shorter than the cache", {"frames": 1}),
    ("as many frames as the cache", {"frames": 2}),
    ("a long cache, a short chunk", {"kept": 5, "frames": 2}),
    ("one frame, long cache, replicated", {"kept": 4, "frames": 1, "start": "replicate"}),
    ("one frame, long cache, zeros", {"kept": 4, "frames": 1, "start": "zeros"}),
    ("no frames", {"frames": 0}),
    ("no frames, zeros", {"frames": 0, "start": "zeros"}),
    ("empty cache", {"kept": 0}),
    ("empty cache, replicated", {"kept": 0, "start": "replicate"}),
    ("no batch", {"batch": 0}),
    ("no channels", {"channels": 0}),
    ("no rows", {"pixels": (0, 14)}),
    ("one pixel of one channel", {"channels": 1, "pixels": (1, 1)}),
    ("one pixel", {"batch": 2, "channels": 5, "pixels": (1, 1)}),
    ("odd sizes", {"batch": 2, "channels": 3, "pixels": (5, 7)}),
    ("channels last", {"batch": 2, "layout": "channels_last"}),
    ("channels last, odd", {"channels": 5, "pixels": (3, 7), "layout": "channels_last"}),
    ("channels last, new clip", {"layout": "channels_last", "start": "replicate"}),
    ("a cache of another layout", {"layout": "channels_last", "cache_layout": "contiguous"}),
    ("only the cache channels last", {"batch": 2, "cache_layout": "channels_last"}),
    ("frames of a longer buffer", {"batch": 2, "layout": "behind"}),
    ("pixels of a wider buffer", {"batch": 2, "layout": "inset"}),
    ("every other column", {"layout": "strided"}),
    ("odd storage offset", {"layout": "offset"}),
    ("frames before channels", {"batch": 2, "layout": "transposed"}),
    ("expanded batch", {"batch": 2, "layout": "expanded"}),
    ("more channels than a tile", {"channels": 67, "pixels": (3, 66), "layout": "inset"}),
)


def _random(rng: random.Random) -> dict[str, Any]:
    start = rng.choice((None, None, "replicate", "zeros"))
    return {
        "batch": rng.choice((1, 1, 2, 3)),
        "channels": rng.choice((1, 2, 3, 8, 17)),
        "kept": rng.choice((0, 1, 2, 2, 3, 4)),
        "frames": rng.choice((1, 1, 2, 3, 5) if start == "replicate" else (0, 1, 2, 3, 5)),
        "pixels": (rng.choice((1, 2, 5)), rng.choice((1, 3, 8, 14))),
        "start": start,
        "layout": rng.choice(LAYOUTS),
        "cache_layout": rng.choice(LAYOUTS),
    }


def _at_size(size: Size, level: int = 1, **options: Any) -> Sample:
    """The last block of a decoder, with `level` times the channels and 1 / `level` the sides."""
    height, width = size.pixels
    pixels = height // level, width // level
    channels = size.channels * level
    options = {"layout": "channels_last", **options}
    return _sample("a model's size", 1, channels, 2, 8, pixels, **options)


def _cost(arguments: Mapping[str, Any]) -> tuple[Cost, Cost]:
    """Inputs are read once, joined and the next cache written; the reverse for the backward.

    In the backward the gradients of the first and last frames are sums of two.
    """
    cache, frames, kept = (arguments[name] for name in ("cache", "frames", "kept"))
    frame = frames.nbytes // max(1, frames.shape[2])
    inputs = frames.nbytes + (0 if cache is None else cache.nbytes)
    outputs = frames.nbytes + 2 * kept * frame  # joined and the next cache
    return Cost(inputs + outputs, 0), Cost(outputs + inputs, frames.numel())


FRAME_CACHE_JOIN = OpInfo(
    name="frame_cache_join",
    op=frame_cache_join,
    reference=frame_cache_join_reference,
    samples=tuple(_sample(reason, **case) for reason, case in CASES),
    random_sample=lambda rng: _sample("fuzz", **_random(rng)),
    at_size=_at_size,
    conventions={
        "256 channels": lambda size: _at_size(size, 2),
        "512 channels": lambda size: _at_size(size, 4),
        "contiguous": lambda size: _at_size(size, layout="contiguous"),
        "begins": lambda size: _at_size(size, start="replicate"),
    },
    videos=("cache", "frames"),
    differentiable=("cache", "frames"),
    resized=lambda batch, frames: _sample(
        "of another length", batch, 2, 2, frames, (1, 2), start="replicate"
    ),
    gradcheck=_sample("for finite differences", 2, 3, 2, 3, (1, 2)),
    cost=_cost,
    torch_ops=("frame_cache_join",),
    launch=None,
)
