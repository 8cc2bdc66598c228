"""A clip of any length through an encoder or a decoder, chunk by chunk: whole, or as a stream."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from cogvx_kernels.streaming import stream

from .decoder import Decoder
from .distribution import DiagonalGaussian
from .encoder import Encoder
from .rules import Way, decoding, encoding
from .state import DecodeState, EncodeState, FrameCache
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
        progress: called with (chunks done, chunks in all): at the beginning, and after each chunk.

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
    return map(DiagonalGaussian, stream(way, video, state, total, last, kind=EncodeState))


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
    return stream(way, latents, state, total, last, kind=DecodeState)


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
    """A function that counts its calls and reports them; that none is done is reported at once."""
    if progress is None:
        return lambda: None
    progress(0, total)
    done = iter(range(1, total + 1))
    return lambda: progress(next(done), total)
