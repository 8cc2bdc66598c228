"""Group norms with SiLU, in one pass: over a chunk, within its frames, or modulated by the latents.

All of them are `cogvx_kernels.spatial_norm_silu`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvx_kernels import OpModule, spatial_norm_silu

from .options import channels_last

# Scale and shift by place, (batch, channels, latent frames, rows, columns) each; None without.
Modulation = tuple[Tensor, Tensor] | None


class Flow(NamedTuple):
    """A chunk (batch, channels, frames, height, width) between two layers, with the statistics of
    the next norm if the pass that computed the chunk computed them too."""

    x: Tensor
    moments: Tensor | None = None


class _NormSiLU(OpModule):
    """Base of the norms: forward."""

    per_frame = False

    def __init__(self, num_groups: int, eps: float) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps

    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, (channels,) each."""
        raise NotImplementedError

    def forward(
        self,
        flow: Flow,
        modulation: Modulation = None,
        leads: bool = False,
        *,
        offset: Tensor | None = None,
        cache: Tensor | None = None,
        start: str | None = None,
    ) -> Tensor:
        """SiLU of the norm of one chunk.

        Args:
            flow: (batch, channels, frames, height, width), with its statistics if they are known.
            modulation: scale and shift by place where the latents modulate the norm, (batch,
                channels, latent frames, rows, columns) each.
            leads: True if the first frame has a latent of its own; see `FrameCache`.
            offset: (channels,), added to the chunk first.
            cache: (batch, channels, kept, height, width), the frames of the next convolution's
                cache: they come before the result, and its last ones take their place.
            start: padding at the beginning of a clip; None within one.

        Returns:
            (batch, channels, frames, height, width), or kept + frames with a cache.
        """
        scale, shift = modulation or (None, None)
        return spatial_norm_silu(
            flow.x,
            *self.affine(),
            scale,
            shift,
            offset,
            num_groups=self.num_groups,
            eps=self.eps,
            per_frame=self.per_frame,
            leads=leads,
            moments=flow.moments,
            cache=cache,
            start=start,
            backend=self.backend,
        )


class Norm(_NormSiLU):
    """A group norm with its SiLU: statistics over all frames of the chunk, so the chunk plan is
    part of what is computed. Source: `docs/model.md`, section 4.4.
    """

    def __init__(self, num_groups: int, channels: int, eps: float) -> None:
        super().__init__(num_groups, eps)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


class FrameNorm(Norm):
    """A group norm with statistics within a frame: independent of chunks, and strictly causal."""

    per_frame = True


class PointConv(nn.Module):
    """A 1x1x1 convolution; `SpatialNorm.modulated` applies the weights of many at once."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = channels_last(nn.Conv3d(in_channels, out_channels, 1))

    def parts(self) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,)."""
        assert self.conv.bias is not None
        return self.conv.weight.flatten(1), self.conv.bias


class SpatialNorm(_NormSiLU):
    """A `Norm` that the latents modulate, place by place: norm(x) · y(zq) + b(zq), and SiLU.

    y and b are computed at the size of the latents and read by the nearest-neighbour rule, which
    commutes with a 1x1x1 convolution; they never exist at the size of x. Height and width are whole
    multiples of the latents'; in time a leading first frame maps to a leading first latent alone.
    Source: `docs/model.md`, section 4.3 (arXiv 2209.09002).
    """

    def __init__(self, num_groups: int, channels: int, zq_channels: int) -> None:
        super().__init__(num_groups, 1e-6)  # whatever the config's norm_eps
        self.norm_layer = nn.GroupNorm(num_groups, channels, self.eps)
        self.conv_y = PointConv(zq_channels, channels)
        self.conv_b = PointConv(zq_channels, channels)

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.norm_layer.weight, self.norm_layer.bias

    @staticmethod
    def modulated(norms: Sequence["SpatialNorm"], zq: Tensor) -> list[Modulation]:
        """y and b of several norms from the latents of a chunk (batch, zq_channels, latent frames,
        height, width), as one product."""
        points = [point for norm in norms for point in (norm.conv_y, norm.conv_b)]
        weights, biases = zip(*(point.parts() for point in points), strict=True)
        rows = F.linear(zq.movedim(1, -1).contiguous(), torch.cat(weights), torch.cat(biases))
        maps = rows.movedim(-1, 1).split([len(bias) for bias in biases], dim=1)
        return list(zip(maps[::2], maps[1::2], strict=True))
