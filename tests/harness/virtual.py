"""Tensors with offsets past 32 bits, to detect kernels that compute offsets in 32 bits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .pages import forbid, map_pages

REACH = 2**31  # a 32-bit offset lies in [-REACH, REACH) elements


class VirtualMemoryRefused(RuntimeError):
    """The system does not map memory beyond its size; a reason to skip."""


def wide_strides(shape: Sequence[int], dtype: torch.dtype, stride_of_dim0: int) -> Tensor:
    """A tensor of zeros whose dim 0 spans 2**31 elements or more, contiguous in the other dims.

    It takes tens of gigabytes of addresses, and a page of memory for each row touched. An offset
    that wraps around is too small, and reads the zeros between rows, or negative, and hits a guard
    page.
    """
    rows, *row = shape
    strides = [math.prod(row[dim + 1 :]) for dim in range(len(row))]
    last = (rows - 1) * stride_of_dim0
    if last < REACH or stride_of_dim0 < math.prod(row):
        raise ValueError(
            f"wide_strides: the last of {rows} rows of {math.prod(row)} elements must start at "
            f"2**31 or beyond, each behind the one before it; got stride {stride_of_dim0}"
        )
    below, above = REACH * dtype.itemsize, (last + math.prod(row)) * dtype.itemsize
    try:
        pages = map_pages(below + above)
    except OSError as error:
        raise VirtualMemoryRefused(
            f"{(below + above) / 2**30:.0f} GiB of untouched memory: {error} "
            "(see vm.overcommit_memory and ulimit -v)"
        ) from error
    forbid(pages, 0, below)
    x = torch.frombuffer(pages, dtype=dtype, offset=below, count=above // dtype.itemsize)
    return x.as_strided(tuple(shape), (stride_of_dim0, *strides))
