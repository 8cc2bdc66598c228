"""Arguments of spatial_norm: groups, checks, limits of the kernels; allocation of results."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backend, _checks
from .._launch import dense

VIDEO = ("batch", "channels", "frames", "height", "width")
LATENTS = ("batch", "channels", "latent_frames", "latent_height", "latent_width")
MAX_PIXELS = 2**31 - 1  # of a frame: counted in 32 bits
MAX_CHANNELS = 16384


class Parameters(NamedTuple):
    """Modulation of the norm: vectors (channels,) and latents y, b; offset is added to x first."""

    weight: Tensor | None
    bias: Tensor | None
    y: Tensor | None
    b: Tensor | None
    offset: Tensor | None

    @property
    def latents(self) -> Tensor | None:
        """y, or without it b: the two have one shape."""
        return self.b if self.y is None else self.y


class Settings(NamedTuple):
    """Numbers and flags of `spatial_norm_silu`."""

    num_groups: int
    eps: float = 0.0
    per_frame: bool = False
    leads: bool = False
    silu: bool = False


# --- results ---------------------------------------------------------------------------------


def new_moments(x: Tensor, num_groups: int, per_frame: bool) -> Tensor:
    shape = (x.shape[0], x.shape[2] if per_frame else 1, num_groups, 2)
    return torch.empty(shape, dtype=statistics_dtype(x), device=x.device)


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def empty_grad(x: Tensor | None, of: Tensor) -> Tensor:
    """The gradient of a vector, uninitialized; without elements if x is None."""
    return of.new_empty((0,)) if x is None else torch.empty_like(x)


def match_memory_format(x: Tensor, out: Tensor) -> Tensor:
    """Convert a reference result to the memory format of the kernel's."""
    return dense(out, x.shape[1] > 1 and x.stride(1) == 1)


def update_cache(joined: Tensor, cache: Tensor, start: str | None) -> None:
    """Put the past frames at the head of `joined`, then its last frames into the cache."""
    cache_len = cache.shape[2]
    first = joined[:, :, cache_len : cache_len + 1]
    past = {"replicate": first, "zeros": None}.get(start or "", cache)
    joined[:, :, :cache_len] = 0 if past is None else past
    cache.copy_(joined[:, :, joined.shape[2] - cache_len :])


# --- checks ----------------------------------------------------------------------------------


def check_video(op: str, x: Tensor, num_groups: int, per_frame: bool) -> None:
    _checks.tensor(op, "x", x, VIDEO)
    _checks.integer(op, "num_groups", num_groups, 1, max(x.shape[1], 1), "(the channels of x)")
    if x.shape[1] % num_groups:
        raise ValueError(
            f"{op}: num_groups must divide the {x.shape[1]} channels of x; got {num_groups}"
        )
    _checks.flag(op, "per_frame", per_frame)


def check_latents(op: str, x: Tensor, leads: bool, **latents: Tensor | None) -> None:
    _checks.flag(op, "leads", leads)
    first = None
    for name, value in latents.items():
        if value is None or (first is not None and _checks.alike(value, first[1])):
            continue
        _checks.tensor(op, name, value, LATENTS)
        _checks.dtype(op, name, value, (x.dtype, statistics_dtype(x)))
        _checks.same_device(op, name, value, "x", x)
        _checks.shape(
            op, name, value, (*x.shape[:2], *value.shape[2:]), f"({', '.join(LATENTS)})",
            lambda: f" for x of shape {tuple(x.shape)}",
        )  # fmt: skip
        if first is not None:
            _checks.shape(op, name, value, first[1].shape, f"the shape of {first[0]}")
        first = first or (name, value)
        _check_ratio(op, name, x, value, leads)


def _check_ratio(op: str, name: str, x: Tensor, value: Tensor, leads: bool) -> None:
    """Whole multiples in space; in time enough latent frames."""
    for dim, what in ((3, "height"), (4, "width")):
        if value.shape[dim] < 1 or x.shape[dim] % value.shape[dim]:
            raise ValueError(
                f"{op}: {name} must have a {what} that divides the {x.shape[dim]} of x; "
                f"got {tuple(value.shape)}"
            )
    least = 2 if leads and x.shape[2] > 1 else 1
    if value.shape[2] < least:
        raise ValueError(
            f"{op}: {name} must have at least {least} latent frames for {x.shape[2]} frames "
            f"and leads={leads}; got {tuple(value.shape)}"
        )


def check_moments(op: str, x: Tensor, moments: Tensor, num_groups: int, per_frame: bool) -> None:
    dims = ("batch", "frames or 1", "num_groups", "2")
    _checks.tensor(op, "moments", moments, dims)
    _checks.dtype(op, "moments", moments, (statistics_dtype(x),))
    _checks.same_device(op, "moments", moments, "x", x)
    wanted = (x.shape[0], x.shape[2] if per_frame else 1, num_groups, 2)
    _checks.shape(
        op, "moments", moments, wanted, f"({', '.join(dims)})", lambda: f", per_frame={per_frame}"
    )


def check_cache(op: str, x: Tensor, cache: Tensor | None, start: str | None) -> None:
    if start is not None:
        _checks.choice(op, "start", start, ("replicate", "zeros"))
    if cache is None:
        if start is not None:
            raise ValueError(f"{op}: start must be None without a cache; got {start!r}")
        return
    _checks.tensor(op, "cache", cache, VIDEO)
    _checks.dtype(op, "cache", cache, (x.dtype,))
    _checks.same_device(op, "cache", cache, "x", x)
    wanted = (*x.shape[:2], cache.shape[2], *x.shape[3:])
    _checks.shape(op, "cache", cache, wanted, "(batch, channels, kept, height, width)")
    if start == "replicate" and x.shape[2] == 0:
        raise ValueError(f'{op}: start="replicate" needs a frame of x; got {tuple(x.shape)}')
    if cache.numel() and any(
        stride == 0 and size > 1 for size, stride in zip(cache.shape, cache.stride(), strict=True)
    ):
        raise ValueError(
            f"{op}: cache must have each element in a place of its own; "
            f"got strides {cache.stride()} for shape {tuple(cache.shape)}"
        )


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if wants_grad(value):
            raise RuntimeError(
                f"{op}: cache is overwritten and keeps no graph; got {name} with "
                f"requires_grad=True. Use cache=None, or torch.no_grad()"
            )


def unsupported_reason(x: Tensor) -> str | None:
    """The reason why the kernels cannot take `x`, or None."""
    if x.shape[1] > MAX_CHANNELS:
        return f"x has {x.shape[1]} channels; the kernel takes at most {MAX_CHANNELS}"
    if x.shape[3] * x.shape[4] > MAX_PIXELS:
        return f"x has frames of {x.shape[3]} x {x.shape[4]}; the kernel takes {MAX_PIXELS} pixels"
    return _backend.triton_reason("x", x)
