"""Residual blocks of encoder and decoder, in levels of one size.

Every layer is called as `layer(flow, modulations, cache)` and returns a `Flow`; there is one
`Modulation` for each of the layer's norms if the latents modulate them. No layer writes into its
input.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvx_kernels import conv3d, residual_moments
from cogvx_kernels.streaming import FrameCache

from ..autocast import weights_in
from .causal_conv import AnyNorm, CausalConv
from .norm import Flow, Modulation, SpatialNorm
from .options import channels_last
from .resample import Downsample3D, Upsample3D

MakeNorm = Callable[..., AnyNorm]  # of channels
MakeConv = Callable[..., CausalConv]  # of in_channels, out_channels and name


class ResnetBlock3D(nn.Module):
    """x + conv2(norm2(conv1(norm1(x)))), each norm with its SiLU; a change of width changes x too.

    With `feeds_norm` the pass of the sum also computes the statistics of the next layer, a norm.
    Source: `docs/model.md`, section 4.2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: MakeNorm,
        conv: MakeConv,
        name: str,
        feeds_norm: bool,
    ) -> None:
        super().__init__()
        self.feeds_norm = feeds_norm
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, name=f"{name}.conv1")
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, name=f"{name}.conv2")
        if in_channels != out_channels:
            self.conv_shortcut: nn.Module = channels_last(nn.Conv3d(in_channels, out_channels, 1))

    def forward(self, flow: Flow, modulations: Sequence[Modulation], cache: FrameCache) -> Flow:
        """The block's output for one chunk.

        Args:
            flow: (batch, in_channels, frames, height, width), with the statistics of `norm1` if the
                layer before computed them.
            modulations: of norm1 and norm2; empty where nothing modulates them.
            cache: the last frames of the chunk before, of every convolution; it is updated.

        Returns:
            (batch, out_channels, frames, height, width), with the statistics of the next norm where
            `feeds_norm`.
        """
        first, second = modulations or (None, None)
        h = self.conv1.after(self.norm1, flow, first, cache, biased=False)
        offset = self.conv1.pending_bias(h)
        h = self.conv2.after(self.norm2, Flow(h), second, cache, offset=offset, biased=False)
        return self._sum(self._shortcut(flow.x), h, self.conv2.pending_bias(h))

    def _shortcut(self, x: Tensor) -> Tensor:
        if not hasattr(self, "conv_shortcut"):
            return x
        weight, bias = weights_in(self.conv_shortcut, x.dtype)
        return conv3d(x, weight, bias, (0, 0, 0))

    def _sum(self, x: Tensor, h: Tensor, offset: Tensor | None) -> Flow:
        if torch.is_grad_enabled() or (offset is None and not self.feeds_norm):
            return Flow(x + h)
        norm = self.norm1
        return Flow(
            *residual_moments(
                x,
                h,
                offset,
                num_groups=norm.num_groups,
                per_frame=norm.per_frame,
                backend=norm.backend,
            )
        )


class Level(nn.Module):
    """The layers at one size, and the resampling to the next.

    The keys of a state dict are those of the released files, which is why a single resampling layer
    is in a list.
    """

    def __init__(
        self,
        resnets: Sequence[ResnetBlock3D],
        downsampler: Downsample3D | None = None,
        upsampler: Upsample3D | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if downsampler is not None:
            self.downsamplers = nn.ModuleList([downsampler])
        if upsampler is not None:
            self.upsamplers = nn.ModuleList([upsampler])

    def layers(self, zq: Tensor | None) -> Iterator[tuple[nn.Module, list[Modulation]]]:
        """Each layer with the modulations of its norms by zq, the latents of a chunk, if any.

        Those of a level are computed at once, and live while its layers run.
        """
        norms = _modulated_norms(self)
        made = SpatialNorm.modulated(norms, zq) if norms and zq is not None else []
        modulations = iter(made)
        for children in self.children():
            for layer in cast(nn.ModuleList, children):
                yield layer, [next(modulations) for _ in _modulated_norms(layer)]


def run_levels(
    levels: Iterable[Level], flow: Flow, zq: Tensor | None, cache: FrameCache, checkpointing: bool
) -> Flow:
    """Run a chunk through the layers of all levels. The input of a layer is freed after it."""
    for level in levels:
        for layer, modulations in level.layers(zq):
            if checkpointing and torch.is_grad_enabled():
                flow = _checkpointed(layer, flow, modulations, cache)
            else:
                flow = layer(flow, modulations, cache)
    return flow


def _checkpointed(
    layer: nn.Module, flow: Flow, modulations: Sequence[Modulation], cache: FrameCache
) -> Flow:
    """layer(flow, modulations, cache), recomputed in the backward pass.

    The layer runs on a fork of the cache: when it runs again, in the backward pass, later chunks
    have replaced the frames in `cache` itself.
    """
    before = cache.fork()

    def run(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        fork = before.fork()
        return layer(Flow(x), modulations, fork).x, fork.frames

    out, cache.frames = checkpoint(run, flow.x, use_reentrant=False)
    return Flow(out)


def _modulated_norms(module: nn.Module) -> list[SpatialNorm]:
    return [m for m in module.modules() if isinstance(m, SpatialNorm)]


def resnets(
    in_channels: int,
    out_channels: int,
    count: int,
    norm: MakeNorm,
    conv: MakeConv,
    level: str,
    resampled: bool = False,
) -> list[ResnetBlock3D]:
    """`count` blocks in a row, of which the first changes the number of channels.

    level: path of their level in the encoder or decoder. resampled: a resampling layer follows.
    """
    blocks = []
    for i in range(count):
        width, name = in_channels if i == 0 else out_channels, f"{level}.resnets.{i}"
        feeds_norm = i < count - 1 or not resampled
        blocks.append(ResnetBlock3D(width, out_channels, norm, conv, name, feeds_norm))
    return blocks
