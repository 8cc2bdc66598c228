"""Adapter for diffusers' Mochi transformer: the norms, gates and sums of its blocks.

Norms are RMS, with a scale and no shift; what is added to a stream is normalised first, and gated
by a tanh. Video and text are two tensors of different widths, and each op is called for one of
them. Attention stays as it is: its angles are learned, and each head has its own.
Source: diffusers, transformer_mochi.py.
"""

from typing import Any

import torch
from torch import Tensor

from ..expert_adaln import expert_adaln, gated_residual, gated_residual_adaln
from . import forward_swap
from .common import Calls, unfit, unknown_norm
from .registry import Family, ModulePatch

NO_TEXT = None, None  # each stream is alone


def block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of MochiTransformerBlock: five passes over a stream; last text: one."""
    site = self._cogvx
    video, text = hidden_states, encoder_hidden_states
    reason = _unlike(self) or unfit(temb, video, text)
    if reason:
        site.miss("adaln", reason)
        return forward_swap.own(self)(
            self, video, text, temb, encoder_attention_mask, image_rotary_emb
        )
    call = Calls(site.patch)
    scale, *rest = _rows(self.norm1, temb, video)
    of_text: list[Tensor] = []
    if self.context_pre_only:
        norm = self.norm1_context
        text_scale = norm.linear_1(norm.silu(temb).to(text.dtype)).to(text.dtype)
        text_eps = norm.norm.norm.eps
    else:
        text_scale, *of_text = _rows(self.norm1_context, temb, text)
        text_eps = self.norm1_context.norm.eps
    y, y_text = self.attn1(
        hidden_states=_normed(call, video, scale, self.norm1.norm.eps),
        encoder_hidden_states=_normed(call, text, text_scale, text_eps),
        image_rotary_emb=image_rotary_emb,
        attention_mask=encoder_attention_mask,
    )
    norms = self.norm2, self.norm3, self.norm4
    video = _added(call, video, y, self.ff, norms, rest)
    if not self.context_pre_only:
        norms = self.norm2_context, self.norm3_context, self.norm4_context
        text = _added(call, text, y_text, self.ff_context, norms, of_text)
    site.hit("adaln", call.reason, 2)
    return video, text


def _rows(norm: Any, emb: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """scale and gate of the attention, scale and gate of the feed-forward."""
    return tuple(norm.linear(norm.silu(emb)).to(x.dtype).chunk(4, dim=1))


def _normed(call: Calls, x: Tensor, scale: Tensor, eps: float) -> Tensor:
    shift = torch.zeros_like(scale)
    return call(expert_adaln, x, shift, scale, *NO_TEXT, None, None, norm="rms", eps=eps)


def _added(
    call: Calls, x: Tensor, y: Tensor, ff: Any, norms: tuple[Any, ...], rows: list[Tensor]
) -> Tensor:
    """A stream with the output of attention added, and then that of its feed-forward."""
    gate, scale, mlp_gate = rows
    after_attention, before_ff, after_ff = (norm.norm.eps for norm in norms)
    zero = torch.zeros_like(scale)
    y = _normed(call, y.to(x.dtype), zero, after_attention)
    x, h = call(
        gated_residual_adaln,
        x, y, gate.tanh(), None, zero, scale, *NO_TEXT, None, None, norm="rms", eps=before_ff,
    )  # fmt: skip
    y = _normed(call, ff(h).to(x.dtype), zero, after_ff)
    return call(gated_residual, x, y, mlp_gate.tanh(), None)


def _unlike(block: Any) -> str | None:
    """Reason why the norms of a block are not supported, or None."""
    modulated = "MochiModulatedRMSNorm", "RMSNorm"
    zero = "MochiRMSNormZero", "RMSNorm"
    norms: list[tuple[Any, tuple[str, ...]]] = [(block.norm1, zero)]
    norms += [(norm, modulated) for norm in (block.norm2, block.norm3, block.norm4)]
    if block.context_pre_only:
        norms.append((block.norm1_context, ("MochiLayerNormContinuous", *modulated)))
    else:
        of_text = block.norm2_context, block.norm3_context, block.norm4_context
        norms += [(block.norm1_context, zero), *((norm, modulated) for norm in of_text)]
    for norm, names in norms:
        reason = unknown_norm(norm, *names)
        if reason:
            return reason
    return None


FAMILY = Family(
    group="transformer",
    models=("MochiTransformer3DModel",),
    ops={"adaln": "adaptive norms, gates and sums of a block, five passes over each stream"},
    modules=(ModulePatch("MochiTransformerBlock", block, {"adaln": 2}),),
)
