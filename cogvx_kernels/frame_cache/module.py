"""Module that puts cached frames before the input of a causal convolution."""

from torch import Tensor

from .._backend import OpModule
from .op import frame_cache_join


class FrameCacheJoin(OpModule):
    """`frame_cache_join` as a module: pads a chunk in time with the frames before it.

    No parameters and no state: the cache is an argument and a result. A convolution of `kernel`
    frames needs kept = `kernel` - 1.
    """

    def __init__(self, kept: int = 2, start: str = "replicate") -> None:
        super().__init__()
        self.kept = kept
        self.start = start

    def forward(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Concatenate the cached frames and a chunk.

        Args:
            x: (batch, channels, frames, height, width).
            cache: (batch, channels, kept, height, width), not written; None where a clip begins.

        Returns:
            (the convolution's input, the next cache), new: (batch, channels, kept + frames, height,
            width) and the shape of the cache.
        """
        start = self.start if cache is None else None
        return frame_cache_join(cache, x, kept=self.kept, start=start, backend=self.backend)

    def extra_repr(self) -> str:
        return f"kept={self.kept}, start={self.start!r}, backend={self.backend!r}"
