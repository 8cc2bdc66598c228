"""Linear layers of a model, on a CPU by oneDNN."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .conv3d import takes_onednn
from .module_utils import is_unmodified


def linear(layer: nn.Module, x: Tensor, gelu: bool = False) -> Tensor:
    """`layer(x)`, with `gelu` followed by tanh-GELU.

    A plain nn.Linear in fp32 on an x86 CPU without gradients runs by oneDNN, with the GELU in its
    product: MKL, which torch calls, was half as fast on an AMD EPYC.
    """
    if is_unmodified(layer, nn.Linear):
        assert isinstance(layer, nn.Linear)
        if _by_onednn(x, layer.weight, layer.bias):
            activation: tuple[Any, ...] = ("gelu", [], "tanh") if gelu else ("none", [], "")
            run = torch.ops.mkldnn._linear_pointwise
            out: Tensor = run(x, layer.weight, layer.bias, *activation)
            return out
    out = layer(x)
    return F.gelu(out, approximate="tanh") if gelu else out


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = [weight] if bias is None else [weight, bias]
    return (
        takes_onednn(x, weight, bias)
        and torch.backends.mkl.is_available()
        and x.numel() > 0
        and all(type(z) in (Tensor, nn.Parameter) and z.dtype is x.dtype for z in given)
        and all(z.device == x.device and z.is_contiguous() for z in (x, *given))
    )
