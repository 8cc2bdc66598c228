"""What autocast makes of a tensor, for ops that torch does not cast for."""

from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What a layer computes in there under autocast; None outside it."""
    # Of the meta device torch has no autocast to ask about.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def weights_in(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A layer's weight and bias in a chunk's dtype, which under autocast is not their own."""
    return layer.weight.to(dtype), layer.bias.to(dtype)
