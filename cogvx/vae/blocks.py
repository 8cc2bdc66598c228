"""What encoder and decoder are made of: residual blocks, and resampling by two.

Every layer is called as `layer(x, zq, cache)`: x (batch, channels, frames, height, width) is the
chunk, zq the latents of the chunk for norms that are modulated by them, else None. No layer writes
into what it was given.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from .causal_conv import CausalConv
from .norm import Norm
from .parts import joined
from .state import FrameCache

MakeNorm = Callable[[int], Norm]
MakeConv = Callable[[int, int], CausalConv]


class ResnetBlock3D(nn.Module):
    """x + conv2(norm2(conv1(norm1(x)))), each norm with its SiLU; a change of width changes x too.

    Source: fact sheet, section 4.2.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: MakeNorm, conv: MakeConv) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut: nn.Module = nn.Conv3d(in_channels, out_channels, 1)

    def forward(
        self, x: Tensor, zq: Tensor | None = None, cache: FrameCache | None = None
    ) -> Tensor:
        h = joined(self.conv1.parts(self.norm1.parts(x, zq, cache), cache), x.shape[2])
        residual = self.conv2.parts(self.norm2.parts(h, zq, cache), cache)
        # Where a part of the sum goes, norm2 has read h.
        return joined(self._added(x, residual), x.shape[2], into=h)

    def _added(self, x: Tensor, residual: Iterator[Tensor]) -> Iterator[Tensor]:
        start = 0
        for part in residual:
            same = x[:, :, start : start + part.shape[2]]
            start += part.shape[2]
            yield part + (self.conv_shortcut(same) if hasattr(self, "conv_shortcut") else same)


class Downsample3D(nn.Module):
    """Halves height and width by a convolution, frame by frame; `time`: first averages pairs of
    frames, all but a leading first one. Source: fact sheet, section 4.5."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(
        self, x: Tensor, zq: Tensor | None = None, cache: FrameCache | None = None
    ) -> Tensor:
        leads = x.shape[2] % 2 == 1 if cache is None else cache.leads
        frames = self._halved(x, leads)
        count = (x.shape[2] + leads) // 2 if self.time else x.shape[2]
        return joined((self.conv(F.pad(f, (0, 1, 0, 1))).unsqueeze(2) for f in frames), count)

    def _halved(self, x: Tensor, leads: bool) -> Iterator[Tensor]:
        """Frames (batch, channels, height, width) at half the rate."""
        frames = x.unbind(2)
        if not self.time:
            yield from frames
            return
        if leads:
            yield frames[0]
        for first, second in zip(frames[leads::2], frames[leads + 1 :: 2], strict=True):
            yield (first + second) * 0.5


class Upsample3D(nn.Module):
    """Doubles height and width by nearest neighbour and a convolution, frame by frame; `time`: then
    gives every frame twice, all but a leading first one.

    Equal frames convolve to equal frames, so they are doubled after the convolution: half the work
    of doubling before it, for the same bits. Source: fact sheet, section 4.6.
    """

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: Tensor, zq: Tensor | None = None, cache: FrameCache | None = None
    ) -> Tensor:
        leads = x.shape[2] % 2 == 1 if cache is None else cache.leads
        count = 2 * x.shape[2] - leads if self.time else x.shape[2]
        return joined(self._doubled(x, leads), count)

    def _doubled(self, x: Tensor, leads: bool) -> Iterator[Tensor]:
        for index, frame in enumerate(x.unbind(2)):
            wide = self.conv(F.interpolate(frame, scale_factor=2.0)).unsqueeze(2)
            once = not self.time or (leads and index == 0)
            yield wide if once else wide.expand(-1, -1, 2, -1, -1)


class Level(nn.Module):
    """The layers at one size, and the one that leads to the next; only holds them.

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

    def layers(self) -> Iterator[nn.Module]:
        for children in self.children():
            yield from cast(nn.ModuleList, children)


def resnets(
    in_channels: int, out_channels: int, count: int, norm: MakeNorm, conv: MakeConv
) -> list[ResnetBlock3D]:
    """`count` blocks in a row, of which the first changes the number of channels."""
    widths = [in_channels, *[out_channels] * count]
    return [ResnetBlock3D(i, o, norm, conv) for i, o in zip(widths, widths[1:], strict=False)]
