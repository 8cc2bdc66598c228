"""What a causal VAE remembers between the chunks of a clip: values that someone holds.

A `FrameCache` is all that the convolutions of one clip remember. It is handed down as one argument,
`h = conv(h, cache)`; nothing is kept on a module, so that two clips are two caches and an abandoned
clip is an abandoned value. An `EncodeState` or `DecodeState` is a cache and the frames that wait
until their chunk is full.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="StreamState")


class FrameCache:
    """The last frames that each causal convolution has seen of a clip, by the convolution's name.

    Attributes:
        frames: name of a convolution -> the frames to put before its next chunk.
        leads: the chunk in hand begins with a frame of its own, which time resampling keeps single.
        started: a chunk has been through; what comes next continues the clip.
        keep: whether there will be another chunk; if not, nothing is remembered past this one.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.frames: dict[str, Tensor] = {}
        self.leads = False
        self.started = False
        self.broken = False

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

    def check(self) -> None:
        if self.broken:
            raise RuntimeError(
                "the state was left in the middle of a chunk by an exception, and part of the clip "
                "is lost: reset() it and begin the clip again"
            )

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

    def fork(self) -> "FrameCache":
        """Another cache that holds the same frames now, and goes its own way from here."""
        other = copy.copy(self)
        other.frames = dict(self.frames)
        return other


class StreamState:
    """Where a clip stands between chunks. Make one per clip; it may be cloned and moved.

    Attributes:
        total: how many frames the clip will have, once that is known.
        taken: how many have been through.
        ended: the clip is complete.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to the beginning of a new clip; frees what was held."""
        self.cache = FrameCache()
        self.pending: list[Tensor] = []
        self.total: int | None = None
        self.taken = 0
        self.chunks = 0
        self.like: tuple[object, ...] | None = None
        self.ended = False

    @property
    def waiting(self) -> int:
        """Frames that have come and wait until their chunk is full."""
        return sum(piece.shape[1] for piece in self.pending)

    @property
    def nbytes(self) -> int:
        """Bytes held between chunks."""
        held = [*self.cache.frames.values(), *self.pending]
        return sum(x.numel() * x.element_size() for x in held)

    def clone(self: S) -> S:
        """A state of its own at the same point of the same clip."""
        return self._mapped(torch.clone)

    def to(self: S, device: torch.device | str) -> S:
        """The same point of the same clip on another device, for the VAE that is there."""
        state = self._mapped(lambda x: x.to(device, copy=True))
        if self.like is not None:
            state.like = (*self.like[:-1], torch.empty(0, device=device).device)
        return state

    def _mapped(self: S, function: Callable[[Tensor], Tensor]) -> S:
        state = copy.copy(self)
        state.cache = self.cache.fork()
        state.cache.frames = {name: function(x) for name, x in self.cache.frames.items()}
        state.pending = [function(x) for x in self.pending]
        return state

    def __repr__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        end = " broken" if self.cache.broken else " ended" if self.ended else ""
        return f"{type(self).__name__}({self.taken}{of} taken, {self.nbytes:,} bytes{end})"


class EncodeState(StreamState):
    """Between the chunks of a video that is being encoded; counts frames of video."""


class DecodeState(StreamState):
    """Between the chunks of latents that are being decoded; counts latent frames."""
