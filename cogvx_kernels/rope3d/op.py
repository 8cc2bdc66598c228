"""Public API: argument checks, backend dispatch, custom-op registration, autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import _autocast, _backend, _checks
from .._custom_op import custom_op
from .reference import qk_norm_rope3d_reference, rope3d_reference

HEADS = ("batch", "seqlen", "nheads", "headdim")


# --- cogvx::rope3d ---------------------------------------------------------------------------


@custom_op("rope3d")
def _rope3d(
    x: Tensor, cos: Tensor, sin: Tensor, text_len: int, interleaved: bool, inverse: bool
) -> Tensor:
    from . import kernel

    return kernel.rope3d_fwd(x, cos, sin, text_len, interleaved, inverse)


@_rope3d.register_fake
def _rope3d_fake(x, cos, sin, text_len, interleaved, inverse):
    return x.new_empty(x.shape)


def _rope3d_setup(ctx, inputs, output):
    _, cos, sin, *ctx.settings = inputs
    ctx.save_for_backward(cos, sin)


def _rope3d_backward(ctx, dout):
    """Rotate by the opposite angle, which is the transpose of a rotation."""
    text_len, interleaved, inverse = ctx.settings
    dx = _rope3d(dout, *ctx.saved_tensors, text_len, interleaved, not inverse)
    return dx, None, None, None, None, None


_rope3d.register_autograd(_rope3d_backward, setup_context=_rope3d_setup)


# --- cogvx::qk_norm_rope3d, its in-place form, and its backward ------------------------------


@custom_op("qk_norm_rope3d")
def _qk_norm_rope3d(
    q: Tensor, k: Tensor, q_weight: Tensor | None, q_bias: Tensor | None,
    k_weight: Tensor | None, k_bias: Tensor | None, cos: Tensor, sin: Tensor,
    text_len: int, norm: str, eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from . import kernel

    affine = q_weight, q_bias, k_weight, k_bias
    settings = kernel.Settings(text_len, norm, eps, interleaved)
    return kernel.qk_norm_rope3d_fwd(q, k, affine, cos, sin, settings, inplace=False)


@_qk_norm_rope3d.register_fake
def _qk_norm_rope3d_fake(q, k, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@custom_op("qk_norm_rope3d_", mutates_args=("q", "k"))
def _qk_norm_rope3d_inplace(
    q: Tensor, k: Tensor, q_weight: Tensor | None, q_bias: Tensor | None,
    k_weight: Tensor | None, k_bias: Tensor | None, cos: Tensor, sin: Tensor,
    text_len: int, norm: str, eps: float, interleaved: bool,
) -> None:  # fmt: skip
    from . import kernel

    affine = q_weight, q_bias, k_weight, k_bias
    settings = kernel.Settings(text_len, norm, eps, interleaved)
    kernel.qk_norm_rope3d_fwd(q, k, affine, cos, sin, settings, inplace=True)


@custom_op("qk_norm_rope3d_backward")
def _qk_norm_rope3d_grads(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    text_len: int, norm: str, eps: float, interleaved: bool, affine_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import kernel

    douts, weights = (dq_out, dk_out), (q_weight, k_weight)
    settings = kernel.Settings(text_len, norm, eps, interleaved)
    return kernel.qk_norm_rope3d_bwd(douts, q, k, weights, cos, sin, settings, affine_grads)


@_qk_norm_rope3d_grads.register_fake
def _qk_norm_rope3d_grads_fake(
    dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, text_len, norm, eps, interleaved,
    affine_grads,
):  # fmt: skip
    wide = torch.promote_types(q.dtype, torch.float32)
    affine = q.new_empty((4 if affine_grads else 0, q.shape[-1]), dtype=wide)
    return q.new_empty(q.shape), k.new_empty(k.shape), affine


def _qk_norm_rope3d_setup(ctx, inputs, output):
    q, k, *affine, cos, sin, text_len, norm, eps, interleaved = inputs
    q_weight, _, k_weight, _ = affine
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
    ctx.settings = text_len, norm, eps, interleaved
    ctx.affine_dtypes = [None if x is None else x.dtype for x in affine]


def _qk_norm_rope3d_backward(ctx, dq_out, dk_out):
    wanted = ctx.needs_input_grad[2:6]
    dq, dk, rows = _qk_norm_rope3d_grads(
        dq_out, dk_out, *ctx.saved_tensors, *ctx.settings, any(wanted)
    )
    affine = [
        rows[i].to(dtype) if want else None
        for i, (want, dtype) in enumerate(zip(wanted, ctx.affine_dtypes, strict=True))
    ]
    return dq, dk, *affine, None, None, None, None, None, None


_qk_norm_rope3d.register_autograd(_qk_norm_rope3d_backward, setup_context=_qk_norm_rope3d_setup)


# --- checks ----------------------------------------------------------------------------------


def _check_rope(
    op: str,
    name: str,
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    text_len: int,
    interleaved: bool,
) -> None:
    _checks.tensor(op, name, x, HEADS)
    _checks.flag(op, "interleaved", interleaved)
    batch, seqlen, nheads, headdim = x.shape
    _checks.integer(op, "text_len", text_len, 0, seqlen, f"(the seqlen of {name})")
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    for table_name, value in (("cos", cos), ("sin", sin)):
        if table_name == "sin" and cos is not None and value is not None:
            if _checks.alike(value, cos):
                _checks.no_grad(op, table_name, value)
                continue
        table = _checks.tensor(op, table_name, value, ("video_len", "rotary_dim // 2"))
        _checks.dtype(op, table_name, table, (torch.float32, wide))
        _checks.same_device(op, table_name, table, name, x)
        _checks.no_grad(op, table_name, table)
        half = table.shape[1]
        if not 1 <= half <= headdim // 2:
            raise ValueError(
                f"{op}: {table_name} must have 1 to headdim // 2 = {headdim // 2} columns, one "
                f"per pair of dims that turn; got {tuple(table.shape)}"
            )
        _checks.shape(
            op, table_name, table, (seqlen - text_len, half), "(video_len, rotary_dim // 2)",
            lambda: f" for {name} of shape {tuple(x.shape)} and text_len={text_len}",
        )  # fmt: skip
    assert cos is not None and sin is not None
    _checks.shape(op, "sin", sin, cos.shape, "the shape of cos")


def _check_qk_norm_rope(
    op: str, q: Tensor, k: Tensor, affine: dict[str, Tensor | None], norm: str, eps: float
) -> None:
    if not _checks.alike(k, q):
        _checks.tensor(op, "k", k, HEADS)
        _checks.dtype(op, "k", k, (q.dtype,))
        _checks.same_device(op, "k", k, "q", q)
        batch, seqlen, _, headdim = q.shape
        wanted = (batch, seqlen, k.shape[2], headdim)
        _checks.shape(
            op, "k", k, wanted, "(batch, seqlen, any nheads, headdim)",
            lambda: f" for q of shape {tuple(q.shape)}",
        )  # fmt: skip
    _checks.vectors(op, "q", q, 3, "headdim", torch.float32, **affine)
    _checks.choice(op, "norm", norm, ("layer", "rms"))
    _checks.positive(op, "eps", eps)


def _check_inplace(op: str, q: Tensor, k: Tensor, affine: dict[str, Tensor | None]) -> None:
    _checks.inplace(op, "q and k, which the backward needs", {"q": q, "k": k}, affine)


def _unsupported_reason(name: str, x: Tensor, **others: Tensor | None) -> str | None:
    """Return why the kernels cannot take `x`, the argument `name`, and the others; else None."""
    if x.shape[-1] % 2:
        return f"{name} has headdim {x.shape[-1]}; the kernel takes even ones"
    reason = _backend.triton_reason(name, x)
    return reason or _backend.transform_reason(**{name: x}, **others)


# --- under autocast --------------------------------------------------------------------------


def _tables(x: Tensor, *tables: Tensor | None) -> tuple[Any, ...]:
    """Tables in the dtype of the rotation of `x`, at least fp32."""
    return _autocast.cast(torch.promote_types(x.dtype, torch.float32), *tables)


def _qk_norm_rope3d_under_autocast(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    inplace: bool,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Run q and k in the dtype to which they promote; each result has its own input's dtype."""
    dtype = _autocast.promoted(q, k)
    wide_q, wide_k = _autocast.cast(dtype, q, k)
    affine = _autocast.parameters(dtype, q_weight, q_bias, k_weight, k_bias)
    arguments = (wide_q, wide_k, *affine, *_tables(wide_q, cos, sin))
    with _autocast.off(q):
        if wide_q is q and wide_k is k:
            return qk_norm_rope3d(*arguments, inplace=inplace, **settings)
        _checks.flag("qk_norm_rope3d", "inplace", inplace)
        new_q, new_k = qk_norm_rope3d(*arguments, **settings)
    if inplace:
        names = ("q_weight", "q_bias", "k_weight", "k_bias")
        _check_inplace("qk_norm_rope3d", q, k, dict(zip(names, affine, strict=True)))
        return q.copy_(new_q), k.copy_(new_k)
    return new_q.to(q.dtype), new_k.to(k.dtype)


# --- the public functions --------------------------------------------------------------------


def rope3d(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    text_len: int = 0,
    interleaved: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Rotary position for the video tokens of a joint sequence; text tokens are copied.

    Args:
        x: (batch, seqlen, nheads, headdim), any strides; the first `text_len` tokens are text. q
            and k of one packed projection, (batch, seqlen, 3 · nheads · headdim), are rotated in
            one call as its first 2 · nheads heads.
        cos, sin: (video_len, rotary_dim // 2) fp32, as `rope3d_tables` makes them of the grid of
            tokens; rotary_dim <= headdim. Constants: they get no gradient.
        text_len: text tokens, which are not rotated, 0 to seqlen.
        interleaved: pairs are dims (2j, 2j + 1), as in CogVideoX; else (j, j + rotary_dim / 2).
        backend: "auto", "kernel" or "reference".

    Returns:
        A new contiguous tensor of x's shape and dtype; computed in at least fp32, rounded once.
        Under autocast too, where tables in 16 bits, the results of products, are cast to fp32.

    Raises:
        TypeError, ValueError: an invalid argument, named in the message.
        RuntimeError: backend="kernel" and the kernel cannot run, or a table requires a gradient.

    Example:
        >>> cos, sin = rope3d_tables(slice_positions((13, 30, 45)), split=(16, 24, 24))
        >>> q = rope3d(q, cos, sin, text_len=226)  # q (batch, 226 + 13 * 30 * 45, nheads, 64)

    Source: arXiv 2104.09864, section 3.4; arXiv 2408.06072, section 2.2.
    """
    if _autocast.enabled(x):
        cos, sin = _tables(x, cos, sin)
        with _autocast.off(x):
            return rope3d(x, cos, sin, text_len=text_len, interleaved=interleaved, backend=backend)
    _check_rope("rope3d", "x", x, cos, sin, text_len, interleaved)
    if _backend.choose(backend, "rope3d", _unsupported_reason("x", x, cos=cos, sin=sin), x):
        return _rope3d(x, cos, sin, text_len, interleaved, False)
    return rope3d_reference(x, cos, sin, text_len=text_len, interleaved=interleaved)


def qk_norm_rope3d(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    text_len: int = 0,
    norm: str = "layer",
    eps: float = 1e-6,
    interleaved: bool = True,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise every head of q and k, then `rope3d` on the video tokens: one pass over both.

    Args:
        q, k: (batch, seqlen, nheads, headdim), any strides, for example views of one packed qkv
            projection, which are not copied; k may have fewer heads than q.
        q_weight, q_bias, k_weight, k_bias: (headdim,) of the norm, or None; fp32 or q's dtype.
        cos, sin: required, by name where the weights are left out; (video_len, rotary_dim // 2)
            fp32, as `rope3d_tables` makes them of the grid of tokens.
        text_len: text tokens, which are normalised and not rotated, 0 to seqlen.
        norm: "layer" (CogVideoX) or "rms" (HunyuanVideo, Mochi).
        eps: added to the variance: 1e-6 in CogVideoX and HunyuanVideo; Mochi has 1e-5.
        interleaved: pairs are dims (2j, 2j + 1), as in CogVideoX; else (j, j + rotary_dim / 2).
        inplace: overwrite q and k and return them; an error if a gradient is required.
        backend: "auto", "kernel" or "reference".

    Returns:
        (q, k) of the same shapes and dtype, new and contiguous unless inplace; computed in at
        least fp32, rounded once. Gradients for q, k and the weights and biases; only the inputs
        are saved for the backward. Under autocast q and k may differ in dtype and each keeps its
        own, as in torch's norms; weights and tables may have any.

    Raises:
        TypeError, ValueError: an invalid argument, named in the message.
        RuntimeError: backend="kernel" and the kernel cannot run; inplace under grad; a table
            requires a gradient.

    Example, for norms without weights:
        >>> cos, sin = rope3d_tables(slice_positions((13, 30, 45)), split=(16, 24, 24))
        >>> q, k = qk_norm_rope3d(q, k, cos=cos, sin=sin, text_len=226, norm="rms")

    Source: arXiv 2408.06072, section 2.2.
    """
    if _autocast.enabled(q):
        return _qk_norm_rope3d_under_autocast(
            q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, inplace, text_len=text_len,
            norm=norm, eps=eps, interleaved=interleaved, backend=backend,
        )  # fmt: skip
    affine = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    _check_rope("qk_norm_rope3d", "q", q, cos, sin, text_len, interleaved)
    _check_qk_norm_rope("qk_norm_rope3d", q, k, affine, norm, eps)
    _checks.flag("qk_norm_rope3d", "inplace", inplace)
    if inplace:
        _check_inplace("qk_norm_rope3d", q, k, affine)
    assert cos is not None and sin is not None
    arguments = (q, k, q_weight, q_bias, k_weight, k_bias, cos, sin)
    reason = _unsupported_reason("q", q, k=k, **affine, cos=cos, sin=sin)
    if _backend.choose(backend, "qk_norm_rope3d", reason, q):
        if inplace:
            _qk_norm_rope3d_inplace(*arguments, text_len, norm, float(eps), interleaved)
            return q, k
        return _qk_norm_rope3d(*arguments, text_len, norm, float(eps), interleaved)
    out = qk_norm_rope3d_reference(
        *arguments, text_len=text_len, norm=norm, eps=eps, interleaved=interleaved
    )
    return (q.copy_(out[0]), k.copy_(out[1])) if inplace else out
