"""Test inputs for the frame cache: random bits in memory of every layout; expected results."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvx_kernels import (
    frame_cache_append,
    frame_cache_join,
    frame_cache_push,
)
from cogvx_kernels.frame_cache import op

native = pytest.mark.skipif(not op.HAS_EXTENSION, reason="cogvx_kernels._C is not built")
BACKENDS = pytest.mark.parametrize("backend", [pytest.param("kernel", marks=native), "reference"])
STARTS = (None, "replicate", "zeros")
FORMATS = (torch.contiguous_format, torch.channels_last_3d)


def bits(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(bits(ours), bits(theirs))


def wanted(cache: Tensor, frames: Tensor, start: str | None) -> tuple[Tensor, Tensor]:
    """Joined and the next cache, independently of the reference."""
    kept = cache.shape[2]
    past = cache
    if start == "replicate":
        past = torch.cat([frames[:, :, :1]] * kept, 2) if kept else cache
    elif start == "zeros":
        past = torch.zeros_like(cache)
    joined = torch.cat([past, frames], 2).contiguous()
    return joined, joined[:, :, joined.shape[2] - kept :].clone()


def padded(x: Tensor, padding: int) -> Tensor:
    """Zero-pad the bytes, because F.pad supports few dtypes."""
    cols = padding * x.dtype.itemsize
    return F.pad(bits(x), (cols, cols, padding, padding)).view(x.dtype)


def video(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Random bits, NaNs with payloads among them."""
    size = math.prod(shape) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype is torch.bool else 256
    values = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
    return values.view(dtype).view(shape).to(device)


def _permuted(x: Tensor, *dims: int) -> Tensor:
    return x.permute(dims).contiguous().permute([dims.index(dim) for dim in range(5)])


def _inset(x: Tensor, last: bool = False) -> Tensor:
    """In a buffer with a border of one pixel; channels or columns have stride 1."""
    batch, channels, frames, height, width = x.shape
    if last:
        buffer = x.new_ones((batch, frames, height + 2, width + 2, channels)).permute(0, 4, 1, 2, 3)
    else:
        buffer = x.new_ones((batch, channels, frames, height + 2, width + 2))
    return buffer[..., 1:-1, 1:-1].copy_(x)


def _behind(x: Tensor) -> Tensor:
    batch, channels, frames, height, width = x.shape
    buffer = x.new_ones((batch, frames + 2, height, width, channels)).permute(0, 4, 1, 2, 3)
    return buffer[:, :, 2:].copy_(x)


def _apart(x: Tensor) -> Tensor:
    """Dense frames with a gap of one element, so that only the first is aligned."""
    batch, channels, frames, height, width = x.shape
    buffer = x.new_ones((frames, batch * channels * height * width + 1))
    shape = batch, channels, height, width
    return buffer[:, :-1].unflatten(1, shape).permute(1, 2, 0, 3, 4).copy_(x)


# The same values in other memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: _permuted(x, 0, 2, 3, 4, 1),
    "behind": _behind,
    "channels last, inset": lambda x: _inset(x, last=True),
    "inset": _inset,
    "frames outermost": lambda x: _permuted(x, 2, 0, 1, 3, 4),
    "frames apart": _apart,
    "frames innermost": lambda x: _permuted(x, 0, 1, 3, 4, 2),
    "turned": lambda x: _permuted(x, 0, 1, 2, 4, 3),
    "strided": lambda x: torch.cat([x, x], -1).unflatten(4, (2, -1)).mT.flatten(4)[..., ::2],
    "off by one": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
}


def check(
    cache: Tensor,
    frames: Tensor,
    start: str | None,
    backend: str,
    padding: int = 0,
    memory_format: torch.memory_format | None = None,
) -> None:
    """Check all three ops on these tensors; `cache` is overwritten."""
    options: Any = {"start": start, "backend": backend}
    kept = cache.shape[2]
    before = bits(frames)
    case = (cache.shape, cache.stride(), frames.shape, frames.stride(), start, padding)

    held = bits(cache)
    expected = wanted(cache, frames, start)
    ours = frame_cache_join(cache, frames, kept=kept, **options)
    assert all(map(same, ours, expected)), f"join: {case}"
    assert torch.equal(bits(cache), held), f"join wrote to the cache: {case}"

    joined = frame_cache_append(
        cache, frames, padding=padding, memory_format=memory_format, **options
    )
    assert same(joined, padded(expected[0], padding)) and same(cache, expected[1]), (
        f"append: {case}"
    )
    if memory_format is not None and joined.numel():
        assert joined.is_contiguous(memory_format=memory_format), case

    expected = wanted(cache, frames, start)
    frame_cache_push(cache, frames, **options)
    assert same(cache, expected[1]), f"push: {case}"
    assert torch.equal(bits(frames), before), f"the chunk was written to: {case}"
