"""Norms, causal convolutions and caches of other libraries, (batch, channels, frames, ...)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvx_kernels.testing import OpInfo

from ..registry import Arguments, Function, Unavailable, find, provider

# (x, weight, bias, num_groups, eps) -> SiLU of the normalised
Norm = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]

NORM = "spatial_norm_silu"


def _whole_chunk(arguments: Arguments) -> None:
    """Other libraries normalise a chunk as it is, into a new tensor."""
    if arguments.get("per_frame"):
        raise Unavailable("its statistics are of all frames")
    for name in ("moments", "cache"):
        if arguments.get(name) is not None:
            raise Unavailable(f"it takes no {name}")


# --- diffusers' steps ------------------------------------------------------------------------


def nearest(latents: Tensor, size: torch.Size, leads: bool) -> Tensor:
    """Latents at the size (frames, height, width); `leads`: the first frame has its own."""
    if not leads or size[0] == 1:
        return F.interpolate(latents, size=size)
    rest = torch.Size((size[0] - 1, *size[1:]))
    sizes = torch.Size((1, *size[1:])), rest
    parts = latents[:, :, :1], latents[:, :, 1:]
    return torch.cat([F.interpolate(x, size=to) for x, to in zip(parts, sizes, strict=True)], 2)


STEPS = "GroupNorm, nearest maps of the latents, multiply, add, SiLU; rounds after each"


@provider("diffusers-eager", STEPS, NORM, compiled="compile-diffusers")
def _diffusers(info: OpInfo, arguments: Arguments) -> Function:
    """GroupNorm, the latents' maps at full size, multiply, add, SiLU: CogVideoXSpatialNorm3D.

    diffusers makes the maps by two convolutions of full size, where these are only read. Without
    maps it is GroupNorm and SiLU.
    """
    _whole_chunk(arguments)

    def spatial_norm_silu(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None = None,
        b: Tensor | None = None, offset: Tensor | None = None, *, num_groups: int = 32,
        eps: float = 1e-6, leads: bool = False, silu: bool = True, **_: Any,
    ) -> Tensor:  # fmt: skip
        x = x if offset is None else x + offset[:, None, None, None]
        x = F.group_norm(x, num_groups, weight, bias, eps)
        if y is not None and b is not None:
            x = x * nearest(y, x.shape[2:], leads) + nearest(b, x.shape[2:], leads)
        return F.silu(x) if silu else x

    return spatial_norm_silu


# --- torch's own steps -----------------------------------------------------------------------


@provider(
    "torch-steps", "torch.cat and F.conv3d, on a GPU cuDNN's", "temporal_conv",
    compiled="compile-torch-steps",
)  # fmt: skip
def cat_conv3d(info: OpInfo, arguments: Arguments) -> Function:
    """torch.cat of the past, and F.conv3d, in the layout of x."""
    if arguments["x"].dim() != 5:
        raise Unavailable("it is for frames with pixels")

    def temporal_conv(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *, cache: Tensor | None = None,
        stride: int = 1, start: str | None = "replicate",
    ) -> Tensor:  # fmt: skip
        weight = weight.flatten(2)[..., None, None]
        past = cache
        if past is None:
            past = x[:, :, :1].expand(-1, -1, weight.shape[2] - 1, -1, -1)
            past = torch.zeros_like(past) if start == "zeros" else past
        groups = x.shape[1] // weight.shape[1]
        return F.conv3d(torch.cat([past, x], 2), weight, bias, (stride, 1, 1), groups=groups)

    return temporal_conv


@provider("torch-steps", "the sum and var_mean", "residual_moments", compiled="compile-torch-steps")
def add_var_mean(info: OpInfo, arguments: Arguments) -> Function:
    """The sum, and torch.var_mean of it in fp32."""

    def residual_moments(
        x: Tensor, h: Tensor, offset: Tensor | None = None, *, num_groups: int = 32,
        per_frame: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h = h if offset is None else h + offset[:, None, None, None]
        total = x + h
        wide = torch.promote_types(total.dtype, torch.float32)
        groups = total.unflatten(1, (num_groups, -1)).to(wide)
        over = (2, 4, 5) if per_frame else (2, 3, 4, 5)
        var, mean = torch.var_mean(groups, over, correction=0, keepdim=True)
        moments = torch.stack((mean, var), -1)[:, :, 0, :, 0, 0]  # (batch, groups, frames, 2)
        return total, moments.transpose(1, 2)

    return residual_moments


# --- Liger, sglang, vLLM-Omni ----------------------------------------------------------------


def _plain(arguments: Arguments, name: str) -> Tensor:
    """x, of a norm without anything of the latents."""
    _whole_chunk(arguments)
    if any(arguments.get(name) is not None for name in ("y", "b", "offset")):
        raise Unavailable("its norm knows nothing of latents")
    if arguments.get("weight") is None or arguments.get("bias") is None:
        raise Unavailable("its norm has weight and bias")
    if not arguments.get("silu", True):
        raise Unavailable("its norm has a SiLU")
    x: Tensor = arguments["x"]
    if not x.is_cuda:
        raise Unavailable(f"{name}'s kernels do not run on a CPU")
    return x


def _of(norm: Norm) -> Function:
    def spatial_norm_silu(
        x: Tensor, weight: Tensor, bias: Tensor, *_: Any, num_groups: int = 32, eps: float = 1e-6,
        **__: Any,
    ) -> Tensor:  # fmt: skip
        return norm(x, weight, bias, num_groups, eps)

    return spatial_norm_silu


@provider("liger", "liger-kernel's GroupNorm, and SiLU", NORM)
def _liger(info: OpInfo, arguments: Arguments) -> Function:
    """Liger's GroupNorm kernel, which takes contiguous tensors, and torch's SiLU."""
    _plain(arguments, "Liger")
    norm = find("liger-kernel", "liger_group_norm", "liger_kernel.transformers.functional")
    return _of(lambda x, w, b, groups, eps: F.silu(norm(x, w, b, x.shape[1], groups, eps)))


@provider("sglang", "sglang's GroupNorm with SiLU", NORM, passes=("forward",))
def _sglang(info: OpInfo, arguments: Arguments) -> Function:
    """sglang's GroupNorm with SiLU: of channels-last a kernel of images, and frames are as rows."""
    x = _plain(arguments, "sglang")
    if x.stride(1) == 1:
        if x.shape[0] != 1:
            raise Unavailable("its kernel for channels-last is of images")
        module = "sglang.kernels.ops.diffusion.norm.group_norm_silu_twopass_triton"
        image = find("sglang", "group_norm_silu_4d", module)
        return _of(lambda x, *rest: image(x.flatten(2, 3), *rest).view_as(x))
    name = "triton_group_norm_silu"
    new = "sglang.kernels.ops.diffusion.norm.group_norm_silu_triton"
    return _of(find("sglang", name, new, "sglang.jit_kernel.diffusion.triton.group_norm_silu"))


@provider("vllm-omni", "vLLM-Omni's GroupNorm with SiLU", NORM, passes=("forward",))
def _vllm_omni(info: OpInfo, arguments: Arguments) -> Function:
    """vLLM-Omni's GroupNorm with SiLU, which takes contiguous tensors."""
    _plain(arguments, "vLLM-Omni")
    name, common = "fused_group_norm_silu", "vllm_omni.model_executor.models.common.ops"
    return _of(find("vllm-omni", name, common, f"{common}.{name}"))


@provider(
    "sglang", "sglang's cat and pad, and a copy of the last frames", "frame_cache_join",
    passes=("forward",),
)  # fmt: skip
def _sglang_cache(info: OpInfo, arguments: Arguments) -> Function:
    """sglang's kernel that puts the cached frames in front, and the next cache as a copy."""
    frames, cache = arguments["frames"], arguments.get("cache")
    if not frames.is_cuda:
        raise Unavailable("sglang's kernels do not run on a CPU")
    if cache is None or arguments.get("start") is not None:
        raise Unavailable("its clip goes on")
    if not (frames.is_contiguous() and cache.is_contiguous()):
        raise Unavailable("its kernel is for contiguous tensors")
    name = "fused_causal_conv3d_cat_pad"
    new = "sglang.kernels.ops.diffusion.triton.causal_conv3d_pad"
    kernel = find("sglang", name, new, "sglang.jit_kernel.diffusion.triton.causal_conv3d_pad")

    def frame_cache_join(cache: Tensor, frames: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        kept = cache.shape[2]
        joined = kernel(frames, cache, [0, 0, 0, 0, kept, 0])
        return joined, joined[:, :, -kept:].clone()

    return frame_cache_join
