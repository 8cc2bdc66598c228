"""Triton kernels and launchers for rope3d and qk_norm_rope3d.

Forward: one program per token loops over the heads of q, then of k, `BLOCK_H` at a time, and loads
the token's angles and the norm's weights once. Backward: a fixed number of programs stride over the
tokens; each rotates the gradient back, recomputes the norm's statistics, which are not stored, and
sums its part of the weights' gradients in registers. The partial sums are added at the end, without
atomics, so the same input gives the same bits. In registers a head is two halves, `a` and `b`, the
first and the second elements of its pairs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import alignment, contiguous, new, next_power_of_2, on_device

# Not yet measured; chosen for two 16-byte loads of bf16 in flight for each thread.
TILE = 1024  # elements of one tensor that a program holds at a time
NUM_WARPS = 2
# The same on every GPU, so that the weights' gradients are summed in the same order.
BACKWARD_PROGRAMS = 1056


class Heads(NamedTuple):
    """Pointer and strides of a tensor (batch, seqlen, nheads, headdim).

    Strides of batch, seq and head are in units of ALIGN elements, that of dim in elements: by the
    product with a constant the compiler knows the alignment of a head. Without it, heads of 40
    dims, 80 bytes apart, are read 2 bytes at a time; a `tl.multiple_of` is lost on AMD.
    """

    ptr: Tensor
    batch: int
    seq: int
    head: int
    dim: int


class Plan(NamedTuple):
    """Compile-time constants of a launch."""

    HEADDIM: int
    ROTARY: int  # dims that are rotated
    HALF: int  # lanes for the pairs of a head: a power of two
    INTERLEAVED: bool
    INVERSE: bool  # rotate by the opposite angle
    BLOCK_H: int  # heads at a time
    ALIGN: int  # elements that strides are multiples of
    NORM: str  # "layer", "rms" or "none"
    EPS: float
    Q_HEADS: int
    K_HEADS: int  # 0: there is no k
    COMPUTE: tl.dtype


class Side(NamedTuple):
    """q or k of a launch: what is written, what is read, and the norm's weight and bias.

    x           the input, of which a backward takes the statistics
    dout        the gradient of the result, in a backward
    weight, bias  (headdim,) and contiguous, or None
    """

    out: Heads
    x: Heads
    dout: Heads | None
    weight: Tensor | None
    bias: Tensor | None


class Settings(NamedTuple):
    """norm: "layer", "rms" or "none"."""

    text_len: int
    norm: str
    eps: float
    interleaved: bool


@triton.jit
def _rows(x, token, seqlen, head, P: tl.constexpr):
    """Offset of each head's first element, in 64 bits from the first product on."""
    batch = (token // seqlen).to(tl.int64)
    seq = (token % seqlen).to(tl.int64)
    return (batch * x.batch + seq * x.seq + head.to(tl.int64) * x.head) * P.ALIGN


@triton.jit
def _pair_dims(P: tl.constexpr):
    """Dims of the first and second elements of half-split pairs, also of dims not rotated."""
    j = tl.arange(0, P.HALF)
    if P.ROTARY == P.HEADDIM:
        return j, j + P.HEADDIM // 2
    turning = j < P.ROTARY // 2
    return (
        tl.where(turning, j, j + P.ROTARY // 2),
        tl.where(turning, j + P.ROTARY // 2, j + P.HEADDIM // 2),
    )


@triton.jit
def _load_pairs(ptr, rows, row_mask, stride_dim, P: tl.constexpr):
    """Load heads as two blocks (rows, HALF), widened.

    Interleaved heads are loaded whole and split in registers, with 16-byte accesses; loads of odd
    and of even dims would take 2 bytes each.
    """
    if P.INTERLEAVED:
        d = tl.arange(0, 2 * P.HALF)
        at = ptr + (rows[:, None] + d.to(tl.int64)[None, :] * stride_dim)
        x = tl.load(at, mask=row_mask[:, None] & (d < P.HEADDIM)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(x, (rows.shape[0], P.HALF, 2)))
    else:
        mask = row_mask[:, None] & (tl.arange(0, P.HALF) < P.HEADDIM // 2)[None, :]
        first, second = _pair_dims(P)
        at = ptr + (rows[:, None] + first.to(tl.int64)[None, :] * stride_dim)
        a = tl.load(at, mask=mask, other=0.0)
        at = ptr + (rows[:, None] + second.to(tl.int64)[None, :] * stride_dim)
        b = tl.load(at, mask=mask, other=0.0)
    return a.to(P.COMPUTE), b.to(P.COMPUTE)


@triton.jit
def _store_pairs(ptr, rows, row_mask, stride_dim, a, b, P: tl.constexpr):
    """Store what `_load_pairs` loads, rounded once to the tensor's dtype."""
    a = a.to(ptr.dtype.element_ty)
    b = b.to(ptr.dtype.element_ty)
    if P.INTERLEAVED:
        d = tl.arange(0, 2 * P.HALF)
        at = ptr + (rows[:, None] + d.to(tl.int64)[None, :] * stride_dim)
        x = tl.reshape(tl.join(a, b), (rows.shape[0], 2 * P.HALF))
        tl.store(at, x, mask=row_mask[:, None] & (d < P.HEADDIM)[None, :])
    else:
        mask = row_mask[:, None] & (tl.arange(0, P.HALF) < P.HEADDIM // 2)[None, :]
        first, second = _pair_dims(P)
        tl.store(ptr + (rows[:, None] + first.to(tl.int64)[None, :] * stride_dim), a, mask=mask)
        tl.store(ptr + (rows[:, None] + second.to(tl.int64)[None, :] * stride_dim), b, mask=mask)


@triton.jit
def _load_weight(ptr, P: tl.constexpr):
    """Load a vector (headdim,) as two blocks (1, HALF)."""
    row = tl.zeros((1,), tl.int64)
    return _load_pairs(ptr, row, row == 0, 1, P)


@triton.jit
def _store_partial_sum(ptr, a, b, P: tl.constexpr):
    """Sum two blocks (BLOCK_H, HALF) over heads and store them as a vector (headdim,)."""
    row = tl.zeros((1,), tl.int64)
    a, b = tl.sum(a, axis=0)[None, :], tl.sum(b, axis=0)[None, :]
    _store_pairs(ptr, row, row == 0, 1, a, b, P)


@triton.jit
def _load_angles(tables, token, seqlen, text_len, P: tl.constexpr):
    """cos and sin of the token's pairs, and the mask of rotated pairs: none for a text token."""
    position = token % seqlen - text_len
    j = tl.arange(0, P.HALF)
    turning = (j < P.ROTARY // 2) & (position >= 0)
    cos_ptr, sin_ptr = tables
    at = position.to(tl.int64) * (P.ROTARY // 2) + j
    cos = tl.load(cos_ptr + at, mask=turning, other=0.0).to(P.COMPUTE)
    sin = tl.load(sin_ptr + at, mask=turning, other=0.0).to(P.COMPUTE)
    if P.INVERSE:
        sin = -sin
    return cos[None, :], sin[None, :], turning[None, :]


@triton.jit
def _rotate(a, b, cos, sin, turning):
    """Rotate each pair by its angle; a select, not an angle of 0, keeps the others bit for bit."""
    return tl.where(turning, a * cos - b * sin, a), tl.where(turning, b * cos + a * sin, b)


@triton.jit
def _normalise(a, b, P: tl.constexpr):
    """Normalised heads, and 1 / their standard deviation or root mean square."""
    if P.NORM == "layer":
        mean = (tl.sum(a + b, axis=1) * (1.0 / P.HEADDIM))[:, None]
        a -= mean
        b -= mean
        if 2 * P.HALF != P.HEADDIM:
            within = (tl.arange(0, P.HALF) < P.HEADDIM // 2)[None, :]
            a = tl.where(within, a, 0.0)
            b = tl.where(within, b, 0.0)
    variance = tl.sum(a * a + b * b, axis=1) * (1.0 / P.HEADDIM)
    rstd = tl.rsqrt(variance + P.EPS)[:, None]
    return a * rstd, b * rstd, rstd


@triton.jit
def _forward_heads(side, token, seqlen, angles, NHEADS: tl.constexpr, P: tl.constexpr):
    """Normalise and rotate all heads of one token of one tensor."""
    cos, sin, turning = angles
    x, out = side.x, side.out
    if side.weight is not None:
        weight_a, weight_b = _load_weight(side.weight, P)
    if side.bias is not None:
        bias_a, bias_b = _load_weight(side.bias, P)
    for first in range(0, NHEADS, P.BLOCK_H):
        head = first + tl.arange(0, P.BLOCK_H)
        mask = head < NHEADS
        rows = _rows(x, token, seqlen, head, P)
        a, b = _load_pairs(x.ptr, rows, mask, x.dim, P)
        if P.NORM != "none":
            a, b, _ = _normalise(a, b, P)
        if side.weight is not None:
            a, b = a * weight_a, b * weight_b
        if side.bias is not None:
            a, b = a + bias_a, b + bias_b
        a, b = _rotate(a, b, cos, sin, turning)
        rows = _rows(out, token, seqlen, head, P)
        _store_pairs(out.ptr, rows, mask, out.dim, a, b, P)


@triton.jit(do_not_specialize=["seqlen", "text_len"])
def _rope3d_fwd_kernel(q, k, tables, seqlen, text_len, P: tl.constexpr):
    """Grid (tokens,)."""
    token = tl.program_id(0)
    angles = _load_angles(tables, token, seqlen, text_len, P)
    _forward_heads(q, token, seqlen, angles, P.Q_HEADS, P)
    if P.K_HEADS > 0:
        _forward_heads(k, token, seqlen, angles, P.K_HEADS, P)


@triton.jit
def _backward_heads(
    side, dweight_ptr, tables, ntokens, seqlen, text_len, NHEADS: tl.constexpr, P: tl.constexpr
):
    """dx of all heads of every num_programs-th token, and partial sums of dweight and dbias."""
    dx, x, dout = side.out, side.x, side.dout
    if side.weight is not None:
        weight_a, weight_b = _load_weight(side.weight, P)
    BLOCK_H: tl.constexpr = P.BLOCK_H
    HALF: tl.constexpr = P.HALF
    dweight_a = tl.zeros((BLOCK_H, HALF), P.COMPUTE)
    dweight_b = tl.zeros((BLOCK_H, HALF), P.COMPUTE)
    dbias_a = tl.zeros((BLOCK_H, HALF), P.COMPUTE)
    dbias_b = tl.zeros((BLOCK_H, HALF), P.COMPUTE)
    for token in range(tl.program_id(0), ntokens, tl.num_programs(0)):
        cos, sin, turning = _load_angles(tables, token, seqlen, text_len, P)
        for first in range(0, NHEADS, P.BLOCK_H):
            head = first + tl.arange(0, P.BLOCK_H)
            mask = head < NHEADS
            rows = _rows(dout, token, seqlen, head, P)
            da, db = _load_pairs(dout.ptr, rows, mask, dout.dim, P)
            rows = _rows(x, token, seqlen, head, P)
            a, b = _load_pairs(x.ptr, rows, mask, x.dim, P)
            da, db = _rotate(da, db, cos, sin, turning)
            a, b, rstd = _normalise(a, b, P)
            if dweight_ptr is not None:
                dweight_a += da * a
                dweight_b += db * b
                dbias_a += da
                dbias_b += db
            if side.weight is not None:
                da, db = da * weight_a, db * weight_b
            dot = (tl.sum(da * a + db * b, axis=1) * (1.0 / P.HEADDIM))[:, None]
            if P.NORM == "layer":
                mean = (tl.sum(da + db, axis=1) * (1.0 / P.HEADDIM))[:, None]
                da, db = da - mean, db - mean
            da, db = (da - a * dot) * rstd, (db - b * dot) * rstd
            rows = _rows(dx, token, seqlen, head, P)
            _store_pairs(dx.ptr, rows, mask, dx.dim, da, db, P)
    if dweight_ptr is not None:
        _store_partial_sum(dweight_ptr, dweight_a, dweight_b, P)
        _store_partial_sum(dweight_ptr + P.HEADDIM, dbias_a, dbias_b, P)


@triton.jit(do_not_specialize=["ntokens", "seqlen", "text_len"])
def _qk_norm_rope3d_bwd_kernel(
    q, k, dweight_ptr, tables, ntokens, seqlen, text_len, P: tl.constexpr
):
    """Grid (programs, 2); the second axis is q or k. dweight_ptr: (2, programs, 2, headdim)."""
    if dweight_ptr is not None:
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        dweight_ptr += program * (2 * P.HEADDIM)
    if tl.program_id(1) == 0:
        _backward_heads(q, dweight_ptr, tables, ntokens, seqlen, text_len, P.Q_HEADS, P)
    else:
        _backward_heads(k, dweight_ptr, tables, ntokens, seqlen, text_len, P.K_HEADS, P)


def _heads(x: Tensor, plan: Plan) -> Heads:
    batch, seq, head, dim = x.stride()
    return Heads(x, batch // plan.ALIGN, seq // plan.ALIGN, head // plan.ALIGN, dim)


def _side(
    plan: Plan, out: Tensor, x: Tensor, dout: Tensor | None, weight: Tensor | None,
    bias: Tensor | None = None,
) -> Side:  # fmt: skip
    grad = None if dout is None else _heads(dout, plan)
    return Side(_heads(out, plan), _heads(x, plan), grad, contiguous(weight), contiguous(bias))


def _plan(
    cos: Tensor, settings: Settings, q: Tensor, k: Tensor | None, *others: Tensor,
    inverse: bool = False,
) -> Plan:  # fmt: skip
    """The constants of a launch over these tensors, outputs included."""
    heads = (q, *(() if k is None else (k,)), *others)
    dtype, headdim = q.dtype, q.shape[3]
    lanes = next_power_of_2(headdim)
    nheads = next_power_of_2(max(x.shape[2] for x in heads))
    return Plan(
        HEADDIM=headdim,
        ROTARY=2 * cos.shape[1],
        HALF=lanes // 2,
        INTERLEAVED=settings.interleaved,
        INVERSE=inverse,
        BLOCK_H=min(nheads, max(1, TILE // lanes)),
        ALIGN=alignment(*heads),
        NORM=settings.norm,
        EPS=settings.eps,
        Q_HEADS=q.shape[2],
        K_HEADS=0 if k is None else k.shape[2],
        COMPUTE=tl.float64 if dtype is torch.float64 else tl.float32,
    )


def rope3d_fwd(
    x: Tensor, cos: Tensor, sin: Tensor, text_len: int, interleaved: bool, inverse: bool
) -> Tensor:
    """x rotated by its angles, or by the opposite ones, as a new contiguous tensor."""
    out = new(x)
    if x.numel() == 0:
        return out
    batch, seqlen = x.shape[:2]
    plan = _plan(cos, Settings(text_len, "none", 0.0, interleaved), x, None, out, inverse=inverse)
    with on_device(x):
        _rope3d_fwd_kernel[(batch * seqlen,)](
            _side(plan, out, x, None, None), None, (cos.contiguous(), sin.contiguous()),
            seqlen, text_len, P=plan, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def qk_norm_rope3d_fwd(
    q: Tensor, k: Tensor, affine: tuple[Tensor | None, ...], cos: Tensor, sin: Tensor,
    settings: Settings, *, inplace: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k normalised and rotated, in place or as new contiguous tensors.

    affine: weight and bias of q's norm, then of k's.
    """
    q_out = q if inplace else new(q)
    k_out = k if inplace else new(k)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    batch, seqlen = q.shape[:2]
    plan = _plan(cos, settings, q, k, q_out, k_out)
    with on_device(q):
        _rope3d_fwd_kernel[(batch * seqlen,)](
            _side(plan, q_out, q, None, *affine[:2]), _side(plan, k_out, k, None, *affine[2:]),
            (cos.contiguous(), sin.contiguous()), seqlen, settings.text_len, P=plan,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return q_out, k_out


def qk_norm_rope3d_bwd(
    douts: tuple[Tensor, Tensor], q: Tensor, k: Tensor,
    weights: tuple[Tensor | None, Tensor | None], cos: Tensor, sin: Tensor, settings: Settings,
    affine_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, of k, and of (q_weight, q_bias, k_weight, k_bias) as rows of one tensor.

    The rows are (4, headdim) in fp32 (fp64 for fp64 inputs), (0, headdim) without `affine_grads`.
    douts, weights: of q and of k.
    """
    dq = new(q)
    dk = new(k)
    batch, seqlen, _, headdim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = 4 if affine_grads else 0
    if q.numel() + k.numel() == 0:
        return dq, dk, torch.zeros((rows, headdim), dtype=wide, device=q.device)
    programs = min(batch * seqlen, BACKWARD_PROGRAMS)
    partials = torch.empty((2, programs, rows // 2, headdim), dtype=wide, device=q.device)
    plan = _plan(cos, settings, q, k, dq, dk, *douts, inverse=True)
    with on_device(q):
        _qk_norm_rope3d_bwd_kernel[(programs, 2)](
            _side(plan, dq, q, douts[0], weights[0]), _side(plan, dk, k, douts[1], weights[1]),
            partials if affine_grads else None, (cos.contiguous(), sin.contiguous()),
            batch * seqlen, seqlen, settings.text_len, P=plan,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dq, dk, partials.sum(1).view(rows, headdim)
