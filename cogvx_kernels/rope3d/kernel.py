"""The way: q and k are read once, normalised and rotated in registers, and written once.

Forward: one program per token walks over the heads of q, then of k, `BLOCK_H` at a time, so that
the token's angles and the norm's weights are loaded once for all of them. Backward: a fixed number
of programs stride over the tokens; each turns the gradient back, recomputes the statistics of the
rows it holds anyway (they are never stored), and adds up its share of the weights' gradients in
registers; the shares are summed at the end, without atomics, so the same input gives the same bits.
In registers a head is two halves, `a` and `b`, the first and the second elements of its pairs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import alignment, on_device

# Measured choices go here. TILE: elements of one tensor that a program holds at a time.
TILE = 1024
NUM_WARPS = 2
# A constant, whatever the GPU, so that the weights' gradients are summed in one order everywhere.
BACKWARD_PROGRAMS = 1056


class Heads(NamedTuple):
    """A tensor (batch, seqlen, nheads, headdim) as the kernels see it.

    Strides of batch, seq and head are in units of ALIGN elements, that of dim in elements: the
    product with a constant shows every compiler how far a head is aligned. (Without it, heads of
    40 dims, 80 bytes apart, are read 2 bytes at a time; a `tl.multiple_of` is lost on AMD.)
    """

    ptr: Tensor
    batch: int
    seq: int
    head: int
    dim: int


class Affine(NamedTuple):
    """Weight and bias of a norm, (headdim,) and contiguous, or None."""

    weight: Tensor | None
    bias: Tensor | None


@triton.jit
def _rows(x, token, seqlen, head, ALIGN: tl.constexpr):
    """Offset of each head's first element; 64 bits from the first product on."""
    batch = (token // seqlen).to(tl.int64)
    seq = (token % seqlen).to(tl.int64)
    return (batch * x.batch + seq * x.seq + head.to(tl.int64) * x.head) * ALIGN


@triton.jit
def _pair_dims(HEADDIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr):
    """Dims of the first and second elements of half-split pairs; those that pass pair up too."""
    j = tl.arange(0, HALF)
    if ROTARY == HEADDIM:
        return j, j + HEADDIM // 2
    turning = j < ROTARY // 2
    return (
        tl.where(turning, j, j + ROTARY // 2),
        tl.where(turning, j + ROTARY // 2, j + HEADDIM // 2),
    )


@triton.jit
def _load_pairs(
    ptr, rows, row_mask, stride_dim,
    HEADDIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Heads as (rows, HALF) twice, widened.

    Interleaved ones are loaded whole and split in registers: every access is then 16 bytes wide,
    where loading odd and even dims apart would make it 2.
    """
    if INTERLEAVED:
        d = tl.arange(0, 2 * HALF)
        at = ptr + (rows[:, None] + d.to(tl.int64)[None, :] * stride_dim)
        x = tl.load(at, mask=row_mask[:, None] & (d < HEADDIM)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(x, (rows.shape[0], HALF, 2)))
    else:
        mask = row_mask[:, None] & (tl.arange(0, HALF) < HEADDIM // 2)[None, :]
        first, second = _pair_dims(HEADDIM, ROTARY, HALF)
        at = ptr + (rows[:, None] + first.to(tl.int64)[None, :] * stride_dim)
        a = tl.load(at, mask=mask, other=0.0)
        at = ptr + (rows[:, None] + second.to(tl.int64)[None, :] * stride_dim)
        b = tl.load(at, mask=mask, other=0.0)
    return a.to(COMPUTE), b.to(COMPUTE)


@triton.jit
def _store_pairs(
    ptr, rows, row_mask, stride_dim, a, b,
    HEADDIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The inverse of `_load_pairs`; rounds to the tensor's dtype, once."""
    a = a.to(ptr.dtype.element_ty)
    b = b.to(ptr.dtype.element_ty)
    if INTERLEAVED:
        d = tl.arange(0, 2 * HALF)
        at = ptr + (rows[:, None] + d.to(tl.int64)[None, :] * stride_dim)
        x = tl.reshape(tl.join(a, b), (rows.shape[0], 2 * HALF))
        tl.store(at, x, mask=row_mask[:, None] & (d < HEADDIM)[None, :])
    else:
        mask = row_mask[:, None] & (tl.arange(0, HALF) < HEADDIM // 2)[None, :]
        first, second = _pair_dims(HEADDIM, ROTARY, HALF)
        tl.store(ptr + (rows[:, None] + first.to(tl.int64)[None, :] * stride_dim), a, mask=mask)
        tl.store(ptr + (rows[:, None] + second.to(tl.int64)[None, :] * stride_dim), b, mask=mask)


@triton.jit
def _load_weight(
    ptr,
    HEADDIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """A vector (headdim,) as (1, HALF) twice."""
    row = tl.zeros((1,), tl.int64)
    return _load_pairs(ptr, row, row == 0, 1, HEADDIM, ROTARY, HALF, INTERLEAVED, COMPUTE)


@triton.jit
def _load_angles(
    cos_ptr, sin_ptr, token, seqlen, text_len,
    ROTARY: tl.constexpr, HALF: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """cos and sin of the token's pairs, and which of them turn: none of a text token's."""
    position = token % seqlen - text_len
    j = tl.arange(0, HALF)
    turning = (j < ROTARY // 2) & (position >= 0)
    at = position.to(tl.int64) * (ROTARY // 2) + j
    cos = tl.load(cos_ptr + at, mask=turning, other=0.0).to(COMPUTE)
    sin = tl.load(sin_ptr + at, mask=turning, other=0.0).to(COMPUTE)
    return cos[None, :], sin[None, :], turning[None, :]


@triton.jit
def _rotate(a, b, cos, sin, turning):
    """Turn each pair by its angle. A select, not an angle of 0, lets the rest pass bit for bit."""
    return tl.where(turning, a * cos - b * sin, a), tl.where(turning, b * cos + a * sin, b)


@triton.jit
def _normalise(
    a, b, HEADDIM: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr
):
    """Each head, less its mean for a LayerNorm, over its root mean square; and 1 / that root."""
    if NORM == "layer":
        mean = (tl.sum(a + b, axis=1) * (1.0 / HEADDIM))[:, None]
        a -= mean
        b -= mean
        if 2 * HALF != HEADDIM:
            within = (tl.arange(0, HALF) < HEADDIM // 2)[None, :]
            a = tl.where(within, a, 0.0)
            b = tl.where(within, b, 0.0)
    variance = tl.sum(a * a + b * b, axis=1) * (1.0 / HEADDIM)
    rstd = tl.rsqrt(variance + EPS)[:, None]
    return a * rstd, b * rstd, rstd


@triton.jit
def _forward_heads(
    out, x, affine, token, seqlen, cos, sin, turning,
    NHEADS: tl.constexpr, BLOCK_H: tl.constexpr, ALIGN: tl.constexpr,
    HEADDIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All heads of one token of one tensor."""
    if affine.weight is not None:
        weight_a, weight_b = _load_weight(
            affine.weight, HEADDIM, ROTARY, HALF, INTERLEAVED, COMPUTE
        )
    if affine.bias is not None:
        bias_a, bias_b = _load_weight(affine.bias, HEADDIM, ROTARY, HALF, INTERLEAVED, COMPUTE)
    for first in range(0, NHEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        mask = head < NHEADS
        rows = _rows(x, token, seqlen, head, ALIGN)
        a, b = _load_pairs(x.ptr, rows, mask, x.dim, HEADDIM, ROTARY, HALF, INTERLEAVED, COMPUTE)
        if NORM != "none":
            a, b, _ = _normalise(a, b, HEADDIM, HALF, NORM, EPS)
        if affine.weight is not None:
            a, b = a * weight_a, b * weight_b
        if affine.bias is not None:
            a, b = a + bias_a, b + bias_b
        a, b = _rotate(a, b, cos, sin, turning)
        rows = _rows(out, token, seqlen, head, ALIGN)
        _store_pairs(out.ptr, rows, mask, out.dim, a, b, HEADDIM, ROTARY, HALF, INTERLEAVED)


@triton.jit(do_not_specialize=["seqlen", "text_len"])
def _rope3d_fwd_kernel(
    q_out, k_out, q, k, q_affine, k_affine, cos_ptr, sin_ptr, seqlen, text_len,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, BLOCK_H: tl.constexpr, ALIGN: tl.constexpr,
    HEADDIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    cos, sin, turning = _load_angles(
        cos_ptr, sin_ptr, token, seqlen, text_len, ROTARY, HALF, COMPUTE
    )
    if INVERSE:
        sin = -sin
    _forward_heads(
        q_out, q, q_affine, token, seqlen, cos, sin, turning, Q_HEADS, BLOCK_H, ALIGN,
        HEADDIM, ROTARY, HALF, INTERLEAVED, NORM, EPS, COMPUTE,
    )  # fmt: skip
    if K_HEADS > 0:
        _forward_heads(
            k_out, k, k_affine, token, seqlen, cos, sin, turning, K_HEADS, BLOCK_H, ALIGN,
            HEADDIM, ROTARY, HALF, INTERLEAVED, NORM, EPS, COMPUTE,
        )  # fmt: skip


@triton.jit
def _backward_heads(
    dx, dweight_ptr, dout, x, weight_ptr, cos_ptr, sin_ptr, ntokens, seqlen, text_len,
    NHEADS: tl.constexpr, BLOCK_H: tl.constexpr, ALIGN: tl.constexpr,
    HEADDIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All heads of every PROGRAMS-th token of one tensor, and their share of dweight and dbias."""
    if weight_ptr is not None:
        weight_a, weight_b = _load_weight(weight_ptr, HEADDIM, ROTARY, HALF, INTERLEAVED, COMPUTE)
    dweight_a = tl.zeros((BLOCK_H, HALF), COMPUTE)
    dweight_b = tl.zeros((BLOCK_H, HALF), COMPUTE)
    dbias_a = tl.zeros((BLOCK_H, HALF), COMPUTE)
    dbias_b = tl.zeros((BLOCK_H, HALF), COMPUTE)
    for token in range(tl.program_id(0), ntokens, tl.num_programs(0)):
        cos, sin, turning = _load_angles(
            cos_ptr, sin_ptr, token, seqlen, text_len, ROTARY, HALF, COMPUTE
        )
        for first in range(0, NHEADS, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)
            mask = head < NHEADS
            rows = _rows(dout, token, seqlen, head, ALIGN)
            da, db = _load_pairs(
                dout.ptr, rows, mask, dout.dim, HEADDIM, ROTARY, HALF, INTERLEAVED, COMPUTE
            )
            rows = _rows(x, token, seqlen, head, ALIGN)
            a, b = _load_pairs(
                x.ptr, rows, mask, x.dim, HEADDIM, ROTARY, HALF, INTERLEAVED, COMPUTE
            )
            da, db = _rotate(da, db, cos, -sin, turning)
            a, b, rstd = _normalise(a, b, HEADDIM, HALF, NORM, EPS)
            if dweight_ptr is not None:
                dweight_a += da * a
                dweight_b += db * b
                dbias_a += da
                dbias_b += db
            if weight_ptr is not None:
                da, db = da * weight_a, db * weight_b
            along = (tl.sum(da * a + db * b, axis=1) * (1.0 / HEADDIM))[:, None]
            if NORM == "layer":
                mean = (tl.sum(da + db, axis=1) * (1.0 / HEADDIM))[:, None]
                da, db = da - mean, db - mean
            da, db = (da - a * along) * rstd, (db - b * along) * rstd
            rows = _rows(dx, token, seqlen, head, ALIGN)
            _store_pairs(dx.ptr, rows, mask, dx.dim, da, db, HEADDIM, ROTARY, HALF, INTERLEAVED)
    if dweight_ptr is not None:
        row = tl.zeros((1,), tl.int64)
        _store_pairs(
            dweight_ptr, row, row == 0, 1,
            tl.sum(dweight_a, axis=0)[None, :], tl.sum(dweight_b, axis=0)[None, :],
            HEADDIM, ROTARY, HALF, INTERLEAVED,
        )  # fmt: skip
        _store_pairs(
            dweight_ptr + HEADDIM, row, row == 0, 1,
            tl.sum(dbias_a, axis=0)[None, :], tl.sum(dbias_b, axis=0)[None, :],
            HEADDIM, ROTARY, HALF, INTERLEAVED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ntokens", "seqlen", "text_len"])
def _qk_norm_rope3d_bwd_kernel(
    dq, dk, dweight_ptr, dq_out, dk_out, q, k, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    ntokens, seqlen, text_len,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, BLOCK_H: tl.constexpr, ALIGN: tl.constexpr,
    HEADDIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Grid (programs, 2); the second axis is q or k. dweight_ptr: (2, programs, 2, headdim)."""
    if dweight_ptr is not None:
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        dweight_ptr += program * (2 * HEADDIM)
    if tl.program_id(1) == 0:
        _backward_heads(
            dq, dweight_ptr, dq_out, q, q_weight_ptr, cos_ptr, sin_ptr, ntokens, seqlen, text_len,
            Q_HEADS, BLOCK_H, ALIGN, HEADDIM, ROTARY, HALF, INTERLEAVED, NORM, EPS, COMPUTE,
        )  # fmt: skip
    else:
        _backward_heads(
            dk, dweight_ptr, dk_out, k, k_weight_ptr, cos_ptr, sin_ptr, ntokens, seqlen, text_len,
            K_HEADS, BLOCK_H, ALIGN, HEADDIM, ROTARY, HALF, INTERLEAVED, NORM, EPS, COMPUTE,
        )  # fmt: skip


def _heads(x: Tensor, align: int) -> Heads:
    *outer, dim = x.stride()
    return Heads(x, *(stride // align for stride in outer), dim)


def _affine(weight: Tensor | None, bias: Tensor | None) -> Affine:
    return Affine(_contiguous(weight), _contiguous(bias))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _constants(q: Tensor, k: Tensor | None, cos: Tensor, interleaved: bool) -> dict[str, object]:
    """The constexpr arguments that both kernels share."""
    headdim, q_heads = q.shape[3], q.shape[2]
    k_heads = 0 if k is None else k.shape[2]
    half = triton.next_power_of_2(headdim) // 2
    return {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "BLOCK_H": min(triton.next_power_of_2(max(q_heads, k_heads)), max(1, TILE // (2 * half))),
        "HEADDIM": headdim,
        "ROTARY": 2 * cos.shape[1],
        "HALF": half,
        "INTERLEAVED": interleaved,
        "COMPUTE": tl.float64 if q.dtype is torch.float64 else tl.float32,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
    }


def rope3d_fwd(
    x: Tensor, cos: Tensor, sin: Tensor, text_len: int, interleaved: bool, inverse: bool
) -> Tensor:
    """x turned by its angles, or back by them, as a new contiguous tensor."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, seqlen, _, _ = x.shape
    if x.numel() == 0:
        return out
    align = alignment(out, x)
    with on_device(x):
        _rope3d_fwd_kernel[(batch * seqlen,)](
            _heads(out, align), None, _heads(x, align), None, _affine(None, None), None,
            cos.contiguous(), sin.contiguous(), seqlen, text_len,
            ALIGN=align, INVERSE=inverse, NORM="none", EPS=0.0,
            **_constants(x, None, cos, interleaved),
        )  # fmt: skip
    return out


def qk_norm_rope3d_fwd(
    q: Tensor, k: Tensor,
    q_weight: Tensor | None, q_bias: Tensor | None,
    k_weight: Tensor | None, k_bias: Tensor | None,
    cos: Tensor, sin: Tensor, text_len: int, norm: str, eps: float, interleaved: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k normalised and turned: written over themselves, or as new contiguous tensors."""
    q_out = q if inplace else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = k if inplace else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    batch, seqlen, _, _ = q.shape
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    align = alignment(q_out, k_out, q, k)
    with on_device(q):
        _rope3d_fwd_kernel[(batch * seqlen,)](
            _heads(q_out, align), _heads(k_out, align), _heads(q, align), _heads(k, align),
            _affine(q_weight, q_bias), _affine(k_weight, k_bias),
            cos.contiguous(), sin.contiguous(), seqlen, text_len,
            ALIGN=align, INVERSE=False, NORM=norm, EPS=eps,
            **_constants(q, k, cos, interleaved),
        )  # fmt: skip
    return q_out, k_out


def qk_norm_rope3d_bwd(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor, sin: Tensor, text_len: int, norm: str, eps: float, interleaved: bool,
    affine_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, of k, and of (q_weight, q_bias, k_weight, k_bias) as rows of one tensor.

    The rows are (4, headdim) in fp32 (fp64 for fp64 inputs), or (0, headdim) if not asked for.
    """
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    batch, seqlen, _, headdim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = 4 if affine_grads else 0
    if q.numel() + k.numel() == 0:
        return dq, dk, torch.zeros((rows, headdim), dtype=wide, device=q.device)
    programs = min(batch * seqlen, BACKWARD_PROGRAMS)
    shares = torch.empty((programs, rows, headdim), dtype=wide, device=q.device)
    shares = shares.view(2, programs, rows // 2, headdim)
    align = alignment(dq, dk, dq_out, dk_out, q, k)
    with on_device(q):
        _qk_norm_rope3d_bwd_kernel[(programs, 2)](
            _heads(dq, align), _heads(dk, align), shares if affine_grads else None,
            _heads(dq_out, align), _heads(dk_out, align), _heads(q, align), _heads(k, align),
            _contiguous(q_weight), _contiguous(k_weight),
            cos.contiguous(), sin.contiguous(), batch * seqlen, seqlen, text_len,
            ALIGN=align, NORM=norm, EPS=eps,
            **_constants(q, k, cos, interleaved),
        )  # fmt: skip
    return dq, dk, shares.sum(1).view(rows, headdim)
