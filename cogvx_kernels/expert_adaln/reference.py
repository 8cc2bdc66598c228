"""Reference of the adaptive LayerNorm and the gated residual, with a modulation for each modality.

Plain PyTorch. It computes in at least fp32 and rounds once, to the dtype of its input;
gradients come from autograd.
"""

import torch
from torch import Tensor

from .. import modality


def expert_adaln_reference(
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
) -> Tensor:
    """Normalise every token, then scale and shift it: n·(1 + scale) + shift.

    norm="layer":  n = (x - mean) / sqrt(var + eps) · weight + bias    mean and variance over dim
    norm="rms":    n = x / sqrt(mean(x²) + eps) · weight + bias

    x                       (batch, seqlen, dim), text first: seqlen = text_len + video_len
    shift, scale            of video tokens: (batch, dim), or (batch, groups, dim) for `groups`
                            equal runs of tokens; None without video
    text_shift, text_scale  of text tokens, likewise
    weight, bias            (dim,) of the norm, shared by both modalities, or None
    returns                 the shape and dtype of x

    Source: CogVideoX (arXiv 2408.06072), section 2.2, expert adaptive LayerNorm; DiT (arXiv
    2212.09748), section 3.2, for adaLN.
    """
    n = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm == "layer":
        n = n - n.mean(-1, keepdim=True)
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    n = n if weight is None else n * weight
    n = n if bias is None else n + bias
    text, video = modality.split(n, text_len)
    text = _modulated(text, text_shift, text_scale)
    video = _modulated(video, shift, scale)
    return modality.join(text, video).to(x.dtype)


def gated_residual_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    text_gate: Tensor | None = None,
    *,
    text_len: int = 0,
) -> Tensor:
    """x + gate·y, with a gate for each modality.

    x, y             (batch, seqlen, dim), text first
    gate, text_gate  as `shift` and `text_shift` of `expert_adaln_reference`
    returns          the shape and dtype of x

    Source: DiT (arXiv 2212.09748), section 3.2; CogVideoX (arXiv 2408.06072), section 2.2.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    text, video = modality.split(y.to(wide), text_len)
    gated = modality.join(_gated(text, text_gate), _gated(video, gate))
    return (x.to(wide) + gated).to(x.dtype)


def gated_residual_adaln_reference(
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
) -> tuple[Tensor, Tensor]:
    """`gated_residual_reference`, then `expert_adaln_reference` of its result.

    returns  (the residual stream, its modulated norm), each of x's shape and dtype; the norm's
             input is the rounded residual stream
    """
    h = gated_residual_reference(x, y, gate, text_gate, text_len=text_len)
    out = expert_adaln_reference(
        h, shift, scale, text_shift, text_scale, weight, bias,
        text_len=text_len, norm=norm, eps=eps,
    )  # fmt: skip
    return h, out


def _modulated(tokens: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    if shift is None or scale is None:
        return tokens  # there are no tokens
    runs = _runs(tokens, scale)
    return (runs * (1 + _each(scale, tokens)) + _each(shift, tokens)).flatten(1, 2)


def _gated(tokens: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return tokens  # there are no tokens
    return (_runs(tokens, gate) * _each(gate, tokens)).flatten(1, 2)


def _runs(tokens: Tensor, modulation: Tensor) -> Tensor:
    """Tokens split into the groups of a modulation: (batch, groups, run, dim)."""
    groups = modulation.shape[1] if modulation.dim() == 3 else 1
    return tokens.unflatten(1, (groups, tokens.shape[1] // groups))


def _each(modulation: Tensor, like: Tensor) -> Tensor:
    """The modulation as (batch, groups, 1, dim), in the dtype of `like`."""
    groups = modulation if modulation.dim() == 3 else modulation[:, None]
    return groups[:, :, None].to(like.dtype)
