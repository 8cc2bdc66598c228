"""Module for the frames before a causal convolution."""

from torch import Tensor, nn

from .op import frame_cache_join


class FrameCacheJoin(nn.Module):
    """`frame_cache_join` as a module: pads a chunk in time with what came before it.

    No parameters and no state: the cache is handed in and comes back, so that two clips are two
    caches. A convolution of `kernel` frames keeps `kernel` - 1.
    """

    def __init__(self, kept: int = 2, start: str = "replicate", backend: str = "auto") -> None:
        super().__init__()
        self.kept = kept
        self.start = start
        self.backend = backend

    def forward(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Put the frames before a chunk in front of it.

        Args:
            x: (batch, channels, frames, height, width).
            cache: (batch, channels, kept, height, width), only read; None where a clip begins.

        Returns:
            (the convolution's input, the next cache), new: (batch, channels, kept + frames, height,
            width) and the shape of the cache.
        """
        start = self.start if cache is None else None
        return frame_cache_join(cache, x, kept=self.kept, start=start, backend=self.backend)

    def extra_repr(self) -> str:
        return f"kept={self.kept}, start={self.start!r}, backend={self.backend!r}"
