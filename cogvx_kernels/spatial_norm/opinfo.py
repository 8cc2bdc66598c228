"""Test samples, cost model and compile budgets of `spatial_norm_silu` and `residual_moments`."""

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from .._launch import empty_video
from .._opinfo import Budget, Cost, OpInfo, Sample, Size, TensorSpec
from .op import residual_moments, spatial_norm_silu
from .reference import residual_moments_reference, spatial_norm_silu_reference
from .validation import Parameters, Settings, new_moments

LAYOUTS = (
    "contiguous", "channels_last", "behind", "inset", "transposed", "offset", "strided", "expanded",
)  # fmt: skip


def _sample(
    reason: str, batch: int = 1, channels: int = 8, num_groups: int = 2, frames: int = 2,
    height: int = 2, width: int = 14, latents: tuple[int, int, int] | None = (1, 1, 7),
    affine: str = "wb", modulation: str = "yb", offset: bool = False, per_frame: bool = False,
    leads: bool = False, silu: bool = True, given: bool = False, wide: bool = False,
    layout: str = "channels_last", latent_layout: str | None = None,
) -> Sample:  # fmt: skip
    """A call; `affine` names weight and bias, `modulation` y and b, of the size of `latents`."""
    kind = "wide" if wide else None
    modulation = "" if latents is None else modulation
    # The SiLU of a multiple of 128 is exactly a ReLU: y or the weight makes such multiples.
    lifts = silu and not modulation
    vector = TensorSpec((channels,), "lifted" if lifts else "weight", dtype=kind)
    latent = TensorSpec(
        (batch, channels, *(latents or ())), "lifted", latent_layout or layout, dtype=kind
    )
    units = (batch, frames if per_frame else 1, num_groups, 2)
    # The mean of rows of an odd width is not 0.
    exact = not (offset or given or width % 2 or (silu and modulation == "b"))
    return Sample(
        reason,
        {
            "x": TensorSpec((batch, channels, frames, height, width), "rows", layout),
            "weight": vector if "w" in affine else None,
            "bias": vector if "b" in affine else None,
            "y": latent if "y" in modulation else None,
            "b": latent if "b" in modulation else None,
            "offset": TensorSpec((channels,), dtype=kind) if offset else None,
            "moments": TensorSpec(units, "weight", dtype="wide") if given else None,
            "num_groups": num_groups,
            "per_frame": per_frame,
            "leads": leads,
            "silu": silu,
        },
        exact=exact,
    )


CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("all arguments",
     {"batch": 2, "frames": 3, "latents": (2, 1, 7), "offset": True, "layout": "contiguous"}),
    ("channels last", {"batch": 2, "frames": 3, "latents": (2, 1, 7), "offset": True}),
    ("plain", {"batch": 2, "latents": None}),
    ("plain, no SiLU, no weight, no bias", {"latents": None, "silu": False, "affine": ""}),
    ("statistics per frame", {"frames": 3, "per_frame": True, "latents": (3, 2, 7)}),
    ("plain, statistics per frame", {"frames": 3, "per_frame": True, "latents": None}),
    ("the first frame leads", {"frames": 5, "leads": True, "latents": (3, 1, 2)}),
    ("a single leading frame", {"frames": 1, "leads": True}),
    ("more latents than frames", {"frames": 3, "leads": True, "latents": (7, 2, 1)}),
    ("latents at full resolution", {"frames": 3, "height": 3, "latents": (3, 3, 14)}),
    ("one latent", {"height": 9, "width": 36, "latents": (1, 1, 1), "channels": 96}),
    ("three columns per latent", {"height": 6, "width": 42, "latents": (2, 2, 14), "frames": 4}),
    ("y only", {"modulation": "y", "affine": "b"}),
    ("b only", {"modulation": "b", "affine": "w", "silu": False}),
    ("b only, SiLU", {"modulation": "b", "affine": ""}),
    ("given statistics", {"given": True, "offset": True, "batch": 2}),
    ("given statistics per frame", {"given": True, "per_frame": True, "latents": None}),
    ("offset, statistics per frame", {"offset": True, "per_frame": True, "latents": None}),
    ("fp32 weights", {"wide": True, "offset": True}),
    ("one group", {"num_groups": 1, "channels": 6}),
    ("one channel per group", {"num_groups": 5, "channels": 5, "offset": True}),
    ("three groups of 17", {"num_groups": 3, "channels": 51}),
    ("more channels than a tile", {"num_groups": 20, "channels": 260, "height": 1, "offset": True}),
    ("1024 channels", {"num_groups": 32, "channels": 1024, "frames": 1, "height": 1}),
    ("more pixels than a strip", {"height": 11, "latents": None, "channels": 96}),
    ("partial strips", {"height": 9, "width": 15, "latents": (1, 3, 5), "channels": 96}),
    ("one pixel", {"frames": 1, "height": 1, "width": 1, "latents": (1, 1, 1)}),
    ("no batch", {"batch": 0}),
    ("no frames", {"frames": 0, "latents": None}),
    ("contiguous", {"layout": "contiguous", "batch": 2, "latents": (2, 2, 7)}),
    ("contiguous, plain", {"layout": "contiguous", "height": 30, "width": 40, "latents": None}),
    ("contiguous, three groups", {"layout": "contiguous", "num_groups": 3, "channels": 27}),
    ("contiguous, odd width",
     {"layout": "contiguous", "height": 6, "width": 39, "latents": (1, 3, 13), "offset": True}),
    ("contiguous latents", {"latent_layout": "contiguous"}),
    ("channels-last latents", {"layout": "contiguous", "latent_layout": "channels_last"}),
    ("frames of a longer buffer", {"layout": "behind", "batch": 2, "frames": 3}),
    ("rows of a wider buffer", {"layout": "inset", "height": 4, "latents": (1, 2, 7)}),
    ("rows of a wider buffer, plain", {"layout": "inset", "height": 4, "latents": None}),
    ("frames before channels", {"layout": "transposed", "batch": 2}),
    ("odd storage offset", {"layout": "offset"}),
    ("every other column", {"layout": "strided", "latents": (1, 1, 2)}),
    ("expanded batch", {"layout": "expanded", "batch": 3}),
)  # fmt: skip


def _random(rng: random.Random) -> dict[str, Any]:
    """Random options: sizes of latents, and the ratio of the video to them."""
    rows, cols = rng.choice(((1, 1), (1, 7), (3, 2), (2, 5), (4, 4)))
    down, across = rng.choice(((1, 1), (2, 2), (4, 4), (8, 8), (3, 3), (1, 2), (2, 1), (10, 17)))
    frames, leads = rng.choice((1, 2, 3, 4, 5)), rng.random() < 0.5
    num_groups = rng.choice((1, 2, 3, 4))
    latent_frames = rng.choice((2, 3, frames + 1, 2 * frames + 1))
    # Two elements always normalize to 1 and -1: their gradient is only rounding errors.
    few = rows * down * cols * across < 8
    batch = rng.choice((1, 1, 2))
    each = 24 if few else rng.choice((1, 2, 4, 5, 24))
    return {
        "batch": batch,
        "channels": num_groups * each,
        "num_groups": num_groups,
        "frames": frames,
        "height": rows * down,
        "width": cols * across,
        "latents": rng.choice((None, *[(latent_frames, rows, cols)] * 3)),
        "affine": "".join(letter for letter in "wb" if rng.random() < 0.7),
        "modulation": rng.choice(("yb", "yb", "y", "b")),
        # The mean cancels the offset of a group of one channel: its gradient is rounding errors.
        "offset": rng.random() < 0.4 and each > 1,
        "per_frame": rng.random() < 0.3,
        "leads": leads,
        "silu": rng.random() < 0.8,
        "given": rng.random() < 0.2,
        "wide": rng.random() < 0.3,
        "layout": rng.choice(LAYOUTS),
        "latent_layout": rng.choice(LAYOUTS),
    }


def _at_size(
    size: Size, channels: int = 1, smaller: int = 1, plain: bool = False,
    layout: str = "channels_last",
) -> Sample:  # fmt: skip
    """The size of the decoder's last blocks, times `channels`, at 1 / `smaller` the sides."""
    height, width = (n // smaller for n in size.pixels)
    return _sample(
        "a model's size", channels=channels * size.channels, num_groups=32, frames=8,
        height=height, width=width, layout=layout,
        latents=None if plain else (2, size.pixels[0] // 8, size.pixels[1] // 8),
    )  # fmt: skip


_CONVENTIONS: Mapping[str, dict[str, Any]] = {
    "256 channels": {"channels": 2, "smaller": 2},
    "plain": {"plain": True},
    "contiguous": {"layout": "contiguous"},
}


def _cost(a: Mapping[str, Any]) -> tuple[Cost, Cost]:
    """Forward: x for its statistics, x again, the result. Backward: x and dout for the sums over
    pixels, both again, dx."""
    x = a["x"]
    once, elements = x.nbytes, x.numel()
    small = sum(v.nbytes for v in a.values() if isinstance(v, Tensor) and v is not x)
    passes = 2 if a["moments"] is not None else 3
    return Cost(passes * once + small, 14 * elements), Cost(5 * once + 2 * small, 34 * elements)


def _launch(kernel: Any, a: Mapping[str, Any]) -> None:
    """Launch forward, forward with a cache, and backward."""
    x, offset, moments = a["x"], a["offset"], a["moments"]
    if moments is None:
        moments = new_moments(x, a["num_groups"], a["per_frame"])
        kernel.moments_fwd(moments, None, x, None, offset, a["num_groups"], a["per_frame"])
    parameters = Parameters(*(a[name] for name in Parameters._fields))
    settings = Settings(a["num_groups"], 1e-6, a["per_frame"], a["leads"], a["silu"])
    kernel.spatial_norm_fwd(empty_video(x), None, x, moments, parameters, settings)
    if x.shape[2] > 1:
        for start in ("", "replicate"):
            joined, cache = empty_video(x, frames=x.shape[2] + 2), empty_video(x, frames=2)
            kernel.spatial_norm_fwd(joined, cache, x, moments, parameters, settings, start)
    grads = empty_video(x), *(None if z is None else empty_video(z) for z in (a["y"], a["b"]))
    given = a["moments"] is not None
    kernel.spatial_norm_bwd(grads, empty_video(x), x, moments, given, parameters, settings)


_SIZES = ("2b-480x720-49f", "1.5-5b-768x1360-81f")


# (registers, bits of an access, narrower accesses). Weights and latents are small and take narrow
# loads. Where a thread stores one partial sum no store is wide; loads of videos are 128 bits.
_LIMITS = {
    "_apply_kernel": (96, 128, 16),
    "_moments_kernel": (80, 32, 2),
    "sums_kernel": (168, 32, 8),
}


SPATIAL_NORM_SILU = OpInfo(
    name="spatial_norm_silu",
    op=spatial_norm_silu,
    reference=spatial_norm_silu_reference,
    samples=tuple(_sample(reason, **case) for reason, case in CASES),
    random_sample=lambda rng: _sample("fuzz", **_random(rng)),
    at_size=_at_size,
    conventions={name: partial(_at_size, **options) for name, options in _CONVENTIONS.items()},
    videos=("x",),
    batched=("y", "b", "moments"),
    differentiable=("x", "weight", "bias", "y", "b", "offset", "moments"),
    # Two terms of the gradient of x are sums over its group.
    summed=("x", "weight", "bias", "y", "b", "offset", "moments"),
    rows=lambda call: (
        len(call["x"]) * call["num_groups"] * (call["x"].shape[2] if call["per_frame"] else 1)
    ),
    resized=lambda batch, frames: _sample(
        "resized", batch, 2, 1, frames, 1, 2, latents=(1, 1, 1), layout="contiguous"
    ),
    gradcheck=_sample(
        "finite differences", 1, 4, 2, 3, 2, 4, (2, 1, 2), offset=True, leads=True, layout="behind"
    ),
    cost=_cost,
    torch_ops=("spatial_norm_silu", "spatial_norm_silu_backward"),
    launch=_launch,
    budgets=tuple(
        Budget(kernel, size, registers, 16384, access, narrow, convention=convention)
        for size in _SIZES
        for convention in ("", "256 channels", "plain")
        for kernel, (registers, access, narrow) in _LIMITS.items()
    ),
)


# --- residual_moments ------------------------------------------------------------------------


def _residual(
    reason: str, batch: int = 1, channels: int = 8, num_groups: int = 2, frames: int = 2,
    height: int = 2, width: int = 14, offset: bool = True, per_frame: bool = False,
    wide: bool = False, layout: str = "channels_last", h_layout: str | None = None,
) -> Sample:  # fmt: skip
    shape = (batch, channels, frames, height, width)
    kind = "wide" if wide else None
    # With an offset, or rows of an odd width, the mean is not an integer.
    return Sample(
        reason,
        {
            "x": TensorSpec(shape, "rows", layout),
            "h": TensorSpec(shape, "rows", h_layout or layout),
            "offset": TensorSpec((channels,), dtype=kind) if offset else None,
            "num_groups": num_groups,
            "per_frame": per_frame,
        },
        exact=not (offset or width % 2),
    )


RESIDUAL_CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("all arguments", {"batch": 2, "frames": 3, "layout": "contiguous"}),
    ("channels last", {"batch": 2, "frames": 3}),
    ("no offset", {"batch": 2, "offset": False}),
    ("statistics per frame", {"per_frame": True, "frames": 3, "offset": False}),
    ("fp32 offset", {"wide": True}),
    ("one group", {"num_groups": 1, "channels": 6}),
    ("one channel per group", {"num_groups": 5, "channels": 5}),
    ("three groups of 17", {"num_groups": 3, "channels": 51}),
    ("more channels than a tile", {"num_groups": 20, "channels": 260, "height": 1}),
    ("more pixels than a strip", {"height": 11, "channels": 96, "offset": False}),
    ("partial strips", {"height": 9, "width": 15, "channels": 96}),
    ("one pixel", {"frames": 1, "height": 1, "width": 1}),
    ("no batch", {"batch": 0}),
    ("contiguous", {"layout": "contiguous", "batch": 2, "offset": False}),
    ("x contiguous, h channels last", {"layout": "contiguous", "h_layout": "channels_last"}),
    ("x in a longer buffer", {"layout": "behind", "h_layout": "channels_last"}),
    ("rows of a wider buffer", {"layout": "inset", "height": 4}),
    ("frames before channels", {"layout": "transposed"}),
    ("odd storage offset", {"layout": "offset"}),
    ("every other column", {"layout": "strided"}),
    ("expanded batch", {"layout": "expanded", "batch": 3}),
)


def _random_residual(rng: random.Random) -> dict[str, Any]:
    num_groups = rng.choice((1, 2, 3, 4))
    return {
        "batch": rng.choice((1, 1, 2)),
        "channels": num_groups * rng.choice((1, 2, 4, 5, 24)),
        "num_groups": num_groups,
        "frames": rng.choice((1, 2, 3)),
        "height": rng.choice((1, 2, 5, 24)),
        "width": rng.choice((1, 7, 14, 40)),
        "offset": rng.random() < 0.5,
        "per_frame": rng.random() < 0.4,
        "wide": rng.random() < 0.3,
        "layout": rng.choice(LAYOUTS),
        "h_layout": rng.choice(LAYOUTS),
    }


def _residual_at_size(size: Size, channels: int = 1, smaller: int = 1) -> Sample:
    height, width = (n // smaller for n in size.pixels)
    return _residual("a model's size", 1, channels * size.channels, 32, 8, height, width)


def _residual_cost(a: Mapping[str, Any]) -> tuple[Cost, Cost]:
    """Forward: x, h and their sum. Backward: a pass-through; one read for the offset's gradient."""
    x = a["x"]
    once, elements = x.nbytes, x.numel()
    backward = 0 if a["offset"] is None else once
    small = 0 if a["offset"] is None else a["offset"].nbytes
    return Cost(3 * once + small, 6 * elements), Cost(backward, elements)


def _launch_residual(kernel: Any, a: Mapping[str, Any]) -> None:
    x, settings = a["x"], (a["num_groups"], a["per_frame"])
    moments = new_moments(x, *settings)
    kernel.moments_fwd(moments, empty_video(x), x, a["h"], a["offset"], *settings)


RESIDUAL_MOMENTS = OpInfo(
    name="residual_moments",
    op=residual_moments,
    reference=residual_moments_reference,
    samples=tuple(_residual(reason, **case) for reason, case in RESIDUAL_CASES),
    random_sample=lambda rng: _residual("fuzz", **_random_residual(rng)),
    at_size=_residual_at_size,
    conventions={"256 channels": lambda size: _residual_at_size(size, 2, 2)},
    videos=("x", "h"),
    differentiable=("x", "h", "offset"),
    summed=("offset",),
    rounds_between=True,  # the sum, before its statistics
    resized=lambda batch, frames: _residual(
        "resized", batch, 2, 1, frames, 1, 2, layout="contiguous"
    ),
    gradcheck=_residual("finite differences", 1, 4, 2, 2, 2, 4),
    cost=_residual_cost,
    torch_ops=("residual_moments",),
    launch=_launch_residual,
    budgets=tuple(
        Budget("_moments_kernel", size, 120, 16384, narrow=4, convention=convention)
        for size in _SIZES
        for convention in ("", "256 channels")
    ),
)
