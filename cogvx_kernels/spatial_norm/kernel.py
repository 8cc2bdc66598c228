"""Triton kernels and launchers of spatial_norm.

Two passes: statistics (`statistics.py`), then norm, modulation and SiLU. In the second a program
takes a few columns of latents and some channels, folds statistics, weight, bias, y and b into one
scale and one shift, and applies them to the rows of pixels that share these latents. The program
that writes a frame to the cache also moves the cached frame that it replaces. The backward sums
over pixels (`gradients.py`), then runs the second pass again for the gradient of x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import on_device
from .device_utils import (
    WARPS,
    address,
    contiguous,
    expand_cells,
    expand_channels,
    latent_frame_of,
    load,
    load_group_pair,
    load_latent,
    load_vector,
    mean_rstd,
    plan_of,
    silu_grad,
    sizes_of,
    span_of,
    store,
    tile_channels,
    tile_columns,
    tile_mask,
    tile_pixels,
    video_of,
)
from .gradients import sums_kernel
from .statistics import STRIP, moments_fwd

__all__ = ["moments_fwd", "spatial_norm_bwd", "spatial_norm_fwd"]

ROWS = 8  # of pixels, which share what a program loads for a row of latents


# --- second pass: norm, modulation, SiLU -----------------------------------------------------


@triton.jit
def _update_cache(
    head, cache, batch, frame, row, col, channel, mask, value, sizes, P: tl.constexpr
):
    """Copy the cached pixels to the head of the result, and `value` into the cache.

    A pixel of frame f replaces the cached one `frames` before it: one program reads and writes
    both.
    """
    slot = frame - (sizes.frames - sizes.cache_len)
    if slot >= 0:
        cached = address(cache, batch, slot, row, col, channel, P.ALIGN, P)
        if P.CACHE == "continue":
            old = tl.load(cached, mask=mask, other=0.0)
            tl.store(address(head, batch, slot, row, col, channel, P.ALIGN, P), old, mask=mask)
            tl.debug_barrier()  # other threads may write what these read: reads come first
        elif P.CACHE == "zeros":
            zeros = tl.zeros_like(value)
            tl.store(address(head, batch, slot, row, col, channel, P.ALIGN, P), zeros, mask=mask)
        tl.store(cached, value, mask=mask)
    if P.CACHE == "replicate":
        if frame == 0:
            for before in range(0, sizes.cache_len):
                past = tl.cast(before, tl.int64)
                addr = address(head, batch, past, row, col, channel, P.ALIGN, P)
                tl.store(addr, value, mask=mask)


@triton.jit
def _apply_tile(
    out, head, cache, x, dout, group_means_ptr, batch, frame, row, col, channel, channel_mask, mask,
    pre_bias, mean, mean_grad, mean_dot, scale, shift, sizes, P: tl.constexpr,
):  # fmt: skip
    """Compute and store a tile of the result; given dout, of the gradient of x."""
    mask = tile_mask(mask, channel_mask, P)
    f = load(x, batch, frame, row, col, channel, mask, P) + expand_channels(pre_bias, P)
    centered = f - expand_channels(mean, P)
    factor = expand_cells(scale, P)
    z = centered * factor + expand_cells(shift, P)
    if dout.ptr is not None:
        grad = load(dout, batch, frame, row, col, channel, mask, P) * silu_grad(z, P) * factor
        if group_means_ptr is not None:
            grad -= expand_channels(mean_grad, P) + centered * expand_channels(mean_dot, P)
        store(out, batch, frame, row, col, channel, mask, grad, P)
    else:
        if P.SILU:
            z = z / (1.0 + tl.exp(-z))
        value = store(out, batch, frame, row, col, channel, mask, z, P)
        if P.CACHE != "none":
            _update_cache(head, cache, batch, frame, row, col, channel, mask, value, sizes, P)


@triton.jit
def _apply_kernel(
    out, head, cache, x, dout, y, b, weight_ptr, bias_ptr, pre_bias_ptr, moments_ptr,
    group_means_ptr, sizes, P: tl.constexpr,
):  # fmt: skip
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
    pre_bias = load_vector(pre_bias_ptr, channel, channel_mask, 0.0, P)
    weight = load_vector(weight_ptr, channel, channel_mask, 1.0, P)
    bias = load_vector(bias_ptr, channel, channel_mask, 0.0, P)
    mean, rstd = mean_rstd(moments_ptr, batch, frame, sizes, channel, channel_mask, P)
    mean_grad = mean
    mean_dot = rstd
    if group_means_ptr is not None:
        mean_grad, mean_dot = load_group_pair(
            group_means_ptr, batch, frame, sizes, channel, channel_mask, P
        )
        mean_grad *= rstd
        mean_dot *= rstd * rstd
    weight *= rstd
    if P.RATIO == 0:
        for step in range(0, sizes.span):
            row, col, mask = tile_pixels(down, step, sizes, P)
            _apply_tile(
                out, head, cache, x, dout, group_means_ptr, batch, frame, row, col, channel,
                channel_mask, mask, pre_bias, mean, mean_grad, mean_dot, weight[None, :],
                bias[None, :], sizes, P,
            )  # fmt: skip
    else:
        cell, col, mask = tile_columns(across, sizes, P)
        latents = (cell < sizes.cols)[:, None] & channel_mask[None, :]
        latent_frame = latent_frame_of(frame, sizes, P)
        latent_row = tl.cast(down // sizes.parts, tl.int64)
        scale = load_latent(y, batch, latent_frame, latent_row, cell, channel, latents, 1.0, P)
        shift = load_latent(b, batch, latent_frame, latent_row, cell, channel, latents, 0.0, P)
        shift += scale * bias[None, :]
        scale *= weight[None, :]
        first = tl.cast(down % sizes.parts, tl.int64) * sizes.span
        for line in range(first, tl.minimum(first + sizes.span, sizes.rows_per_latent)):
            row = latent_row * sizes.rows_per_latent + line
            _apply_tile(
                out, head, cache, x, dout, group_means_ptr, batch, frame, row, col, channel,
                channel_mask, mask, pre_bias, mean, mean_grad, mean_dot, scale, shift, sizes, P,
            )  # fmt: skip


# --- launchers -------------------------------------------------------------------------------


def spatial_norm_fwd(
    out: Tensor, cache: Tensor | None, x: Tensor, moments: Tensor,
    weight: Tensor | None, bias: Tensor | None, y: Tensor | None, b: Tensor | None,
    pre_bias: Tensor | None, num_groups: int, eps: float, per_frame: bool, leads: bool, silu: bool,
    start: str = "",
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
    videos = (body, head, cache, x)
    plan = plan_of(x, num_groups, videos, (y, b), per_frame, leads, silu, eps, mode)
    _apply(plan, (*videos, None), y, b, weight, bias, pre_bias, moments, None, cache_len)


def _apply(plan, videos, y, b, weight, bias, pre_bias, moments, group_means, cache_len=0) -> None:
    body, *_, x, _ = videos
    sizes = sizes_of(x, y if y is not None else b, plan, span_of(x, plan, ROWS), cache_len)
    programs = x.shape[0] * sizes.frames * sizes.down * sizes.across * plan.TILES
    with on_device(x):
        _apply_kernel[(programs,)](
            *(video_of(z, plan.ALIGN, plan.CHANNELS_LAST) for z in videos),
            *(video_of(z, plan.LATENT_ALIGN, plan.CHANNELS_LAST) for z in (y, b)),
            contiguous(weight), contiguous(bias), contiguous(pre_bias), moments, group_means, sizes,
            P=plan, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def spatial_norm_bwd(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], dout: Tensor, x: Tensor,
    moments: Tensor, given: bool,
    weight: Tensor | None, bias: Tensor | None, y: Tensor | None, b: Tensor | None,
    pre_bias: Tensor | None, num_groups: int, eps: float, per_frame: bool, leads: bool, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Write gradients of x, y and b to `grads`; return those of weight, bias, pre_bias, moments.

    `given` statistics were passed in, not computed from x: they have a gradient, and that of x does
    not go through them. Returned gradients have the dtype of the statistics.
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
        sums = _sums(plan, dy, db, x, dout, y, b, weight, bias, pre_bias, moments)
    rstd = torch.rsqrt(moments[..., 1] + eps)  # (batch, frames or 1, groups)
    extent = frames if not per_frame else 1
    elements = channels // num_groups * extent * height * width
    sums = sums if per_frame else sums.sum(1, keepdim=True)
    dbias, dweight, xhat = sums.unbind(2)  # (batch, frames or 1, channels)
    scaled = [s if weight is None else s * weight for s in (dbias, dweight)]
    groups = torch.stack([s.unflatten(2, (num_groups, -1)).sum(3) for s in scaled], -1)
    group_means = groups / max(elements, 1)
    if dx is not None and x.numel():
        _apply(
            plan, (dx, None, None, x, dout), y, b, weight, bias, pre_bias, moments,
            None if given else group_means,
        )  # fmt: skip
    group_size = channels // num_groups
    dpre_bias = scaled[0]
    if not given:
        mean, mean_dot = (z.repeat_interleave(group_size, 2) for z in group_means.unbind(-1))
        dpre_bias = dpre_bias - extent * height * width * mean - xhat * mean_dot
    dpre_bias = dpre_bias * rstd.repeat_interleave(group_size, 2)
    dmoments = torch.stack((-rstd * groups[..., 0], -0.5 * rstd**2 * groups[..., 1]), -1)
    return dweight.sum((0, 1)), dbias.sum((0, 1)), dpre_bias.sum((0, 1)), dmoments


def _sums(plan, dy, db, x, dout, y, b, weight, bias, pre_bias, moments) -> Tensor:
    """Sums over pixels of y · g, of y · g · x̂, and of x̂: (batch, frames, 3, channels)."""
    batch, channels, frames = x.shape[:3]
    modulation = y if y is not None else b
    sizes = sizes_of(x, modulation, plan, span_of(x, plan, STRIP // plan.RUN))
    blocks, units = sizes.down, frames
    if modulation is not None:
        across = triton.cdiv(sizes.cols, plan.CELLS)
        span = sizes.rows_per_latent * triton.cdiv(plan.RATIO, plan.RUN)
        sizes = sizes._replace(across=across, span=span)
        blocks, units = sizes.rows * across, sizes.latents
    shape = (batch, frames if plan.PER_FRAME else units, blocks, 3, channels)
    sums = torch.empty(shape, dtype=moments.dtype, device=x.device)
    with on_device(x):
        sums_kernel[(batch * units * blocks * plan.TILES,)](
            sums, *(video_of(z, plan.LATENT_ALIGN, plan.CHANNELS_LAST) for z in (dy, db)),
            *(video_of(z, plan.ALIGN, plan.CHANNELS_LAST) for z in (x, dout)),
            *(video_of(z, plan.LATENT_ALIGN, plan.CHANNELS_LAST) for z in (y, b)),
            contiguous(weight), contiguous(bias), contiguous(pre_bias), moments, blocks, sizes,
            P=plan, PRE_BIAS=pre_bias is not None, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return sums.sum(2)
