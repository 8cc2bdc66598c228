"""The promise of `frame_cache_join`: samples, sizes, costs. The in-place ops have their own tests.

Nothing is computed, so the contract's bounds all mean the same here: the same bits.
"""

import math
import random
from collections.abc import Mapping
from typing import Any

from .._opinfo import Cost, OpInfo, Sample, Size, TensorSpec
from .op import frame_cache_join
from .reference import frame_cache_join_reference

LAYOUTS = ("contiguous", "channels_last", "behind", "inset", "transposed", "offset", "strided")


def _sample(
    reason: str,
    batch: int = 1,
    channels: int = 8,
    kept: int = 2,
    frames: int = 3,
    pixels: tuple[int, int] = (2, 14),
    start: str | None = None,
    layout: str = "contiguous",
    cache_layout: str | None = None,
) -> Sample:
    """A clip that goes on, or with `start` one that begins, and has no cache."""
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
    ("a clip that goes on", {"batch": 2}),
    ("a clip that begins with copies", {"batch": 2, "start": "replicate"}),
    ("a clip that begins with zeros", {"start": "zeros"}),
    ("one frame, shorter than the cache", {"frames": 1}),
    ("as many frames as are kept", {"frames": 2}),
    ("a long cache, a short chunk", {"kept": 5, "frames": 2}),
    ("one frame, copied for a long cache", {"kept": 4, "frames": 1, "start": "replicate"}),
    ("one frame after zeros", {"kept": 4, "frames": 1, "start": "zeros"}),
    ("no frames", {"frames": 0}),
    ("no frames after zeros", {"frames": 0, "start": "zeros"}),
    ("nothing kept", {"kept": 0}),
    ("nothing kept, and copied", {"kept": 0, "start": "replicate"}),
    ("no batch", {"batch": 0}),
    ("no channels", {"channels": 0}),
    ("no rows", {"pixels": (0, 14)}),
    ("one pixel of one channel", {"channels": 1, "pixels": (1, 1)}),
    ("one pixel", {"batch": 2, "channels": 5, "pixels": (1, 1)}),
    ("odd sizes", {"batch": 2, "channels": 3, "pixels": (5, 7)}),
    ("channels last", {"batch": 2, "layout": "channels_last"}),
    ("channels last, odd", {"channels": 5, "pixels": (3, 7), "layout": "channels_last"}),
    ("channels last, begins", {"layout": "channels_last", "start": "replicate"}),
    ("a cache of another layout", {"layout": "channels_last", "cache_layout": "contiguous"}),
    ("a cache that is channels last alone", {"batch": 2, "cache_layout": "channels_last"}),
    ("behind two frames of a buffer", {"batch": 2, "layout": "behind"}),
    ("inside a wider buffer", {"batch": 2, "layout": "inset"}),
    ("every other column", {"layout": "strided"}),
    ("off by a few elements", {"layout": "offset"}),
    ("frames before channels", {"batch": 2, "layout": "transposed"}),
    ("one sample for all", {"batch": 2, "layout": "expanded"}),
    ("more channels than a square", {"channels": 67, "pixels": (3, 66), "layout": "inset"}),
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
    """The last block of a decoder, or one `level` times as wide, of 1 / `level` the sides."""
    height, width = size.pixels
    pixels = height // level, width // level
    channels = size.channels * level
    options = {"layout": "channels_last", **options}
    return _sample("a model's size", 1, channels, 2, 8, pixels, **options)


def _cost(arguments: Mapping[str, Any]) -> tuple[Cost, Cost]:
    """What came is read once; joined and the next cache are written. Backward: read, and written.

    The gradients of what begins a clip and of what ends one are sums of two.
    """
    cache, frames, kept = (arguments[name] for name in ("cache", "frames", "kept"))
    frame = _bytes(frames) // max(1, frames.shape[2])
    came = _bytes(frames) + (0 if cache is None else _bytes(cache))
    joined, following = _bytes(frames) + kept * frame, kept * frame
    return Cost(came + joined + following, 0), Cost(joined + following + came, _elements(frames))


def _elements(x: Any) -> int:
    return int(math.prod(x.shape))


def _bytes(x: Any) -> int:
    return int(_elements(x) * x.element_size())


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
