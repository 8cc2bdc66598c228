"""The law on a CPU where no gradient is wanted: in pieces that stay in its cache, in place.

The law makes a tensor of the video's size for every line of it. Here a piece of a frame is
centred, scaled, shifted and activated where it is to lie, with statistics, weight, y and b folded
into a factor and a term beforehand, at the size of the latents; what is made besides is of a
piece's size. A piece is some of a frame's rows, or where pixels are neighbours, of its channels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import latent_of_frame
from .validation import new_video

PIECE = 1 << 18  # elements, a megabyte in fp32

Maps = tuple[Tensor, Tensor, Tensor]


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
        there = y if y is not None else b
        latents = [0] * frames if there is None else latent_of_frame(frames, there.shape[2], leads)
        maps, made = None, (-1, -1)
        for frame, latent in enumerate(latents):
            if made != (latent, frame * per_frame):  # maps serve all frames that share them
                made = latent, frame * per_frame
                at = (None if z is None else z[:, :, latent] for z in (y, b))
                maps = _maps(x, moments[:, made[1]], eps, weight, bias, *at)
            assert maps is not None
            _into(joined[:, :, kept + frame], x[:, :, frame], offset, maps, silu)
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
        into, left, right = (z[:, :, frame] for z in (total, x, h))
        for piece in _pieces(into):
            part = left[piece].to(wide) + right[piece]
            into[piece] = part if offset is None else part.add_(_column(offset, part)[:, piece[1]])
    return total, _moments(total, None, num_groups, per_frame)


def _pieces(frame: Tensor, rows: int = 1) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of a frame (batch, channels, height, width); of its height in whole `rows`."""
    batch, channels, height, width = frame.shape
    whole = slice(None)
    if channels > 1 and frame.stride(1) == 1:
        step = max(rows, PIECE // max(batch * channels * width, 1) // rows * rows)
        yield from ((whole, whole, slice(r, min(r + step, height))) for r in range(0, height, step))
    else:
        step = max(1, PIECE // max(batch * height * width, 1))
        yield from ((whole, slice(c, c + step), whole) for c in range(0, channels, step))


def _into(out: Tensor, x: Tensor, offset: Tensor | None, maps: Maps, silu: bool) -> None:
    """Into a frame SiLU of (x + offset - mean) · scale + shift.

    Made beside and then copied: torch's SiLU has other last bits where it meets other strides.
    """
    mean, scale, shift = maps
    rows = scale.shape[2]
    each = x.shape[2] // rows
    for piece in _pieces(x, each):
        _, channels, lines = piece
        few = slice(None)
        if rows > 1 and lines != few:
            few = slice(lines.start // each, lines.stop // each)
        part = x[piece].to(mean.dtype)
        part = part if offset is None else part + _column(offset, part)[:, channels]
        part = part - mean[:, channels]
        by_rows = part.unflatten(2, (scale[:, :, few].shape[2], -1))
        a, b = (z[:, channels, few].unsqueeze(3) for z in (scale, shift))
        torch.addcmul(b, by_rows, a, out=by_rows)
        out[piece] = F.silu(part, inplace=True) if silu else part


def _maps(
    x: Tensor, moments: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None,
    y: Tensor | None, b: Tensor | None,
) -> Maps:  # fmt: skip
    """(mean, scale, shift) of a frame: the last two (batch, channels, rows of latents, width)."""
    each = x.shape[1] // moments.shape[1]
    mean, var = (m.repeat_interleave(each, 1)[..., None, None] for m in moments.unbind(-1))
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * _column(weight, scale)
    shift = torch.zeros_like(mean) if bias is None else _column(bias, mean).expand_as(mean)
    if y is not None:
        scale, shift = scale * y, shift * y
    if b is not None:
        shift = shift + b
    if y is not None or b is not None:
        like = y if y is not None else b
        assert like is not None
        scale, shift = (_widened(z.expand(like.shape), x) for z in (scale, shift))
    return mean, scale, shift


def _widened(z: Tensor, x: Tensor) -> Tensor:
    """(batch, channels, rows, columns) at the width of x, and as x lies: so that lines are read in
    order. Rows are shared."""
    ratio = x.shape[4] // z.shape[3]
    if x.shape[1] > 1 and x.stride(1) == 1:
        lines = z.permute(0, 2, 3, 1).unsqueeze(3).expand(-1, -1, -1, ratio, -1)
        return lines.flatten(2, 3).contiguous().permute(0, 3, 1, 2)
    return z.unsqueeze(4).expand(-1, -1, -1, -1, ratio).flatten(3, 4).contiguous()


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype)[None, :, None, None]


def _moments(f: Tensor, offset: Tensor | None, num_groups: int, per_frame: bool) -> Tensor:
    """Mean and variance (batch, frames or 1, groups, 2) of f + offset.

    Of every piece's channels in two passes, as it is in the cache for the second; then merged.
    """
    wide = torch.promote_types(f.dtype, torch.float32)
    batch, channels, frames, _, width = f.shape
    pieces = list(_pieces(f[:, :, 0])) if frames else []
    runs = list(dict.fromkeys((piece[2].start, piece[2].stop) for piece in pieces))
    parts = f.new_empty((3, batch, frames, max(len(runs), 1), channels), dtype=wide)
    for frame in range(frames):
        for piece in pieces:
            part = f[:, :, frame][piece].to(wide)
            part = part if offset is None else part + _column(offset, part)[:, piece[1]]
            # torch.var_mean is one pass, but on a CPU ten times slower than these.
            mean = part.mean((2, 3), keepdim=True)
            run = runs.index((piece[2].start, piece[2].stop))
            part = part - mean
            parts[0, :, frame, run, piece[1]] = mean[:, :, 0, 0]
            parts[1, :, frame, run, piece[1]] = part.mean((2, 3))  # what its rounding left
            parts[2, :, frame, run, piece[1]] = part.square_().mean((2, 3))
    counts = [float(f.shape[3] * width) if r[0] is None else (r[1] - r[0]) * width for r in runs]
    return _merged(parts, parts.new_tensor(counts or [1.0]), num_groups, per_frame)


def _merged(parts: Tensor, counts: Tensor, num_groups: int, per_frame: bool) -> Tensor:
    """Of parts (3, batch, frames, runs, channels), each of so many pixels: a mean, what the mean
    is off by, and the mean square about it."""
    means, rests, squares = parts.unflatten(4, (num_groups, -1))
    over = (2, 4) if per_frame else (1, 2, 4)
    share = (counts / counts.sum())[:, None, None]
    first = means[:, :, :1, :, :1] if per_frame else means[:, :1, :1, :, :1]
    elements = means.shape[4] * (1 if per_frame else means.shape[1])
    apart = means - first + rests
    beyond = (apart * share).sum(over, keepdim=True) / elements
    squares = squares - rests.square() + (apart - beyond).square()
    var = (squares * share).sum(over, keepdim=True) / elements
    return torch.stack((first + beyond, var), -1)[:, :, 0, :, 0]
