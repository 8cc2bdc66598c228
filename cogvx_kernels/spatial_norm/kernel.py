"""The way: statistics in one pass (`statistics.py`), then norm, modulation and SiLU in another.

The second pass goes by the latents: a program takes a few columns of them and some channels, folds
statistics, weight, y and b into a factor and a term, and walks over the rows of pixels that share
them. Cached frames are moved by whoever writes the frames that take their place. The backward sums
over pixels (`gradients.py`), and goes this way again for x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import on_device
from .device_utils import (
    WARPS,
    at,
    channels_of,
    columns_of,
    contiguous,
    latent,
    latent_frame,
    load,
    of_cells,
    of_channels,
    of_groups,
    pixels_of,
    plan_of,
    sizes_of,
    slope,
    span_of,
    statistics,
    store,
    vector,
    video_of,
    whole,
)
from .gradients import sums_kernel
from .statistics import STRIP, moments_fwd

__all__ = ["moments_fwd", "spatial_norm_bwd", "spatial_norm_fwd"]

ROWS = 8  # rows of pixels for a program: so many share what it loads for them


# --- the second pass -------------------------------------------------------------------------


@triton.jit
def _remember(head, cache, batch, frame, row, col, channel, mask, value, sizes, P: tl.constexpr):
    """What was cached goes before the result, and `value`, just written, into the cache.

    A pixel of frame f takes the place of the one it is `frames` after: one program reads and
    writes both.
    """
    slot = frame - (sizes.frames - sizes.kept)
    if slot >= 0:
        cached = at(cache, batch, slot, row, col, channel, P.ALIGN, P)
        if P.CACHE == "continue":
            old = tl.load(cached, mask=mask, other=0.0)
            tl.store(at(head, batch, slot, row, col, channel, P.ALIGN, P), old, mask=mask)
            tl.debug_barrier()  # whichever threads read and write an element: first the one
        elif P.CACHE == "zeros":
            nothing = tl.zeros_like(value)
            tl.store(at(head, batch, slot, row, col, channel, P.ALIGN, P), nothing, mask=mask)
        tl.store(cached, value, mask=mask)
    if P.CACHE == "replicate":
        if frame == 0:
            for before in range(0, sizes.kept):
                place = tl.cast(before, tl.int64)
                tl.store(at(head, batch, place, row, col, channel, P.ALIGN, P), value, mask=mask)


@triton.jit
def _tile(
    out, head, cache, x, dout, along_ptr, batch, frame, row, col, channel, there, mask,
    offset, mean, mean_grad, mean_along, scale, shift, sizes, P: tl.constexpr,
):  # fmt: skip
    """A tile of the result; or, given dout, of the gradient of x."""
    mask = whole(mask, there, P)
    f = load(x, batch, frame, row, col, channel, mask, P) + of_channels(offset, P)
    centred = f - of_channels(mean, P)
    factor = of_cells(scale, P)
    z = centred * factor + of_cells(shift, P)
    if dout.ptr is not None:
        grad = load(dout, batch, frame, row, col, channel, mask, P) * slope(z, P) * factor
        if along_ptr is not None:
            grad -= of_channels(mean_grad, P) + centred * of_channels(mean_along, P)
        store(out, batch, frame, row, col, channel, mask, grad, P)
    else:
        if P.SILU:
            z = z / (1.0 + tl.exp(-z))
        value = store(out, batch, frame, row, col, channel, mask, z, P)
        if P.CACHE != "none":
            _remember(head, cache, batch, frame, row, col, channel, mask, value, sizes, P)


@triton.jit
def _apply_kernel(
    out, head, cache, x, dout, y, b, weight_ptr, bias_ptr, offset_ptr, moments_ptr, along_ptr,
    sizes, P: tl.constexpr,
):  # fmt: skip
    """Grid (batch · frames · down · across · tiles of channels,).

    along_ptr: (units, groups, 2), the group's means of the gradient of x̂ and of its product with
    x̂, for the gradient of x; None where the statistics do not depend on x.
    """
    channel, there = channels_of(tl.program_id(0) % P.TILES, P)
    place = tl.program_id(0) // P.TILES
    across = place % sizes.across
    place = place // sizes.across
    down = place % sizes.down
    place = tl.cast(place // sizes.down, tl.int64)
    frame = place % sizes.frames
    batch = place // sizes.frames
    offset = vector(offset_ptr, channel, there, 0.0, P)
    weight = vector(weight_ptr, channel, there, 1.0, P)
    bias = vector(bias_ptr, channel, there, 0.0, P)
    mean, rstd = statistics(moments_ptr, batch, frame, sizes, channel, there, P)
    mean_grad = mean
    mean_along = rstd
    if along_ptr is not None:
        mean_grad, mean_along = of_groups(along_ptr, batch, frame, sizes, channel, there, P)
        mean_grad *= rstd
        mean_along *= rstd * rstd
    weight *= rstd
    if P.RATIO == 0:
        for step in range(0, sizes.span):
            row, col, mask = pixels_of(down, step, sizes, P)
            _tile(
                out, head, cache, x, dout, along_ptr, batch, frame, row, col, channel, there,
                mask, offset, mean, mean_grad, mean_along, weight[None, :], bias[None, :], sizes, P,
            )  # fmt: skip
    else:
        cell, col, mask = columns_of(across, sizes, P)
        latents = (cell < sizes.cols)[:, None] & there[None, :]
        source = latent_frame(frame, sizes, P)
        of = tl.cast(down // sizes.parts, tl.int64)
        scale = latent(y, batch, source, of, cell, channel, latents, 1.0, P)
        shift = latent(b, batch, source, of, cell, channel, latents, 0.0, P)
        shift += scale * bias[None, :]
        scale *= weight[None, :]
        first = tl.cast(down % sizes.parts, tl.int64) * sizes.span
        for line in range(first, tl.minimum(first + sizes.span, sizes.each)):
            row = of * sizes.each + line
            _tile(
                out, head, cache, x, dout, along_ptr, batch, frame, row, col, channel, there,
                mask, offset, mean, mean_grad, mean_along, scale, shift, sizes, P,
            )  # fmt: skip


# --- launchers -------------------------------------------------------------------------------


def spatial_norm_fwd(
    out: Tensor, cache: Tensor | None, x: Tensor, moments: Tensor,
    weight: Tensor | None, bias: Tensor | None, y: Tensor | None, b: Tensor | None,
    offset: Tensor | None, num_groups: int, eps: float, per_frame: bool, leads: bool, silu: bool,
    start: str = "",
) -> None:  # fmt: skip
    """Into `out`, behind as many frames as `cache` has: those go to its head, and the last of the
    result into the cache. There must be as many."""
    if x.numel() == 0:
        return
    kept = 0 if cache is None else cache.shape[2]
    head, body = (out[:, :, :kept], out[:, :, kept:]) if kept else (None, out)
    cache = cache if kept else None
    how = "none" if cache is None else start or "continue"
    videos = (body, head, cache, x)
    plan = plan_of(x, num_groups, videos, (y, b), per_frame, leads, silu, eps, how)
    _apply(plan, (*videos, None), y, b, weight, bias, offset, moments, None, kept)


def _apply(plan, videos, y, b, weight, bias, offset, moments, along, kept=0) -> None:
    body, *_, x, _ = videos
    sizes = sizes_of(x, y if y is not None else b, plan, span_of(x, plan, ROWS), kept)
    programs = x.shape[0] * sizes.frames * sizes.down * sizes.across * plan.TILES
    with on_device(x):
        _apply_kernel[(programs,)](
            *(video_of(z, plan.ALIGN, plan.CHANNELS_LAST) for z in videos),
            *(video_of(z, plan.LATENT_ALIGN, plan.CHANNELS_LAST) for z in (y, b)),
            contiguous(weight), contiguous(bias), contiguous(offset), moments, along, sizes,
            P=plan, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def spatial_norm_bwd(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], dout: Tensor, x: Tensor,
    moments: Tensor, given: bool,
    weight: Tensor | None, bias: Tensor | None, y: Tensor | None, b: Tensor | None,
    offset: Tensor | None, num_groups: int, eps: float, per_frame: bool, leads: bool, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Into `grads` dx, if it is there, dy and db; returns those of weight, bias, offset, moments.

    `given` statistics are not of this x: then they have a gradient, and x's does not go through
    them. All that is returned is in the dtype of the statistics.
    """
    dx, dy, db = grads
    batch, channels, frames, height, width = x.shape
    plan = plan_of(x, num_groups, (dx, dout), (y, b, dy, db), per_frame, leads, silu, eps)
    if x.numel() == 0:
        for grad in (dy, db):
            if grad is not None:
                grad.zero_()
        sums = moments.new_zeros((batch, frames, 3, channels))
    else:
        sums = _sums(plan, dy, db, x, dout, y, b, weight, bias, offset, moments)
    rstd = torch.rsqrt(moments[..., 1] + eps)  # (batch, frames or 1, groups)
    extent = frames if not per_frame else 1
    elements = channels // num_groups * extent * height * width
    sums = sums if per_frame else sums.sum(1, keepdim=True)
    of_bias, of_weight, of_normal = sums.unbind(2)  # (batch, frames or 1, channels)
    scaled = [s if weight is None else s * weight for s in (of_bias, of_weight)]
    groups = torch.stack([s.unflatten(2, (num_groups, -1)).sum(3) for s in scaled], -1)
    along = groups / max(elements, 1)
    if dx is not None and x.numel():
        _apply(
            plan, (dx, None, None, x, dout), y, b, weight, bias, offset, moments,
            None if given else along,
        )  # fmt: skip
    each = channels // num_groups
    of_offset = scaled[0]
    if not given:
        mean, slope = (z.repeat_interleave(each, 2) for z in along.unbind(-1))
        of_offset = of_offset - extent * height * width * mean - of_normal * slope
    of_offset = of_offset * rstd.repeat_interleave(each, 2)
    of_moments = torch.stack((-rstd * groups[..., 0], -0.5 * rstd**2 * groups[..., 1]), -1)
    return of_weight.sum((0, 1)), of_bias.sum((0, 1)), of_offset.sum((0, 1)), of_moments


def _sums(plan, dy, db, x, dout, y, b, weight, bias, offset, moments) -> Tensor:
    """(batch, frames, 3, channels): the sums over pixels of y · g, of y · g · x̂, and of x̂."""
    batch, channels, frames = x.shape[:3]
    there = y if y is not None else b
    sizes = sizes_of(x, there, plan, span_of(x, plan, STRIP // plan.RUN))
    places, units = sizes.down, frames
    if there is not None:
        across = triton.cdiv(sizes.cols, plan.CELLS)
        span = sizes.each * triton.cdiv(plan.RATIO, plan.RUN)
        sizes = sizes._replace(across=across, span=span)
        places, units = sizes.rows * across, sizes.latents
    kept = frames if plan.PER_FRAME else units
    sums = torch.empty((batch, kept, places, 3, channels), dtype=moments.dtype, device=x.device)
    with on_device(x):
        sums_kernel[(batch * units * places * plan.TILES,)](
            sums, *(video_of(z, plan.LATENT_ALIGN, plan.CHANNELS_LAST) for z in (dy, db)),
            *(video_of(z, plan.ALIGN, plan.CHANNELS_LAST) for z in (x, dout)),
            *(video_of(z, plan.LATENT_ALIGN, plan.CHANNELS_LAST) for z in (y, b)),
            contiguous(weight), contiguous(bias), contiguous(offset), moments, places, sizes,
            P=plan, OFFSET=offset is not None, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return sums.sum(2)
