"""A clip of any length through a causal network, chunk by chunk, from pieces as they come.

The network defines its chunks, and what it remembers between them is a value, held in a state that
the caller owns. Shared by every VAE that is streamed here.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

C = TypeVar("C", bound="Cache")
S = TypeVar("S", bound="StreamState")


class Cache:
    """What a network remembers of a clip; `broken` once an exception has cost a part of it."""

    def __init__(self) -> None:
        self.broken = False

    def check(self) -> None:
        """Raises RuntimeError if it is broken."""
        if self.broken:
            raise RuntimeError(
                "the state was left in the middle of a chunk by an exception, and part of the clip "
                "is lost: reset() it and begin the clip again"
            )

    def clear(self) -> None:
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        raise NotImplementedError

    def mapped(self: C, function: Callable[[Tensor], Tensor]) -> C:
        """Another, of what the function makes of each tensor."""
        raise NotImplementedError


class Way(Protocol):
    """One way through a network: encoding or decoding.

    Attributes:
        where: who complains.
        name: what goes in, "video" or "latents".
        chunk: frames of every chunk but the first and last.
        coder: a chunk and the cache -> what comes out.
        leads: whether the first chunk is one frame, whatever the length of the clip; if not, what
            remains of a clip is in its first chunk.
        plan: frames of a clip -> the frames of each of its chunks.
    """

    @property
    def where(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def chunk(self) -> int: ...

    @property
    def leads(self) -> bool: ...

    @property
    def coder(self) -> Callable[..., Any]: ...

    @property
    def plan(self) -> Callable[[int], tuple[int, ...]]: ...

    def check(self, x: Any) -> Tensor:
        """Raises TypeError or ValueError unless x is a clip or a piece of one."""

    def check_frames(self, count: int, name: str | None = None) -> None:
        """Raises ValueError unless so many frames make a whole clip."""


class StreamState:
    """Where a clip stands between chunks. Make one per clip; it may be cloned and moved.

    Attributes:
        total: how many frames the clip will have, once that is known.
        taken: how many have been through.
        ended: the clip is complete.
    """

    def __init__(self) -> None:
        self.reset()

    def new_cache(self) -> Cache:
        """That of a clip which has not begun."""
        raise NotImplementedError

    def reset(self) -> None:
        """Back to the beginning of a new clip; frees what was held."""
        self.cache = self.new_cache()
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
        return sum(x.numel() * x.element_size() for x in (*self.cache.tensors(), *self.pending))

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
        state.cache = self.cache.mapped(function)
        state.pending = [function(x) for x in self.pending]
        return state

    def __repr__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        end = " broken" if self.cache.broken else " ended" if self.ended else ""
        return f"{type(self).__name__}({self.taken}{of} taken, {self.nbytes:,} bytes{end})"


def stream(
    way: Way,
    source: Any,
    state: StreamState | None,
    total: int | None,
    last: bool,
    *,
    kind: type[StreamState],
    whose: str = "",
) -> Iterator[Tensor]:
    """What comes out of each chunk, as soon as it can; what can be checked is checked now.

    source  a clip (batch, frames, channels, height, width), or an iterable of pieces of it
    state   where the clip stands, to be left where the last chunk leaves it; None begins a clip
    total   frames of the whole clip, if they are known
    last    whether the clip ends with this source
    kind    what the state must be
    whose   the package of that kind, to be named where another has one of the same name

    Raises TypeError or ValueError for an argument, or for a piece when it comes: the state is then
    as it was before that piece; RuntimeError if the state's clip has ended or was lost.
    """
    if state is None:
        state = kind()
    elif not isinstance(state, kind):
        wanted = f"{kind.__name__} of {whose}" if whose else kind.__name__
        raise TypeError(f"{way.where}: state must be a {wanted}; got {type(state).__name__}")
    _check_open(way, state)
    if total is not None:
        if isinstance(total, bool) or not isinstance(total, int):
            raise TypeError(f"{way.where}: total must be an integer; got {total!r}")
        if state.total not in (None, total) or (state.total is None and state.like is not None):
            raise ValueError(
                f"{way.where}: total must be given when the clip begins; got {total} "
                f"after {state.taken + state.waiting} frames of {state.total or 'unknown'}"
            )
        way.check_frames(total, name="total")
    if isinstance(source, Tensor):
        way.check(source)
        begins = state.like is None and state.total is None
        if total is None and begins and last:
            way.check_frames(source.shape[1])
            total = source.shape[1]
        _check_piece(way, state, source, state.total if total is None else total)
        source = (source,)
    elif not isinstance(source, Iterable):
        raise TypeError(
            f"{way.where}: {way.name} must be a tensor or an iterable of tensors; "
            f"got {type(source).__name__}"
        )
    if total is not None:
        state.total = total
    return _run_stream(way, source, state, last)


def _run_stream(
    way: Way, source: Iterable[Tensor], state: StreamState, last: bool
) -> Iterator[Tensor]:
    for piece in source:
        way.check(piece)
        _check_piece(way, state, piece, state.total)
        _check_open(way, state)
        state.like = _likeness(piece)
        state.pending.append(piece)
        del piece
        while (size := _next_chunk(way, state)) and state.waiting >= size:
            yield _run_chunk(way, state, size)
        # Whoever gave the piece may write the next one in its place.
        state.pending = [rest.clone() for rest in state.pending]
    if state.ended or not last:
        return
    _check_end(way, state)
    if state.waiting:
        yield _run_chunk(way, state, state.waiting)
    _end(state)


def _run_chunk(way: Way, state: StreamState, size: int) -> Tensor:
    out: Tensor = way.coder(_taken(state, size), state.cache)
    state.taken += size
    state.chunks += 1
    if state.taken == state.total:
        _end(state)
    return out


def _taken(state: StreamState, size: int) -> Tensor:
    """The next `size` frames, no longer waiting; a copy only if they came in several pieces."""
    parts = []
    while size:
        piece = state.pending.pop(0)
        parts.append(piece[:, :size])
        if piece.shape[1] > size:
            state.pending.insert(0, piece[:, size:])
        size -= parts[-1].shape[1]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _next_chunk(way: Way, state: StreamState) -> int:
    """Frames of the chunk that comes next; 0 if the clip is complete."""
    if state.total is not None:
        plan = way.plan(state.total)
        return plan[state.chunks] if state.chunks < len(plan) else 0
    if way.leads:
        return way.chunk if state.chunks else 1
    return state.waiting  # the piece itself: `_check_piece` saw that it is a chunk


def _end(state: StreamState) -> None:
    state.ended = True
    state.cache.clear()


def _likeness(x: Tensor) -> tuple[object, ...]:
    """What all pieces of a clip share."""
    return (x.shape[0], *x.shape[3:], x.dtype, x.device)


def _check_open(way: Way, state: StreamState) -> None:
    try:
        state.cache.check()
    except RuntimeError as error:
        raise RuntimeError(f"{way.where}: {error}") from None
    if state.ended:
        raise RuntimeError(
            f"{way.where}: the state's clip has ended after {state.taken} frames: reset() it to "
            "begin another"
        )


def _check_piece(way: Way, state: StreamState, piece: Tensor, total: int | None) -> None:
    """The piece continues the state's clip."""
    if state.like not in (None, _likeness(piece)):
        raise ValueError(
            f"{way.where}: {way.name} must continue the clip of batch, height, width, dtype and "
            f"device {state.like}; got {_likeness(piece)}"
        )
    came, before = piece.shape[1], state.taken + state.waiting
    if total is not None:
        if before + came > total:
            raise ValueError(
                f"{way.where}: {way.name} must end after total = {total} frames; "
                f"got {before + came}"
            )
    elif not way.leads:
        wanted = _chunks_now(way, state)
        if came not in wanted:
            here = (
                f"{' or '.join(map(str, wanted))} frames" if wanted else "nothing after a lone one"
            )
            raise ValueError(
                f"{way.where}: {way.name} must come in the chunks that the VAE is defined by, here "
                f"{here} frames, or in any pieces with total=, the frames of the whole clip; "
                f"got {came} frames"
            )


def _chunks_now(way: Way, state: StreamState) -> tuple[int, ...]:
    """How long the next chunk of the released VAE may be while the length of the clip is unknown.

    What remains of a clip is in its first chunk, so a first chunk that is too short is the clip.
    """
    if state.chunks:
        return (way.chunk,) if state.taken >= way.chunk else ()
    if way.name == "video":
        return (1, way.chunk, way.chunk + 1)
    return tuple(range(1, 2 * way.chunk))


def _check_end(way: Way, state: StreamState) -> None:
    """The clip may end here."""
    came = state.taken + state.waiting
    if state.total is not None and came < state.total:
        raise ValueError(
            f"{way.where}: {way.name} must have total = {state.total} frames; the clip ended "
            f"after {came}"
        )
    way.check_frames(came)
