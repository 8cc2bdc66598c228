"""Tensors that a kernel cannot leave unseen: a forbidden page on either side, poison within.

A GPU reads past the end of a tensor and carries on; here the process dies of it (run such cases in
`workers`). A tensor fills whole pages only by chance, so one end is flush with its forbidden page,
and the bytes up to the other, the slack, are watched: `check` tells whether they were written, and
they are NaN in every float dtype, so what is read there shows in the result.
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

# Bytes of memory that nobody has written: NaN; or an integer that is wild as an index too.
POISON = 0xFF
INTEGER_POISON = 0xA5

# What allocates, by owner; and which of these leave the memory as they found it.
FACTORIES = {
    torch: ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "full"),
    Tensor: ("new_empty", "new_zeros", "contiguous", "clone"),
}
UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty"}


@dataclass
class _Allocation:
    """A tensor's bytes and the slack around them."""

    name: str
    bytes: Tensor
    start: int
    size: int
    slack: Tensor  # what all bytes held at first


class Fence:
    """Allocates fenced tensors and keeps them while it lives; leaving its context checks it.

    side  the end of a tensor that is flush with a forbidden page: "right", or "left"

    The start of a tensor is aligned to its elements, and to 16 bytes if its size is a multiple of
    them or its left end is the flush one. On a GPU, where no page can be forbidden, there is slack
    at both ends: writes are seen, reads are NaN.
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
        """A contiguous tensor full of poison."""
        count, device = math.prod(shape), torch.device(device)
        if count == 0:  # has no address: an access to it is one to page 0
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        size = count * dtype.itemsize
        if device.type == "cpu":
            length = math.ceil(size / PAGE) * PAGE
            start = 0 if self.side == "left" else length - size
            pages = map_pages(PAGE + length + PAGE)
            forbid(pages, 0, PAGE)
            forbid(pages, PAGE + length, PAGE)
            memory = torch.frombuffer(pages, dtype=torch.uint8, offset=PAGE, count=length)
            # A storage of its own, so that torch too knows where the tensor ends.
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
        """Whether the tensor lies in memory of this fence."""
        at = x.data_ptr()
        return any(
            0 <= at - allocation.bytes.data_ptr() - allocation.start < allocation.size
            for allocation in self._allocations
        )

    def check(self) -> None:
        """Raise AssertionError if slack was written, and say beside which tensors."""
        faults = [fault for allocation in self._allocations for fault in _faults(allocation)]
        if faults:
            raise AssertionError("written out of bounds:\n" + "\n".join(faults))

    def close(self) -> None:
        """Let go of the memory. It is unmapped when the last tensor in it is gone."""
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
        """Fence what modules of `package` allocate: outputs, scratch, contiguous copies.

        Left alone is what no launcher sees: tensors that require a gradient, fake and meta ones.
        `torch.compile` is not to trace through this.
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
    """Where a fenced tensor still holds its poison, bit for bit; a computed NaN is another NaN."""
    elements = x.detach().contiguous().reshape(-1).view(torch.uint8)
    elements = elements.reshape(*x.shape, x.dtype.itemsize)
    return (elements == _poison(x.dtype)).all(-1)


def _poison(dtype: torch.dtype) -> int:
    if dtype is torch.bool:
        return 1  # any other byte is no bool
    return POISON if dtype.is_floating_point or dtype.is_complex else INTEGER_POISON


def _stripes(size: int, number: int, device: torch.device) -> Tensor:
    """Slack for the fence's tensor of this number: two bytes in turn, a NaN of 2, 4 or 8 bytes.

    Neighbours' differ: slack that is copied from one tensor's to another's is seen there.
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
    """x's memory as a tensor in its own right: autograd knows no view of it, no base."""
    whole = torch.empty(0, dtype=x.dtype, device=x.device)
    return whole.set_(x.untyped_storage(), x.storage_offset(), tuple(shape), tuple(strides))
