"""Ops of the C++ and CUDA extension: fakes, and the functional form of the in-place append.

Importing this file loads the extension; schemas and kernels are in `csrc/`. Each op reads a frame
once and writes it to joined and to the next cache in the same pass, for any layouts.
"""

import torch
from torch import Tensor

from .._C import HAS_CUDA

__all__ = ["HAS_CUDA", "append", "join", "join_fake", "push"]

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


def _written(cache: Tensor) -> None:
    """Increase its version counter: ops on the stable ABI do not, compiled code does so itself."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(cache)


def join(
    cache: Tensor | None, frames: Tensor, cache_len: int, start: str | None, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Append to a copy of the cache."""
    next_cache = _new_cache(cache, frames, cache_len, channels_last)
    if start is None:
        next_cache.copy_(cache)
    return ops.frame_cache_append(next_cache, frames, start, 0, channels_last), next_cache


def _new_cache(cache: Tensor | None, frames: Tensor, cache_len: int, channels_last: bool) -> Tensor:
    batch, channels, _, height, width = frames.shape
    return torch.empty(
        (batch, channels, cache_len if cache is None else cache.shape[2], height, width),
        dtype=frames.dtype,
        device=frames.device,
        memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format,
    )


# --- fakes -----------------------------------------------------------------------------------


@torch.library.register_fake("cogvx::frame_cache_append")
def _append_fake(cache, frames, start=None, padding=0, channels_last=False):
    batch, channels, chunk_len, height, width = frames.shape
    total, height, width = cache.shape[2] + chunk_len, height + 2 * padding, width + 2 * padding
    if channels_last:
        joined = frames.new_empty((batch, total, height, width, channels))
        return joined.permute(0, 4, 1, 2, 3)
    return frames.new_empty((batch, channels, total, height, width))


@torch.library.register_fake("cogvx::frame_cache_push")
def _push_fake(cache, frames, start=None):
    pass


def join_fake(
    cache: Tensor | None, frames: Tensor, cache_len: int, start: str | None, channels_last: bool
) -> tuple[Tensor, Tensor]:
    next_cache = _new_cache(cache, frames, cache_len, channels_last)
    return _append_fake(next_cache, frames, start, 0, channels_last), next_cache
