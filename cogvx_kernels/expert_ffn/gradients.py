"""Kernels of the backward: gradients of the pre-activation and of the weights.

The gradient of x is the second product of `kernel.py`, with the weight transposed.
"""

import triton
import triton.language as tl

from .device_utils import (
    activate,
    bias_of,
    locate,
    matmul,
    pairs_of,
    plus_product,
    slopes,
    store,
    tile_of,
    token_rows,
)


@triton.jit(do_not_specialize=["tiles"])
def hidden_grad_kernel(
    dpre_ptr, hidden_ptr, dshare_ptr, dout, pre_ptr, groups, down, tiles, P: tl.constexpr
):
    """The gradient of the pre-activation, and the hidden activation recomputed, times the share.

    dshare (tiles of columns, pairs) is each program's part of dout · y. dpre_ptr may be pre_ptr: a
    program reads its tile before it writes it. Grid as in the forward.
    """
    NCOLS: tl.constexpr = (P.FFN_DIM + P.BLOCK_COLS - 1) // P.BLOCK_COLS
    WIDTH: tl.constexpr = P.FFN_DIM * (1 + P.GATED)
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    tile, col_tile = tile_of(tiles, NCOLS, P)
    expert, first, begin, count = locate(tile, groups, P.EXPERTS, P)
    if expert >= 0:
        row = begin + tl.arange(0, P.BLOCK_ROWS)
        cols = col_tile * P.BLOCK_COLS + tl.arange(0, P.BLOCK_COLS)
        mask = cols < P.FFN_DIM
        there = row < count
        pair = pairs_of(groups, expert, first, begin, tl.minimum(row, count - 1), P)
        at = (first + row)[:, None]
        stored = there[:, None] & mask[None, :]
        rows = dout.ptr + token_rows(dout, groups, pair, P)
        along = tl.zeros((BLOCK_ROWS,), P.COMPUTE)
        if groups.share is not None:
            if down.bias is not None:
                if col_tile == 0:  # before the product, whose tiles fill the registers
                    along += _dot_bias(dout, rows, down, expert, P)
        grad = matmul(rows, dout.dim, down, expert, cols, mask, P.FFN_DIM, P.DIM, False, P)
        kept = pre_ptr + at * WIDTH + cols[None, :]
        pre = tl.load(kept, mask=stored, other=0.0).to(P.COMPUTE)
        gate = pre
        if P.GATED:
            gate = tl.load(kept + P.FFN_DIM, mask=stored, other=0.0).to(P.COMPUTE)
        hidden = activate(pre, gate, P)
        if groups.share is not None:
            # By fma, or the product is contracted with the sum's first exchange between threads,
            # and those that hold copies of a row's sum differ by an ulp.
            along += tl.sum(tl.fma(grad, hidden, 0.0), 1)
            pairs = tl.cast(groups.samples, tl.int64) * groups.seqlen * P.TOP_K
            tl.store(dshare_ptr + col_tile * pairs + pair, along, mask=there)
            share = tl.load(groups.share + pair).to(P.COMPUTE)[:, None]
            grad *= share
            hidden *= share
        if hidden_ptr is not None:
            store(hidden_ptr + at * P.FFN_DIM + cols[None, :], hidden, stored)
        slope, gate_slope = slopes(pre, gate, P)
        out = dpre_ptr + at * WIDTH + cols[None, :]
        store(out, grad * slope, stored)
        if P.GATED:
            store(out + P.FFN_DIM, grad * gate_slope, stored)


@triton.jit
def _dot_bias(dout, rows, experts, expert, P: tl.constexpr):
    """dout · bias of each row; `rows` are addresses."""
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    total = tl.zeros((BLOCK_ROWS,), P.COMPUTE)
    for begin in range(0, P.DIM, P.BLOCK_INNER):
        cols = begin + tl.arange(0, P.BLOCK_INNER).to(tl.int64)
        mask = cols < P.DIM
        part = tl.load(rows[:, None] + cols[None, :] * dout.dim, mask=mask[None, :], other=0.0)
        bias = bias_of(experts, expert, cols, mask, P)[None, :]
        total += tl.sum(tl.fma(part.to(P.COMPUTE), bias, 0.0), 1)  # by fma as above
    return total


@triton.jit
def _rows_at(x, groups, sample, run, first, row, TOKENS: tl.constexpr, P: tl.constexpr):
    """Offsets of rows of a sample's run, in a tensor of tokens or of compact rows."""
    if P.ROUTED:
        at = first + row
        if TOKENS:
            at = tl.load(groups.order + at, mask=row < run, other=0) // P.TOP_K
    elif TOKENS:
        at = sample * groups.seqlen + first + row
    else:
        at = sample * run + first * groups.samples + row
    return at * x.seq * P.ALIGN


@triton.jit
def weight_grad_kernel(
    dweight_ptr, dbias_ptr, left, right, groups,
    ROWS: tl.constexpr, COLS: tl.constexpr, LEFT_TOKENS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dweight (experts, ROWS, COLS) = leftᵀ · right over each expert's rows; dbias sums left.

    One of left and right has a row for each token, the other is compact, and has the share in it:
    so must dbias, if left has tokens. Grid (experts · tiles,).
    """
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    BLOCK_INNER: tl.constexpr = P.BLOCK_INNER
    NCOLS: tl.constexpr = (COLS + BLOCK_COLS - 1) // BLOCK_COLS
    NROWS: tl.constexpr = (ROWS + BLOCK_ROWS - 1) // BLOCK_ROWS
    program = tl.program_id(0).to(tl.int64)
    expert = program // (NROWS * NCOLS)
    row_tile, col_tile = program // NCOLS % NROWS, program % NCOLS
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_mask, col_mask = rows < ROWS, cols < COLS
    inner = tl.arange(0, P.BLOCK_INNER).to(tl.int64)
    first, run, samples = _run(expert, groups, P)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE)
    for sample in range(0, samples):
        for begin in range(0, run, P.BLOCK_INNER):
            place = begin + inner
            there = place < run
            at = _rows_at(left, groups, sample, run, first, place, LEFT_TOKENS, P)
            a = tl.load(left.ptr + at[None, :] + rows[:, None] * left.dim,
                        mask=there[None, :] & row_mask[:, None], other=0.0)  # fmt: skip
            at = _rows_at(right, groups, sample, run, first, place, not LEFT_TOKENS, P)
            b = tl.load(right.ptr + at[:, None] + cols[None, :] * right.dim,
                        mask=there[:, None] & col_mask[None, :], other=0.0)  # fmt: skip
            acc = plus_product(acc, a, b, P)
    out = dweight_ptr + (expert * ROWS + rows[:, None]) * COLS + cols[None, :]
    store(out, acc, row_mask[:, None] & col_mask[None, :])
    if dbias_ptr is not None:
        if col_tile == 0:
            total = tl.zeros((BLOCK_ROWS, BLOCK_INNER), P.COMPUTE)
            for sample in range(0, samples):
                for begin in range(0, run, P.BLOCK_INNER):
                    place = begin + inner
                    there = place < run
                    at = _rows_at(left, groups, sample, run, first, place, LEFT_TOKENS, P)
                    a = tl.load(left.ptr + at[None, :] + rows[:, None] * left.dim,
                                mask=there[None, :] & row_mask[:, None], other=0.0)  # fmt: skip
                    a = a.to(P.COMPUTE)
                    if LEFT_TOKENS and groups.share is not None:
                        pair = tl.load(groups.order + first + place, mask=there, other=0)
                        share = tl.load(groups.share + pair, mask=there, other=0.0)
                        a *= share.to(P.COMPUTE)[None, :]
                    total += a
            store(dbias_ptr + expert * ROWS + rows, tl.sum(total, 1), row_mask)


@triton.jit
def _run(expert, groups, P: tl.constexpr):
    """(first, rows, samples) of an expert; first is in `order`, or in the sequence.

    A single expert's tokens are one run over all samples.
    """
    zero = tl.cast(0, tl.int64)
    if P.ROUTED:
        first = tl.where(expert == 0, zero, tl.load(groups.ends + tl.maximum(expert - 1, 0)))
        run = tl.load(groups.ends + expert) - first
        samples = zero + 1
    elif P.EXPERTS == 1:
        first = zero
        run = tl.cast(groups.samples, tl.int64) * groups.seqlen
        samples = zero + 1
    else:
        text_len = tl.cast(groups.text_len, tl.int64)
        first = tl.where(expert == 0, zero, text_len)
        run = tl.where(expert == 0, text_len, groups.seqlen - text_len)
        samples = tl.cast(groups.samples, tl.int64)
    return first, run, samples
