"""What encoder and decoder are made of: residual blocks, in levels of one size.

Every layer is called as `layer(flow, modulations, cache)` and returns a `Flow`: the chunk, with a
`Modulation` for each of the layer's norms, if the latents modulate them. No layer writes into what
it was given.
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
from .resample import Downsample3D, Upsample3D

MakeNorm = Callable[[int], AnyNorm]
MakeConv = Callable[[int, int], CausalConv]


class ResnetBlock3D(nn.Module):
    """x + conv2(norm2(conv1(norm1(x)))), each norm with its SiLU; a change of width changes x too.

    Where a norm comes next, `feeds_norm`, its statistics are made in the pass that adds.
    Source: fact sheet, section 4.2.
    """

    feeds_norm = False
    backend = "auto"

    def __init__(self, in_channels: int, out_channels: int, norm: MakeNorm, conv: MakeConv) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut: nn.Module = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, flow: Flow, modulations: Sequence[Modulation], cache: FrameCache) -> Flow:
        """The block's output for one chunk.

        Args:
            flow: (batch, in_channels, frames, height, width), with the statistics of `norm1` if the
                layer before made them.
            modulations: those of norm1 and norm2; empty where nothing modulates them.
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
                backend=self.backend,
            )
        )


class Level(nn.Module):
    """The layers at one size, and the one that leads to the next.

    The keys of a state dict are those of the released files, which is why a lone resampling layer
    stands in a list.
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
        resampled = downsampler is not None or upsampler is not None
        for block in resnets[: -1 if resampled else None]:
            block.feeds_norm = True

    def layers(self, zq: Tensor | None) -> Iterator[tuple[nn.Module, list[Modulation]]]:
        """Each layer with the modulations of its norms by zq, the latents of a chunk, if any.

        Those of a level are made at once, and live while its layers are walked.
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
    """A chunk through the layers of all levels. What a layer was given is freed after it."""
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
    in_channels: int, out_channels: int, count: int, norm: MakeNorm, conv: MakeConv
) -> list[ResnetBlock3D]:
    """`count` blocks in a row, of which the first changes the number of channels."""
    widths = [in_channels, *[out_channels] * count]
    return [ResnetBlock3D(i, o, norm, conv) for i, o in zip(widths, widths[1:], strict=False)]
