"""The first pass: mean and variance of every group, of a video or of a sum that is made on the way.

A strip is a run of a frame's pixels. A program takes a strip of some channels and sums what they
differ by from the mean of its first tile, and the squares of that, which loses nothing to a large
mean; strips are merged in a fixed order by the exact formula for means and variances of parts, so
the same input gives the same bits, and how many groups there are changes nothing of how many
programs run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import on_device
from .device_utils import (
    WARPS,
    channels_of,
    contiguous,
    load,
    of_channels,
    over_pixels,
    pixels_of,
    plan_of,
    sizes_of,
    span_of,
    store,
    vector,
    video_of,
    whole,
)

# Reasoned, not yet measured: as long as keeps a strip's parts at a hundredth of its bytes.
STRIP = 1024  # pixels
MERGED = 4096  # parts that one program merges


@triton.jit
def _row_of(total, x, h, offset, batch, frame, place, step, sizes, channel, there, P: tl.constexpr):
    """A tile of x + offset; or of x + h + offset as it is rounded, which is stored. Its mask."""
    row, col, mask = pixels_of(place, step, sizes, P)
    mask = whole(mask, there, P)
    tile = load(x, batch, frame, row, col, channel, mask, P)
    if h.ptr is not None:
        tile += load(h, batch, frame, row, col, channel, mask, P)
        tile += of_channels(offset, P)
        tile = store(total, batch, frame, row, col, channel, mask, tile, P).to(P.COMPUTE)
    else:
        tile += of_channels(offset, P)
    return tile, mask


@triton.jit(do_not_specialize=["strips"])
def _moments_kernel(parts_ptr, total, x, h, offset_ptr, strips, sizes, P: tl.constexpr):
    """Grid (batch · frames · strips · tiles of channels,).

    parts_ptr: (batch, frames, strips, 3, channels): for each strip and channel a shift, the mean
    less the shift, and the sum of squares about the mean.
    """
    RUN: tl.constexpr = P.RUN
    channel, there = channels_of(tl.program_id(0) % P.TILES, P)
    place = tl.program_id(0) // P.TILES
    strip = place % strips
    frame = tl.cast(place // strips, tl.int64) % sizes.frames
    batch = tl.cast(place // strips, tl.int64) // sizes.frames
    offset = vector(offset_ptr, channel, there, 0.0, P)
    pixels = tl.cast(sizes.height, tl.int64) * sizes.width
    first = tl.cast(strip, tl.int64) * sizes.span * RUN
    tile, mask = _row_of(total, x, h, offset, batch, frame, strip, 0, sizes, channel, there, P)
    tile = tl.where(mask, tile, 0.0)
    shift = over_pixels(tile, P) / tl.minimum(pixels - first, RUN).to(P.COMPUTE)
    # An infinity has to reach the mean as one, so it must not be taken from itself.
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    tile = tl.where(mask, tile - of_channels(shift, P), 0.0)
    sums = tile
    squares = tile * tile
    for step in range(1, tl.minimum(sizes.span, (pixels - first + (RUN - 1)) // RUN)):
        tile, mask = _row_of(
            total, x, h, offset, batch, frame, strip, step, sizes, channel, there, P
        )
        tile = tl.where(mask, tile - of_channels(shift, P), 0.0)
        sums += tile
        squares += tile * tile
    total_sum = over_pixels(sums, P)
    count = tl.minimum(pixels - first, tl.cast(sizes.span, tl.int64) * RUN).to(P.COMPUTE)
    mean = total_sum / count
    about = over_pixels(squares, P) - total_sum * mean
    parts_ptr += tl.cast(place, tl.int64) * (3 * P.CHANNELS) + channel
    tl.store(parts_ptr, shift, mask=there)
    tl.store(parts_ptr + P.CHANNELS, mean, mask=there)
    tl.store(parts_ptr + 2 * P.CHANNELS, tl.where(about < 0.0, 0.0, about), mask=there)


@triton.jit
def _part(parts_ptr, row, rows, col, there, strip, strips, pixels, WIDTH: tl.constexpr,
          KINDS: tl.constexpr):  # fmt: skip
    """Parts to merge, (rows, cols): shift, mean less shift, squares about it, and how many."""
    mask = (row < rows)[:, None] & there[None, :]
    where = parts_ptr + row[:, None] * (KINDS * WIDTH) + col[None, :]
    shift = tl.load(where, mask=mask, other=0.0)
    mean = tl.load(where + WIDTH, mask=mask, other=0.0)
    about = tl.load(where + 2 * WIDTH, mask=mask, other=0.0)
    if KINDS == 4:
        count = tl.load(where + 3 * WIDTH, mask=mask, other=0.0)
    else:
        each = tl.minimum(pixels - (row % strips) * strip, strip)
        count = tl.where(mask, each[:, None], 0).to(shift.dtype)
    return shift, mean, about, count, mask


@triton.jit(do_not_specialize=["rows", "chunk", "chunks", "strip", "strips", "pixels"])
def _merge_kernel(
    out_ptr, parts_ptr, rows, chunk, chunks, strip, strips, pixels,
    KINDS: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
    COLS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Grid (units · chunks · groups,): a unit is a sample, or a frame of one.

    parts_ptr: (units, rows, KINDS, WIDTH), WIDTH = groups · EACH; a program merges `chunk` rows of
    a group. out_ptr: (units, groups, 2), mean and variance, if LAST; else (units, chunks, 4,
    groups), parts again with how many elements they stand for.
    """
    GROUPS: tl.constexpr = WIDTH // EACH
    group = tl.cast(tl.program_id(0) % GROUPS, tl.int64)
    place = tl.cast(tl.program_id(0) // GROUPS, tl.int64)
    unit = place // chunks
    first = (place % chunks) * chunk
    end = tl.minimum(first + chunk, tl.cast(rows, tl.int64))
    parts_ptr += unit * rows * (KINDS * WIDTH) + group * EACH
    col = tl.arange(0, COLS).to(tl.int64)
    there = col < EACH
    about_what = tl.load(parts_ptr + first * (KINDS * WIDTH))
    sums = tl.zeros((BLOCK, COLS), about_what.dtype)
    counts = tl.zeros((BLOCK, COLS), about_what.dtype)
    for start in range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        shift, mean, _, count, mask = _part(
            parts_ptr, row, end, col, there, strip, strips, pixels, WIDTH, KINDS
        )
        sums += tl.where(mask, count * ((shift - about_what) + mean), 0.0)
        counts += count
    total = tl.sum(tl.sum(counts, axis=1), axis=0)
    beyond = tl.sum(tl.sum(sums, axis=1), axis=0) / total
    squares = tl.zeros((BLOCK, COLS), about_what.dtype)
    for start in range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        shift, mean, about, count, mask = _part(
            parts_ptr, row, end, col, there, strip, strips, pixels, WIDTH, KINDS
        )
        apart = (shift - about_what) + mean - beyond
        squares += tl.where(mask, about + count * (apart * apart), 0.0)
    squared = tl.sum(tl.sum(squares, axis=1), axis=0)
    if LAST:
        out_ptr += (unit * GROUPS + group) * 2
        tl.store(out_ptr, about_what + beyond)
        tl.store(out_ptr + 1, squared / total)
    else:
        out_ptr += place * (4 * GROUPS) + group
        tl.store(out_ptr, about_what)
        tl.store(out_ptr + GROUPS, beyond)
        tl.store(out_ptr + 2 * GROUPS, squared)
        tl.store(out_ptr + 3 * GROUPS, total)


# --- launchers -------------------------------------------------------------------------------


def moments_fwd(
    moments: Tensor, total: Tensor | None, x: Tensor, h: Tensor | None, offset: Tensor | None,
    num_groups: int, per_frame: bool,
) -> None:  # fmt: skip
    """Into `moments` the statistics of x + offset; with h, into `total` x + h + offset, and its."""
    batch, channels, frames, height, width = x.shape
    if x.numel() == 0:
        return
    plan = plan_of(x, num_groups, (h, total))
    videos = [video_of(z, plan.ALIGN, plan.CHANNELS_LAST) for z in (total, x, h)]
    pixels = height * width
    span = span_of(x, plan, STRIP // plan.RUN)
    sizes = sizes_of(x, None, plan, span)
    strips = sizes.down
    parts = torch.empty((batch, frames, strips, 3, channels), dtype=moments.dtype, device=x.device)
    with on_device(x):
        _moments_kernel[(batch * frames * strips * plan.TILES,)](
            parts, *videos, contiguous(offset), strips, sizes, P=plan,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        units, rows = (batch * frames, strips) if per_frame else (batch, frames * strips)
        _merge(
            moments, parts, units, rows, 3, channels, num_groups, plan.RUN * span, strips, pixels
        )


def _merge(
    moments: Tensor, parts: Tensor, units: int, rows: int, kinds: int, width: int, num_groups: int,
    strip: int, strips: int, pixels: int,
) -> None:  # fmt: skip
    """Parts (units, rows, kinds, width) into moments (units, groups, 2), in as many rounds as
    it takes for no program to merge very many."""
    each = width // num_groups
    cols = triton.next_power_of_2(each)
    block = max(1, 1024 // cols)
    chunk = max(2, MERGED // cols)
    chunks = triton.cdiv(rows, chunk)
    out = moments
    if chunks > 1:
        out = parts.new_empty((units, chunks, 4, num_groups))
    _merge_kernel[(units * chunks * num_groups,)](
        out, parts, rows, chunk, chunks, strip, strips, pixels,
        KINDS=kinds, WIDTH=width, EACH=each, BLOCK=block, COLS=cols, LAST=chunks == 1,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    if chunks > 1:
        _merge(moments, out, units, chunks, 4, num_groups, num_groups, strip, strips, pixels)
