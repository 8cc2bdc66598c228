"""Triton kernel for the gradient of a dense weight: each program sums over a strip of rows.

A group is a run of FRAMES output frames of one sample, a strip a range of pixels of a range of
groups. The launcher sums the strips in order.
"""

import triton
import triton.language as tl

from .device_utils import (
    add_product,
    frame_address,
    pixel_offsets,
    source_frame,
    strip_tiles,
    tile_address,
    tile_mask,
)


@triton.jit
def dense_weight_kernel(
    sums_ptr, bias_sums_ptr, x, cache, dout, sizes, strips, TAPS: tl.constexpr,
    FRAMES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """sums (strips, KERNEL, OUT, IN) = doutᵀ · the frame a tap reads; bias_sums (strips, OUT).

    A program has TAPS taps, which share the frames that it loads. Grid (strips · tiles of OUT ·
    tiles of IN · KERNEL / TAPS,): taps of the same rows are neighbours.
    """
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    BLOCK_INNER: tl.constexpr = P.BLOCK_INNER
    NROWS: tl.constexpr = (P.OUT + BLOCK_ROWS - 1) // BLOCK_ROWS
    NCOLS: tl.constexpr = (P.IN + BLOCK_COLS - 1) // BLOCK_COLS
    PARTS: tl.constexpr = P.KERNEL // TAPS
    LOADED: tl.constexpr = P.STRIDE * (FRAMES - 1) + TAPS
    program = tl.program_id(0).to(tl.int64)
    tap = program % PARTS * TAPS
    program //= PARTS
    col_tile = program % NCOLS
    program //= NCOLS
    row_tile, strip = program % NROWS, program // NROWS
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    pixel = tl.arange(0, BLOCK_INNER).to(tl.int64)
    grad_inner = tl.cast(dout.inner, tl.int64)
    grad_at = pixel_offsets(pixel[None, :], rows[:, None], grad_inner, P)
    accs = ()
    for _ in tl.static_range(TAPS):
        accs += (tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE),)
    # With several taps the bias sums are a product with ones, of the least columns: a tile that
    # wgmma reads, Triton overwrites too early if it is also loaded into registers.
    ONES: tl.constexpr = 16
    ones = tl.full((BLOCK_INNER, ONES), 1.0, tl.float32).to(dout.ptr.dtype.element_ty)
    total = tl.zeros((BLOCK_ROWS, ONES), P.COMPUTE)
    first_group, last_group, first_tile, last_tile = strip_tiles(strip, strips)
    for group in range(first_group, last_group):
        batch, frame = group // strips.runs, group % strips.runs * FRAMES
        for tile in range(first_tile, last_tile):
            mask = tile_mask(pixel, tile, BLOCK_INNER, sizes, P)
            grad_mask = mask[None, :] & (rows < P.OUT)[:, None]
            mask = mask[:, None] & (cols < P.IN)[None, :]
            values = ()
            for i in tl.static_range(LOADED):
                position = frame * P.STRIDE + tap + i
                ptr, inner = source_frame(x, cache, batch, position, P)
                ptr = tile_address(ptr, tile, BLOCK_INNER, inner, P)
                at = pixel_offsets(pixel[:, None], cols[None, :], inner, P)
                valid = position >= (P.KERNEL - 1 if P.PAST == "zeros" else 0)
                values += (tl.load(ptr + at, mask=mask & valid, other=0.0),)
            for i in tl.static_range(FRAMES):
                ptr = frame_address(dout, batch, frame + i, P)
                ptr = tile_address(ptr, tile, BLOCK_INNER, grad_inner, P)
                grad = tl.load(ptr + grad_at, mask=grad_mask, other=0.0)
                if bias_sums_ptr is not None and TAPS > 1:
                    total = add_product(total, grad, ones, P)
                sums = ()
                for j in tl.static_range(TAPS):
                    sums += (add_product(accs[j], grad, values[i * P.STRIDE + j], P),)
                accs = sums
    mask = (rows < P.OUT)[:, None] & (cols < P.IN)[None, :]
    for j in tl.static_range(TAPS):
        at = ((strip * P.KERNEL + tap + j) * P.OUT + rows[:, None]) * P.IN + cols[None, :]
        tl.store(sums_ptr + at, accs[j], mask=mask)
    if bias_sums_ptr is not None:
        if tap == 0 and col_tile == 0:
            if TAPS > 1:
                bias = tl.max(total, 1)
            else:
                bias = _strip_sums(dout, rows, strip, sizes, strips, P)
            tl.store(bias_sums_ptr + strip * P.OUT + rows, bias, mask=rows < P.OUT)


@triton.jit
def _strip_sums(dout, rows, strip, sizes, strips, P: tl.constexpr):
    """Sums of a strip's gradients, by channel, for groups of one frame."""
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_INNER: tl.constexpr = P.BLOCK_INNER
    pixel = tl.arange(0, BLOCK_INNER).to(tl.int64)
    inner = tl.cast(dout.inner, tl.int64)
    at = pixel_offsets(pixel[None, :], rows[:, None], inner, P)
    total = tl.zeros((BLOCK_ROWS, BLOCK_INNER), P.COMPUTE)
    first_group, last_group, first_tile, last_tile = strip_tiles(strip, strips)
    for group in range(first_group, last_group):
        frame = frame_address(dout, group // strips.runs, group % strips.runs, P)
        for tile in range(first_tile, last_tile):
            mask = tile_mask(pixel, tile, BLOCK_INNER, sizes, P)[None, :] & (rows < P.OUT)[:, None]
            ptr = tile_address(frame, tile, BLOCK_INNER, inner, P)
            total += tl.load(ptr + at, mask=mask, other=0.0).to(P.COMPUTE)
    return tl.sum(total, 1)
