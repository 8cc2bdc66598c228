"""What a causal VAE remembers between the chunks of a clip: values that someone holds.

A `FrameCache` is all that the convolutions of one clip remember. It is handed down as one argument,
`h = conv(h, cache)`; nothing is kept on a module, so that two clips are two caches and an abandoned
clip is an abandoned value. An `EncodeState` or `DecodeState` is a cache and the frames that wait
until their chunk is full.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cogvx_kernels.streaming import Cache, StreamState


class FrameCache(Cache):
    """The last frames that each causal convolution has seen of a clip, by the convolution's name.

    Attributes:
        frames: name of a convolution -> the frames to put before its next chunk.
        leads: the chunk in hand begins with a frame of its own, which time resampling keeps single.
        started: a chunk has been through; what comes next continues the clip.
        keep: whether there will be another chunk; if not, nothing is remembered past this one.
    """

    def __init__(self, keep: bool = True) -> None:
        super().__init__()
        self.keep = keep
        self.frames: dict[str, Tensor] = {}
        self.leads = False
        self.started = False

    @contextmanager
    def chunk(self, leads: bool) -> Iterator[None]:
        """Around the work on one chunk; `leads` counts only for the first of a clip.

        Whatever stops the work in the middle leaves some convolutions ahead of others, so the cache
        is emptied and says so when it is used again.
        """
        self.check()
        self.leads = leads and not self.started
        try:
            yield
        except BaseException:
            self.frames.clear()
            self.broken = True
            raise
        self.started = True

    def take(self, name: str) -> Tensor | None:
        """The frames before this chunk, no longer held here; None where the clip begins."""
        return self.frames.pop(name, None)

    def put(self, name: str, frames: Tensor) -> None:
        if self.keep:
            self.frames[name] = frames

    def slot(self, name: str, x: Tensor, kept: int) -> tuple[Tensor, str | None]:
        """The `kept` frames before the chunk x, to be replaced in place by its last ones; and how
        the clip begins, for the ops of `cogvx_kernels`: where it does, the frames are not read."""
        frames = self.frames.get(name)
        if frames is None:
            shape = (*x.shape[:2], kept, *x.shape[3:])
            frames = torch.empty(
                shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
            )
            self.put(name, frames)
            return frames, "replicate"
        if frames.is_inference() and not torch.is_inference_mode_enabled():
            frames = frames.clone()  # which could not be written to outside of inference mode
            self.frames[name] = frames
        if not self.keep:
            del self.frames[name]
        return frames, None

    def clear(self) -> None:
        self.frames.clear()

    def tensors(self) -> list[Tensor]:
        return list(self.frames.values())

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "FrameCache":
        other = self.fork()
        other.frames = {name: function(x) for name, x in self.frames.items()}
        return other

    def fork(self) -> "FrameCache":
        """Another cache that holds the same frames now, and goes its own way from here."""
        other = copy.copy(self)
        other.frames = dict(self.frames)
        return other


class _State(StreamState):
    cache: FrameCache

    def new_cache(self) -> FrameCache:
        return FrameCache()


class EncodeState(_State):
    """Between the chunks of a video that is being encoded; counts frames of video."""


class DecodeState(_State):
    """Between the chunks of latents that are being decoded; counts latent frames."""
