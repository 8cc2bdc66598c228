"""Triton kernels and launchers for expert_ffn: two grouped matrix products over all experts.

The rows of an expert are a group, and a tile of rows finds its expert by counting tiles. Without an
index the groups are the runs of text and of video, read in place. With one, (token, choice) pairs
are sorted by expert, and rows are gathered on load and scattered on store. The number of rows of an
expert is not read back to the host: the grid has the largest possible number of tiles, and programs
without a tile return. Between the products the hidden activation is compact, a row for each pair.
Backward: a kernel for the gradient of the pre-activation, which it recomputes unless it was kept,
one for the gradient of x, one for each weight. Sums have a fixed order, without atomics.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from .._backend import INTERPRETED
from .._launch import (
    Rows,
    alignment,
    as_rows,
    cdiv,
    next_power_of_2,
    on_device,
    product_options,
)
from .device_utils import (
    Experts,
    Groups,
    Plan,
    activate,
    bias_of,
    locate,
    matmul,
    pairs_of,
    pre_activation,
    store,
    store_finite,
    tile_of,
)
from .gradients import hidden_grad_kernel, weight_grad_kernel
from .routing import ExpertWeights, Routing, Weights

# Not yet measured; the largest that compile without spills.
BLOCK_ROWS = 128
BLOCK_COLS = 128
WIDE_COLS = 256  # on Hopper: a quarter less traffic from L2, which bounds products
BLOCK_INNER = 64  # of 2-byte elements; half as many of 4
WARPS = 8
STAGES = 3
BAND = 8  # tiles of rows that reuse tiles of weights in the L2 cache

# --- forward ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tiles"])
def _up_kernel(hidden_ptr, pre_ptr, x, groups, up, tiles, P: tl.constexpr):
    """pre = x · upᵀ + bias and hidden = act(pre), a row for each pair; either may be None.

    Grid (tiles of rows · of columns,).
    """
    NCOLS: tl.constexpr = (P.FFN_DIM + P.BLOCK_COLS - 1) // P.BLOCK_COLS
    WIDTH: tl.constexpr = P.FFN_DIM * (1 + P.GATED)
    tile, col_tile = tile_of(tiles, NCOLS, P)
    expert, first, begin, count = locate(tile, groups, P.EXPERTS, P)
    if expert >= 0:
        row = begin + tl.arange(0, P.BLOCK_ROWS)
        cols = col_tile * P.BLOCK_COLS + tl.arange(0, P.BLOCK_COLS)
        mask = cols < P.FFN_DIM
        pair = pairs_of(groups, expert, first, begin, tl.minimum(row, count - 1), P)
        pre, gate = pre_activation(x, groups, pair, expert, up, cols, mask, P)
        at = (first + row)[:, None]
        stored = (row < count)[:, None] & mask[None, :]
        if pre_ptr is not None:
            kept = pre_ptr + at * WIDTH + cols[None, :]
            store_finite(kept, pre, stored)
            if P.GATED:
                store_finite(kept + P.FFN_DIM, gate, stored)
        if hidden_ptr is not None:
            hidden = activate(pre, gate, P)
            store(hidden_ptr + at * P.FFN_DIM + cols[None, :], hidden, stored)


@triton.jit(do_not_specialize=["tiles"])
def _down_kernel(
    out_ptr, rows_ptr, groups, weights, tiles, INNER: tl.constexpr, FORWARD: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Compact rows (pairs, INNER) times their expert's weight, scattered to their tokens.

    out (batch, seqlen, TOP_K, dim), contiguous. Grid as above. FORWARD: times the transposed
    weight, plus the bias, times the share. A pair without an expert gets zeros.
    """
    NCOLS: tl.constexpr = (P.DIM + P.BLOCK_COLS - 1) // P.BLOCK_COLS
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    tile, col_tile = tile_of(tiles, NCOLS, P)
    expert, first, begin, count = locate(tile, groups, P.EXPERTS + P.ROUTED, P)
    if expert >= 0:
        row = begin + tl.arange(0, BLOCK_ROWS)
        cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        mask = cols < P.DIM
        safe = tl.minimum(row, count - 1)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE)
        if expert < P.EXPERTS:
            rows = rows_ptr + (first + safe) * INNER
            acc = matmul(rows, 1, weights, expert, cols, mask, P.DIM, INNER, FORWARD, P)
            if FORWARD and weights.bias is not None:
                acc += bias_of(weights, expert, cols, mask, P)[None, :]
        # Behind the loop, which would keep it in registers.
        pair = pairs_of(groups, expert, first, begin, safe, P)
        if expert < P.EXPERTS:
            if FORWARD and groups.share is not None:
                acc *= tl.load(groups.share + pair).to(P.COMPUTE)[:, None]
        stored = (row < count)[:, None] & mask[None, :]
        store(out_ptr + pair[:, None] * P.DIM + cols[None, :], acc, stored)


@triton.jit
def _combine_kernel(out_ptr, slots_ptr, BLOCK: tl.constexpr, P: tl.constexpr):
    """Sum over the choices of a token. Grid (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK).to(tl.int64)
    mask = cols < P.DIM
    TOP_K: tl.constexpr = P.TOP_K
    total = tl.zeros((BLOCK,), P.COMPUTE)
    for choice in tl.static_range(TOP_K):
        at = slots_ptr + (token * TOP_K + choice) * P.DIM + cols
        total += tl.load(at, mask=mask, other=0.0).to(P.COMPUTE)
    store(out_ptr + token * P.DIM + cols, total, mask)


# --- launchers -------------------------------------------------------------------------------


def _compact(x: Tensor | None, plan: Plan) -> Rows:
    return Rows(x, 0, 0, 1) if x is None else Rows(x, 0, x.stride(0) // plan.ALIGN, 1)


def _alike(weights: Weights) -> Weights:
    """Weights with equal strides, copied only if they differ."""
    same = all(w.stride() == weights[0].stride() for w in weights)
    return weights if same else tuple(w.contiguous() for w in weights)


def _experts(weights: Weights, biases: Weights, plan: Plan) -> Experts:
    row, col = weights[0].stride()
    return Experts(weights, row // plan.ALIGN, col, tuple(b.contiguous() for b in biases) or None)


def _groups(x: Tensor, routing: Routing | None, text_len: int) -> Groups:
    order, ends, share = (None, None, None) if routing is None else routing[:3]
    share = None if share is None else share.contiguous()
    return Groups(order, ends, share, x.shape[1], text_len, x.shape[0])


def _plan(
    x: Tensor, up: Weights, down: Weights, routing: Routing | None, activation: str, *rows: Tensor
) -> Plan:
    """The constants of launches over x, the experts' weights, and other tensors of rows."""
    dim, ffn_dim = down[0].shape
    small = x.element_size() == 2
    inner = BLOCK_INNER if small else BLOCK_INNER // 2
    block = 1 if small else 2  # fp32 is multiplied without tensor cores, in smaller tiles
    return Plan(
        EXPERTS=len(up),
        ROUTED=routing is not None,
        TOP_K=1 if routing is None else routing.top_k,
        DIM=dim,
        FFN_DIM=ffn_dim,
        ACTIVATION=activation,
        GATED=up[0].shape[0] != ffn_dim,
        BLOCK_ROWS=_block(BLOCK_ROWS // block, x.shape[0] * x.shape[1]),
        BLOCK_COLS=_block(_most_columns(small), min(dim, ffn_dim)),
        BLOCK_INNER=_block(inner, min(dim, ffn_dim)),
        BAND=BAND,
        ALIGN=math.gcd(alignment(x, *up, *down, *rows), ffn_dim),  # the width of compact rows
        COMPUTE=tl.float64 if x.dtype is torch.float64 else tl.float32,
    )


def _block(most: int, size: int) -> int:
    """A power of two from 16, the least of a tensor core, to `most`."""
    return max(16, min(most, next_power_of_2(size)))


def _most_columns(small: bool) -> int:
    if not small:
        return BLOCK_COLS // 2
    target = _target()
    return WIDE_COLS if target is not None and target.arch == 90 else BLOCK_COLS


def _columns(plan: Plan, cols: int, most: int = WIDE_COLS) -> Plan:
    """The plan with tiles of at most `most` columns; of WIDE_COLS only if they divide `cols`."""
    width = max(16, min(plan.BLOCK_COLS, most))
    return plan._replace(BLOCK_COLS=min(width, BLOCK_COLS) if cols % width else width)


def _tiles(plan: Plan, groups: Groups) -> int:
    """The number of tiles of rows, or with routing its upper bound."""
    if plan.ROUTED:
        pairs = groups.samples * groups.seqlen * plan.TOP_K
        return pairs // plan.BLOCK_ROWS + plan.EXPERTS + 1
    runs = [groups.seqlen]
    if plan.EXPERTS == 2:
        runs = [groups.text_len, groups.seqlen - groups.text_len]
    return sum(cdiv(groups.samples * run, plan.BLOCK_ROWS) for run in runs)


def _grid(plan: Plan, tiles: int, cols: int) -> tuple[int]:
    return (tiles * cdiv(cols, plan.BLOCK_COLS),)


def _options(plan: Plan) -> dict[str, int]:
    warps = max(1, min(WARPS, plan.BLOCK_ROWS * plan.BLOCK_COLS // 256))
    return product_options(_target(), warps, STAGES)


def _target() -> Any:
    """Triton's target; None in the interpreter."""
    return None if INTERPRETED else driver.active.get_current_target()


def expert_ffn_fwd(
    x: Tensor, experts: ExpertWeights, routing: Routing | None, text_len: int, activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, pre-activation), the latter a row for each (token, choice) pair; empty without `keep`."""
    up, down = _alike(experts.up), _alike(experts.down)
    plan = _plan(x, up, down, routing, activation)
    groups = _groups(x, routing, text_len)
    batch, seqlen, dim = x.shape
    pairs = batch * seqlen * plan.TOP_K
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = up[0].shape[0]
    pre = torch.empty((pairs, width) if keep else (0,), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out, pre
    hidden = torch.empty((pairs, plan.FFN_DIM), dtype=x.dtype, device=x.device)
    first = _experts(up, experts.up_bias, plan)
    with on_device(x):
        _up(hidden, pre if keep else None, x, groups, first, plan)
        _to_tokens(out, hidden, groups, _experts(down, experts.down_bias, plan), plan, forward=True)
    return out, pre


def _up(
    hidden: Tensor | None, pre: Tensor | None, x: Tensor, groups: Groups, weights: Experts,
    plan: Plan,
) -> None:  # fmt: skip
    """Launch `_up_kernel`."""
    two = plan.GATED or (hidden is not None and pre is not None)  # tiles at once in registers
    plan = _columns(plan, plan.FFN_DIM, BLOCK_COLS if two else WIDE_COLS)
    tiles = _tiles(plan, groups)
    _up_kernel[_grid(plan, tiles, plan.FFN_DIM)](
        hidden, pre, as_rows(x, plan), groups, weights, tiles, P=plan, **_options(plan)
    )


def _to_tokens(
    out: Tensor, rows: Tensor, groups: Groups, weights: Experts, plan: Plan, forward: bool
) -> None:
    """Launch `_down_kernel`, and with several choices the sum over them."""
    plan = _columns(plan, plan.DIM)
    tiles = _tiles(plan, groups)
    slots = out
    if plan.TOP_K > 1:
        slots = torch.empty(
            (*out.shape[:2], plan.TOP_K, plan.DIM), dtype=out.dtype, device=out.device
        )
    _down_kernel[_grid(plan, tiles, plan.DIM)](
        slots, rows, groups, weights, tiles, INNER=rows.shape[1], FORWARD=forward, P=plan,
        **_options(plan),
    )  # fmt: skip
    if plan.TOP_K > 1:
        _combine_kernel[(out.shape[0] * out.shape[1],)](
            out, slots, BLOCK=next_power_of_2(plan.DIM), P=plan, num_warps=4
        )


def expert_ffn_bwd(
    dout: Tensor, x: Tensor, experts: ExpertWeights, routing: Routing | None, pre: Tensor | None,
    text_len: int, activation: str, needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dup, dup_bias, ddown, ddown_bias, dshare); those absent or not required are empty.

    Gradients of the experts' weights are (num_experts, …). needs: that of x, those of the weights.
    """
    up, down = _alike(experts.up), _alike(experts.down)
    rows, weights = needs
    dout, x = _flat(dout), _flat(x)
    plan = _plan(x, up, down, routing, activation, dout)
    groups, share = _groups(x, routing, text_len), None if routing is None else routing.share
    # Half as wide: registers hold a tile of the gradient beside two of its activation, or more.
    more = plan.GATED or share is not None
    most = min(plan.BLOCK_COLS, BLOCK_COLS) if more else plan.BLOCK_COLS
    halved = _columns(plan, plan.FFN_DIM, most // 2)
    pairs, width = x.shape[0] * x.shape[1] * plan.TOP_K, up[0].shape[0]

    def new(*shape: int, when: bool = True) -> Tensor:
        return torch.empty(shape if when else (0,), dtype=x.dtype, device=x.device)

    dx = new(*x.shape, when=rows)
    dup, ddown = (new(len(w), *w[0].shape, when=weights) for w in (up, down))
    dup_bias, ddown_bias = (
        new(len(b), *(b[0].shape if b else ()), when=weights and bool(b))
        for b in (experts.up_bias, experts.down_bias)
    )
    if share is not None:
        wide = torch.promote_types(share.dtype, torch.float32)
        cols = cdiv(plan.FFN_DIM, halved.BLOCK_COLS)
        dshare = torch.zeros((cols, pairs), dtype=wide, device=x.device)
    if x.numel() == 0:
        empty = x.new_empty((0,)) if share is None else torch.zeros_like(share)
        grads = (g.zero_() for g in (dup, dup_bias, ddown, ddown_bias))
        return dx, *grads, empty
    dpre = new(pairs, width)
    hidden = new(pairs, plan.FFN_DIM) if weights else None
    tiles = _tiles(plan, groups)
    first, second = _experts(up, experts.up_bias, plan), _experts(down, experts.down_bias, plan)
    with on_device(x):
        if pre is None:  # in place, so that it takes no more memory
            pre = dpre
            _up(None, pre, x, groups, first, plan)
        hidden_grad_kernel[_grid(halved, tiles, plan.FFN_DIM)](
            dpre, hidden, None if share is None else dshare, as_rows(dout, plan), pre, groups,
            second, tiles, P=halved, **_options(halved),
        )  # fmt: skip
        if rows:
            _to_tokens(dx, dpre, groups, first, plan, forward=False)
        if weights:
            _weight_grad(dup, dup_bias, _compact(dpre, plan), as_rows(x, plan), groups, False, plan)
            _weight_grad(
                ddown, ddown_bias, as_rows(dout, plan), _compact(hidden, plan), groups, True, plan
            )
    if share is None:
        return dx, dup, dup_bias, ddown, ddown_bias, x.new_empty((0,))
    return dx, dup, dup_bias, ddown, ddown_bias, dshare.sum(0).to(share.dtype).view(share.shape)


def _weight_grad(
    dweight: Tensor, dbias: Tensor, left: Rows, right: Rows, groups: Groups, left_tokens: bool,
    plan: Plan,
) -> None:  # fmt: skip
    experts, rows, cols = dweight.shape
    plan = _columns(plan, cols)
    grid = experts * cdiv(rows, plan.BLOCK_ROWS) * cdiv(cols, plan.BLOCK_COLS)
    weight_grad_kernel[(grid,)](
        dweight, dbias if dbias.numel() else None, left, right, groups,
        ROWS=rows, COLS=cols, LEFT_TOKENS=left_tokens, P=plan, **_options(plan),
    )  # fmt: skip


def _flat(x: Tensor) -> Tensor:
    """x with evenly spaced tokens over all samples, copied only if they are not."""
    if x.shape[1] == 1:  # its stride is arbitrary
        x = x.as_strided(x.shape, (x.stride(0), x.stride(0), x.stride(2)))
    even = x.shape[0] <= 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if even else x.contiguous()
