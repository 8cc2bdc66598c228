"""Triton kernels and launchers for the first pass: mean and variance of each group.

Of a video, or of a residual sum that the same pass writes. A program takes a strip, a run of a
frame's pixels, of some channels, and sums differences from the mean of its first tile and their
squares, so that a large mean costs no digits. Strips are merged in a fixed order by the exact
formula for the mean and variance of a union (Chan et al.): the same input gives the same bits. The
number of programs does not depend on that of groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, contiguous, next_power_of_2, on_device
from .device_utils import (
    expand_channels,
    load,
    load_vector,
    store,
    sum_pixels,
    tile_channels,
    tile_mask,
    tile_pixels,
)
from .launch import WARPS, plan_of, sizes_of, span_of, video_of
from .validation import Settings

# Estimated, not measured: so long that the parts of a strip are a hundredth of its bytes.
STRIP = 1024  # pixels
MERGED = 4096  # parts merged by one program


@triton.jit
def _load_tile(videos, pre_bias, program, step, sizes, lanes, P: tl.constexpr):
    """A tile of x + pre_bias and its mask; with h, of x + h + pre_bias, rounded and stored."""
    total, x, h = videos
    batch, frame, strip = program
    channel, channel_mask = lanes
    row, col, mask = tile_pixels(strip, step, sizes, P)
    mask = tile_mask(mask, channel_mask, P)
    at = batch, frame, row, col, channel
    tile = load(x, at, mask, P)
    if h.ptr is not None:
        tile += load(h, at, mask, P)
        tile += expand_channels(pre_bias, P)
        tile = store(total, at, mask, tile, P).to(P.COMPUTE)
    else:
        tile += expand_channels(pre_bias, P)
    return tile, mask


@triton.jit(do_not_specialize=["strips"])
def _moments_kernel(parts_ptr, videos, pre_bias_ptr, strips, sizes, P: tl.constexpr):
    """Grid (batch · frames · strips · tiles of channels,). videos: total, x, h.

    parts_ptr: (batch, frames, strips, 3, channels): for each strip and channel a shift, the mean
    minus the shift, and m2, the sum of squared differences from the mean.
    """
    RUN: tl.constexpr = P.RUN
    lanes = tile_channels(tl.program_id(0) % P.TILES, P)
    channel, channel_mask = lanes
    block = tl.program_id(0) // P.TILES
    strip = block % strips
    frame = tl.cast(block // strips, tl.int64) % sizes.frames
    batch = tl.cast(block // strips, tl.int64) // sizes.frames
    pre_bias = load_vector(pre_bias_ptr, channel, channel_mask, 0.0, P)
    pixels = tl.cast(sizes.height, tl.int64) * sizes.width
    first = tl.cast(strip, tl.int64) * sizes.span * RUN
    program = batch, frame, strip
    tile, mask = _load_tile(videos, pre_bias, program, 0, sizes, lanes, P)
    tile = tl.where(mask, tile, 0.0)
    shift = sum_pixels(tile, P) / tl.minimum(pixels - first, RUN).to(P.COMPUTE)
    # inf - inf would be NaN: an infinity must reach the mean as one.
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    tile = tl.where(mask, tile - expand_channels(shift, P), 0.0)
    sums = tile
    squares = tile * tile
    for step in range(1, tl.minimum(sizes.span, (pixels - first + (RUN - 1)) // RUN)):
        tile, mask = _load_tile(videos, pre_bias, program, step, sizes, lanes, P)
        tile = tl.where(mask, tile - expand_channels(shift, P), 0.0)
        sums += tile
        squares += tile * tile
    total_sum = sum_pixels(sums, P)
    count = tl.minimum(pixels - first, tl.cast(sizes.span, tl.int64) * RUN).to(P.COMPUTE)
    mean = total_sum / count
    m2 = sum_pixels(squares, P) - total_sum * mean
    parts_ptr += tl.cast(block, tl.int64) * (3 * P.CHANNELS) + channel
    tl.store(parts_ptr, shift, mask=channel_mask)
    tl.store(parts_ptr + P.CHANNELS, mean, mask=channel_mask)
    tl.store(parts_ptr + 2 * P.CHANNELS, tl.where(m2 < 0.0, 0.0, m2), mask=channel_mask)


@triton.jit
def _load_part(
    parts_ptr, row, rows, col, channel_mask, strip, strips, pixels, WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
):  # fmt: skip
    """Parts to merge, each (rows, cols): shift, mean minus shift, m2, number of elements; mask."""
    mask = (row < rows)[:, None] & channel_mask[None, :]
    addr = parts_ptr + row[:, None] * (KINDS * WIDTH) + col[None, :]
    shift = tl.load(addr, mask=mask, other=0.0)
    mean = tl.load(addr + WIDTH, mask=mask, other=0.0)
    m2 = tl.load(addr + 2 * WIDTH, mask=mask, other=0.0)
    if KINDS == 4:
        count = tl.load(addr + 3 * WIDTH, mask=mask, other=0.0)
    else:
        pixel_count = tl.minimum(pixels - (row % strips) * strip, strip)
        count = tl.where(mask, pixel_count[:, None], 0).to(shift.dtype)
    return shift, mean, m2, count, mask


@triton.jit(do_not_specialize=["rows", "chunk", "chunks", "strip", "strips", "pixels"])
def _merge_kernel(
    out_ptr, parts_ptr, rows, chunk, chunks, strip, strips, pixels,
    KINDS: tl.constexpr, WIDTH: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    COLS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Grid (units · chunks · groups,): a unit is a sample, or a frame of one.

    parts_ptr: (units, rows, KINDS, WIDTH), WIDTH = groups · GROUP_SIZE; a program merges `chunk`
    rows of a group. out_ptr: (units, groups, 2), mean and variance, if LAST; else (units, chunks,
    4, groups), merged parts with their number of elements.
    """
    GROUPS: tl.constexpr = WIDTH // GROUP_SIZE
    group = tl.cast(tl.program_id(0) % GROUPS, tl.int64)
    block = tl.cast(tl.program_id(0) // GROUPS, tl.int64)
    unit = block // chunks
    first = (block % chunks) * chunk
    end = tl.minimum(first + chunk, tl.cast(rows, tl.int64))
    parts_ptr += unit * rows * (KINDS * WIDTH) + group * GROUP_SIZE
    col = tl.arange(0, COLS).to(tl.int64)
    channel_mask = col < GROUP_SIZE
    center = tl.load(parts_ptr + first * (KINDS * WIDTH))
    sums = tl.zeros((BLOCK, COLS), center.dtype)
    counts = tl.zeros((BLOCK, COLS), center.dtype)
    for start in range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        shift, mean, _, count, mask = _load_part(
            parts_ptr, row, end, col, channel_mask, strip, strips, pixels, WIDTH, KINDS
        )
        sums += tl.where(mask, count * ((shift - center) + mean), 0.0)
        counts += count
    total = tl.sum(tl.sum(counts, axis=1), axis=0)
    delta = tl.sum(tl.sum(sums, axis=1), axis=0) / total
    squares = tl.zeros((BLOCK, COLS), center.dtype)
    for start in range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        shift, mean, m2, count, mask = _load_part(
            parts_ptr, row, end, col, channel_mask, strip, strips, pixels, WIDTH, KINDS
        )
        diff = (shift - center) + mean - delta
        squares += tl.where(mask, m2 + count * (diff * diff), 0.0)
    squared = tl.sum(tl.sum(squares, axis=1), axis=0)
    if LAST:
        out_ptr += (unit * GROUPS + group) * 2
        tl.store(out_ptr, center + delta)
        tl.store(out_ptr + 1, squared / total)
    else:
        out_ptr += block * (4 * GROUPS) + group
        tl.store(out_ptr, center)
        tl.store(out_ptr + GROUPS, delta)
        tl.store(out_ptr + 2 * GROUPS, squared)
        tl.store(out_ptr + 3 * GROUPS, total)


# --- launchers -------------------------------------------------------------------------------


def moments_fwd(
    moments: Tensor, total: Tensor | None, x: Tensor, h: Tensor | None, pre_bias: Tensor | None,
    num_groups: int, per_frame: bool,
) -> None:  # fmt: skip
    """Write the statistics of x + pre_bias to `moments`.

    With h, write x + h + pre_bias to `total`, and its statistics.
    """
    batch, channels, frames, height, width = x.shape
    if x.numel() == 0:
        return
    plan = plan_of(x, Settings(num_groups), (h, total))
    videos = tuple(video_of(z, plan.ALIGN, plan.CHANNELS_LAST) for z in (total, x, h))
    pixels = height * width
    span = span_of(x, plan, STRIP // plan.RUN)
    sizes = sizes_of(x, None, plan, span)
    strips = sizes.down
    parts = torch.empty((batch, frames, strips, 3, channels), dtype=moments.dtype, device=x.device)
    with on_device(x):
        _moments_kernel[(batch * frames * strips * plan.TILES,)](
            parts, videos, contiguous(pre_bias), strips, sizes, P=plan,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        units = parts.view(batch * frames if per_frame else batch, -1, 3, channels)
        _merge(moments, units, num_groups, plan.RUN * span, strips, pixels)


def _merge(
    moments: Tensor, parts: Tensor, num_groups: int, strip: int, strips: int, pixels: int
) -> None:
    """Merge parts (units, rows, kinds, width) into moments (units, groups, 2).

    In as many rounds as it takes for no program to merge more than `MERGED`.
    """
    units, rows, kinds, width = parts.shape
    group_size = width // num_groups
    cols = next_power_of_2(group_size)
    block = max(1, 1024 // cols)
    chunk = max(2, MERGED // cols)
    chunks = cdiv(rows, chunk)
    out = moments
    if chunks > 1:
        out = parts.new_empty((units, chunks, 4, num_groups))
    _merge_kernel[(units * chunks * num_groups,)](
        out, parts, rows, chunk, chunks, strip, strips, pixels,
        KINDS=kinds, WIDTH=width, GROUP_SIZE=group_size, BLOCK=block, COLS=cols, LAST=chunks == 1,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    if chunks > 1:
        _merge(moments, out, num_groups, strip, strips, pixels)
