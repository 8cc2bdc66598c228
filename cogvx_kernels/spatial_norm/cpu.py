"""Reference of spatial_norm for the CPU without gradients: in place, in pieces that fit its cache.

The plain reference allocates several tensors of the video's size. Here statistics, weight, bias, y
and b are folded into one scale and one shift at latent resolution; then a piece of a frame, some of
its rows (channels-last) or channels (contiguous), is normalized, modulated and activated at a time.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._launch import empty_video
from .reference import latent_of_frame
from .validation import Parameters, Settings, update_cache

PIECE = 1 << 18  # elements: a megabyte in fp32

Maps = tuple[Tensor, Tensor, Tensor]
Piece = tuple[slice, slice, slice]
Item = TypeVar("Item")


def spatial_norm_silu_cpu(
    x: Tensor, parameters: Parameters, moments: Tensor | None, settings: Settings,
    cache: Tensor | None, start: str | None,
) -> Tensor:  # fmt: skip
    """`spatial_norm_silu_reference`."""
    weight, bias, y, b, offset = parameters
    num_groups, eps, per_frame, leads, silu = settings
    frames, cache_len = x.shape[2], 0 if cache is None else cache.shape[2]
    joined = empty_video(x, frames=cache_len + frames)
    if x.numel():
        if moments is None:
            moments = _moments(x, offset, num_groups, per_frame)
        modulation = parameters.latents
        latents = [0] * frames
        if modulation is not None:
            latents = latent_of_frame(frames, modulation.shape[2], leads)
        maps, key = None, (-1, -1)
        for frame, latent in enumerate(latents):
            if key != (latent, frame * per_frame):  # frames share the maps of a key
                key = latent, frame * per_frame
                at = (None if z is None else z[:, :, latent] for z in (y, b))
                maps = _maps(x, moments[:, key[1]], eps, weight, bias, *at)
            assert maps is not None
            _apply(joined[:, :, cache_len + frame], x[:, :, frame], offset, maps, silu)
    if cache is not None and cache_len:
        update_cache(joined, cache, start)
    return joined


def residual_moments_cpu(
    x: Tensor, h: Tensor, pre_bias: Tensor | None, num_groups: int, per_frame: bool
) -> tuple[Tensor, Tensor]:
    """`residual_moments_reference`."""
    total, wide = empty_video(x), torch.promote_types(x.dtype, torch.float32)
    for frame in _worked(range(x.shape[2]), x):
        into, left, right = (z[:, :, frame] for z in (total, x, h))
        for piece in _worked(_pieces(into), x):
            part = left[piece].to(wide) + right[piece]
            if pre_bias is not None:
                part += _column(pre_bias, part)[:, piece[1]]
            into[piece] = part
    return total, _moments(total, None, num_groups, per_frame)


def _worked(items: Sequence[Item], x: Tensor) -> Sequence[Item]:
    """All items, or of a meta tensor two: those behind them need no more memory, and it has no
    numbers."""
    return items[:2] if x.is_meta else items


def _pieces(frame: Tensor, rows: int = 1) -> list[Piece]:
    """Slices of a frame (batch, channels, height, width), its height in multiples of `rows`."""
    batch, channels, height, width = frame.shape
    every = slice(None)
    if channels > 1 and frame.stride(1) == 1:
        step = max(rows, PIECE // max(batch * channels * width, 1) // rows * rows)
        return [(every, every, slice(r, min(r + step, height))) for r in range(0, height, step)]
    step = max(1, PIECE // max(batch * height * width, 1))
    return [(every, slice(c, c + step), every) for c in range(0, channels, step)]


def _apply(out: Tensor, x: Tensor, pre_bias: Tensor | None, maps: Maps, silu: bool) -> None:
    """Write SiLU((x + pre_bias - mean) · scale + shift) to a frame of the result.

    Through a dense buffer, because the last bits of torch's SiLU depend on strides.
    """
    mean, scale, shift = maps
    rows = scale.shape[2]
    ratio = x.shape[2] // rows
    for piece in _worked(_pieces(x, ratio), x):
        _, channels, lines = piece
        latents = slice(None)
        if rows > 1 and lines != latents:
            latents = slice(lines.start // ratio, lines.stop // ratio)
        part = x[piece].to(mean.dtype)
        part = part if pre_bias is None else part + _column(pre_bias, part)[:, channels]
        part = part - mean[:, channels]
        by_rows = part.unflatten(2, (scale[:, :, latents].shape[2], -1))
        a, b = (z[:, channels, latents].unsqueeze(3) for z in (scale, shift))
        torch.addcmul(b, by_rows, a, out=by_rows)
        out[piece] = F.silu(part, inplace=True) if silu else part


def _maps(
    x: Tensor, moments: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None,
    y: Tensor | None, b: Tensor | None,
) -> Maps:  # fmt: skip
    """(mean, scale, shift) of a frame: the last two (batch, channels, rows of latents, width)."""
    group_size = x.shape[1] // moments.shape[1]
    mean, var = (m.repeat_interleave(group_size, 1)[..., None, None] for m in moments.unbind(-1))
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * _column(weight, scale)
    shift = torch.zeros_like(mean) if bias is None else _column(bias, mean).expand_as(mean)
    if y is not None:
        scale, shift = scale * y, shift * y
    if b is not None:
        shift = shift + b
    modulation = y if y is not None else b
    if modulation is not None:
        scale, shift = (_upsampled(z.expand(modulation.shape), x) for z in (scale, shift))
    return mean, scale, shift


def _upsampled(z: Tensor, x: Tensor) -> Tensor:
    """(batch, channels, rows, columns) repeated to the width of x, in its memory format."""
    ratio = x.shape[4] // z.shape[3]
    if x.shape[1] > 1 and x.stride(1) == 1:
        lines = z.permute(0, 2, 3, 1).unsqueeze(3).expand(-1, -1, -1, ratio, -1)
        return lines.flatten(2, 3).contiguous().permute(0, 3, 1, 2)
    return z.unsqueeze(4).expand(-1, -1, -1, -1, ratio).flatten(3, 4).contiguous()


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype)[None, :, None, None]


def _moments(f: Tensor, pre_bias: Tensor | None, num_groups: int, per_frame: bool) -> Tensor:
    """Mean and variance (batch, frames or 1, groups, 2) of f + pre_bias.

    Two passes over each piece, which is in the cache for the second; then merged.
    """
    wide = torch.promote_types(f.dtype, torch.float32)
    batch, channels, frames, _, width = f.shape
    pieces = _pieces(f[:, :, 0]) if frames else []
    runs = list(dict.fromkeys((piece[2].start, piece[2].stop) for piece in pieces))
    parts = f.new_empty((3, batch, frames, max(len(runs), 1), channels), dtype=wide)
    for frame in _worked(range(frames), f):
        for piece in _worked(pieces, f):
            part = f[:, :, frame][piece].to(wide)
            part = part if pre_bias is None else part + _column(pre_bias, part)[:, piece[1]]
            # torch.var_mean is one pass, but ten times slower on a CPU.
            mean = part.mean((2, 3), keepdim=True)
            run = runs.index((piece[2].start, piece[2].stop))
            part = part - mean
            parts[0, :, frame, run, piece[1]] = mean[:, :, 0, 0]
            parts[1, :, frame, run, piece[1]] = part.mean((2, 3))  # rounding error of the mean
            parts[2, :, frame, run, piece[1]] = part.square_().mean((2, 3))
    counts = [float(f.shape[3] * width) if r[0] is None else (r[1] - r[0]) * width for r in runs]
    return _merged(parts, parts.new_tensor(counts or [1.0]), num_groups, per_frame)


def _merged(parts: Tensor, counts: Tensor, num_groups: int, per_frame: bool) -> Tensor:
    """Merge parts of `counts` pixels: mean, its rounding error, mean square about it.

    parts: (3, batch, frames, runs, channels).
    """
    means, residuals, squares = parts.unflatten(4, (num_groups, -1))
    over = (2, 4) if per_frame else (1, 2, 4)
    share = (counts / counts.sum())[:, None, None]
    first = means[:, :, :1, :, :1] if per_frame else means[:, :1, :1, :, :1]
    elements = means.shape[4] * (1 if per_frame else means.shape[1])
    diff = means - first + residuals
    delta = (diff * share).sum(over, keepdim=True) / elements
    squares = squares - residuals.square() + (diff - delta).square()
    var = (squares * share).sum(over, keepdim=True) / elements
    return torch.stack((first + delta, var), -1)[:, :, 0, :, 0]
