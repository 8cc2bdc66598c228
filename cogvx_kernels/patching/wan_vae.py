"""Adapter for diffusers' Wan VAE, 2.1 and 2.2: causal convolutions and upsampling.

The frames before a chunk, one or two, belong to the blocks around a convolution: nothing is written
to them. Source: Wan (arXiv 2503.20314), section 4.1.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._backend import transform_reason
from ..frame_cache import frame_cache_append
from . import forward_swap
from .common import NO_KERNEL, Calls
from .registry import Family, ModulePatch


def causal_conv(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """Forward of WanCausalConv3d: its padded input is written in one pass; none without padding."""
    site = self._cogvx
    reason = _unlike_conv(self, x, cache_x)
    if reason:
        site.miss("cache", reason)
        return forward_swap.own(self)(self, x, cache_x)
    sides, _, _, _, before, _ = self._padding
    if not before:
        site.hit("cache", "a convolution of one frame reads no frames before it")
        return nn.Conv3d.forward(self, x)
    if cache_x is None:
        past, start = x.new_empty((*x.shape[:2], before, *x.shape[3:])), "zeros"
    else:
        # A copy, for the op to write to; zeros before it where the clip is not that long yet.
        missing = before - cache_x.shape[2]
        past, start = F.pad(cache_x.to(x.device), (0, 0, 0, 0, missing, 0)), None
    call = Calls(site.patch)
    joined = call(frame_cache_append, past, x, start=start, padding=sides)
    site.hit("cache", call.reason)
    return nn.Conv3d.forward(self, joined)


def upsample(self: Any, x: Tensor) -> Tensor:
    """Forward of WanUpsample: pixels are copied, in the dtype that they have."""
    site = self._cogvx
    reason = _unlike_upsample(self, x)
    if reason:
        site.miss("resample", reason)
        return forward_swap.own(self)(self, x)
    site.hit("resample", NO_KERNEL)
    return nn.Upsample.forward(self, x)


RECORDED = "a gradient is recorded"


def _recorded(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _unlike_upsample(upsample: Any, x: Tensor) -> str | None:
    """Reason why this module or this call is not supported, or None."""
    if upsample.mode not in ("nearest", "nearest-exact"):
        return f"its mode is {upsample.mode!r}"
    return transform_reason(x=x) or (RECORDED if _recorded(x) else None)


def _unlike_conv(conv: Any, x: Tensor, past: Tensor | None) -> str | None:
    """Reason why this convolution or this call is not supported, or None."""
    reason = transform_reason(x=x, cache_x=past)
    if reason:
        return reason
    left, right, top, bottom, before, after = conv._padding
    if not left == right == top == bottom or after or conv.padding_mode != "zeros":
        return f"its padding is {conv._padding}, {conv.padding_mode}"
    if not before:
        return f"its padding is {conv._padding}" if left else None
    if x.ndim != 5:
        return f"it was called with a tensor of shape {tuple(x.shape)}"
    if past is not None and (past.dtype != x.dtype or past.shape[2] > before):
        return f"it was called with {past.shape[2]} frames before it, of {past.dtype}"
    if torch.compiler.is_compiling():
        return "a compiler makes one pass of it by itself"
    return RECORDED if _recorded(x, past) else None


FAMILY = Family(
    group="vae",
    models=("AutoencoderKLWan",),
    ops={
        "cache": "cached frames, zeros before and around them, and the chunk put together at once",
        "resample": "frames upsampled in their own dtype",
    },
    exact=("cache", "resample"),
    modules=(
        ModulePatch("WanCausalConv3d", causal_conv, {"cache": 1}),
        ModulePatch("WanUpsample", upsample, {"resample": 1}),
    ),
)
