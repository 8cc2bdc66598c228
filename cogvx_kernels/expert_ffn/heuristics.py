"""Choice of the GEMM backend for experts without an index, by measurements made in advance.

`python -m benchmarks.tune --op expert_ffn --dense` measures both backends and prints a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Measured(NamedTuple):
    """One measurement of both backends."""

    device: str  # of torch.cuda.get_device_name
    dtype: str
    dim: int
    ffn_dim: int  # rows of `up`
    experts: int
    faster: str  # "grouped" or "dense"
    ratio: float  # the slower's time over the faster's
    date: str


MEASURED: tuple[Measured, ...] = ()


def select_gemm(x: Tensor, up: Tensor, experts: int) -> str:
    """The faster backend for tokens x and one or two experts like `up`.

    Without a measurement, one expert on a GPU is "dense", because cuBLAS is hard to beat at a plain
    product, and two are "grouped", because "dense" needs a launch for each expert and sample. In
    Triton's interpreter it is "grouped".
    """
    if not x.is_cuda:
        return "grouped"
    dtype = str(x.dtype).removeprefix("torch.")
    key = (torch.cuda.get_device_name(x.device), dtype, x.shape[2], up.shape[0], experts)
    for row in MEASURED:
        if row[:5] == key:
            return row.faster
    return "dense" if experts == 1 else "grouped"
