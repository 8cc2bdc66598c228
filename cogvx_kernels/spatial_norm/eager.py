"""The law on a CPU where no gradient is wanted: a frame at a time, in place, straight into place.

The law makes a tensor of the video's size for every line of it. Here a frame is normalised in one
fused multiply and add, with statistics, weight, y and b folded into a factor and a term at the size
of the latents, and goes to where it belongs; what is made besides is of a frame's size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import new_video
from .reference import latent_of_frame


def spatial_norm_silu_eager(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    b: Tensor | None,
    offset: Tensor | None,
    moments: Tensor | None,
    num_groups: int,
    eps: float,
    per_frame: bool,
    leads: bool,
    silu: bool,
    cache: Tensor | None,
    start: str | None,
) -> Tensor:
    """`spatial_norm_silu_reference`."""
    frames, kept = x.shape[2], 0 if cache is None else cache.shape[2]
    joined = new_video(x, kept + frames)
    if x.numel():
        if moments is None:
            moments = _moments(x, offset, num_groups, per_frame)
        _into(
            joined[:, :, kept:], x, weight, bias, y, b, offset, moments, eps, leads, silu
        )  # fmt: skip
    if cache is not None and kept:
        past = {"replicate": joined[:, :, kept : kept + 1], "zeros": None}.get(start or "", cache)
        joined[:, :, :kept] = 0 if past is None else past
        cache.copy_(joined[:, :, frames:])
    return joined


def residual_moments_eager(
    x: Tensor, h: Tensor, offset: Tensor | None, num_groups: int, per_frame: bool
) -> tuple[Tensor, Tensor]:
    """`residual_moments_reference`."""
    total, wide = new_video(x), torch.promote_types(x.dtype, torch.float32)
    for frame in range(x.shape[2]):
        part = x[:, :, frame].to(wide) + h[:, :, frame]
        total[:, :, frame] = part if offset is None else part.add_(_column(offset, wide))
    return total, _moments(total, None, num_groups, per_frame)


def _into(
    out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    b: Tensor | None, offset: Tensor | None, moments: Tensor, eps: float, leads: bool, silu: bool,
) -> None:  # fmt: skip
    """The result, frame by frame, into `out`."""
    wide, frames = moments.dtype, x.shape[2]
    there = y if y is not None else b
    latents = [0] * frames if there is None else latent_of_frame(frames, there.shape[2], leads)
    made: tuple[int, ...] = ()
    for frame in range(frames):
        unit = frame if moments.shape[1] > 1 else 0
        if made != (latents[frame], unit):  # a factor and a term serve the frames that share them
            made = latents[frame], unit
            at_latent = (None if z is None else z[:, :, made[0]].to(wide) for z in (y, b))
            mean, scale, shift = _folded(x, moments[:, unit], eps, weight, bias, *at_latent)
        f = x[:, :, frame].to(wide, copy=x.dtype != wide)
        if offset is not None:
            f = f + _column(offset, wide)
        z = _applied(f, mean, scale, shift)
        out[:, :, frame] = F.silu(z, inplace=True) if silu else z


def _folded(
    x: Tensor, moments: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None,
    y: Tensor | None, b: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(mean, scale, shift) of (f - mean) · scale + shift, for a frame's channels and latents."""
    each = x.shape[1] // moments.shape[1]
    mean, var = (m.repeat_interleave(each, 1)[..., None, None] for m in moments.unbind(-1))
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * _column(weight, scale.dtype)
    shift = torch.zeros_like(mean) if bias is None else _column(bias, mean.dtype).expand_as(mean)
    if y is not None:
        scale, shift = scale * y, shift * y
    return mean, scale, shift if b is None else shift + b


def _applied(f: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(f - mean) · scale + shift, where a latent serves its rows and columns of pixels."""
    rows, cols = max(scale.shape[2], shift.shape[2]), max(scale.shape[3], shift.shape[3])
    scale, shift = (_widened(z, rows, f.shape[3] // cols) for z in (scale, shift))
    return torch.addcmul(shift, (f - mean).unflatten(2, (rows, -1)), scale).flatten(2, 3)


def _widened(z: Tensor, rows: int, ratio: int) -> Tensor:
    """(..., rows, columns) to (..., rows, 1, ratio · columns): the width of the pixels, so that
    lines are read in order, while rows are shared. A single row and column serve as they are."""
    if z.shape[2:] == (1, 1):
        return z.unsqueeze(-2)
    return (z.repeat_interleave(ratio, dim=-1) if ratio > 1 else z).unsqueeze(-2)


def _column(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype)[:, None, None]


def _moments(f: Tensor, offset: Tensor | None, num_groups: int, per_frame: bool) -> Tensor:
    """Mean and variance (batch, frames or 1, groups, 2) of f + offset."""
    wide, (batch, channels, frames) = torch.promote_types(f.dtype, torch.float32), f.shape[:3]
    each = f.new_empty((batch, frames, num_groups, 2), dtype=wide)
    for frame in range(frames):
        part = f[:, :, frame].to(wide)
        part = part if offset is None else part + _column(offset, wide)
        groups = part.unflatten(1, (num_groups, channels // num_groups))
        # torch.var_mean is one pass, but on a CPU ten times slower than these two.
        mean = groups.mean((2, 3, 4), keepdim=True)
        each[:, frame, :, 0] = mean[:, :, 0, 0, 0]
        each[:, frame, :, 1] = (groups - mean).square_().mean((2, 3, 4))
    if per_frame:
        return each
    mean, var = each.unbind(-1)
    apart = mean - mean[:, :1]
    beyond = apart.mean(1, keepdim=True)
    var = var.mean(1, keepdim=True) + (apart - beyond).square().mean(1, keepdim=True)
    return torch.stack((mean[:, :1] + beyond, var), -1)
