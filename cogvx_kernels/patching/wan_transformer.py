"""Adapter for diffusers' Wan transformer, 2.1 and 2.2: its blocks, and the self-attention in them.

A block has no text among its tokens: all are video. Its modulation is fp32, of each sample, or of
each token where those have timesteps of their own (Wan 2.2, TI2V). Norms of q and k are over all
heads together, and stay the model's own. Source: Wan (arXiv 2503.20314), section 4.2.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .._backend import transform_reason
from ..expert_adaln import expert_adaln, gated_residual, gated_residual_adaln
from ..rope3d import rope3d
from . import forward_swap
from .attention import sdpa, use_attention_backend
from .common import Calls, affine, modified
from .registry import Family, ModulePatch
from .rotary import CosSin

PROCESSOR = "WanAttnProcessor"


def block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: CosSin,
) -> Tensor:
    """Forward of WanTransformerBlock: each sum and the norm after it in one pass."""
    site = self._cogvx
    x = hidden_states
    reason = _unlike_block(self, x, temb)
    if reason:
        site.miss("adaln", reason)
        return forward_swap.own(self)(self, x, encoder_hidden_states, temb, rotary_emb)
    call = Calls(site.patch)
    rows = (self.scale_shift_table + temb.float()).unbind(-2)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows
    h = call(expert_adaln, x, shift, scale, None, None, *affine(self.norm1), eps=self.norm1.eps)
    y = self.attn1(h, None, None, rotary_emb).to(x.dtype)
    if _unlike_norm(self.norm2, x) is None:
        # A norm without a modulation: one by nothing.
        none = gate.new_zeros(gate.shape[-1]).expand_as(gate)
        x, h = call(
            gated_residual_adaln,
            x, y, gate, None, none, none, None, None, *affine(self.norm2), eps=self.norm2.eps,
        )  # fmt: skip
    else:
        x = call(gated_residual, x, y, gate, None)
        h = self.norm2(x.float()).type_as(x)
    y = self.attn2(h, encoder_hidden_states, None, None).to(x.dtype)
    whole = gate.new_ones(gate.shape[-1]).expand_as(gate)  # the sum after attn2 has no gate
    x, h = call(
        gated_residual_adaln,
        x, y, whole, None, ffn_shift, ffn_scale, None, None, *affine(self.norm3),
        eps=self.norm3.eps,
    )  # fmt: skip
    y = self.ffn(h).to(x.dtype)
    x = call(gated_residual, x, y, ffn_gate, None)
    site.hit("adaln", call.reason, 2)
    return x.to(hidden_states.dtype)  # under autocast the modulation, in fp32, has widened it


def attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: CosSin | None = None,
    **kwargs: Any,
) -> Tensor:
    """Forward of WanAttention with its own processor: rotation of q and k, each in one pass."""
    reason = _unlike_attention(self, hidden_states, encoder_hidden_states, rotary_emb, kwargs)
    if reason:
        self._cogvx.miss("rope", reason)
        return forward_swap.own(self)(
            self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs
        )
    assert rotary_emb is not None
    patch = self._cogvx.patch
    call = Calls(patch)
    if self.fused_projections:
        q, k, v = self.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        q, k, v = (to(hidden_states) for to in (self.to_q, self.to_k, self.to_v))
    cos, sin = patch.rotary(_pair_tables, *rotary_emb)
    q, k, v = (x.unflatten(2, (self.heads, -1)) for x in (self.norm_q(q), self.norm_k(k), v))
    q, k = (call(rope3d, x, cos, sin) for x in (q, k))
    self._cogvx.hit("rope", call.reason)
    y = sdpa(self, q, k, v, attention_mask).flatten(2).type_as(q)
    return self.to_out[1](self.to_out[0](y))


def _pair_tables(cos: Tensor, sin: Tensor) -> CosSin:
    """(seqlen, headdim // 2) each, of two (1, seqlen, 1, headdim): the columns that Wan reads."""
    return (
        cos[0, :, 0, ::2].to(torch.float32, memory_format=torch.contiguous_format),
        sin[0, :, 0, 1::2].to(torch.float32, memory_format=torch.contiguous_format),
    )


def _unlike_norm(norm: Any, x: Tensor) -> str | None:
    if type(norm).__name__ != "FP32LayerNorm":
        return f"a FP32LayerNorm is a {type(norm).__name__}"
    if norm.weight is not None and norm.weight.dtype not in (x.dtype, torch.float32):
        return f"the weights of a FP32LayerNorm are {norm.weight.dtype}"
    return modified(norm, type(norm))


def _unlike_block(block: Any, x: Tensor, temb: Tensor) -> str | None:
    """Reason why this block or this call is not supported, or None."""
    reason = transform_reason(hidden_states=x, temb=temb)
    if reason:
        return reason
    batch, seqlen, dim = x.shape
    groups = {1, seqlen} if temb.ndim == 4 else {6}
    if temb.shape[0] != batch or temb.shape[1] not in groups or temb.shape[-2:] != (6, dim):
        return f"temb is of shape {tuple(temb.shape)} for tokens of {tuple(x.shape)}"
    return _unlike_norm(block.norm1, x) or _unlike_norm(block.norm3, x)


def _unlike_attention(
    attn: Any,
    x: Tensor,
    text: Tensor | None,
    rotary: CosSin | None,
    others: dict[str, Any],
) -> str | None:
    """Reason why this attention or this call is not supported, or None."""
    processor = type(attn.processor).__name__
    if processor != PROCESSOR:
        return f"its processor is a {processor}"
    if text is not None or rotary is None or attn.add_k_proj is not None or others:
        return "it is no attention of a video's tokens to themselves"
    reason = transform_reason(hidden_states=x, rotary_emb=rotary)
    if reason:
        return reason
    headdim = attn.inner_dim // attn.heads
    for table in rotary:
        known = table.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not known or table.shape != (1, x.shape[1], 1, headdim) or table.requires_grad:
            return f"rotary_emb is {table.dtype} of shape {tuple(table.shape)}"
    return None


def _is_of_video(name: str, attn: Any, ops: Collection[str]) -> bool:
    """False for the cross-attention to the text, which has no rotation."""
    return name.rpartition(".")[2] == "attn1"


FAMILY = Family(
    group="transformer",
    models=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    ops={
        "adaln": "norms, modulations, gates and sums of a block in four passes over its tokens",
        "rope": "rotation of q and of k in one pass each",
    },
    modules=(
        ModulePatch("WanTransformerBlock", block, {"adaln": 2}),
        ModulePatch("WanAttention", attention, {"rope": 1}, _is_of_video),
    ),
    prepare=use_attention_backend,
)
