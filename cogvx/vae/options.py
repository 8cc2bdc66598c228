"""Execution options shared by the layers of an encoder or decoder; layout of their weights."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@dataclass
class Options:
    """How the layers compute; results agree within rounding. Layers read it in each forward.

    algo  of `cogvx_kernels.conv3d`: "auto", "conv3d" or "conv2d"
    fold  upsample by four convolutions of the small picture, see `cogvx_kernels.resample`
    """

    algo: str = "auto"
    fold: bool = True


def channels_last(module: M) -> M:
    """Lay out the weights of all convolutions in a module with channels last, as their inputs are.

    Values and keys of the state dict stay. Needed once more after weights have been replaced.
    """
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.Conv3d)):
            form = torch.channels_last if child.weight.dim() == 4 else torch.channels_last_3d
            child.weight.data = child.weight.data.contiguous(memory_format=form)
    return module
