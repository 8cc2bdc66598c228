"""Convolutions that see the present and the past: their padding in time is what came before.

Before the first frame of a clip lie copies of it; before every later chunk, the last frames of the
chunk before, from the cache. Space is padded with zeros. Fact sheet, section 4.1.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import joined, split
from .state import FrameCache


class CausalConv(nn.Module):
    """The base: gives `_past_and_present` to whoever convolves over `time_kernel` frames.

    `name` is the key of its frames in a cache: its path in the encoder or decoder, set there by
    `name_convs`. Alone it needs none.
    """

    time_kernel: int
    name = ""

    @property
    def weight(self) -> Tensor:
        """The kernel, for its dtype and device."""
        return next(self.parameters())

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """(batch, in, frames, height, width) -> (batch, out, frames, height, width).

        Without a cache the clip begins and ends with x.
        """
        return joined(self.parts(split(x), cache), x.shape[2])

    def parts(self, parts: Iterable[Tensor], cache: FrameCache | None) -> Iterator[Tensor]:
        """The convolution of a chunk that comes in parts: each answered by a part as long."""
        raise NotImplementedError

    def _past_and_present(
        self, parts: Iterable[Tensor], cache: FrameCache | None
    ) -> Iterator[Tensor]:
        """Each part behind the `time_kernel` - 1 frames before it."""
        length = self.time_kernel - 1
        if length == 0:
            yield from parts
            return
        past = cache.take(self.name) if cache is not None else None
        for part in parts:
            if past is None:
                past = part[:, :, :1].expand(-1, -1, length, -1, -1)
            x = torch.cat([past, part], dim=2)
            del part
            past = x[:, :, -length:].clone()
            if cache is not None:
                cache.put(self.name, past)
            yield x


class CausalConv3d(CausalConv):
    """One 3-D kernel over frames, height and width: the released VAE's."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.time_kernel = kernel_size
        padding = (0, kernel_size // 2, kernel_size // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, padding=padding)

    def parts(self, parts: Iterable[Tensor], cache: FrameCache | None) -> Iterator[Tensor]:
        for x in self._past_and_present(parts, cache):
            yield self.conv(x)


class FactorizedConv3d(CausalConv):
    """A 2-D convolution of each frame, then a causal one along frames: the factorised VAE's.

    What is remembered is what the spatial one gave, so that no frame is convolved in space twice.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.time_kernel = kernel_size
        self.spatial = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.temporal = nn.Conv1d(out_channels, out_channels, kernel_size)

    def parts(self, parts: Iterable[Tensor], cache: FrameCache | None) -> Iterator[Tensor]:
        spatial = (self._in_space(x) for x in parts)
        for x in self._past_and_present(spatial, cache):
            # (out, out, kernel) as a 3-D kernel of one pixel
            weight = self.temporal.weight[..., None, None]
            yield F.conv3d(x, weight, self.temporal.bias)

    def _in_space(self, x: Tensor) -> Tensor:
        pad = self.time_kernel // 2
        weight = self.spatial.weight[:, :, None]  # (out, in, 1, kernel, kernel)
        return F.conv3d(x, weight, self.spatial.bias, padding=(0, pad, pad))


def name_convs(module: nn.Module) -> None:
    """Tells every causal convolution of an encoder or decoder its path in it."""
    for name, child in module.named_modules():
        if isinstance(child, CausalConv):
            child.name = name
