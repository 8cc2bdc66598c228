"""Helpers of launchers: device context, alignment of strides, dense memory formats."""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The last field of a tuple of tuples. Triton 3.6 forgets constants in the inner ones (None, strides
# of 1) after an `if` or `for`, unless a constant of the outer one comes after them.
LAST = None


_NO_CHANGE = contextlib.nullcontext()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context of every launch: Triton launches on the current device, so it must be x's."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_CHANGE
    return torch.cuda.device(x.device)


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's own, a constexpr_function, takes ten times as long."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def new(x: Tensor) -> Tensor:
    """An empty contiguous tensor of x's shape and dtype."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def alignment(*tensors: Tensor | None, inner: int = -1) -> int:
    """The largest power of two, at most 16, that divides the strides of all dims but `inner`.

    In elements. Kernels multiply strides by it as a constant, because Triton specialises a runtime
    stride only if it is a multiple of 16.
    """
    present = [x for x in tensors if x is not None]
    strides: list[int] = []
    for x in present:
        outer = [*x.stride()]
        del outer[inner]
        strides += outer
    if math.gcd(16, *strides) == 16:
        return 16
    sizes: list[int] = []
    for x in present:
        outer = [*x.shape]
        del outer[inner]
        sizes += outer
    return math.gcd(16, *(s for s, size in zip(strides, sizes, strict=True) if size > 1))


class Rows(NamedTuple):
    """Pointer and strides of a tensor (batch, seqlen, dim) for a kernel.

    Strides of batch and seq are in units of ALIGN elements: by the product with a constant the
    compiler knows the alignment of a row.
    """

    ptr: Tensor | None
    batch: int
    seq: int
    dim: int


_NO_ROWS = Rows(None, 0, 0, 1)


def as_rows(x: Tensor | None, plan: Any) -> Rows:
    """`x` for a launch with the constants `plan`; None becomes a Rows without a pointer.

    A tensor (batch, dim) is one row for each sample.
    """
    if x is None:
        return _NO_ROWS
    batch, *seq, dim = x.stride()
    return Rows(x, batch // plan.ALIGN, seq[0] // plan.ALIGN if seq else 0, dim)


def product_options(target: Any, warps: int, stages: int) -> dict[str, int]:
    """Launch options of a matrix product for Triton's `target`, None in the interpreter.

    The stages are for at least 99 KB of shared memory; AMD's 64 KB hold two. RDNA 3 (gfx11) keeps
    an operand in both halves of a wave, and spilled registers with less than this.
    """
    if target is None or target.backend != "hip":
        return {"num_warps": warps, "num_stages": stages}
    if target.arch.startswith("gfx11"):
        return {"num_warps": 2 * warps, "num_stages": 1}
    return {"num_warps": warps, "num_stages": min(stages, 2)}


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """`x` (batch, channels, ...) as dense channels_last or contiguous memory, copied if it is not.

    Like Tensor.contiguous(memory_format=...), which torch.vmap does not support.
    """
    if not channels_last:
        return x.contiguous()
    rows = x.movedim(1, -1)
    # A tensor without elements is contiguous with any strides.
    rows = rows.contiguous() if x.numel() else rows.clone(memory_format=torch.contiguous_format)
    return rows.movedim(-1, 1)


def empty_video(x: Tensor, channels: int | None = None, frames: int | None = None) -> Tensor:
    """An empty (batch, channels, frames, height, width), by default of x's shape.

    Channels-last if x is, else contiguous.
    """
    form = (
        torch.channels_last_3d if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format
    )
    if channels is None and frames is None:
        return torch.empty_like(x, memory_format=form)
    shape = list(x.shape)
    shape[1] = shape[1] if channels is None else channels
    shape[2] = shape[2] if frames is None else frames
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
