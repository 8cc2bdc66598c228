"""The kernel of a dense weight's gradient: sums over strips of rows, a strip to a program.

A unit is a tile of pixels of one frame of the result, a strip a run of units; strips are summed by
the launcher, in their order.
"""

import triton
import triton.language as tl

from .device_utils import cells, count_of, first_tap, frame_at, plus_product, source_of, unit_of


@triton.jit(do_not_specialize=["units", "each"])
def dense_weight_kernel(sums_ptr, of_bias_ptr, x, cache, dout, sizes, units, each, P: tl.constexpr):
    """sums (strips, KERNEL, OUT, IN) = doutᵀ · the frame a tap reads; of_bias (strips, OUT).

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
    first = strip * each
    last = tl.minimum(first + each, tl.cast(units, tl.int64))
    for unit in range(first, last):
        batch, tile, frame = unit_of(unit, sizes)
        pixel = tile * P.BLOCK_INNER + inner
        there = pixel < count_of(sizes, P)
        a = _turned(dout, batch, frame, pixel, there, rows, P)
        ptr, stride = source_of(x, cache, batch, frame * P.STRIDE + tap, P)
        there &= tap >= first_tap(frame, P)
        b = tl.load(ptr + cells(pixel[:, None], cols[None, :], stride, P),
                    mask=there[:, None] & (cols < P.IN)[None, :], other=0.0)  # fmt: skip
        acc = plus_product(acc, a, b, P)
    at = ((strip * P.KERNEL + tap) * P.OUT + rows[:, None]) * P.IN + cols[None, :]
    tl.store(sums_ptr + at, acc, mask=(rows < P.OUT)[:, None] & (cols < P.IN)[None, :])
    if of_bias_ptr is not None:
        if tap == 0 and col_tile == 0:
            total = tl.zeros((BLOCK_ROWS,), P.COMPUTE)
            for unit in range(first, last):
                batch, tile, frame = unit_of(unit, sizes)
                pixel = tile * P.BLOCK_INNER + inner
                there = pixel < count_of(sizes, P)
                a = _turned(dout, batch, frame, pixel, there, rows, P)
                total += tl.sum(a.to(P.COMPUTE), 1)
            tl.store(of_bias_ptr + strip * P.OUT + rows, total, mask=rows < P.OUT)


@triton.jit
def _turned(dout, batch, frame, pixel, there, rows, P: tl.constexpr):
    """A frame's gradients, (channels, pixels)."""
    at = cells(pixel[None, :], rows[:, None], tl.cast(dout.inner, tl.int64), P)
    mask = there[None, :] & (rows < P.OUT)[:, None]
    return tl.load(frame_at(dout, batch, frame, P) + at, mask=mask, other=0.0)
