"""Kernels with one bug each, and correct twins, to test the harness."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogvx_kernels._launch import on_device


@triton.jit
def _copy_kernel(
    x_ptr, y_ptr, n, LOAD_SHIFT: tl.constexpr, STORE_SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """Correct with both shifts 0, else off by that many elements in loads or stores."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs + LOAD_SHIFT, mask=mask, other=0.0)
    tl.store(y_ptr + offs + STORE_SHIFT, x, mask=mask)


def copy(x: Tensor, y: Tensor, load_shift: int = 0, store_shift: int = 0, block: int = 64) -> None:
    with on_device(x):
        copy_without_device(x, y, load_shift, store_shift, block)


def copy_without_device(
    x: Tensor, y: Tensor, load_shift: int = 0, store_shift: int = 0, block: int = 64
) -> None:
    """Launch on the current device."""
    n = x.numel()
    _copy_kernel[(triton.cdiv(n, block),)](
        x, y, n, LOAD_SHIFT=load_shift, STORE_SHIFT=store_shift, BLOCK=block
    )


@triton.jit
def count_kernel(total_ptr, ATOMIC: tl.constexpr):
    """All programs add 1 at one address: a race without ATOMIC."""
    if ATOMIC:
        tl.atomic_add(total_ptr, 1.0)
    else:
        tl.store(total_ptr, tl.load(total_ptr) + 1.0)


@triton.jit
def neighbour_kernel(x_ptr):
    """Each program reads what the next one writes."""
    i = tl.program_id(0)
    tl.store(x_ptr + i, tl.load(x_ptr + i + 1))


@triton.jit
def overlap_kernel(words_ptr, halves_ptr):
    """Program 0 stores a word, program 1 the half at halves_ptr: a race if that is in the word."""
    if tl.program_id(0) == 0:
        tl.store(words_ptr, 1)
    else:
        tl.store(halves_ptr, 2)


@triton.jit
def atomic_and_plain_kernel(total_ptr, out_ptr):
    """Program 0 adds atomically, program 1 reads without."""
    if tl.program_id(0) == 0:
        tl.atomic_add(total_ptr, 1.0)
    else:
        tl.store(out_ptr, tl.load(total_ptr))


@triton.jit
def last_one_kernel(out_ptr):
    """The result depends on the order of programs."""
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def no_other_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Masked lanes are undefined on a GPU."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n))


@triton.jit
def descriptor_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Lanes beyond a descriptor's shape are masked."""
    x_block = tl.make_tensor_descriptor(x_ptr, (n,), (1,), (BLOCK,))
    y_block = tl.make_tensor_descriptor(y_ptr, (n,), (1,), (BLOCK,))
    y_block.store((0,), x_block.load((0,)))


@triton.jit
def all_but_last_kernel(y_ptr, n, BLOCK: tl.constexpr):
    """Does not write the last element."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.zeros((BLOCK,), tl.float32), mask=offs < n - 1)


@triton.jit
def _rows_kernel(x_ptr, y_ptr, stride, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A row for each program; without WIDE, its offset is computed in 32 bits."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    start = (row.to(tl.int64) if WIDE else row) * stride
    x = tl.load(x_ptr + start + offs, mask=mask, other=0.0)
    tl.store(y_ptr + row * n + offs, x, mask=mask)


def copy_rows(x: Tensor, wide: bool) -> Tensor:
    """Copy x (rows, n) to a contiguous tensor, correctly if `wide`."""
    y = torch.zeros(x.shape, dtype=x.dtype)
    block = triton.next_power_of_2(x.shape[1])
    with on_device(x):
        _rows_kernel[(x.shape[0],)](x, y, x.stride(0), x.shape[1], WIDE=wide, BLOCK=block)
    return y


@triton.jit
def endless_kernel(x_ptr):
    """Never ends."""
    while tl.load(x_ptr) == 0.0:
        pass


@triton.jit
def idle_kernel():
    pass


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Rounds to y's dtype."""
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def double_kernel(x_ptr, BLOCK: tl.constexpr):
    """Computes in x's dtype, which the interpreter does wrong for bfloat16."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, x + x)
