"""What every launcher needs besides Triton: the right device, and how far strides are aligned."""

import contextlib
import math

import torch
from torch import Tensor


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context of every launch: Triton launches on the current device, so make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def alignment(*tensors: Tensor) -> int:
    """The largest power of two, at most 16, that divides the strides of all but the last dims.

    In elements. Kernels multiply by it as a constant: a compiler that only sees runtime strides
    knows of their alignment if they are multiples of 16, and of nothing less.
    """
    strides = [
        stride
        for x in tensors
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
        if size > 1
    ]
    return math.gcd(16, *strides)
