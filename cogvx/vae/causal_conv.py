"""Convolutions that are causal in time: a chunk is padded with the frames before it.

At the beginning of a clip its first frame is replicated; every later chunk takes the last frames of
the chunk before, from the cache. Space is padded with zeros. Source: `docs/model.md`, section 4.1.

Where no gradient is recorded a cache is one buffer for each convolution, replaced in place, and the
output of a norm is written straight behind it. Under autocast the chunk has its dtype, and weights
are cast to that of the chunk.
"""

import torch
from torch import Tensor, nn

from cogvx_kernels import (
    OpModule,
    conv3d,
    frame_cache_append,
    frame_cache_join,
    frame_cache_push,
    temporal_conv,
)
from cogvx_kernels.streaming import FrameCache

from ..autocast import weights_in
from .norm import Flow, Modulation, Norm, SpatialNorm
from .options import Options, channels_last

AnyNorm = Norm | SpatialNorm


class CausalConv(OpModule):
    """Base of the causal convolutions, over `kernel_size` frames.

    name: key of its frames in a cache, which is its path in the encoder or decoder.
    """

    def __init__(self, kernel_size: int, name: str, options: Options | None) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.name = name
        self.options = options or Options()

    @property
    def weight(self) -> Tensor:
        """The kernel, for its dtype and device."""
        return next(self.parameters())

    @property
    def kept(self) -> int:
        """Frames in its cache."""
        return self.kernel_size - 1

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """The causal convolution of one chunk.

        Args:
            x: (batch, in_channels, frames, height, width).
            cache: the last frames of the chunk before, replaced by those of this one; None where x
                is the whole clip.

        Returns:
            (batch, out_channels, frames, height, width).
        """
        raise NotImplementedError

    def after(
        self,
        norm: AnyNorm,
        flow: Flow,
        modulation: Modulation,
        cache: FrameCache,
        *,
        offset: Tensor | None = None,
        biased: bool = True,
    ) -> Tensor:
        """The convolution of the norm of a chunk.

        `offset` is passed to the norm. `biased=False` leaves out the `pending_bias`.
        """
        return self(norm(flow, modulation, cache.leads, offset=offset), cache)

    def pending_bias(self, x: Tensor) -> Tensor | None:
        """The bias that the pass after the convolution of x should add, or None."""
        return None

    def _joined(self, past: Tensor | None, x: Tensor, cache: FrameCache) -> Tensor:
        """x with the frames `past` before it, for autograd; its last frames go into the cache."""
        start = "replicate" if past is None else None
        joined, past = frame_cache_join(past, x, kept=self.kept, start=start, backend=self.backend)
        cache.put(self.name, past)
        return joined


class CausalConv3d(CausalConv):
    """One 3-D kernel over frames, height and width: the released VAE's."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        name: str = "",
        options: Options | None = None,
    ) -> None:
        super().__init__(kernel_size, name, options)
        self.padding = (0, kernel_size // 2, kernel_size // 2)
        self.conv = channels_last(
            nn.Conv3d(in_channels, out_channels, kernel_size, padding=self.padding)
        )

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """As `CausalConv.forward`: (batch, in_channels, frames, …) -> (batch, out_channels, …)."""
        cache = FrameCache(keep=False) if cache is None else cache
        if self.kept == 0:
            return self._convolved(x, self.conv.bias)
        if torch.is_grad_enabled():
            x = self._joined(cache.take(self.name), x, cache)
        else:
            past, start = cache.slot(self.name, x, self.kept)
            form = torch.channels_last_3d
            x = frame_cache_append(past, x, start=start, memory_format=form, backend=self.backend)
            cache.replaced(self.name)
        return self._convolved(x, self.conv.bias)

    def after(
        self,
        norm: AnyNorm,
        flow: Flow,
        modulation: Modulation,
        cache: FrameCache,
        *,
        offset: Tensor | None = None,
        biased: bool = True,
    ) -> Tensor:
        if torch.is_grad_enabled():
            return super().after(norm, flow, modulation, cache, offset=offset)
        past, start = cache.slot(self.name, flow.x, self.kept)
        x = norm(flow, modulation, cache.leads, offset=offset, cache=past, start=start)
        cache.replaced(self.name)
        later = not biased and self.pending_bias(x) is not None
        return self._convolved(x, None if later else self.conv.bias)

    def pending_bias(self, x: Tensor) -> Tensor | None:
        """cuDNN adds a bias in a pass of its own; the libraries of a CPU while they write."""
        return self.conv.bias if x.is_cuda and not torch.is_grad_enabled() else None

    def _convolved(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return conv3d(x, self.conv.weight.to(x.dtype), bias, self.padding, algo=self.options.algo)


class FactorizedConv3d(CausalConv):
    """A 2-D convolution of each frame, then a causal one along frames: the factorised VAE's.

    The cache holds outputs of the spatial one, so that no frame is convolved in space twice.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        name: str = "",
        options: Options | None = None,
    ) -> None:
        super().__init__(kernel_size, name, options)
        self.spatial = channels_last(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        )
        self.temporal = nn.Conv1d(out_channels, out_channels, kernel_size)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """As `CausalConv.forward`: (batch, in_channels, frames, …) -> (batch, out_channels, …)."""
        cache = FrameCache(keep=False) if cache is None else cache
        pad = self.kernel_size // 2
        weight, bias = weights_in(self.spatial, x.dtype)
        # (out, in, 1, kernel, kernel): a 3-D kernel of one frame
        x = conv3d(x, weight[:, :, None], bias, (0, pad, pad))
        if self.kept == 0:
            return self._in_time(x, None, "replicate")
        if torch.is_grad_enabled():
            past = cache.take(self.name)
            out = self._in_time(x, past, "replicate")
            if cache.keep:
                self._joined(past, x, cache)
            return out
        past, start = cache.slot(self.name, x, self.kept)
        out = self._in_time(x, past if start is None else None, "replicate")
        if cache.keep:
            frame_cache_push(past, x, start=start, backend=self.backend)
            cache.replaced(self.name)
        return out

    def _in_time(self, x: Tensor, past: Tensor | None, start: str) -> Tensor:
        weight, bias = weights_in(self.temporal, x.dtype)
        return temporal_conv(x, weight, bias, cache=past, start=start, backend=self.backend)
