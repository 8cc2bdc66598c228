"""Adapter for diffusers' CogVideoX transformer: its blocks, and the attention in them.

A block works on the joint sequence, text first. Its arguments are views of one: those that the
block before returned. Source: `docs/model.md`, section 2.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._backend import transform_reason
from ..context_parallel import Part
from ..expert_adaln import expert_adaln, gated_residual, gated_residual_adaln
from ..linear import linear
from ..module_utils import has_hooks
from ..rope3d import qk_norm_rope3d, rope3d
from . import forward_swap
from .attention import sdpa, use_attention_backend
from .common import Calls, affine, joint, modified
from .context import (
    PART,
    ContextHooks,
    add_diffusers_plan,
    has_diffusers_parallelism,
    remove_diffusers_plan,
)
from .registry import Family, ModulePatch
from .rotary import CosSin, pair_tables
from .state import Patch

Rows = tuple[Tensor, ...]  # six of (batch, dim), of one norm: see `_shifts` and `_gates`

# Attributes of a processor by which diffusers selects a backend, and cuts tokens.
FROM_DIFFUSERS = ("_attention_backend", "_parallel_config")
SEPARATE, FUSED = "CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"


def block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: CosSin | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of CogVideoXBlock: norms, gates and sums in three passes over the joint sequence."""
    site = self._cogvx
    reason = (
        transform_reason(
            hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb
        )
        or modified(self.norm1.norm, nn.LayerNorm)
        or modified(self.norm2.norm, nn.LayerNorm)
    )
    if reason:
        site.miss("adaln", reason)
        return forward_swap.own(self)(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs
        )
    text_len = encoder_hidden_states.shape[1]
    call = Calls(site.patch)
    x = joint(encoder_hidden_states, hidden_states)
    first, second = (
        n.linear(n.silu(temb)).to(x.dtype).chunk(6, dim=1) for n in (self.norm1, self.norm2)
    )
    h = call(
        expert_adaln, x, *_shifts(first), *affine(self.norm1.norm),
        text_len=text_len, eps=self.norm1.norm.eps,
    )  # fmt: skip
    y = _attended(self.attn1, h, text_len, image_rotary_emb, attention_kwargs or {})
    x, h = call(
        gated_residual_adaln,
        x, y.to(x.dtype), *_gates(first), *_shifts(second), *affine(self.norm2.norm),
        text_len=text_len, eps=self.norm2.norm.eps,
    )  # fmt: skip
    y = _feed_forward(self.ff, h)
    x = call(gated_residual, x, y.to(x.dtype), *_gates(second), text_len=text_len)
    site.hit("adaln", call.reason, 2)
    text, video = x.split([text_len, x.shape[1] - text_len], dim=1)
    return video, text


def attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **cross_attention_kwargs: Any,
) -> Any:
    """Forward of Attention with CogVideoX's processors: norm and rotation of q, k in one pass.

    With the keyword `text_len`, from a patched block, hidden_states is the joint sequence, that
    many tokens of text first; encoder_hidden_states is empty, and so is the second result.
    """
    text_len = cross_attention_kwargs.pop("text_len", None)
    kwargs = {"attention_mask": attention_mask, **cross_attention_kwargs}
    part: Part | None = kwargs.pop(PART, None)
    video, text = hidden_states, encoder_hidden_states
    if text_len is not None:
        video, text = video[:, text_len:], video[:, :text_len]
    tables = _tables(self, video, text, **kwargs)
    if isinstance(tables, str):
        theirs = getattr(self.processor, "_parallel_config", None)
        if part is not None or theirs is not None:  # its own forward attends within a part
            raise RuntimeError(
                f"{self._cogvx.name}: must be as patch knows it for tokens to be shared by ranks; "
                f"{tables}"
            )
        self._cogvx.miss("rope", tables)
        out = forward_swap.own(self)(self, video, text, **kwargs)
        return out if text_len is None else (joint(out[1], out[0]), encoder_hidden_states)
    assert text is not None
    call = Calls(self._cogvx.patch)
    x = joint(text, video) if text_len is None else hidden_states
    y = _attention(self, call, x, *tables, part)
    self._cogvx.hit("rope", call.reason)
    if text_len is not None:
        return y, encoder_hidden_states
    return y[:, text.shape[1] :], y[:, : text.shape[1]]


def _shifts(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """shift and scale of video, and of text, in diffusers' order of rows."""
    return rows[0], rows[1], rows[3], rows[4]


def _gates(rows: Rows) -> tuple[Tensor, Tensor]:
    return rows[2], rows[5]


def _attended(
    attn: Any,
    h: Tensor,
    text_len: int,
    rotary: CosSin | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """The attention of a block over its joint sequence, in and out; called as a module, so that its
    hooks run."""
    kwargs = {"image_rotary_emb": rotary, **kwargs}
    if attn.__dict__.get("_cogvx") is not None:
        y: Tensor = attn(
            hidden_states=h, encoder_hidden_states=h[:, :0], text_len=text_len, **kwargs
        )[0]
        return y
    video, text = attn(
        hidden_states=h[:, text_len:], encoder_hidden_states=h[:, :text_len], **kwargs
    )
    return joint(text, video)


def _attention(
    attn: Any, call: Calls, x: Tensor, cos: Tensor, sin: Tensor, part: Part | None
) -> Tensor:
    """Over the joint sequence x (batch, seqlen, dim), or a rank's part of one; rotates the last
    tokens, one for each row."""
    if type(attn.processor).__name__ == FUSED:
        layers = [attn.to_qkv]
        q, k, v = linear(attn.to_qkv, x).chunk(3, dim=-1)
    else:
        layers = [attn.to_q, attn.to_k]
        q, k, v = (linear(layer, x) for layer in (attn.to_q, attn.to_k, attn.to_v))
    q, k, v = (z.unflatten(2, (attn.heads, -1)) for z in (q, k, v))
    text_len = x.shape[1] - cos.shape[0]
    if attn.norm_q is None:
        q, k = (call(rope3d, z, cos, sin, text_len=text_len) for z in (q, k))
    else:
        q, k = call(
            qk_norm_rope3d, q, k, *affine(attn.norm_q), *affine(attn.norm_k), cos, sin,
            text_len=text_len, eps=attn.norm_q.eps,
            # A hook on a projection may keep its output.
            inplace=not torch.is_grad_enabled() and not any(has_hooks(layer) for layer in layers),
        )  # fmt: skip
    own = partial(sdpa, attn)
    y = own(q, k, v) if part is None else part.attention(q, k, v, own)
    return attn.to_out[1](linear(attn.to_out[0], y.flatten(2)))


def _feed_forward(ff: Any, x: Tensor) -> Tensor:
    """ff(x); where it is as known, with its linear layers by `linear`."""
    first, *others = ff.net
    drops = [layer for layer in others if type(layer) is nn.Dropout]
    known = (
        type(ff).__name__ == "FeedForward"
        and len(others) == len(drops) + 1
        and type(first).__name__ == "GELU"
        and first.approximate == "tanh"
        and not any(layer.training and layer.p for layer in drops)
        and not any(map(has_hooks, (ff, first, *drops)))
    )
    if not known:
        return ff(x)
    last = next(layer for layer in others if type(layer) is not nn.Dropout)
    return linear(last, linear(first.proj, x, gelu=True))


def _tables(
    attn: Any,
    video: Tensor,
    text: Tensor | None,
    image_rotary_emb: CosSin | None = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> CosSin | str:
    """cos and sin of the video tokens, (video_len, headdim // 2) each, or of no token; or the
    reason why this attention or this call is not supported."""
    processor = type(attn.processor).__name__
    if processor not in (SEPARATE, FUSED):
        return f"its processor is a {processor}"
    if text is None or attention_mask is not None or others:
        given = [*others, *(["attention_mask"] if attention_mask is not None else [])]
        return f"it was called with {', '.join(given) or 'no text'}"
    cos, sin = image_rotary_emb or (None, None)
    reason = transform_reason(hidden_states=video, encoder_hidden_states=text, cos=cos, sin=sin)
    if reason:
        return reason
    norms = (attn.norm_q, attn.norm_k)
    if (norms[0] is None) != (norms[1] is None):
        return "only one of q and k is normalised"
    for norm in norms:
        reason = None if norm is None else modified(norm, nn.LayerNorm)
        if reason:
            return reason
    if norms[0] is not None and norms[0].eps != norms[1].eps:
        return "the norms of q and k have different eps"
    if cos is None or sin is None:
        none = video.new_empty((0, attn.inner_dim // attn.heads // 2), dtype=torch.float32)
        return none, none
    if cos.dtype != torch.float32 or cos.ndim != 2 or cos.shape[0] != video.shape[1]:
        return f"image_rotary_emb is {cos.dtype} of shape {tuple(cos.shape)}"
    if cos.requires_grad or sin.requires_grad:
        return "image_rotary_emb requires a gradient"
    tables: CosSin | str = attn._cogvx.patch.rotary(pair_tables, cos, sin)
    return tables


def _prepare(model: Any, patch: Patch) -> None:
    """Enable `compile_repeated_blocks`, attention backends and `enable_parallelism`, which
    diffusers has for its other transformers; share the context of the patch."""
    if not getattr(model, "_repeated_blocks", None):
        model._repeated_blocks = ["CogVideoXBlock"]
    use_attention_backend(model, patch)
    for processor in _processors(model):
        for name in FROM_DIFFUSERS:
            processor.__dict__.setdefault(name, None)
    if "rope" in patch.ops:
        add_diffusers_plan(model)
    if patch.context is not None:
        model.__dict__["_cogvx_context"] = ContextHooks(model, patch.context)


def _undo(model: Any) -> None:
    model.__dict__.pop("_repeated_blocks", None)
    hooks = model.__dict__.pop("_cogvx_context", None)
    if hooks is not None:
        hooks.remove()
    remove_diffusers_plan(model)
    for processor in _processors(model):
        for name in FROM_DIFFUSERS:
            processor.__dict__.pop(name, None)


def _shares(model: Any, patch: Patch) -> str | None:
    """Reason why ranks cannot share this model's tokens, or None."""
    if "rope" not in patch.ops:
        return 'attention must be patched: "rope" must be in only'
    if patch.refused:
        return "; ".join(f"{name}: {reason}" for name, reason in patch.refused.items())
    if has_diffusers_parallelism(model):
        return "diffusers' parallelism is enabled: unpatch ends it"
    return None


def _processors(model: Any) -> list[Any]:
    found = (getattr(module, "processor", None) for module in model.modules())
    return [x for x in found if type(x).__name__ in (SEPARATE, FUSED)]


FAMILY = Family(
    group="transformer",
    models=("CogVideoXTransformer3DModel",),
    ops={
        "adaln": "adaptive norms, gates and sums of a block in three passes over text and video",
        "rope": "norm and rotation of q and k in one pass; any attention backend",
    },
    modules=(
        ModulePatch("CogVideoXBlock", block, {"adaln": 2}),
        ModulePatch("Attention", attention, {"rope": 1}),
    ),
    prepare=_prepare,
    undo=_undo,
    shares=_shares,
)
