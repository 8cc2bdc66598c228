"""Tensors between guard pages, filled with poison, to detect accesses out of bounds.

A GPU reads past the end of a tensor without an error; here the process crashes (run such cases in
`workers`). A tensor rarely fills whole pages, so one end is flush with its guard page, and the
bytes between the other end and its page are slack: `check` reports writes to it, and it is NaN in
every float dtype, so that reads show in the result.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from .pages import PAGE, forbid, map_pages

# Bytes of unwritten memory: NaN, or an integer that is out of range as an index.
POISON = 0xFF
INTEGER_POISON = 0xA5

# Functions that allocate, by owner; and those that leave the memory uninitialised.
FACTORIES = {
    torch: ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "full"),
    Tensor: ("new_empty", "new_zeros", "contiguous", "clone"),
}
UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty"}


@dataclass
class _Allocation:
    """The memory of a tensor and the slack around it."""

    name: str
    bytes: Tensor
    start: int
    size: int
    slack: Tensor  # initial bytes of the whole memory


class Fence:
    """Allocator of fenced tensors; leaving its context checks their slack.

    side  the end of a tensor that is flush with a guard page: "right" or "left"

    A tensor is aligned to its elements, and to 16 bytes if its size is a multiple of 16 or side is
    "left". On a GPU, without guard pages, there is slack at both ends: writes are detected, reads
    are NaN.
    """

    def __init__(self, side: Literal["right", "left"] = "right") -> None:
        self.side = side
        self._allocations: list[_Allocation] = []

    def new(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """A contiguous tensor filled with poison."""
        count, device = math.prod(shape), torch.device(device)
        if count == 0:  # without an address: an access is one to page 0
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        size = count * dtype.itemsize
        if device.type == "cpu":
            length = math.ceil(size / PAGE) * PAGE
            start = 0 if self.side == "left" else length - size
            pages = map_pages(PAGE + length + PAGE)
            forbid(pages, 0, PAGE)
            forbid(pages, PAGE + length, PAGE)
            memory = torch.frombuffer(pages, dtype=torch.uint8, offset=PAGE, count=length)
            # A separate storage, so that torch too knows the tensor's end.
            x = torch.frombuffer(pages, dtype=dtype, offset=PAGE + start, count=count)
        else:
            start = PAGE
            memory = torch.empty(2 * PAGE + size, dtype=torch.uint8, device=device)
            x = memory[start : start + size].view(dtype)
        slack = _stripes(memory.numel(), len(self._allocations), device)
        memory.copy_(slack)
        memory[start : start + size] = _poison(dtype)
        name = f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
        self._allocations.append(_Allocation(name, memory, start, size, slack))
        return _lay_out(x, shape, _contiguous_strides(shape))

    def __contains__(self, x: Tensor) -> bool:
        """True if the tensor is in memory of this fence."""
        at = x.data_ptr()
        return any(
            0 <= at - allocation.bytes.data_ptr() - allocation.start < allocation.size
            for allocation in self._allocations
        )

    def check(self) -> None:
        """Raise AssertionError if slack was written, with the tensors beside it."""
        faults = [fault for allocation in self._allocations for fault in _faults(allocation)]
        if faults:
            raise AssertionError("written out of bounds:\n" + "\n".join(faults))

    def close(self) -> None:
        """Release the memory; it is unmapped with the last tensor in it."""
        self._allocations.clear()

    def __enter__(self) -> "Fence":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.close()

    @contextlib.contextmanager
    def allocations(self, package: str = "cogvx_kernels") -> Iterator["Fence"]:
        """Fence allocations in modules of `package`: outputs, scratch, contiguous copies.

        Tensors that require a gradient, fake and meta tensors are left alone: no launcher gets
        them. `torch.compile` cannot trace through this.
        """
        with contextlib.ExitStack() as patches:
            for owner, names in FACTORIES.items():
                for name in names:
                    fenced = self._fencing(getattr(owner, name), name in UNINITIALISED, package)
                    patches.enter_context(mock.patch.object(owner, name, fenced))
            yield self

    def _fencing(
        self, original: Callable[..., Tensor], uninitialised: bool, package: str
    ) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def fenced(*args: Any, **kwargs: Any) -> Tensor:
            x = original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            ours = caller == package or caller.startswith(package + ".")
            if not ours or not _can_be_fenced(x) or any(x is argument for argument in args):
                return x
            y = self._like(x)
            return y if uninitialised else y.copy_(x)

        return fenced

    def _like(self, x: Tensor) -> Tensor:
        span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        return _lay_out(self.new((span,), x.dtype, x.device), x.shape, x.stride())


def untouched(x: Tensor) -> Tensor:
    """Mask of elements that still hold poison, bit for bit; a computed NaN has other bits."""
    elements = x.detach().contiguous().reshape(-1).view(torch.uint8)
    elements = elements.reshape(*x.shape, x.dtype.itemsize)
    return (elements == _poison(x.dtype)).all(-1)


def _poison(dtype: torch.dtype) -> int:
    if dtype is torch.bool:
        return 1  # other bytes are not a bool
    return POISON if dtype.is_floating_point or dtype.is_complex else INTEGER_POISON


def _stripes(size: int, number: int, device: torch.device) -> Tensor:
    """Slack of the fence's tensor of this number: two alternating bytes, NaN in 2, 4 or 8 bytes.

    It differs between tensors, so that slack copied from one to another is detected.
    """
    pair = torch.tensor([0xF1 + number % 14, 0xFF], dtype=torch.uint8, device=device)
    return pair.repeat((size + 1) // 2)[:size]


def _faults(allocation: _Allocation) -> Iterator[str]:
    written = (allocation.bytes != allocation.slack).nonzero().flatten()
    before = written[written < allocation.start] - allocation.start
    after = written[written >= allocation.start + allocation.size] - (
        allocation.start + allocation.size
    )
    for at, where in ((before, "before its start"), (after, "after its end")):
        if at.numel():
            first, last = int(at.min()), int(at.max())
            yield f"{allocation.name}: {at.numel()} bytes {where}, from {first:+} to {last:+}"


def _can_be_fenced(x: object) -> bool:
    return (
        type(x) is Tensor
        and x.layout is torch.strided
        and x.device.type in ("cpu", "cuda")
        and x.numel() > 0
        and not x.requires_grad
    )


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _lay_out(x: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """x's memory as a separate tensor, which for autograd is not a view."""
    whole = torch.empty(0, dtype=x.dtype, device=x.device)
    return whole.set_(x.untyped_storage(), x.storage_offset(), tuple(shape), tuple(strides))
