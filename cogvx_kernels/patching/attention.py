"""Softmax attention by the backend that diffusers is set to."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .state import Patch


def use_attention_backend(model: Any, patch: Patch) -> None:
    """Make `sdpa` use diffusers' attention dispatch, where this version of diffusers has one."""
    try:
        from diffusers.models.attention_dispatch import dispatch_attention_fn
    except ImportError:  # before diffusers 0.35
        return
    patch.softmax = dispatch_attention_fn


def sdpa(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √headdim) v, all (batch, seqlen, nheads, headdim), with the backend of the
    attention's processor."""
    softmax = attn._cogvx.patch.softmax
    if softmax is None:
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    choices = {"backend": getattr(attn.processor, "_attention_backend", None)}
    parallel = getattr(attn.processor, "_parallel_config", None)
    if parallel is not None:
        choices["parallel_config"] = parallel
    out: Tensor = softmax(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, **choices)
    return out
