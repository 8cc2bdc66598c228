"""Triton kernel for the gradient of a dense weight: each program sums over a strip of rows.

A unit is a tile of pixels of one output frame, a strip a run of units. The launcher sums the
strips in order.
"""

import triton
import triton.language as tl

from .device_utils import (
    add_product,
    first_tap,
    frame_address,
    pixel_count,
    pixel_offsets,
    source_frame,
    unit_tile,
)


@triton.jit(do_not_specialize=["units", "strip_units"])
def dense_weight_kernel(
    sums_ptr, bias_sums_ptr, x, cache, dout, sizes, units, strip_units, P: tl.constexpr
):
    """sums (strips, KERNEL, OUT, IN) = doutᵀ · the frame a tap reads; bias_sums (strips, OUT).

    Grid (strips · tiles of OUT · tiles of IN · KERNEL,): taps of the same rows are neighbours.
    """
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    NROWS: tl.constexpr = (P.OUT + BLOCK_ROWS - 1) // BLOCK_ROWS
    NCOLS: tl.constexpr = (P.IN + BLOCK_COLS - 1) // BLOCK_COLS
    program = tl.program_id(0).to(tl.int64)
    tap = program % P.KERNEL
    program //= P.KERNEL
    col_tile = program % NCOLS
    program //= NCOLS
    row_tile, strip = program % NROWS, program // NROWS
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inner = tl.arange(0, P.BLOCK_INNER)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE)
    first = strip * strip_units
    last = tl.minimum(first + strip_units, tl.cast(units, tl.int64))
    for unit in range(first, last):
        batch, tile, frame = unit_tile(unit, sizes)
        pixel = tile * P.BLOCK_INNER + inner
        pixel_mask = pixel < pixel_count(sizes, P)
        a = _load_transposed(dout, batch, frame, pixel, pixel_mask, rows, P)
        ptr, stride = source_frame(x, cache, batch, frame * P.STRIDE + tap, P)
        pixel_mask &= tap >= first_tap(frame, P)
        b = tl.load(ptr + pixel_offsets(pixel[:, None], cols[None, :], stride, P),
                    mask=pixel_mask[:, None] & (cols < P.IN)[None, :], other=0.0)  # fmt: skip
        acc = add_product(acc, a, b, P)
    at = ((strip * P.KERNEL + tap) * P.OUT + rows[:, None]) * P.IN + cols[None, :]
    tl.store(sums_ptr + at, acc, mask=(rows < P.OUT)[:, None] & (cols < P.IN)[None, :])
    if bias_sums_ptr is not None:
        if tap == 0 and col_tile == 0:
            total = tl.zeros((BLOCK_ROWS,), P.COMPUTE)
            for unit in range(first, last):
                batch, tile, frame = unit_tile(unit, sizes)
                pixel = tile * P.BLOCK_INNER + inner
                pixel_mask = pixel < pixel_count(sizes, P)
                a = _load_transposed(dout, batch, frame, pixel, pixel_mask, rows, P)
                total += tl.sum(a.to(P.COMPUTE), 1)
            tl.store(bias_sums_ptr + strip * P.OUT + rows, total, mask=rows < P.OUT)


@triton.jit
def _load_transposed(dout, batch, frame, pixel, pixel_mask, rows, P: tl.constexpr):
    """Load gradients of a frame as (channels, pixels)."""
    at = pixel_offsets(pixel[None, :], rows[:, None], tl.cast(dout.inner, tl.int64), P)
    mask = pixel_mask[None, :] & (rows < P.OUT)[:, None]
    return tl.load(frame_address(dout, batch, frame, P) + at, mask=mask, other=0.0)
