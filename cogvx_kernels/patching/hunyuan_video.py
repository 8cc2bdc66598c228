"""Adapter for diffusers' HunyuanVideo transformers: both kinds of blocks, and their attention.

Here video comes before text. In a double-stream block they are two tensors, and each op is called
for one of them; a single-stream block works on both at once, in place of its arguments. In models
conditioned by an image, the tokens of the first frame have a modulation of their own: for the ops
they are the text. Source: diffusers, transformer_hunyuan_video.py.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._backend import transform_reason
from ..expert_adaln import expert_adaln, gated_residual, gated_residual_adaln
from ..module_utils import has_hooks
from ..rope3d import qk_norm_rope3d
from . import forward_swap
from .attention import sdpa, use_attention_backend
from .common import Calls, joint, unfit, unknown_norm
from .registry import Family, ModulePatch
from .rotary import CosSin, pair_tables

PROCESSOR = "HunyuanVideoAttnProcessor2_0"
First = tuple[Tensor | None, int | None]  # embedding of the first tokens, and their number

# Index of the first row of an adaptive norm: shift, scale, gate, and again for the MLP.
ATTENTION, MLP = 0, 3


class Modulation(NamedTuple):
    """Modulation of one stream: rows (batch, dim) for its tokens, others for the first
    `first_len`."""

    rows: tuple[Tensor, ...]
    first: tuple[Tensor | None, ...] = (None,) * 6
    first_len: int = 0

    def shifts(self, at: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Shift and scale, and those of the first tokens, in the order of the ops."""
        return self.rows[at], self.rows[at + 1], self.first[at], self.first[at + 1]

    def gates(self, at: int) -> tuple[Tensor, Tensor | None]:
        return self.rows[at + 2], self.first[at + 2]


# --- blocks ----------------------------------------------------------------------------------


def double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: CosSin | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Forward of HunyuanVideoTransformerBlock."""
    given = hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis
    own = partial(forward_swap.own(self), self, *given, *args, **kwargs)
    return _double(self, own, "AdaLayerNormZero", *given)


def token_replace_double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: CosSin | None = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of HunyuanVideoTokenReplaceTransformerBlock."""
    first = token_replace_emb, num_tokens
    given = hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis
    own = partial(forward_swap.own(self), self, *given, *first)
    return _double(self, own, "HunyuanVideoTokenReplaceAdaLayerNormZero", *given, first)


def _double(
    block: Any,
    own: Callable[[], tuple[Tensor, Tensor]],
    norm: str,
    video: Tensor,
    text: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None,
    rotary: CosSin | None,
    first: First | None = None,
) -> tuple[Tensor, Tensor]:
    """The norms, gates and sums of a stream in three passes over it. own: the model's forward."""
    site = block._cogvx
    reason = _unlike_first(video, first) or _unlike_double(block, (video, text), temb, norm)
    if reason:
        site.miss("adaln", reason)
        return own()
    call = Calls(site.patch)
    of_video = _modulation(block.norm1, temb, video, first)
    of_text = _modulation(block.norm1_context, temb, text)
    y, y_text = block.attn(
        hidden_states=_normed(block.norm1.norm, call, video, of_video),
        encoder_hidden_states=_normed(block.norm1_context.norm, call, text, of_text),
        attention_mask=attention_mask,
        image_rotary_emb=rotary,
    )
    video, h = _gated_and_normed(block.norm2, call, video, y, of_video)
    text, h_text = _gated_and_normed(block.norm2_context, call, text, y_text, of_text)
    y, y_text = block.ff(h), block.ff_context(h_text)
    video = _gated(call, video, y, of_video, MLP)
    text = _gated(call, text, y_text, of_text, MLP)
    site.hit("adaln", call.reason, 2)
    return video, text


def single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: CosSin | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Forward of HunyuanVideoSingleTransformerBlock."""
    given = hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb
    own = partial(forward_swap.own(self), self, *given, *args, **kwargs)
    return _single(self, own, "AdaLayerNormZeroSingle", *given)


def token_replace_single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: CosSin | None = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of HunyuanVideoTokenReplaceSingleTransformerBlock."""
    first = token_replace_emb, num_tokens
    given = hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb
    own = partial(forward_swap.own(self), self, *given, *first)
    return _single(self, own, "HunyuanVideoTokenReplaceAdaLayerNormZeroSingle", *given, first)


def _single(
    block: Any,
    own: Callable[[], tuple[Tensor, Tensor]],
    norm: str,
    video: Tensor,
    text: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None,
    rotary: CosSin | None,
    first: First | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm, gate and sum in two passes over video and text. own: the model's forward."""
    site = block._cogvx
    reason = _unlike_first(video, first) or _unlike_single(block, (video, text), temb, norm)
    if reason:
        site.miss("adaln", reason)
        return own()
    call = Calls(site.patch)
    modulation = _modulation(block.norm, temb, video, first)
    lengths = [video.shape[1], text.shape[1]]
    x = joint(video, text)
    h = _normed(block.norm.norm, call, x, modulation)
    hidden = block.act_mlp(block.proj_mlp(h))
    video, text = h.split(lengths, dim=1)
    y, y_text = block.attn(
        hidden_states=video,
        encoder_hidden_states=text,
        attention_mask=attention_mask,
        image_rotary_emb=rotary,
    )
    y = block.proj_out(torch.cat([joint(y, y_text), hidden], dim=2))
    x = _gated(call, x, y, modulation, ATTENTION)
    site.hit("adaln", call.reason)
    video, text = x.split(lengths, dim=1)
    return video, text


def _modulation(norm: Any, emb: Tensor, x: Tensor, first: First | None = None) -> Modulation:
    if first is None:
        return Modulation(_rows(norm, emb, x))
    first_emb, first_len = first
    assert first_emb is not None and first_len is not None
    return Modulation(_rows(norm, emb, x), _rows(norm, first_emb, x), first_len)


def _rows(norm: Any, emb: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    rows = norm.linear(norm.silu(emb)).to(x.dtype)
    return tuple(rows.unflatten(1, (-1, x.shape[2])).unbind(1))


def _normed(norm: nn.LayerNorm, call: Calls, x: Tensor, m: Modulation) -> Tensor:
    return call(
        expert_adaln, x, *m.shifts(ATTENTION), norm.weight, norm.bias,
        text_len=m.first_len, eps=norm.eps,
    )  # fmt: skip


def _gated_and_normed(
    norm: nn.LayerNorm, call: Calls, x: Tensor, y: Tensor, m: Modulation
) -> tuple[Tensor, Tensor]:
    return call(
        gated_residual_adaln,
        x, y.to(x.dtype), *m.gates(ATTENTION), *m.shifts(MLP), norm.weight, norm.bias,
        text_len=m.first_len, eps=norm.eps,
    )  # fmt: skip


def _gated(call: Calls, x: Tensor, y: Tensor, m: Modulation, at: int) -> Tensor:
    return call(gated_residual, x, y.to(x.dtype), *m.gates(at), text_len=m.first_len)


def _unlike_double(
    block: Any, streams: tuple[Tensor, Tensor], temb: Tensor, norm: str
) -> str | None:
    return (
        unknown_norm(block.norm1, norm, "LayerNorm")
        or unknown_norm(block.norm1_context, "AdaLayerNormZero", "LayerNorm")
        or unknown_norm(block.norm2, "LayerNorm")
        or unknown_norm(block.norm2_context, "LayerNorm")
        or unfit(temb, *streams)
    )


def _unlike_single(
    block: Any, streams: tuple[Tensor, Tensor], temb: Tensor, norm: str
) -> str | None:
    if not streams[1].shape[1]:
        return "there is no text"
    return unknown_norm(block.norm, norm, "LayerNorm") or unfit(temb, *streams)


def _unlike_first(video: Tensor, first: First | None) -> str | None:
    if first is None:
        return None
    emb, first_len = first
    if emb is None or first_len is None:
        return "it was called without token_replace_emb and num_tokens"
    if not 0 <= first_len <= video.shape[1]:
        return f"num_tokens is {first_len}"
    return unfit(emb, video)


# --- attention -------------------------------------------------------------------------------


def attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **cross_attention_kwargs: Any,
) -> Any:
    """Forward of Attention with HunyuanVideo's processor: norm and rotation of q, k in one pass."""
    tables = _tables(self, hidden_states, encoder_hidden_states, **cross_attention_kwargs)
    if isinstance(tables, str):
        self._cogvx.miss("rope", tables)
        return forward_swap.own(self)(
            self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
        )
    assert encoder_hidden_states is not None
    call = Calls(self._cogvx.patch)
    lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
    if self.add_q_proj is None:
        # Text is rotated by angle 0: the same bits.
        cos, sin = (
            F.pad(table, (0, 0, 0, lengths[1]), value=value)
            for table, value in zip(tables, (1.0, 0.0), strict=True)
        )
        x = joint(hidden_states, encoder_hidden_states)
        layers = self.to_q, self.to_k, self.to_v
        q, k, v = _qkv(self, call, layers, (self.norm_q, self.norm_k), x, (cos, sin))
    else:
        own = self.to_q, self.to_k, self.to_v
        added = self.add_q_proj, self.add_k_proj, self.add_v_proj
        unturned = tables[0][:0], tables[1][:0]
        norms, of_added = (self.norm_q, self.norm_k), (self.norm_added_q, self.norm_added_k)
        of_video = _qkv(self, call, own, norms, hidden_states, tables)
        of_text = _qkv(self, call, added, of_added, encoder_hidden_states, unturned)
        q, k, v = (torch.cat(both, dim=1) for both in zip(of_video, of_text, strict=True))
    y = sdpa(self, q, k, v, attention_mask).flatten(2).to(q.dtype)
    video, text = y.split(lengths, dim=1)
    if getattr(self, "to_out", None) is not None:
        video = self.to_out[1](self.to_out[0](video))
    if getattr(self, "to_add_out", None) is not None:
        text = self.to_add_out(text)
    self._cogvx.hit("rope", call.reason)
    return video, text


def _qkv(
    attn: Any,
    call: Calls,
    layers: tuple[Any, ...],
    norms: tuple[Any, Any],
    x: Tensor,
    tables: CosSin,
) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, seqlen, nheads, headdim) each; rotates the last tokens, one per row of the tables."""
    q, k, v = (layer(x).unflatten(2, (attn.heads, -1)) for layer in layers)
    of_q, of_k = norms
    q, k = call(
        qk_norm_rope3d, q, k, of_q.weight, None, of_k.weight, None, *tables,
        text_len=x.shape[1] - tables[0].shape[0], norm="rms", eps=of_q.eps,
        # A hook on a projection may keep its output.
        inplace=not torch.is_grad_enabled() and not any(has_hooks(layer) for layer in layers[:2]),
    )  # fmt: skip
    return q, k, v


def _tables(
    attn: Any,
    video: Tensor,
    text: Tensor | None,
    image_rotary_emb: CosSin | None = None,
    **others: Any,
) -> CosSin | str:
    """cos and sin, (video_len, headdim // 2) each; or the reason why this attention or this call is
    not supported."""
    processor = type(attn.processor).__name__
    if processor != PROCESSOR:
        return f"its processor is a {processor}"
    if text is None or not text.shape[1] or image_rotary_emb is None or others:
        return f"it was called with {', '.join(others) or 'no text or no image_rotary_emb'}"
    cos, sin = image_rotary_emb
    reason = transform_reason(hidden_states=video, encoder_hidden_states=text, cos=cos, sin=sin)
    if reason:
        return reason
    norms = [attn.norm_q, attn.norm_k]
    if attn.add_q_proj is not None:
        norms += [attn.norm_added_q, attn.norm_added_k]
    for norm in norms:
        reason = unknown_norm(norm, "RMSNorm") or _unlike_norm(norm, attn.norm_q, video)
        if reason:
            return reason
    wanted = (video.shape[1], attn.inner_dim // attn.heads)
    if cos.dtype != torch.float32 or cos.shape != wanted or cos.device != video.device:
        return f"image_rotary_emb is {cos.dtype} of shape {tuple(cos.shape)} on {cos.device}"
    if cos.requires_grad or sin.requires_grad:
        return "image_rotary_emb requires a gradient"
    tables: CosSin | str = attn._cogvx.patch.rotary(pair_tables, cos, sin)
    return tables


def _unlike_norm(norm: Any, other: Any, x: Tensor) -> str | None:
    if norm.eps != other.eps:
        return "the norms of q and k have different eps"
    if getattr(norm, "bias", None) is not None:
        return "an RMSNorm has a bias"
    if norm.weight is not None and norm.weight.dtype != x.dtype:
        return f"an RMSNorm's weight is {norm.weight.dtype} and tokens are {x.dtype}"
    return None


def _is_joint(name: str, module: Any, ops: Collection[str]) -> bool:
    """False for the attention that refines the text alone, without a rotation."""
    return not name.startswith("context_embedder.")


FAMILY = Family(
    group="transformer",
    models=("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"),
    ops={
        "adaln": "adaptive norms, gates and sums of a block, three passes over each stream",
        "rope": "norm and rotation of q and k in one pass",
    },
    modules=(
        ModulePatch("HunyuanVideoTransformerBlock", double_block, {"adaln": 2}),
        ModulePatch("HunyuanVideoSingleTransformerBlock", single_block, {"adaln": 1}),
        ModulePatch(
            "HunyuanVideoTokenReplaceTransformerBlock", token_replace_double_block, {"adaln": 2}
        ),
        ModulePatch(
            "HunyuanVideoTokenReplaceSingleTransformerBlock",
            token_replace_single_block,
            {"adaln": 1},
        ),
        ModulePatch("Attention", attention, {"rope": 1}, counts=_is_joint),
    ),
    prepare=use_attention_backend,
)
