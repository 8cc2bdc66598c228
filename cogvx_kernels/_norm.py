"""Norm of rows, for the references."""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_rows(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm or RMSNorm ("layer" or "rms") over the last dim, in at least fp32, unrounded.

    weight, bias  (dim,) or None
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if z is None else z.to(wide) for z in (weight, bias))
    x = x.to(wide)
    # One pass on a CPU. The steps are exact on small integers, to which the fp64 reference is held,
    # and inductor makes faster code of them.
    if norm == "layer" and wide is torch.float32 and not torch.compiler.is_compiling():
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
