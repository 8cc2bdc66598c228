"""Which way is faster for experts that need no sorting, as measured; nothing is tuned at run time.

`python -m benchmarks.tune --op expert_ffn --dense` measures both side by side and prints a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Measured(NamedTuple):
    """One comparison: the faster way, by how much, on what, and when."""

    device: str  # as torch.cuda.get_device_name says
    dtype: str
    dim: int
    ffn_dim: int  # rows of `up`
    experts: int
    faster: str  # "grouped" or "dense"
    ratio: float  # the slower's time over the faster's
    date: str


MEASURED: tuple[Measured, ...] = ()


def select_gemm(x: Tensor, up: Tensor, experts: int) -> str:
    """The faster way for tokens x and experts like `up`, of which there are one or two.

    Where nothing was measured, one expert on a GPU is dense, because its product is cuBLAS' own
    field; and two are grouped, because dense takes a launch for each expert and sample. Triton's
    interpreter is there to check kernels: grouped.
    """
    if not x.is_cuda:
        return "grouped"
    dtype = str(x.dtype).removeprefix("torch.")
    key = (torch.cuda.get_device_name(x.device), dtype, x.shape[2], up.shape[0], experts)
    for row in MEASURED:
        if row[:5] == key:
            return row.faster
    return "dense" if experts == 1 else "grouped"
