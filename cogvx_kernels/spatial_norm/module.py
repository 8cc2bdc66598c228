"""Module for a spatial norm with SiLU and the convolutions of its modulation."""

import torch
from torch import Tensor, nn

from .. import _checks
from .._backend import OpModule
from .op import spatial_norm_silu


class SpatialNormSiLU(OpModule):
    """`spatial_norm_silu` as a module with the norm's parameters and the 1x1 convolutions of y, b.

    With `zq_channels` the keys of the state dict are those of diffusers' CogVideoXSpatialNorm3D:
    `norm_layer`, `conv_y.conv` and `conv_b.conv`, each with weight and bias; else `weight` and
    `bias`, as in nn.GroupNorm. The convolutions run at latent resolution. The default eps is that
    of CogVideoX's VAE, 1e-6; nn.GroupNorm's is 1e-5.
    """

    def __init__(
        self,
        num_groups: int,
        channels: int,
        zq_channels: int | None = None,
        eps: float = 1e-6,
        per_frame: bool = False,
        silu: bool = True,
    ) -> None:
        super().__init__()
        _checks.integer("SpatialNormSiLU", "num_groups", num_groups, 1, channels, "(the channels)")
        self.num_groups = num_groups
        self.channels = channels
        self.eps = eps
        self.per_frame = per_frame
        self.silu = silu
        self.modulated = zq_channels is not None
        if zq_channels is None:
            self.weight = nn.Parameter(torch.ones(channels))
            self.bias = nn.Parameter(torch.zeros(channels))
        else:
            self.norm_layer = nn.GroupNorm(num_groups, channels, eps)
            self.conv_y = nn.ModuleDict({"conv": nn.Conv3d(zq_channels, channels, 1)})
            self.conv_b = nn.ModuleDict({"conv": nn.Conv3d(zq_channels, channels, 1)})

    def forward(
        self,
        x: Tensor,
        zq: Tensor | None = None,
        *,
        leads: bool | None = None,
        offset: Tensor | None = None,
        moments: Tensor | None = None,
        cache: Tensor | None = None,
        start: str | None = None,
    ) -> Tensor:
        """SiLU of the norm, modulated by the latents.

        Args:
            x: (batch, channels, frames, height, width).
            zq: (batch, zq_channels, latent frames, latent height, latent width), for a module with
                `zq_channels`; x's height and width are whole multiples of the latents'.
            leads: the first frame has a latent frame to itself; None: if the number of frames is
                odd, as in diffusers.
            offset: (channels,), added to x first, or None.
            moments: (batch, frames if per_frame else 1, num_groups, 2) of `residual_moments`, or
                None to compute them.
            cache: (batch, channels, kept, height, width), put before the result and overwritten
                with its last frames; or None.
            start: "replicate" or "zeros" if the clip begins, with a cache.

        Returns:
            A new tensor of x's shape and dtype; with a cache of kept + frames frames.
        """
        y = b = None
        if self.modulated:
            if zq is None:
                raise ValueError("SpatialNormSiLU: zq must be given with zq_channels; got None")
            weight, bias = self.norm_layer.weight, self.norm_layer.bias
            y, b = (_modulation(point["conv"], zq, x) for point in (self.conv_y, self.conv_b))
        else:
            weight, bias = self.weight, self.bias
        leads = x.shape[2] % 2 == 1 if leads is None else leads
        return spatial_norm_silu(
            x, weight, bias, y, b, offset, num_groups=self.num_groups, eps=self.eps,
            per_frame=self.per_frame, leads=leads, silu=self.silu, moments=moments, cache=cache,
            start=start, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.channels}, eps={self.eps}, per_frame={self.per_frame}, "
            f"silu={self.silu}, backend={self.backend!r}"
        )


def _modulation(conv: nn.Module, zq: Tensor, x: Tensor) -> Tensor:
    """y or b at latent resolution, channels-last if x is, for wide loads in the kernel."""
    out: Tensor = conv(zq)
    if x.shape[1] > 1 and x.stride(1) == 1:
        out = out.contiguous(memory_format=torch.channels_last_3d)
    return out
