"""Public API: argument checks, backend dispatch, custom-op registration, autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import _autocast, _backend, _checks
from .._custom_op import custom_op
from .reference import (
    expert_adaln_reference,
    gated_residual_adaln_reference,
    gated_residual_reference,
)
from .validation import (
    check_inplace,
    check_modulation,
    check_norm,
    check_rows,
    unsupported_reason,
)

# --- cogvx::expert_adaln ---------------------------------------------------------------------


@custom_op("expert_adaln")
def _expert_adaln(
    x: Tensor, shift: Tensor | None, scale: Tensor | None,
    text_shift: Tensor | None, text_scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, text_len: int, norm: str, eps: float,
) -> Tensor:  # fmt: skip
    from . import kernel

    video, text = kernel.Modulation(shift, scale), kernel.Modulation(text_shift, text_scale)
    settings = kernel.Settings(text_len, norm, eps)
    return kernel.expert_adaln_fwd(x, None, video, text, weight, bias, settings)[1]


@_expert_adaln.register_fake
def _expert_adaln_fake(x, *_):
    return x.new_empty(x.shape)


def _expert_adaln_setup(ctx, inputs, output):
    x, _, scale, _, text_scale, weight, bias, *ctx.settings = inputs
    ctx.save_for_backward(x, None, None, None, scale, text_scale, weight, bias)


def _expert_adaln_backward(ctx, dout):
    dx, _, _, _, *rest = _gradients(ctx, None, dout)
    return dx, *rest, None, None, None


_expert_adaln.register_autograd(_expert_adaln_backward, setup_context=_expert_adaln_setup)


# --- cogvx::gated_residual, and its in-place form --------------------------------------------


@custom_op("gated_residual")
def _gated_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, text_gate: Tensor | None, text_len: int
) -> Tensor:
    from . import kernel

    video, text = kernel.Modulation(gate=gate), kernel.Modulation(gate=text_gate)
    settings = kernel.Settings(text_len, "none", 0.0)
    return kernel.expert_adaln_fwd(x, y, video, text, None, None, settings)[0]


@_gated_residual.register_fake
def _gated_residual_fake(x, *_):
    return x.new_empty(x.shape)


@custom_op("gated_residual_", mutates_args=("x",))
def _gated_residual_inplace(
    x: Tensor, y: Tensor, gate: Tensor | None, text_gate: Tensor | None, text_len: int
) -> None:
    from . import kernel

    video, text = kernel.Modulation(gate=gate), kernel.Modulation(gate=text_gate)
    settings = kernel.Settings(text_len, "none", 0.0)
    kernel.expert_adaln_fwd(x, y, video, text, None, None, settings, inplace=True)


def _gated_residual_setup(ctx, inputs, output):
    x, y, gate, text_gate, text_len = inputs
    ctx.settings = text_len, "none", 0.0
    ctx.save_for_backward(x, y, gate, text_gate, None, None, None, None)


def _gated_residual_backward(ctx, dstream):
    dx, dy, dgate, dtext_gate, *_ = _gradients(ctx, dstream, None)
    return dx, dy, dgate, dtext_gate, None


_gated_residual.register_autograd(_gated_residual_backward, setup_context=_gated_residual_setup)


# --- cogvx::gated_residual_adaln -------------------------------------------------------------


@custom_op("gated_residual_adaln")
def _gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor | None, text_gate: Tensor | None,
    shift: Tensor | None, scale: Tensor | None,
    text_shift: Tensor | None, text_scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, text_len: int, norm: str, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from . import kernel

    video = kernel.Modulation(shift, scale, gate)
    text = kernel.Modulation(text_shift, text_scale, text_gate)
    settings = kernel.Settings(text_len, norm, eps)
    return kernel.expert_adaln_fwd(x, y, video, text, weight, bias, settings)


@_gated_residual_adaln.register_fake
def _gated_residual_adaln_fake(x, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _gated_residual_adaln_setup(ctx, inputs, output):
    """Keep the residual stream instead of x."""
    _, y, gate, text_gate, _, scale, _, text_scale, weight, bias, *ctx.settings = inputs
    ctx.save_for_backward(output[0], y, gate, text_gate, scale, text_scale, weight, bias)


def _gated_residual_adaln_backward(ctx, dstream, dout):
    return *_gradients(ctx, dstream, dout), None, None, None


_gated_residual_adaln.register_autograd(
    _gated_residual_adaln_backward, setup_context=_gated_residual_adaln_setup
)


# --- the backward of all three ---------------------------------------------------------------


@custom_op("expert_adaln_backward")
def _expert_adaln_grads(
    dstream: Tensor | None, dout: Tensor | None, stream: Tensor, y: Tensor | None,
    gate: Tensor | None, text_gate: Tensor | None,
    scale: Tensor | None, text_scale: Tensor | None,
    weight: Tensor | None, text_len: int, norm: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import kernel

    video, text = (kernel.Modulation(None, *of) for of in ((scale, gate), (text_scale, text_gate)))
    settings = kernel.Settings(text_len, norm, eps)
    return kernel.expert_adaln_bwd(dstream, dout, stream, y, video, text, weight, settings)


@_expert_adaln_grads.register_fake
def _expert_adaln_grads_fake(
    dstream, dout, stream, y, gate, text_gate, scale, text_scale, weight, text_len, norm, eps
):
    batch, _, dim = stream.shape
    groups = sum(_groups(x, z) for x, z in ((text_scale, text_gate), (scale, gate)))
    vectors = 2 * (norm != "none") + (y is not None)
    wide = torch.promote_types(stream.dtype, torch.float32)
    return (
        stream.new_empty((0,) if norm == "none" else stream.shape),
        stream.new_empty((0,) if y is None else stream.shape),
        stream.new_empty((batch, groups, vectors, dim), dtype=wide),
    )


def _groups(*modulation):
    return next((x.shape[1] if x.dim() == 3 else 1 for x in modulation if x is not None), 0)


def _gradients(ctx, dstream, dout):
    """Gradients of x, y, gate, text_gate, shift, scale, text_shift, text_scale, weight, bias.

    The norm's factor is (1 + scale)·weight and its term (1 + scale)·bias + shift, so the sums of
    dout and of dout·x̂ over the tokens of a group give all of their gradients.
    """
    stream, y, gate, text_gate, scale, text_scale, weight, bias = ctx.saved_tensors
    dx, dy, sums = _expert_adaln_grads(
        dstream, dout, stream, y, gate, text_gate, scale, text_scale, weight, *ctx.settings
    )
    ntext = _groups(text_scale, text_gate)
    gates = shifts = scales = (None, None)
    dweight = dbias = None
    if y is not None:
        gates = _of_modalities(sums[:, :, -1], ntext, text_gate, gate)
    else:
        dy = None
    if dout is None:
        dx = dstream  # the residual passes it on
    else:
        sum_dout, sum_dout_xhat, *_ = sums.unbind(2)
        dscale = sum_dout_xhat if weight is None else sum_dout_xhat * weight
        dscale = dscale if bias is None else dscale + sum_dout * bias
        shifts = _of_modalities(sum_dout, ntext, text_scale, scale)
        scales = _of_modalities(dscale, ntext, text_scale, scale)
        factors = [
            1 + (x if x.dim() == 3 else x[:, None]).to(sums.dtype)
            for x in (text_scale, scale)
            if x is not None
        ]
        factor = torch.cat([sum_dout[:, :0], *factors], 1)
        dweight = None if weight is None else (factor * sum_dout_xhat).sum((0, 1)).to(weight.dtype)
        dbias = None if bias is None else (factor * sum_dout).sum((0, 1)).to(bias.dtype)
    (dtext_gate, dgate), (dtext_shift, dshift), (dtext_scale, dscale) = gates, shifts, scales
    modulation = (dgate, dtext_gate, dshift, dscale, dtext_shift, dtext_scale)
    return dx, dy, *modulation, dweight, dbias


def _of_modalities(sums, ntext, text, video):
    """The sums of text's groups and of video's, as each modulation is, or None."""
    if text is not None and video is not None and text.dtype is video.dtype:
        sums = sums.to(text.dtype)  # one launch for both

    def part(like, first, end):
        if like is None:
            return None
        return (sums[:, first] if like.dim() == 2 else sums[:, first:end]).to(like.dtype)

    return part(text, 0, ntext), part(video, ntext, sums.shape[1])


# --- under autocast --------------------------------------------------------------------------


def _expert_adaln_under_autocast(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: dict[str, Any], **rest: Any
) -> Tensor:
    """Cast to the dtype to which x and the modulation promote; `modulation` is by argument name."""
    dtype = _autocast.promoted(x, *modulation.values())
    x, *values = _autocast.cast(dtype, x, *modulation.values())
    weight, bias = _autocast.parameters(dtype, weight, bias)
    with _autocast.off(x):
        named = dict(zip(modulation, values, strict=True))
        return expert_adaln(x, **named, weight=weight, bias=bias, **rest)


def _gated_residual_under_autocast(
    x: Tensor, y: Tensor, gate: Any, text_gate: Any, inplace: bool, **rest: Any
) -> Tensor:
    """Cast to the common dtype; in place, x keeps its dtype and the result is rounded to it."""
    dtype = _autocast.promoted(x, y, gate, text_gate)
    wide, *others = _autocast.cast(dtype, x, y, gate, text_gate)
    with _autocast.off(x):
        if wide is x or not inplace:
            return gated_residual(wide, *others, inplace=inplace, **rest)
        out = gated_residual(wide, *others, **rest)
    check_inplace("gated_residual", x, y=y, gate=gate, text_gate=text_gate)
    return x.copy_(out)


def _gated_residual_adaln_under_autocast(
    x: Tensor, y: Tensor, gates: dict[str, Any], modulation: dict[str, Any],
    weight: Tensor | None, bias: Tensor | None, **rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One pass if the stream and its norm have the same dtype, else two: the norm's is wider."""
    dtype = _autocast.promoted(x, y, *gates.values())
    if dtype is not _autocast.promoted(x, y, *gates.values(), *modulation.values()):
        stream = gated_residual(x, y, **gates, text_len=rest["text_len"], backend=rest["backend"])
        return stream, expert_adaln(stream, **modulation, weight=weight, bias=bias, **rest)
    named = {**gates, **modulation}
    x, y, *values = _autocast.cast(dtype, x, y, *named.values())
    weight, bias = _autocast.parameters(dtype, weight, bias)
    with _autocast.off(x):
        named = dict(zip(named, values, strict=True))
        return gated_residual_adaln(x, y, **named, weight=weight, bias=bias, **rest)


# --- the public functions --------------------------------------------------------------------


def expert_adaln(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    text_shift: Tensor | None = None,
    text_scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    text_len: int = 0,
    norm: str = "layer",
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Normalise every token, then n·(1 + scale) + shift, with a pair for each modality.

    Args:
        x: (batch, seqlen, dim), any strides; the first `text_len` tokens are text.
        shift, scale: of video tokens, (batch, dim), or (batch, groups, dim) for `groups` equal
            runs of tokens: one for each frame, or for each token. Any strides; fp32 or x's dtype.
            None only without video tokens.
        text_shift, text_scale: of text tokens, likewise; None without text.
        weight, bias: (dim,) of the norm, shared by both modalities, or None.
        text_len: number of text tokens, 0 to seqlen.
        norm: "layer" (CogVideoX) or "rms".
        eps: added to the variance: 1e-5 in CogVideoX; DiT, Wan, HunyuanVideo and Mochi have 1e-6.
        backend: "auto", "kernel" or "reference".

    Returns:
        A new contiguous tensor of x's shape and dtype; computed in at least fp32, rounded once.
        Gradients for every tensor; only the inputs are saved for the backward.
        Under autocast dtypes may be mixed, and the result has the one to which x and the
        modulation promote, as norm(x) * (1 + scale) + shift has. The norm itself counts as x's
        dtype, where torch's on CUDA gives fp32: the next product would round it.

    Raises:
        TypeError, ValueError: an invalid argument, named in the message.
        RuntimeError: backend="kernel" and the kernel cannot run.

    Source: arXiv 2408.06072, section 2.2 (expert adaptive LayerNorm); arXiv 2212.09748 (adaLN).
    """
    op = "expert_adaln"
    named = {"shift": shift, "scale": scale, "text_shift": text_shift, "text_scale": text_scale}
    if _autocast.enabled(x):
        return _expert_adaln_under_autocast(
            x, weight, bias, named, text_len=text_len, norm=norm, eps=eps, backend=backend
        )
    check_rows(op, x, text_len)
    check_modulation(op, x, x.shape[1] - text_len, shift=shift, scale=scale)
    check_modulation(op, x, text_len, text_shift=text_shift, text_scale=text_scale)
    check_norm(op, x, weight, bias, norm, eps)
    modulation = shift, scale, text_shift, text_scale
    if _backend.choose(backend, op, unsupported_reason(x, **named, weight=weight, bias=bias), x):
        return _expert_adaln(x, *modulation, weight, bias, text_len, norm, float(eps))
    return expert_adaln_reference(
        x, *modulation, weight, bias, text_len=text_len, norm=norm, eps=eps
    )


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    text_gate: Tensor | None = None,
    *,
    text_len: int = 0,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x + gate·y, with a gate for each modality.

    Args:
        x, y: (batch, seqlen, dim), any strides; the first `text_len` tokens are text.
        gate, text_gate: as `shift` and `text_shift` of `expert_adaln`.
        text_len, backend: as in `expert_adaln`.
        inplace: overwrite x and return it; an error if a gradient is required.

    Returns:
        A tensor of x's shape and dtype, new and contiguous unless inplace; computed in at least
        fp32, rounded once. Gradients for every tensor. Under autocast dtypes may be mixed, and the
        result has the one to which they promote, as x + gate * y has; in place x keeps its own.

    Raises:
        TypeError, ValueError: an invalid argument, named in the message.
        RuntimeError: backend="kernel" and the kernel cannot run; inplace under grad.

    Source: arXiv 2408.06072, section 2.2; arXiv 2212.09748, section 3.2.
    """
    op = "gated_residual"
    if _autocast.enabled(x):
        return _gated_residual_under_autocast(
            x, y, gate, text_gate, inplace, text_len=text_len, backend=backend
        )
    check_rows(op, x, text_len, y)
    check_modulation(op, x, x.shape[1] - text_len, gate=gate)
    check_modulation(op, x, text_len, text_gate=text_gate)
    _checks.flag(op, "inplace", inplace)
    if inplace:
        check_inplace(op, x, y=y, gate=gate, text_gate=text_gate)
    gates = gate, text_gate
    if _backend.choose(backend, op, unsupported_reason(x, y=y, gate=gate, text_gate=text_gate), x):
        if inplace:
            _gated_residual_inplace(x, y, *gates, text_len)
            return x
        return _gated_residual(x, y, *gates, text_len)
    out = gated_residual_reference(x, y, *gates, text_len=text_len)
    return x.copy_(out) if inplace else out


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    text_gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    text_shift: Tensor | None = None,
    text_scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    text_len: int = 0,
    norm: str = "layer",
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, then `expert_adaln` of its result: two tensors read and two written.

    Args:
        x, y, gate, text_gate: as in `gated_residual`.
        shift, scale, text_shift, text_scale, weight, bias, norm, eps: as in `expert_adaln`; without
            text, shift and scale are passed by name. Gate, shift and scale of a modality have the
            same shape.
        text_len, backend: as in both.

    Returns:
        (the residual stream, its modulated norm), each new, contiguous, of x's shape and dtype;
        each is rounded once, and the norm's input is the rounded stream. The stream and y are
        saved for the backward, and not x. Under autocast dtypes may be mixed, and each result has
        the dtype of `gated_residual` followed by `expert_adaln`.

    Raises:
        TypeError, ValueError: an invalid argument, named in the message.
        RuntimeError: backend="kernel" and the kernel cannot run.

    Source: arXiv 2408.06072, section 2.2; arXiv 2212.09748, section 3.2.
    """
    op = "gated_residual_adaln"
    named = {"shift": shift, "scale": scale, "text_shift": text_shift, "text_scale": text_scale}
    named_gates = {"gate": gate, "text_gate": text_gate}
    if _autocast.enabled(x):
        return _gated_residual_adaln_under_autocast(
            x, y, named_gates, named, weight, bias,
            text_len=text_len, norm=norm, eps=eps, backend=backend,
        )  # fmt: skip
    check_rows(op, x, text_len, y)
    check_modulation(op, x, x.shape[1] - text_len, gate=gate, shift=shift, scale=scale)
    check_modulation(
        op, x, text_len, text_gate=text_gate, text_shift=text_shift, text_scale=text_scale
    )
    check_norm(op, x, weight, bias, norm, eps)
    arguments = (x, y, gate, text_gate, shift, scale, text_shift, text_scale, weight, bias)
    reason = unsupported_reason(x, y=y, **named_gates, **named, weight=weight, bias=bias)
    if _backend.choose(backend, op, reason, x):
        return _gated_residual_adaln(*arguments, text_len, norm, float(eps))
    return gated_residual_adaln_reference(*arguments, text_len=text_len, norm=norm, eps=eps)
