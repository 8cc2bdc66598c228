"""Adapter for diffusers' CogVideoX VAE: residual blocks, causal convolutions, norms, resampling.

The cache of a causal convolution is two frames, replaced in place; a convolution of one frame has
none. Norms take their modulation at the size of the latents. Where a gradient is recorded nothing
is written in place. Source: `docs/model.md`, section 4.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._backend import transform_reason
from ..conv3d import LIMIT, conv3d, known_issue
from ..frame_cache import frame_cache_append, frame_cache_join
from ..resample import fold_frames, temporal_avg_pool, unfold_frames, upsample2x_conv
from ..spatial_norm import spatial_norm_silu
from ..streaming import frame_slot
from . import forward_swap
from .common import NO_KERNEL, Calls, modified
from .registry import Family, ModulePatch
from .state import Site


class Frames:
    """Cached frames of one causal convolution, for the next chunk to take, once.

    The next chunk overwrites the frames in place, so that there are never two copies.
    """

    def __init__(self, frames: Tensor) -> None:
        self._frames: Tensor | None = frames

    def read(self) -> Tensor:
        if self._frames is None:
            raise RuntimeError(
                "conv_cache: these frames were taken by a later chunk, which has replaced them; "
                "copy.deepcopy a cache before it is used to decode from it twice"
            )
        return self._frames

    def take(self) -> Tensor:
        """The frames, to be replaced in place; no other chunk can take them."""
        frames, self._frames = self.read(), None
        return frames

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Frames":
        """A holder of `function` of the frames."""
        return Frames(function(self.read()))


def causal_conv(self: Any, inputs: Tensor, conv_cache: Any = None) -> tuple[Tensor, Any]:
    """Forward of CogVideoXCausalConv3d."""
    site = self._cogvx
    past = conv_cache.read() if isinstance(conv_cache, Frames) else conv_cache
    reason = transform_reason(inputs=inputs, conv_cache=past)
    if self.pad_mode == "replicate":
        reason = "its padding in time is not causal"
    if reason:
        site.miss("cache", reason)
        return forward_swap.own(self)(self, inputs, past)
    kept = self.time_kernel_size - 1
    if not kept:
        site.hit("cache", "a convolution of one frame keeps no frames")
        return self.conv(inputs), None
    call = Calls(site.patch)
    if _functional():
        start = "replicate" if past is None else None
        joined, past = call(frame_cache_join, past, inputs, kept=kept, start=start)
        site.hit("cache", call.reason)
        return self.conv(joined), past
    frames, start = _slot(conv_cache, inputs, kept, site.patch.fast)
    joined = call(
        frame_cache_append, frames, inputs, start=start, memory_format=_format(site.patch.fast)
    )
    site.hit("cache", call.reason)
    return self.conv(joined), Frames(frames)


def residual_block(
    self: Any,
    inputs: Tensor,
    temb: Tensor | None = None,
    zq: Tensor | None = None,
    conv_cache: dict[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Forward of CogVideoXResnetBlock3D: norm, SiLU and cached frames in one pass."""
    site = self._cogvx
    reason = _unlike_block(self, inputs, temb, zq)
    if reason:
        site.miss("norm", reason)
        return forward_swap.own(self)(self, inputs, temb, zq, conv_cache)
    old = conv_cache or {}
    new = {}
    h, new["conv1"] = _norm_and_conv(site, self.norm1, self.conv1, inputs, zq, old.get("conv1"))
    h, new["conv2"] = _norm_and_conv(site, self.norm2, self.conv2, h, zq, old.get("conv2"))
    x = inputs
    if self.in_channels != self.out_channels:
        if self.use_conv_shortcut:
            x, new["conv_shortcut"] = self.conv_shortcut(x, conv_cache=old.get("conv_shortcut"))
        else:
            x = self.conv_shortcut(x)
    return h + x, new


def spatial_norm(
    self: Any, f: Tensor, zq: Tensor, conv_cache: dict[str, Any] | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Forward of CogVideoXSpatialNorm3D where it stands alone, without a SiLU."""
    site = self._cogvx
    reason = _unlike_norm(self, f, zq)
    if reason:
        site.miss("norm", reason)
        return forward_swap.own(self)(self, f, zq, conv_cache)
    call = Calls(site.patch)
    out = _norm_silu(call, self, f, zq, silu=False)
    site.hit("norm", call.reason)
    return out, {}


def safe_conv(self: Any, input: Tensor) -> Tensor:
    """Forward of CogVideoXSafeConv3d for any size: pieces are never shorter than the kernel."""
    site = self._cogvx
    plain = self.padding_mode == "zeros" and {*self.stride, *self.dilation, self.groups} == {1}
    plain = plain and not isinstance(self.padding, str) and self.padding[0] == 0
    reason = transform_reason(input=input)
    if not plain:
        reason = "it has a stride, a dilation, groups or another padding"
    if reason:
        site.miss("conv", reason)
        return forward_swap.own(self)(self, input)
    site.hit("conv", NO_KERNEL)
    small = (
        input.numel() * input.element_size() <= LIMIT
        and known_issue(input.device, input.dtype) is None
    )
    if small and not site.patch.fast:
        return nn.Conv3d.forward(self, input)
    return conv3d(input, self.weight, self.bias, self.padding)


def upsample(self: Any, inputs: Tensor) -> Tensor:
    """Forward of CogVideoXUpsample3D: frames that come in pairs are convolved once."""
    site = self._cogvx
    conv = self.conv
    reason = transform_reason(inputs=inputs)
    if conv.kernel_size != (3, 3) or conv.stride != (1, 1) or conv.padding != (1, 1):
        reason = "its convolution is not of 3x3 with a stride of 1"
    if reason:
        site.miss("resample", reason)
        return forward_swap.own(self)(self, inputs)
    site.hit("resample", NO_KERNEL)
    frames = inputs.shape[2]
    single = frames % 2 if self.compress_time else frames
    if site.patch.fast and modified(conv, nn.Conv2d) is None:
        return upsample2x_conv(inputs, conv.weight, conv.bias, single)
    x = unfold_frames(conv(F.interpolate(fold_frames(inputs), scale_factor=2.0)), len(inputs))
    if single == frames:
        return x
    order = torch.arange(frames, device=x.device).repeat_interleave(2)
    return x.index_select(2, order[single:])


def downsample(self: Any, x: Tensor) -> Tensor:
    """Forward of CogVideoXDownsample3D: pairs of frames averaged in place."""
    reason = transform_reason(x=x)
    if reason:
        self._cogvx.miss("resample", reason)
        return forward_swap.own(self)(self, x)
    self._cogvx.hit("resample", NO_KERNEL)
    if self.compress_time:
        x = temporal_avg_pool(x, x.shape[2] % 2)
    return unfold_frames(self.conv(F.pad(fold_frames(x), (0, 1, 0, 1))), len(x))


def _norm_and_conv(
    site: Site, norm: nn.Module, causal: Any, x: Tensor, zq: Tensor | None, past: Any
) -> tuple[Tensor, Any]:
    """The convolution of the norm of x, and the cache of the convolution."""
    call = Calls(site.patch)
    of_conv = causal.__dict__.get("_cogvx")
    if (
        of_conv is None
        or causal.time_kernel_size == 1
        or causal.pad_mode == "replicate"
        or _functional()
    ):
        h = _norm_silu(call, norm, x, zq)
        site.hit("norm", call.reason)
        return causal(h, conv_cache=past)
    frames, start = _slot(past, x, causal.time_kernel_size - 1, site.patch.fast)
    joined = _norm_silu(call, norm, x, zq, cache=frames, start=start)
    site.hit("norm", call.reason)
    of_conv.hit("cache", call.reason)
    return causal.conv(joined), Frames(frames)


def _norm_silu(call: Calls, norm: Any, x: Tensor, zq: Tensor | None, **options: Any) -> Tensor:
    """SiLU of the norm of x, modulated by zq if given: y and b of the latents' size are read by the
    nearest-neighbour rule, which commutes with a 1x1x1 convolution."""
    layer, y, b = norm, None, None
    if zq is not None:
        layer, y, b = norm.norm_layer, norm.conv_y.conv(zq), norm.conv_b.conv(zq)
    frames = x.shape[2]
    return call(
        spatial_norm_silu, x, layer.weight, layer.bias, y, b,
        num_groups=layer.num_groups, eps=layer.eps,
        leads=zq is not None and frames > 1 and frames % 2 == 1, **options,
    )  # fmt: skip


def _slot(
    past: Frames | Tensor | None, x: Tensor, kept: int, channels_last: bool
) -> tuple[Tensor, str | None]:
    """The frames before x, to be replaced in place by its last ones; and how a clip begins."""
    if past is not None:
        past = past.take() if isinstance(past, Frames) else past.clone()
    return frame_slot(past, x, kept, _format(channels_last))


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def _functional() -> bool:
    """True if caches must not be written in place: for a gradient, or for a compiler."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _unlike_norm(norm: Any, f: Tensor, zq: Tensor | None) -> str | None:
    if zq is None:
        return "there are no latents to modulate it"
    if any(side % of for side, of in zip(f.shape[3:], zq.shape[3:], strict=True)):
        return f"{tuple(f.shape[3:])} pixels are no multiple of {tuple(zq.shape[3:])} latents"
    reason = transform_reason(f=f, zq=zq)
    if reason:
        return reason
    return modified(norm.norm_layer, nn.GroupNorm)


def _unlike_block(block: Any, x: Tensor, temb: Tensor | None, zq: Tensor | None) -> str | None:
    if temb is not None:
        return "it has a time embedding"
    if not isinstance(block.nonlinearity, nn.SiLU):
        return f"its nonlinearity is a {type(block.nonlinearity).__name__}"
    if block.training and block.dropout.p:
        return "it drops activations"
    reason = transform_reason(inputs=x, zq=zq)
    if reason:
        return reason
    for norm in (block.norm1, block.norm2):
        spatial = type(norm).__name__ == "CogVideoXSpatialNorm3D"
        reason = _unlike_norm(norm, x, zq) if spatial else modified(norm, nn.GroupNorm)
        if reason:
            return reason
    return None


def _has_cache(name: str, conv: Any, ops: Collection[str]) -> bool:
    """False for a convolution of one frame in a norm, which calls its inner convolution."""
    return conv.time_kernel_size > 1 or "norm" not in ops


def _is_outside_blocks(name: str, norm: Any, ops: Collection[str]) -> bool:
    """False for a norm in a residual block, which calls its inner modules."""
    return name.rpartition(".")[2] not in ("norm1", "norm2")


FAMILY = Family(
    group="vae",
    models=("AutoencoderKLCogVideoX",),
    ops={
        "cache": "two frames for each causal convolution, replaced in place, and nothing else kept",
        "norm": "norm, modulation at latent size, SiLU and cached frames in one pass",
        "resample": "repeated frames convolved once; pairs averaged in place",
        "conv": "3-D convolutions of any size, avoiding bad versions of cuDNN",
    },
    exact=("cache", "resample", "conv"),
    modules=(
        ModulePatch("CogVideoXCausalConv3d", causal_conv, {"cache": 1}, _has_cache),
        ModulePatch("CogVideoXResnetBlock3D", residual_block, {"norm": 2}),
        ModulePatch("CogVideoXSpatialNorm3D", spatial_norm, {"norm": 1}, _is_outside_blocks),
        ModulePatch("CogVideoXUpsample3D", upsample, {"resample": 1}),
        ModulePatch("CogVideoXDownsample3D", downsample, {"resample": 1}),
        ModulePatch("CogVideoXSafeConv3d", safe_conv, {"conv": 1}),
    ),
)
