"""A clip of any length through an encoder or a decoder, chunk by chunk: whole, or as a stream."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .decoder import Decoder
from .distribution import DiagonalGaussian
from .encoder import Encoder
from .rules import Way, decoding, encoding
from .state import DecodeState, EncodeState, FrameCache, StreamState
from .tiling import Tiling, tiled

Progress = Callable[[int, int], None]


def encode(
    encoder: Encoder,
    video: Tensor,
    *,
    tiling: Tiling | None = None,
    slicing: bool = False,
    progress: Progress | None = None,
) -> DiagonalGaussian:
    """The distribution of a clip's latents, raw: not yet multiplied by the scaling factor.

    Args:
        video: (batch, frames, in_channels, height, width), values in [-1, 1], dtype and device of
            the weights; frames by the rule of `cogvx.frames`, sides multiples of 8.
        tiling: cut frames that are larger than a tile; None never does.
        slicing: take the clips of the batch one by one.
        progress: called with (chunks done, chunks in all) after each chunk.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing has been computed.
    """
    way = encoding(encoder, "encode")
    return DiagonalGaussian(_walk(way, video, tiling, slicing, progress))


def decode(
    decoder: Decoder,
    latents: Tensor,
    *,
    tiling: Tiling | None = None,
    slicing: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """The video of raw latents: already divided by the scaling factor.

    Args:
        latents: (batch, latent frames, latent_channels, height, width), dtype and device of the
            weights; any number of frames.
        tiling, slicing, progress: as in `encode`; tiles are measured in pixels here too.

    Returns:
        (batch, frames, out_channels, 8 · height, 8 · width), values in about [-1, 1].

    Raises:
        TypeError, ValueError: an argument is not as above; nothing has been computed.
    """
    return _walk(decoding(decoder, "decode"), latents, tiling, slicing, progress)


def stream_encode(
    encoder: Encoder,
    video: Tensor | Iterable[Tensor],
    state: EncodeState | None = None,
    *,
    total: int | None = None,
    last: bool = True,
) -> Iterator[DiagonalGaussian]:
    """`encode` as a stream: the distributions of the chunks, in order, each as soon as it can be.

    What is held does not grow with the clip, and the results are bit for bit those of `encode`.

    Args:
        video: a clip as in `encode`, or pieces of it in order, of any number of frames each.
        state: where the clip stands, to go on from and to leave behind; None begins a clip.
        total: frames of the whole clip. A clip given as one tensor needs none, nor does the
            factorised VAE. The released VAE puts what remains into the *first* chunk, so without it
            the pieces must be that VAE's own chunks: 1, 8 or 9 frames, then 8 each.
        last: whether the clip ends with this video; if not, frames whose chunk is not full yet wait
            in the state.

    Raises:
        TypeError, ValueError: an argument, or a piece when it comes, is not as above. The state is
            as it was before that piece.
        RuntimeError: the state's clip has ended, or was lost to an exception in a chunk.
    """
    way = encoding(encoder, "stream_encode")
    chunks = _stream(way, video, EncodeState() if state is None else state, total, last)
    return map(DiagonalGaussian, chunks)


def stream_decode(
    decoder: Decoder,
    latents: Tensor | Iterable[Tensor],
    state: DecodeState | None = None,
    *,
    total: int | None = None,
    last: bool = True,
) -> Iterator[Tensor]:
    """`decode` as a stream: the video of the chunks, in order, each as soon as it can be.

    As `stream_encode`, counted in latent frames: the released VAE's own chunks are 1, 2 or 3
    frames, then 2 each.
    """
    way = decoding(decoder, "stream_decode")
    return _stream(way, latents, DecodeState() if state is None else state, total, last)


# --- whole clips -----------------------------------------------------------------------------


def _walk(
    way: Way, x: Tensor, tiling: Tiling | None, slicing: bool, progress: Progress | None
) -> Tensor:
    way.check(x)
    way.check_frames(x.shape[1])
    plan = way.plan(x.shape[1])
    ratio = way.config.spatial_compression_ratio
    scale = (ratio, 1) if way.name == "video" else (1, ratio)
    height, width = (side * ratio // scale[0] for side in x.shape[3:])
    steps = len(plan)
    if tiling is not None:
        tiling.check(way.where, ratio)
    cut = tiling is not None and tiling.cuts(height, width)
    if tiling is not None and cut:
        steps *= tiling.count(height, width, ratio)
    slices = x.split(1) if slicing else (x,)
    tick = _ticker(steps * len(slices), progress)

    def run(clip: Tensor) -> Tensor:
        return _joined(_chunks(way, clip, plan, tick), way.frames_out(x.shape[1]), dim=1)

    def cover(clip: Tensor) -> Tensor:
        return tiled(run, clip, tiling, ratio, scale) if tiling is not None and cut else run(clip)

    return _joined(map(cover, slices), x.shape[0], dim=0) if len(slices) > 1 else cover(x)


def _chunks(
    way: Way, clip: Tensor, plan: tuple[int, ...], tick: Callable[[], None]
) -> Iterator[Tensor]:
    cache = FrameCache() if len(plan) > 1 else None
    for chunk in clip.split(plan, dim=1):
        yield way.coder(chunk, cache)
        tick()


def _joined(pieces: Iterable[Tensor], size: int, dim: int) -> Tensor:
    """Pieces joined along `dim` to `size`, each put in its place as it comes, and then freed.

    While gradients are recorded they are all kept anyway.
    """
    if torch.is_grad_enabled():
        whole = list(pieces)
        return whole[0] if len(whole) == 1 else torch.cat(whole, dim)
    into: Tensor | None = None
    start = 0
    for piece in pieces:
        if into is None:
            into = piece.new_empty([*piece.shape[:dim], size, *piece.shape[dim + 1 :]])
        into.narrow(dim, start, piece.shape[dim]).copy_(piece)
        start += piece.shape[dim]
        del piece  # before the next one is made
    assert into is not None and start == size
    return into


def _ticker(total: int, progress: Progress | None) -> Callable[[], None]:
    """A function that counts its calls and reports them."""
    done = iter(range(1, total + 1))
    return (lambda: progress(next(done), total)) if progress is not None else (lambda: None)


# --- streams ---------------------------------------------------------------------------------


def _stream(
    way: Way, source: Any, state: StreamState, total: int | None, last: bool
) -> Iterator[Tensor]:
    """Checks what can be checked now, and gives the iterator that does the work."""
    wanted = EncodeState if way.name == "video" else DecodeState
    if not isinstance(state, wanted):
        raise TypeError(
            f"{way.where}: state must be a {wanted.__name__}; got {type(state).__name__}"
        )
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
    if way.config.factorized:
        return way.chunk if state.chunks else 1
    return state.waiting  # the piece itself: `_check_piece` saw that it is a chunk


def _end(state: StreamState) -> None:
    state.ended = True
    state.cache.frames.clear()


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
    elif not way.config.factorized:
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
