"""Chunked runs of a causal encoder or decoder: input checks, the state between chunks, chunk order.

The caller runs its own network: `CoderSpec.chunks` yields each chunk of the input as soon as enough
frames have arrived, and the caller computes `coder(chunk, state.cache)` within `state.running`. All
that the network keeps between chunks is in the state, which the caller owns.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _autocast
from .chunks import Chunking, check_size

S = TypeVar("S", bound="StreamState")
DIMS = "(batch, frames, channels, height, width)"


class FrameCache:
    """The last frames of the previous chunk, for each causal convolution of a network.

    Attributes:
        frames: name of a convolution -> frames to put before its next chunk; dicts may be nested.
        leads: the current chunk begins with a frame that time resampling keeps single.
        started: a chunk has been run; the next one continues the clip.
        keep: False while the last chunk runs, after which nothing is kept.
        broken: an exception stopped a chunk, and the frames were dropped.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.frames: dict[str, Any] = {}
        self.leads = False
        self.started = False
        self.broken = False

    @contextmanager
    def chunk(self, leads: bool) -> Iterator[None]:
        """Context of one chunk; `leads` counts only for the first chunk of a clip."""
        self.check()
        self.leads = leads and not self.started
        with self.guard():
            yield
        self.started = True

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Break the cache and empty it on an exception, after which part of the clip is lost."""
        try:
            yield
        except BaseException:
            self.frames = {}
            self.broken = True
            raise

    def check(self) -> None:
        """Raises RuntimeError if the cache is broken."""
        if self.broken:
            raise RuntimeError(
                "the state was left in the middle of a chunk by an exception, and part of the clip "
                "is lost: reset() it and begin the clip again"
            )

    def take(self, name: str) -> Tensor | None:
        """Remove and return the frames before this chunk; None at the beginning of a clip."""
        return self.frames.pop(name, None)

    def put(self, name: str, frames: Tensor) -> None:
        """Store the frames before the next chunk."""
        if self.keep:
            self.frames[name] = frames

    def slot(self, name: str, x: Tensor, kept: int) -> tuple[Tensor, str | None]:
        """`frame_slot` of this convolution, channels last."""
        frames, start = frame_slot(self.take(name), x, kept, torch.channels_last_3d)
        self.put(name, frames)
        return frames, start

    def replaced(self, name: str) -> None:
        """Called once the frames of a `slot` have been replaced by those of this chunk."""

    def tensors(self) -> list[Tensor]:
        """All cached frames."""
        found: list[Tensor] = []
        _map(self.frames, found.append)
        return found

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "FrameCache":
        """A cache with `function` of each tensor."""
        other = copy.copy(self)
        other.frames = _map(self.frames, function)
        return other

    def fork(self) -> "FrameCache":
        """An independent cache that holds the same tensors."""
        return self.mapped(lambda frames: frames)


def _map(value: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, dict):
        return {name: _map(x, function) for name, x in value.items()}
    if value is None or isinstance(value, Tensor):
        return None if value is None else function(value)
    return value.mapped(function)  # a holder of frames, see patching/cogvideox_vae.py


def frame_slot(
    frames: Tensor | None, x: Tensor, kept: int, memory_format: torch.memory_format
) -> tuple[Tensor, str | None]:
    """The `kept` frames before the chunk x, to be replaced in place, and `start` for the ops.

    At the beginning of a clip `frames` is None: the buffer is new, and `start` says how it is
    padded; its content is not read.
    """
    if frames is None:
        shape = (*x.shape[:2], kept, *x.shape[3:])
        frames = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
        return frames, "replicate"
    if frames.is_inference() and not torch.is_inference_mode_enabled():
        frames = frames.clone()  # an inference tensor cannot be written to outside inference mode
    return frames, None


class StreamState:
    """Position in one clip between two chunks. Make one per clip; it can be cloned and moved.

    Attributes:
        total: frames of the whole clip, once known.
        taken: frames that have been run.
        chunks: chunks that have been run.
        ended: the clip is complete.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new clip; frees all that is held."""
        self.cache = FrameCache()
        self.pending: list[Tensor] = []
        self.total: int | None = None
        self.taken = 0
        self.chunks = 0
        self.like: tuple[object, ...] | None = None
        self.coder: str | None = None
        self.ended = False

    @property
    def waiting(self) -> int:
        """Frames that have arrived and wait until their chunk is full."""
        return sum(piece.shape[1] for piece in self.pending)

    @property
    def nbytes(self) -> int:
        """Bytes held between chunks."""
        return sum(x.numel() * x.element_size() for x in (*self.cache.tensors(), *self.pending))

    @contextmanager
    def running(self, frames: int) -> Iterator[None]:
        """Context of the run of a chunk, counted at the end; an exception breaks the cache."""
        with self.cache.guard():
            yield
        self.count(frames)

    def count(self, frames: int) -> None:
        """Count a chunk that has been run."""
        self.taken += frames
        self.chunks += 1
        if self.taken == self.total:
            self.end()

    def end(self) -> None:
        """Mark the clip as complete and free the cache."""
        self.ended = True
        self.cache.frames = {}

    def clone(self: S) -> S:
        """An independent state at the same point of the same clip."""
        return self._mapped(torch.clone)

    def to(self: S, device: torch.device | str) -> S:
        """A copy on another device, for the VAE that is there."""
        state = self._mapped(lambda x: x.to(device, copy=True))
        if self.like is not None:
            state.like = (*self.like[:-1], torch.empty(0, device=device).device)
        return state

    def _mapped(self: S, function: Callable[[Tensor], Tensor]) -> S:
        state = copy.copy(self)
        state.cache = self.cache.mapped(function)
        state.pending = [function(x) for x in self.pending]
        return state

    def __repr__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        end = " broken" if self.cache.broken else " ended" if self.ended else ""
        return f"{type(self).__name__}({self.taken}{of} taken, {self.nbytes:,} bytes{end})"


class EncodeState(StreamState):
    """State between the chunks of a video that is being encoded; counts frames of video."""


class DecodeState(StreamState):
    """State between the chunks of latents that are being decoded; counts latent frames."""


@dataclass(frozen=True)
class CoderSpec:
    """Input of an encoder or decoder that runs on chunks.

    Attributes:
        where: prefix of error messages.
        name: the input, "video" or "latents".
        coder: class name of the network, which a state is bound to from its first frame on.
        chunking: valid lengths, and the chunks of a clip.
        channels: channels of the input.
        dtype: of the weights; under autocast every floating dtype is accepted.
        device: of the weights; None if a hook moves them.
        multiple: divisor of height and width.
    """

    where: str
    name: str
    coder: str
    chunking: Chunking
    channels: int
    dtype: torch.dtype
    device: torch.device | None
    multiple: int = 1

    def open(self, state: StreamState | None) -> StreamState:
        """The state, or a new one for None. Raises unless its clip can be continued."""
        kind = EncodeState if self.name == "video" else DecodeState
        if state is None:
            return kind()
        if not isinstance(state, kind):
            raise TypeError(
                f"{self.where}: state must be a {kind.__name__}; got {type(state).__name__}"
            )
        self._check_open(state)
        return state

    def chunks(
        self,
        source: Tensor | Iterable[Tensor],
        state: StreamState,
        total: int | None = None,
        last: bool = True,
    ) -> Iterator[Tensor]:
        """Yield each chunk as soon as enough frames have arrived; validates arguments eagerly.

        Args:
            source: a clip (batch, frames, channels, height, width), or an iterable of its pieces.
            state: from `open`; the caller runs each chunk within `state.running`.
            total: frames of the whole clip, if known.
            last: True if the clip ends with this source.

        Raises:
            TypeError, ValueError: for an argument, or for a piece when it arrives: the state is
                then as it was before that piece.
            RuntimeError: the state's clip has ended, or was lost to an exception.
        """
        if total is not None:
            self._check_total(state, total)
        if isinstance(source, Tensor):
            self.check(source)
            begins = state.like is None and state.total is None
            if total is None and begins and last:
                self.chunking.check(self.where, self.name, source.shape[1])
                total = source.shape[1]
            self._check_piece(state, source, state.total if total is None else total)
            source = (source,)
        elif not isinstance(source, Iterable):
            raise TypeError(
                f"{self.where}: {self.name} must be a tensor or an iterable of tensors; "
                f"got {type(source).__name__}"
            )
        if total is not None:
            state.total = total
        return self._chunks(source, state, last)

    def _chunks(self, source: Iterable[Tensor], state: StreamState, last: bool) -> Iterator[Tensor]:
        for piece in source:
            self.check(piece)
            self._check_piece(state, piece, state.total)
            self._check_open(state)
            state.like, state.coder = _likeness(piece), self.coder
            state.pending.append(piece)
            del piece
            while (size := self._next_size(state)) and state.waiting >= size:
                state.cache.keep = state.taken + size != state.total
                yield _take(state, size)
                self._check_unbroken(state)
            # The source may reuse the memory of this piece for the next one.
            state.pending = [rest.clone() for rest in state.pending]
        if state.ended or not last:
            return
        self._check_end(state)
        if state.waiting:
            state.cache.keep = False
            yield _take(state, state.waiting)
            self._check_unbroken(state)
        state.end()

    def _next_size(self, state: StreamState) -> int:
        """Frames of the next chunk; 0 if the clip is complete."""
        if state.total is not None:
            plan = self.chunking.plan(state.total)
            return plan[state.chunks] if state.chunks < len(plan) else 0
        if self.chunking.first_alone:
            return self.chunking.size if state.chunks else 1
        return state.waiting  # `_check_piece` has checked that the piece is one chunk

    def check(self, x: Any) -> Tensor:
        """Raises TypeError or ValueError unless x is a clip or a piece of one."""
        if not isinstance(x, Tensor):
            raise self._wrong(TypeError, f"a tensor {DIMS}", type(x).__name__)
        if x.dim() != 5:
            raise self._wrong(ValueError, f"5-dimensional {DIMS}", f"{tuple(x.shape)}")
        if x.shape[2] != self.channels:
            got = f"{tuple(x.shape)}, {x.shape[2]} channels"
            raise self._wrong(ValueError, f"{DIMS} with {self.channels} channels", got)
        if 0 in x.shape:
            raise self._wrong(ValueError, f"{DIMS} with nothing empty", f"{tuple(x.shape)}")
        cast = x.is_floating_point() and _autocast.enabled(x)
        if x.dtype != self.dtype and not cast:
            raise self._wrong(TypeError, f"{self.dtype} as the weights", f"{x.dtype}")
        if self.device is not None and x.device != self.device:
            raise self._wrong(ValueError, f"on {self.device} as the weights", f"{x.device}")
        check_size(self.where, self.name, x.shape[3], x.shape[4], self.multiple)
        return x

    def _check_unbroken(self, state: StreamState) -> None:
        try:
            state.cache.check()
        except RuntimeError as error:
            raise RuntimeError(f"{self.where}: {error}") from None

    def _check_open(self, state: StreamState) -> None:
        self._check_unbroken(state)
        if state.ended:
            raise RuntimeError(
                f"{self.where}: the state's clip has ended after {state.taken} frames: reset() it "
                "to begin another"
            )
        if state.coder not in (None, self.coder):
            raise ValueError(
                f"{self.where}: state must be of a clip of this {self.coder}; got one of a "
                f"{state.coder}"
            )

    def _check_total(self, state: StreamState, total: Any) -> None:
        if isinstance(total, bool) or not isinstance(total, int):
            raise TypeError(f"{self.where}: total must be an integer; got {total!r}")
        if state.total not in (None, total) or (state.total is None and state.like is not None):
            raise ValueError(
                f"{self.where}: total must be given when the clip begins; got {total} "
                f"after {state.taken + state.waiting} frames of {state.total or 'unknown'}"
            )
        self.chunking.check(self.where, "total", total)

    def _check_piece(self, state: StreamState, piece: Tensor, total: int | None) -> None:
        """Raises ValueError unless the piece continues the state's clip."""
        if state.like not in (None, _likeness(piece)):
            raise ValueError(
                f"{self.where}: {self.name} must continue the clip of batch, height, width, dtype "
                f"and device {state.like}; got {_likeness(piece)}"
            )
        frames, before = piece.shape[1], state.taken + state.waiting
        if total is not None:
            if before + frames > total:
                raise ValueError(
                    f"{self.where}: {self.name} must end after total = {total} frames; "
                    f"got {before + frames}"
                )
        elif not self.chunking.first_alone:
            sizes = self.chunking.first_sizes()
            if state.chunks:  # a first chunk shorter than the others is a whole clip
                sizes = (self.chunking.size,) if state.taken >= self.chunking.size else ()
            if frames not in sizes:
                wanted = " or ".join(map(str, sizes)) + " frames"
                wanted = wanted if sizes else "nothing after a lone one"
                raise ValueError(
                    f"{self.where}: {self.name} must come in the chunks that the VAE is defined "
                    f"by, here {wanted}, or in any pieces with total=, the frames of the whole "
                    f"clip; got {frames} frames"
                )

    def _check_end(self, state: StreamState) -> None:
        """Raises ValueError unless the clip may end here."""
        frames = state.taken + state.waiting
        if state.total is not None and frames < state.total:
            raise ValueError(
                f"{self.where}: {self.name} must have total = {state.total} frames; the clip ended "
                f"after {frames}"
            )
        self.chunking.check(self.where, self.name, frames)

    def _wrong(self, kind: type[Exception], wanted: str, got: str) -> Exception:
        return kind(f"{self.where}: {self.name} must be {wanted}; got {got}")


def _take(state: StreamState, size: int) -> Tensor:
    """Remove the next `size` frames from `pending`; copies only if they came in several pieces."""
    parts = []
    while size:
        piece = state.pending.pop(0)
        parts.append(piece[:, :size])
        if piece.shape[1] > size:
            state.pending.insert(0, piece[:, size:])
        size -= parts[-1].shape[1]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _likeness(x: Tensor) -> tuple[object, ...]:
    """Properties that all pieces of a clip share."""
    return (x.shape[0], *x.shape[3:], x.dtype, x.device)
