"""Which algo the layers of a VAE go about their work: the same values, within rounding."""

import torch
from torch import nn

from cogvx_kernels import BACKENDS

from ..config import check_choice
from .blocks import ResnetBlock3D
from .causal_conv import CausalConv, CausalConv3d
from .norm import Norm
from .resample import Upsample3D

WITH_BACKEND = (CausalConv, Norm, ResnetBlock3D)
ALGOS = ("auto", "conv3d", "conv2d")


def set_backend(module: nn.Module, backend: str) -> None:
    """From now on the ops of cogvx_kernels take "auto", "kernel" or "reference"."""
    check_choice("set_backend", "backend", backend, BACKENDS)
    for child in module.modules():
        if isinstance(child, WITH_BACKEND):
            child.backend = backend


def set_convolutions(module: nn.Module, algo: str = "auto", fold: bool = True) -> None:
    """algo: of `cogvx_kernels.conv3d`, as one convolution or as one of planes for each frame of the
    kernel. fold: see `Upsample3D`."""
    check_choice("set_convolutions", "algo", algo, ALGOS)
    for child in module.modules():
        if isinstance(child, CausalConv3d):
            child.algo = algo
        elif isinstance(child, Upsample3D):
            child.fold = fold


def lay_channels_last(module: nn.Module) -> None:
    """Kernels with their channels next to each other, as the layers' tensors have them: so that no
    library turns them round in every call. Values and keys of the state dict stay."""
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.Conv3d)):
            planes = isinstance(child, nn.Conv2d)
            form = torch.channels_last if planes else torch.channels_last_3d
            child.weight.data = child.weight.data.contiguous(memory_format=form)
