"""Downsampling and upsampling: in space by 2-D convolutions, in time by pairs of frames."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvx_kernels.resample import (
    SAFE,
    fold_frames,
    temporal_avg_pool,
    unfold_frames,
    upsample2x_conv,
)
from cogvx_kernels.streaming import FrameCache

from ..autocast import weights_in
from .norm import Flow, Modulation
from .options import Options, channels_last


class Downsample3D(nn.Module):
    """Halves height and width by a convolution, frame by frame; `time`: first averages pairs of
    frames, all but a leading first one. Source: `docs/model.md`, section 4.5."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.time = time
        self.conv = channels_last(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, flow: Flow, modulations: Sequence[Modulation], cache: FrameCache) -> Flow:
        """The chunk at half its size.

        Args:
            flow: (batch, channels, frames, height, width).
            modulations: none; there is no norm.
            cache: its `leads` is true if the first frame is averaged with no other.

        Returns:
            (batch, channels, frames, height / 2, width / 2); with `time` frames / 2, rounded up.
        """
        x = temporal_avg_pool(flow.x, cache.leads) if self.time else flow.x
        step = max(1, SAFE // max(1, x[:, :, :1].numel()))
        pieces = [self._convolved(piece) for piece in x.split(step, dim=2)]
        return Flow(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2))

    def _convolved(self, x: Tensor) -> Tensor:
        return unfold_frames(self.conv(F.pad(fold_frames(x), (0, 1, 0, 1))), len(x))


class Upsample3D(nn.Module):
    """Doubles height and width by nearest neighbour and a convolution, frame by frame; `time`: then
    repeats every frame, all but a leading first one. Source: `docs/model.md`, section 4.6.
    """

    def __init__(self, channels: int, time: bool, options: Options | None = None) -> None:
        super().__init__()
        self.time = time
        self.options = options or Options()
        self.conv = channels_last(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, flow: Flow, modulations: Sequence[Modulation], cache: FrameCache) -> Flow:
        """The chunk at twice its size.

        Args:
            flow: (batch, channels, frames, height, width).
            modulations: none; there is no norm.
            cache: its `leads` is true if the first frame is not repeated.

        Returns:
            (batch, channels, frames, 2 · height, 2 · width); with `time` 2 · frames, or one fewer.
        """
        x, conv = flow.x, self.conv
        single = cache.leads if self.time else x.shape[2]  # frames at the front not repeated
        weight, bias = weights_in(conv, x.dtype)
        return Flow(upsample2x_conv(x, weight, bias, int(single), fold=self.options.fold))
