"""Group norms with SiLU, as parts of a chunk: the statistics first, then a few frames at a time.

All of them come down to `silu(x · scale + shift)`, in at least fp32 and rounded once. They differ
in what the statistics extend over, and in where scale and shift come from.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_conv import CausalConv3d
from .parts import slices
from .state import FrameCache


class Norm(nn.Module):
    """The base: a norm with its SiLU."""

    def parts(self, x: Tensor, zq: Tensor | None, cache: FrameCache | None) -> Iterator[Tensor]:
        """SiLU of the norm of x (batch, channels, frames, height, width), in parts.

        zq: (batch, zq_channels, latent frames, height / n, width / n), the latents of the chunk,
            for a norm that they modulate.
        """
        raise NotImplementedError


class ChunkNorm(Norm):
    """A group norm with statistics over all frames of the chunk: so the chunk plan is part of what
    is computed. Source: fact sheet, section 4.4.
    """

    per_frame = False

    def __init__(self, num_groups: int, channels: int, eps: float) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def parts(self, x: Tensor, zq: Tensor | None, cache: FrameCache | None) -> Iterator[Tensor]:
        scale, shift = self.scale_and_shift(x)
        for frames in slices(x):
            part = x[:, :, frames]
            if self.per_frame:
                yield _affine_silu(part, scale[:, :, frames], shift[:, :, frames])
            else:
                yield _affine_silu(part, scale, shift)

    def scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (batch, channels, frames or 1, 1, 1), in at least fp32."""
        mean, var = _moments(x, self.num_groups)  # (batch, groups, frames)
        if not self.per_frame:
            var = var.mean(-1, keepdim=True) + mean.var(-1, correction=0, keepdim=True)
            mean = mean.mean(-1, keepdim=True)
        each = len(self.weight) // self.num_groups
        rstd = (var + self.eps).rsqrt().repeat_interleave(each, dim=1)
        weight, bias = (p.to(rstd.dtype)[:, None] for p in (self.weight, self.bias))
        scale = rstd * weight
        shift = bias - mean.repeat_interleave(each, dim=1) * scale
        return scale[..., None, None], shift[..., None, None]


class FrameNorm(ChunkNorm):
    """Statistics within a frame: chunks do not matter, and no frame knows of a later one."""

    per_frame = True


class SpatialNorm(Norm):
    """A `ChunkNorm` that the latents modulate, place by place: norm(x) · y(zq) + b(zq), and SiLU.

    y and b are made at the size of the latents and read by the nearest-neighbour rule, which
    commutes with a convolution of one pixel; they never exist at the size of x. Height and width
    are whole multiples of the latents'; in time a leading first frame maps to a leading first
    latent alone. Source: fact sheet, section 4.3 (arXiv 2209.09002).
    """

    def __init__(self, num_groups: int, channels: int, zq_channels: int) -> None:
        super().__init__()
        self.norm_layer = ChunkNorm(
            num_groups, channels, eps=1e-6
        )  # whatever the config's norm_eps
        self.conv_y = CausalConv3d(zq_channels, channels, kernel_size=1)
        self.conv_b = CausalConv3d(zq_channels, channels, kernel_size=1)

    def parts(self, x: Tensor, zq: Tensor | None, cache: FrameCache | None) -> Iterator[Tensor]:
        assert zq is not None
        scale, shift = self.norm_layer.scale_and_shift(x)
        y, b = (conv(zq).to(scale.dtype) for conv in (self.conv_y, self.conv_b))
        rows, ratio = zq.shape[3], x.shape[4] // zq.shape[4]
        scale, shift = (_widened(m, ratio) for m in (y * scale, torch.addcmul(b, y, shift)))
        leads = x.shape[2] % 2 == 1 if cache is None else cache.leads
        latents = latent_of_frame(x.shape[2], zq.shape[2], leads)
        for frames in slices(x):
            part = x[:, :, frames].unflatten(3, (rows, -1))
            at = latents[frames]
            yield _affine_silu(part, _frames(scale, at), _frames(shift, at)).flatten(3, 4)


def latent_of_frame(frames: int, latents: int, leads: bool) -> list[int]:
    """Which latent frame each frame of a chunk belongs to; `leads`: the first is alone.

    >>> latent_of_frame(5, 3, leads=True), latent_of_frame(4, 2, leads=False)
    ([0, 1, 1, 2, 2], [0, 0, 1, 1])
    """
    if leads and frames > 1:
        return [0, *(1 + i for i in latent_of_frame(frames - 1, latents - 1, False))]
    return [frame * latents // frames for frame in range(frames)]


def _frames(x: Tensor, at: list[int]) -> Tensor:
    """x (batch, channels, latent frames, ...) at the latent frames `at`; one for all if equal."""
    if len(set(at)) == 1:
        return x[:, :, at[0] : at[0] + 1]
    if at == list(range(x.shape[2])):
        return x
    return torch.cat([x[:, :, i : i + 1] for i in at], dim=2)


def _widened(x: Tensor, ratio: int) -> Tensor:
    """(..., rows, columns) -> (..., rows, 1, ratio · columns): the width of the pixels, so that
    lines are read in order, while rows are shared."""
    return x.unsqueeze(-2).repeat_interleave(ratio, dim=-1) if ratio > 1 else x.unsqueeze(-2)


def _affine_silu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """silu(x · scale + shift) in the dtype of scale, rounded to x's at the end."""
    out = torch.addcmul(shift, x, scale)
    return F.silu(out, inplace=not torch.is_grad_enabled()).to(x.dtype)


def _moments(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, each (batch, groups, frames), within a frame and in at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    means, variances = [], []
    for frames in slices(x):
        part = x[:, :, frames].to(wide).unflatten(1, (num_groups, -1))
        if part.device.type == "cpu" and not torch.is_grad_enabled():
            # torch.var_mean is one pass, but on a CPU ten times slower than these; vector_norm adds
            # up in fp32 as it goes, and is 7e-5 off for 800,000 elements
            mean = part.mean((2, 4, 5), keepdim=True)
            variances.append((part - mean).square_().mean((2, 4, 5)))
            means.append(mean[:, :, 0, :, 0, 0])
        else:
            variance, mean = torch.var_mean(part, (2, 4, 5), correction=0)
            means.append(mean)
            variances.append(variance)
    return torch.cat(means, -1), torch.cat(variances, -1)
