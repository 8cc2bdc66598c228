"""The way: torch ops of the C++ and CUDA extension. Importing this file loads it.

Their schemas and kernels are in `csrc/`; here is what a compiler that traces them is told, and the
functional form, made of an in-place one. Each moves a frame once, to joined and to the next cache
in the same pass, whatever the layouts.
"""

import torch
from torch import Tensor

from .._C import HAS_CUDA

__all__ = ["HAS_CUDA", "append", "exchange", "join", "join_fake", "push"]

ops = torch.ops.cogvx


def append(
    cache: Tensor, frames: Tensor, start: str | None, padding: int, channels_last: bool
) -> Tensor:
    joined = ops.frame_cache_append(cache, frames, start, padding, channels_last)
    _written(cache)
    return joined


def push(cache: Tensor, frames: Tensor, start: str | None) -> None:
    ops.frame_cache_push(cache, frames, start)
    _written(cache)


def exchange(cache: Tensor, joined: Tensor, start: str | None) -> None:
    ops.frame_cache_exchange(cache, joined, start)
    _written(cache, joined)


def _written(*tensors: Tensor) -> None:
    """Tell autograd: an op on the stable ABI does not. What is compiled sees to it by itself."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def join(
    cache: Tensor | None, frames: Tensor, kept: int, start: str | None, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """An append to a copy of the cache."""
    following = _new_cache(cache, frames, kept, channels_last)
    if start is None:
        following.copy_(cache)
    return ops.frame_cache_append(following, frames, start, 0, channels_last), following


def _new_cache(cache: Tensor | None, frames: Tensor, kept: int, channels_last: bool) -> Tensor:
    batch, channels, _, height, width = frames.shape
    return torch.empty(
        (batch, channels, kept if cache is None else cache.shape[2], height, width),
        dtype=frames.dtype,
        device=frames.device,
        memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format,
    )


# --- what a compiler is told -----------------------------------------------------------------


@torch.library.register_fake("cogvx::frame_cache_append")
def _append_fake(cache, frames, start=None, padding=0, channels_last=False):
    batch, channels, arriving, height, width = frames.shape
    total, height, width = cache.shape[2] + arriving, height + 2 * padding, width + 2 * padding
    if channels_last:
        joined = frames.new_empty((batch, total, height, width, channels))
        return joined.permute(0, 4, 1, 2, 3)
    return frames.new_empty((batch, channels, total, height, width))


@torch.library.register_fake("cogvx::frame_cache_push")
def _push_fake(cache, frames, start=None):
    pass


@torch.library.register_fake("cogvx::frame_cache_exchange")
def _exchange_fake(cache, joined, start=None):
    pass


def join_fake(
    cache: Tensor | None, frames: Tensor, kept: int, start: str | None, channels_last: bool
) -> tuple[Tensor, Tensor]:
    following = _new_cache(cache, frames, kept, channels_last)
    return _append_fake(following, frames, start, 0, channels_last), following
