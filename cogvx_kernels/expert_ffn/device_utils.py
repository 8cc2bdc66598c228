"""Device functions of the expert_ffn kernels: tiles of rows, matrix products, activations.

A tile of rows finds its expert by counting tiles, and each row its token.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Experts(NamedTuple):
    """A weight (rows, cols) of each expert, with the same strides, and its bias."""

    ptrs: tuple[Tensor, ...]
    row: int  # in units of ALIGN elements
    col: int
    bias: tuple[Tensor, ...] | None


class Groups(NamedTuple):
    """The rows of each expert.

    order, ends  of `routing.Routing`; None without routing
    share        weights of the pairs, (batch, seqlen, TOP_K), contiguous; None for 1
    seqlen       of the joint sequence
    text_len     tokens of the first of two experts, without routing
    samples      in the batch
    """

    order: Tensor | None
    ends: Tensor | None
    share: Tensor | None
    seqlen: int
    text_len: int
    samples: int


class Plan(NamedTuple):
    """Compile-time constants of a launch."""

    EXPERTS: int
    ROUTED: bool
    TOP_K: int
    DIM: int
    FFN_DIM: int  # columns of the hidden activation
    ACTIVATION: str
    GATED: bool  # the pre-activation has twice as many columns: values, then gates
    BLOCK_ROWS: int
    BLOCK_COLS: int
    BLOCK_INNER: int
    BAND: int
    ALIGN: int  # elements that strides are multiples of
    COMPUTE: tl.dtype


# --- rows of an expert -----------------------------------------------------------------------


@triton.jit
def rows_of(groups, group: tl.constexpr, P: tl.constexpr):
    """Number of rows of an expert; group EXPERTS is the pairs without an expert."""
    if P.ROUTED:
        count = tl.load(groups.ends + tl.cast(group, tl.int64))
        if group > 0:
            count -= tl.load(groups.ends + tl.cast(group - 1, tl.int64))
    elif P.EXPERTS == 1:
        count = tl.cast(groups.samples, tl.int64) * groups.seqlen
    elif group == 0:
        count = tl.cast(groups.samples, tl.int64) * groups.text_len
    else:
        count = tl.cast(groups.samples, tl.int64) * (groups.seqlen - groups.text_len)
    return count


@triton.jit
def locate(tile, groups, GROUPS: tl.constexpr, P: tl.constexpr):
    """(expert, its first row among all, the tile's first row in it, its rows); expert -1: none."""
    expert = tl.cast(-1, tl.int64)
    first = tl.cast(0, tl.int64)
    begin = tl.cast(0, tl.int64)
    rows = tl.cast(0, tl.int64)
    base = tl.cast(0, tl.int64)
    tiles_before = tl.cast(0, tl.int64)
    for group in tl.static_range(GROUPS):
        count = rows_of(groups, group, P)
        tiles = (count + (P.BLOCK_ROWS - 1)) // P.BLOCK_ROWS
        inside = (tile >= tiles_before) & (tile < tiles_before + tiles)
        expert = tl.where(inside, group, expert)
        first = tl.where(inside, base, first)
        begin = tl.where(inside, (tile - tiles_before) * P.BLOCK_ROWS, begin)
        rows = tl.where(inside, count, rows)
        base += count
        tiles_before += tiles
    return expert, first, begin, rows


@triton.jit
def pairs_of(groups, expert, first, begin, row, P: tl.constexpr):
    """The (token, choice) pairs of a tile's rows, numbered through batch, sequence and choices.

    `begin` is the tile's first row. `row` must be less than the expert's rows: a pair past them
    need not exist.
    """
    if P.ROUTED:
        pair = tl.load(groups.order + first + row)
    elif P.EXPERTS == 1:
        pair = row
    else:
        text_len = tl.cast(groups.text_len, tl.int64)
        run = tl.where(expert == 0, text_len, groups.seqlen - text_len)
        others = groups.seqlen - run
        sample = begin // run
        place = row - sample * run  # in the tile's first sample, or past it
        pair = row + sample * others + tl.where(expert == 0, 0, text_len)
        # A division of 64 bits for each row would take too many registers.
        for _ in range(0, (P.BLOCK_ROWS - 1) // run + 1):
            pair += tl.where(place >= run, others, 0)
            place -= tl.where(place >= run, run, 0)
    return pair


@triton.jit
def token_rows(x, groups, pair, P: tl.constexpr):
    """Offset of each pair's token in a tensor of tokens."""
    token = pair // P.TOP_K
    sample, place = token // groups.seqlen, token % groups.seqlen
    return (sample * x.batch + place * x.seq) * P.ALIGN


@triton.jit
def of_expert(ptrs, expert, P: tl.constexpr):
    """The tensor of an expert, by selects: with a branch the loop is not pipelined."""
    EXPERTS: tl.constexpr = P.EXPERTS
    ptr = ptrs[0]
    for e in tl.static_range(1, EXPERTS):
        ptr = tl.where(expert == e, ptrs[e], ptr)
    return ptr


@triton.jit
def bias_of(experts, expert, cols, mask, P: tl.constexpr):
    bias = of_expert(experts.bias, expert, P)
    return tl.load(bias + cols, mask=mask, other=0.0).to(P.COMPUTE)


@triton.jit
def tile_of(tiles, NCOLS: tl.constexpr, P: tl.constexpr):
    """(tile of rows, tile of columns) of this program: bands of BAND tiles of rows, by column."""
    program = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = P.BAND * NCOLS
    band = program // WIDTH * P.BAND
    height = tl.minimum(tiles - band, P.BAND)
    within = program % WIDTH
    return band + within % height, within // height


# --- the product -----------------------------------------------------------------------------


@triton.jit
def plus_product(acc, left, right, P: tl.constexpr):
    """acc + left · right, on tensor cores unless they are fp32.

    In fp32 each step has a sum of its own, or all steps are one chain of fma, whose error at a
    width of 3072 is 3.7 times torch's. A maxNumImpreciseAcc other than 0 keeps Triton from folding
    the addition into the product; it has no other effect in fp32.
    """
    if left.dtype == tl.float32:
        acc += tl.dot(left, right, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=P.COMPUTE)
    return acc


@triton.jit
def matmul(
    rows, step, experts, expert, cols, mask, COLS: tl.constexpr, INNER: tl.constexpr,
    TRANSPOSED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """rows · weight, or rows · weightᵀ, at the masked of COLS columns; a sum over INNER.

    `rows` are addresses, with `step` from one element to the next.
    """
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    inner = tl.arange(0, P.BLOCK_INNER)
    col_step, inner_step = tl.cast(experts.col, tl.int64), tl.cast(experts.row, tl.int64) * P.ALIGN
    if TRANSPOSED:
        col_step, inner_step = inner_step, col_step
    a = rows[:, None] + inner.to(tl.int64)[None, :] * step
    b = of_expert(experts.ptrs, expert, P)
    b += cols[None, :] * col_step + inner.to(tl.int64)[:, None] * inner_step
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE)
    for begin in range(0, INNER, P.BLOCK_INNER):
        if COLS % P.BLOCK_COLS == 0 and INNER % P.BLOCK_INNER == 0:
            left = tl.load(a)
            right = tl.load(b)
        else:
            inside = inner < INNER - begin
            left = tl.load(a, mask=inside[None, :], other=0.0)
            right = tl.load(b, mask=inside[:, None] & mask[None, :], other=0.0)
        acc = plus_product(acc, left, right, P)
        a += tl.cast(step, tl.int64) * P.BLOCK_INNER
        b += inner_step * P.BLOCK_INNER
    return acc


# --- activations -----------------------------------------------------------------------------

SQRT_HALF = tl.constexpr(0.7071067811865476)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(pre, gate, P: tl.constexpr):
    """The activation of `pre`; `gate` is the pre-activation of the gates, for SwiGLU."""
    if P.ACTIVATION == "gelu_tanh":
        cube = pre * (1.0 + 0.044715 * pre * pre)
        out = pre * sigmoid(cube * TWICE_SQRT_2_OVER_PI)
    elif P.ACTIVATION == "gelu":
        out = 0.5 * pre * (1.0 + tl.erf(pre * SQRT_HALF))
    elif P.ACTIVATION == "swiglu":
        out = pre * gate * sigmoid(gate)
    else:
        tl.static_assert(False, "unknown activation")
    return out


@triton.jit
def slopes(pre, gate, P: tl.constexpr):
    """The activation's derivatives by pre and by gate.

    sigmoid(-z) is 1 - sigmoid(z) without the cancellation.
    """
    if P.ACTIVATION == "gelu_tanh":
        square = pre * pre
        z = pre * (1.0 + 0.044715 * square) * TWICE_SQRT_2_OVER_PI
        s = sigmoid(z)
        by_pre = s + pre * s * sigmoid(-z) * TWICE_SQRT_2_OVER_PI * (1.0 + 0.134145 * square)
        by_gate = by_pre
    elif P.ACTIVATION == "gelu":
        by_pre = 0.5 * (1.0 + tl.erf(pre * SQRT_HALF))
        by_pre += pre * INV_SQRT_2PI * tl.exp(-0.5 * pre * pre)
        by_gate = by_pre
    elif P.ACTIVATION == "swiglu":
        s = sigmoid(gate)
        by_pre = gate * s
        by_gate = pre * s * (1.0 + gate * sigmoid(-gate))
    else:
        tl.static_assert(False, "unknown activation")
    return by_pre, by_gate


@triton.jit
def pre_activation(x, groups, pair, expert, up, cols, mask, P: tl.constexpr):
    """x · upᵀ + bias at some columns, and at the columns of their gates."""
    rows = x.ptr + token_rows(x, groups, pair, P)
    pre = matmul(rows, x.dim, up, expert, cols, mask, P.FFN_DIM, P.DIM, True, P)
    if up.bias is not None:
        pre += bias_of(up, expert, cols, mask, P)[None, :]
    gate = pre
    if P.GATED:
        cols += P.FFN_DIM
        gate = matmul(rows, x.dim, up, expert, cols, mask, P.FFN_DIM, P.DIM, True, P)
        if up.bias is not None:
            gate += bias_of(up, expert, cols, mask, P)[None, :]
    return pre, gate


@triton.jit
def store(ptr, x, mask):
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_finite(ptr, x, mask):
    """Store a pre-activation; beyond fp16's range at its end, where derivatives are constant.

    At an infinity they would be NaN.
    """
    if ptr.dtype.element_ty == tl.float16:
        x = tl.maximum(x, -65504.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    store(ptr, x, mask)
