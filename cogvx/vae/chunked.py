"""Encode and decode clips of any length chunk by chunk: whole, in tiles, or as a stream."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from cogvx_kernels.streaming import CoderSpec, DecodeState, EncodeState, StreamState

from .. import frames
from ..threads import suited_threads
from .decoder import Decoder
from .distribution import DiagonalGaussian
from .encoder import Encoder
from .tiling import Tiling, tiled

Coder = Encoder | Decoder
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
    spec = _encoder_spec(encoder, "encode")
    return DiagonalGaussian(_run_clip(encoder, spec, video, tiling, slicing, progress))


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
    spec = _decoder_spec(decoder, "decode")
    return _run_clip(decoder, spec, latents, tiling, slicing, progress)


def stream_encode(
    encoder: Encoder,
    video: Tensor | Iterable[Tensor],
    state: EncodeState | None = None,
    *,
    total: int | None = None,
    last: bool = True,
) -> Iterator[DiagonalGaussian]:
    """`encode` as a stream: the distributions of the chunks, in order, each as soon as it can be.

    Memory does not grow with the clip, and the results are bit for bit those of `encode`.

    Args:
        video: a clip as in `encode`, or pieces of it in order, of any number of frames each.
        state: position in the clip, continued and updated; None begins a clip.
        total: frames of the whole clip. A clip given as one tensor needs none, nor does the
            factorised VAE. The released VAE puts the remainder into the *first* chunk, so without
            it the pieces must be that VAE's own chunks: 1, 8 or 9 frames, then 8 each.
        last: True if the clip ends with this video; if not, frames whose chunk is not full yet wait
            in the state.

    Raises:
        TypeError, ValueError: an argument, or a piece when it comes, is not as above. The state is
            as it was before that piece.
        RuntimeError: the state's clip has ended, or was lost to an exception in a chunk.
    """
    spec = _encoder_spec(encoder, "stream_encode")
    return map(DiagonalGaussian, _stream(encoder, spec, video, state, total, last))


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
    spec = _decoder_spec(decoder, "stream_decode")
    return _stream(decoder, spec, latents, state, total, last)


def _encoder_spec(encoder: Encoder, where: str) -> CoderSpec:
    if not isinstance(encoder, Encoder):
        raise TypeError(f"{where}: encoder must be an Encoder; got {type(encoder).__name__}")
    config, weight = encoder.config, encoder.conv_out.weight
    return CoderSpec(
        where,
        "video",
        type(encoder).__name__,
        frames.encoder_chunking(config),
        config.in_channels,
        weight.dtype,
        weight.device,
        multiple=config.spatial_compression_ratio,
    )


def _decoder_spec(decoder: Decoder, where: str) -> CoderSpec:
    if not isinstance(decoder, Decoder):
        raise TypeError(f"{where}: decoder must be a Decoder; got {type(decoder).__name__}")
    config, weight = decoder.config, decoder.conv_out.weight
    return CoderSpec(
        where,
        "latents",
        type(decoder).__name__,
        frames.decoder_chunking(config),
        config.latent_channels,
        weight.dtype,
        weight.device,
    )


def _stream(
    coder: Coder,
    spec: CoderSpec,
    x: Tensor | Iterable[Tensor],
    state: StreamState | None = None,
    total: int | None = None,
    last: bool = True,
) -> Iterator[Tensor]:
    """The output of each chunk."""
    state = spec.open(state)

    def run(chunk: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            out = coder(chunk, state.cache)
        else:
            with suited_threads(_largest(coder, chunk), chunk.device):
                out = coder(chunk, state.cache)
        state.advance(chunk.shape[1])
        return out

    return map(run, spec.chunks(x, state, total, last))  # map holds neither input nor output


def _largest(coder: Coder, chunk: Tensor) -> int:
    """Elements of the largest tensor between two layers, estimated from frames of full size."""
    config, size = coder.config, chunk.numel() // chunk.shape[2]
    if isinstance(coder, Decoder):
        size *= config.temporal_compression_ratio * config.spatial_compression_ratio**2
    return size * config.block_out_channels[0]


# --- whole clips -----------------------------------------------------------------------------


def _run_clip(
    coder: Coder,
    spec: CoderSpec,
    x: Tensor,
    tiling: Tiling | None,
    slicing: bool,
    progress: Progress | None,
) -> Tensor:
    """A whole batch of clips: the concatenation of `_stream`, by clip and by tile where wanted."""
    spec.check(x)
    spec.chunking.check(spec.where, spec.name, x.shape[1])
    ratio, decodes = coder.config.spatial_compression_ratio, isinstance(coder, Decoder)
    scale = (1, ratio) if decodes else (ratio, 1)
    height, width = (side * ratio // scale[0] for side in x.shape[3:])
    steps = len(spec.chunking.plan(x.shape[1]))
    if tiling is not None:
        tiling.check(spec.where, ratio)
    tiles = tiling is not None and tiling.cuts(height, width)
    if tiling is not None and tiles:
        steps *= tiling.count(height, width, ratio)
    slices = x.split(1) if slicing else (x,)
    tick = _ticker(steps * len(slices), progress)
    run = partial(_run_chunks, coder, spec, tick)
    if tiling is not None and tiles:
        run = partial(tiled, run, tiling=tiling, ratio=ratio, scale=scale)
    if len(slices) == 1:
        return run(x)
    out = _Concat(x.shape[0], dim=0)
    for clip in slices:
        out.append(run(clip))
    return out.result()


def _run_chunks(coder: Coder, spec: CoderSpec, tick: Callable[[], None], x: Tensor) -> Tensor:
    count = frames.video_frames if isinstance(coder, Decoder) else frames.latent_frames
    out = _Concat(count(x.shape[1], coder.config), dim=1)
    for piece in _stream(coder, spec, x):
        out.append(piece)
        del piece  # before the next one is made
        tick()
    return out.result()


class _Concat:
    """torch.cat along `dim` to `size`: each piece is copied to its place and can be freed.

    While gradients are recorded all pieces are kept anyway, and concatenated at the end.
    """

    def __init__(self, size: int, dim: int) -> None:
        self.size, self.dim = size, dim
        self.start = 0
        self.out: Tensor | None = None
        self.pieces: list[Tensor] = []

    def append(self, piece: Tensor) -> None:
        if torch.is_grad_enabled():
            self.pieces.append(piece)
            return
        if self.out is None:
            shape = (*piece.shape[: self.dim], self.size, *piece.shape[self.dim + 1 :])
            self.out = piece.new_empty(shape)
        self.out.narrow(self.dim, self.start, piece.shape[self.dim]).copy_(piece)
        self.start += piece.shape[self.dim]

    def result(self) -> Tensor:
        if self.pieces:
            return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces, self.dim)
        assert self.out is not None and self.start == self.size
        return self.out


def _ticker(total: int, progress: Progress | None) -> Callable[[], None]:
    """A function that counts its calls and reports them; that none is done is reported at once."""
    if progress is None:
        return lambda: None
    progress(0, total)
    done = iter(range(1, total + 1))
    return lambda: progress(next(done), total)
