"""Autocast of ops that torch does not cast for."""

from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Dtype of layers under autocast on a device; None outside autocast."""
    # torch has no autocast state of the meta device.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def weights_in(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A layer's weight and bias, converted to a dtype as under autocast."""
    return layer.weight.to(dtype), layer.bias.to(dtype)
