"""Triton kernels and launchers of spatial_norm.

Two passes: statistics (`statistics.py`), then norm, modulation and SiLU. In the second a program
takes a few columns of latents and some channels, folds statistics, weight, bias, y and b into one
scale and one shift, and applies them to the rows of pixels that share these latents. The program
that writes a frame to the cache also moves the cached frame that it replaces. The backward sums
over pixels (`gradients.py`), then runs the second pass again for the gradient of x.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAST, cdiv, on_device
from .device_utils import (
    address,
    expand_cells,
    expand_channels,
    latent_frame_of,
    load,
    load_group_pair,
    load_latent,
    load_vector,
    mean_rstd,
    silu,
    silu_grad,
    store,
    tile_channels,
    tile_columns,
    tile_mask,
    tile_pixels,
)
from .gradients import sums_kernel
from .launch import WARPS, latent_video, modulation_of, plan_of, sizes_of, span_of, video_of
from .statistics import STRIP, moments_fwd
from .validation import Parameters, Settings

__all__ = ["moments_fwd", "spatial_norm_bwd", "spatial_norm_fwd"]

ROWS = 8  # of pixels, which share what a program loads for a row of latents


# --- second pass: norm, modulation, SiLU -----------------------------------------------------


@triton.jit
def _update_cache(videos, at, mask, value, sizes, P: tl.constexpr):
    """Copy the cached pixels to the head of the result, and `value` into the cache.

    A pixel of frame f replaces the cached one `frames` before it: one program reads and writes
    both.
    """
    batch, frame, row, col, channel = at
    slot = frame - (sizes.frames - sizes.cache_len)
    if slot >= 0:
        cached = address(videos.cache, (batch, slot, row, col, channel), P)
        head = address(videos.head, (batch, slot, row, col, channel), P)
        if P.CACHE == "continue":
            old = tl.load(cached, mask=mask, other=0.0)
            tl.store(head, old, mask=mask)
            tl.debug_barrier()  # other threads may write what these read: reads come first
        elif P.CACHE == "zeros":
            tl.store(head, tl.zeros_like(value), mask=mask)
        tl.store(cached, value, mask=mask)
    if P.CACHE == "replicate":
        if frame == 0:
            for before in range(0, sizes.cache_len):
                past = tl.cast(before, tl.int64)
                addr = address(videos.head, (batch, past, row, col, channel), P)
                tl.store(addr, value, mask=mask)


@triton.jit
def _apply_tile(videos, group_means_ptr, at, mask, stats, affine, sizes, P: tl.constexpr):
    """Compute and store a tile of the result; given dout, of the gradient of x."""
    pre_bias, mean, mean_grad, mean_dot = stats
    scale, shift = affine
    x = load(videos.x, at, mask, P)
    if P.SHORT:
        # Multiplied out, once for all tiles: the digits that cancel are not in a short x either.
        shift += scale * (pre_bias - mean)[None, :]
        mean_grad += mean_dot * (pre_bias - mean)
    else:
        x = (x + expand_channels(pre_bias, P)) - expand_channels(mean, P)
    factor = expand_cells(scale, P)
    z = x * factor + expand_cells(shift, P)
    if videos.dout.ptr is not None:
        grad = load(videos.dout, at, mask, P) * silu_grad(z, P) * factor
        if group_means_ptr is not None:
            grad = (grad - expand_channels(mean_grad, P)) - x * expand_channels(mean_dot, P)
        store(videos.out, at, mask, grad, P)
    else:
        value = store(videos.out, at, mask, silu(z, P), P)
        if P.CACHE != "none":
            _update_cache(videos, at, mask, value, sizes, P)


@triton.jit
def _apply_kernel(videos, m, moments_ptr, group_means_ptr, sizes, P: tl.constexpr):
    """Grid (batch · frames · down · across · tiles of channels,).

    group_means_ptr: (units, groups, 2), means over the group of the gradient of x̂ and of its
    product with x̂, for the gradient of x; None if the statistics do not depend on x.
    """
    channel, channel_mask = tile_channels(tl.program_id(0) % P.TILES, P)
    block = tl.program_id(0) // P.TILES
    across = block % sizes.across
    block = block // sizes.across
    down = block % sizes.down
    block = tl.cast(block // sizes.down, tl.int64)
    frame = block % sizes.frames
    batch = block // sizes.frames
    pre_bias = load_vector(m.offset, channel, channel_mask, 0.0, P)
    weight = load_vector(m.weight, channel, channel_mask, 1.0, P)
    bias = load_vector(m.bias, channel, channel_mask, 0.0, P)
    mean, rstd = mean_rstd(moments_ptr, batch, frame, sizes, channel, channel_mask, P)
    mean_grad = mean
    mean_dot = rstd
    if group_means_ptr is not None:
        mean_grad, mean_dot = load_group_pair(
            group_means_ptr, batch, frame, sizes, channel, channel_mask, P
        )
        mean_grad *= rstd
        mean_dot *= rstd * rstd
    stats = pre_bias, mean, mean_grad, mean_dot
    weight *= rstd
    if P.RATIO == 0:
        affine = weight[None, :], bias[None, :]
        for step in range(0, sizes.span):
            row, col, mask = tile_pixels(down, step, sizes, P)
            at = batch, frame, row, col, channel
            mask = tile_mask(mask, channel_mask, P)
            _apply_tile(videos, group_means_ptr, at, mask, stats, affine, sizes, P)
    else:
        cell, col, mask = tile_columns(across, sizes, P)
        latents = (cell < sizes.cols)[:, None] & channel_mask[None, :]
        latent_row = tl.cast(down // sizes.parts, tl.int64)
        latent_at = batch, latent_frame_of(frame, sizes, P), latent_row, cell, channel
        scale = load_latent(m.y, latent_at, latents, 1.0, P)
        shift = load_latent(m.b, latent_at, latents, 0.0, P)
        shift += scale * bias[None, :]
        scale *= weight[None, :]
        mask = tile_mask(mask, channel_mask, P)
        first = tl.cast(down % sizes.parts, tl.int64) * sizes.span
        for line in range(first, tl.minimum(first + sizes.span, sizes.rows_per_latent)):
            at = batch, frame, latent_row * sizes.rows_per_latent + line, col, channel
            _apply_tile(videos, group_means_ptr, at, mask, stats, (scale, shift), sizes, P)


# --- launchers -------------------------------------------------------------------------------


class Videos(NamedTuple):
    """Videos of the second pass: `head` and `cache` if it updates a cache, `dout` in a backward."""

    out: Any
    head: Any
    cache: Any
    x: Any
    dout: Any
    last: None = LAST


def spatial_norm_fwd(
    out: Tensor, cache: Tensor | None, x: Tensor, moments: Tensor, parameters: Parameters,
    settings: Settings, start: str = "",
) -> None:  # fmt: skip
    """Write the result to `out`, after the frames of `cache`, which become its last frames.

    x must have at least as many frames as the cache.
    """
    if x.numel() == 0:
        return
    cache_len = 0 if cache is None else cache.shape[2]
    head, body = (out[:, :, :cache_len], out[:, :, cache_len:]) if cache_len else (None, out)
    cache = cache if cache_len else None
    mode = "none" if cache is None else start or "continue"
    videos = Videos(body, head, cache, x, None)
    plan = plan_of(x, settings, videos[:4], (parameters.y, parameters.b), mode)
    _apply(plan, videos, parameters, moments, None, cache_len)


def _apply(plan, videos, parameters, moments, group_means, cache_len=0) -> None:
    x = videos.x
    sizes = sizes_of(x, parameters.latents, plan, span_of(x, plan, ROWS), cache_len)
    programs = x.shape[0] * sizes.frames * sizes.down * sizes.across * plan.TILES
    with on_device(x):
        _apply_kernel[(programs,)](
            Videos(*(video_of(z, plan.ALIGN, plan.CHANNELS_LAST) for z in videos)),
            modulation_of(parameters, plan), moments, group_means, sizes,
            P=plan, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def spatial_norm_bwd(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], dout: Tensor, x: Tensor,
    moments: Tensor, given: bool, parameters: Parameters, settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Write gradients of x, y and b to `grads`; return those of weight, bias, offset, moments.

    `given` statistics were passed in, not computed from x: they have a gradient, and that of x does
    not go through them. Returned gradients have the dtype of the statistics.
    """
    dx, dy, db = grads
    weight, _, y, b, _ = parameters
    num_groups, eps, per_frame, *_ = settings
    batch, channels, frames, height, width = x.shape
    plan = plan_of(x, settings, (dx, dout), (y, b, dy, db))
    if x.numel() == 0:
        for grad in (dy, db):
            if grad is not None:
                grad.zero_()
        sums = moments.new_zeros((batch, frames, 3, channels))
    else:
        sums = _sums(plan, dy, db, x, dout, parameters, moments)
    rstd = torch.rsqrt(moments[..., 1] + eps)  # (batch, frames or 1, groups)
    extent = frames if not per_frame else 1
    elements = channels // num_groups * extent * height * width
    sums = sums if per_frame else sums.sum(1, keepdim=True)
    dbias, dweight, xhat = sums.unbind(2)  # (batch, frames or 1, channels)
    scaled = [s if weight is None else s * weight for s in (dbias, dweight)]
    groups = torch.stack([s.unflatten(2, (num_groups, -1)).sum(3) for s in scaled], -1)
    group_means = groups / max(elements, 1)
    if dx is not None and x.numel():
        videos = Videos(dx, None, None, x, dout)
        _apply(plan, videos, parameters, moments, None if given else group_means)
    group_size = channels // num_groups
    doffset = scaled[0]
    if not given:
        mean, mean_dot = (z.repeat_interleave(group_size, 2) for z in group_means.unbind(-1))
        doffset = doffset - extent * height * width * mean - xhat * mean_dot
    doffset = doffset * rstd.repeat_interleave(group_size, 2)
    dmoments = torch.stack((-rstd * groups[..., 0], -0.5 * rstd**2 * groups[..., 1]), -1)
    return dweight.sum((0, 1)), dbias.sum((0, 1)), doffset.sum((0, 1)), dmoments


def _sums(plan, dy, db, x, dout, parameters, moments) -> Tensor:
    """Sums over pixels of y · g, of y · g · x̂, and of x̂: (batch, frames, 3, channels)."""
    batch, channels, frames = x.shape[:3]
    sizes = sizes_of(x, parameters.latents, plan, span_of(x, plan, STRIP // plan.RUN))
    blocks, units = sizes.down, frames
    if parameters.latents is not None:
        across = cdiv(sizes.cols, plan.CELLS)
        span = sizes.rows_per_latent * cdiv(plan.RATIO, plan.RUN)
        sizes = sizes._replace(across=across, span=span)
        blocks, units = sizes.rows * across, sizes.latents
    shape = (batch, frames if plan.PER_FRAME else units, blocks, 3, channels)
    sums = torch.empty(shape, dtype=moments.dtype, device=x.device)
    with on_device(x):
        sums_kernel[(batch * units * blocks * plan.TILES,)](
            sums, *(latent_video(z, plan) for z in (dy, db)),
            *(video_of(z, plan.ALIGN, plan.CHANNELS_LAST) for z in (x, dout)),
            modulation_of(parameters, plan), moments, blocks, sizes,
            P=plan, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return sums.sum(2)
