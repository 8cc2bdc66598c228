"""Encode and decode clips of any length chunk by chunk: whole, in tiles, or as a stream."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from cogvx_kernels.streaming import CoderSpec, DecodeState, EncodeState, FrameCache, StreamState

from .. import frames
from ..profiling import annotate
from ..threads import suited_threads
from .decoder import Decoder
from .distribution import DiagonalGaussian
from .encoder import Encoder
from .ranks import VAERanks
from .tiling import Each, Tiling, tiled

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
    """The distribution of a clip's raw latents; see `CausalVAE.encode`."""
    spec = _spec(encoder, Encoder, "encode")
    return DiagonalGaussian(_run_clip(encoder, spec, video, tiling, slicing, progress))


def decode(
    decoder: Decoder,
    latents: Tensor,
    *,
    tiling: Tiling | None = None,
    slicing: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """The video of raw latents; see `CausalVAE.decode`."""
    spec = _spec(decoder, Decoder, "decode")
    return _run_clip(decoder, spec, latents, tiling, slicing, progress)


def stream_encode(
    encoder: Encoder,
    video: Tensor | Iterable[Tensor],
    state: EncodeState | None = None,
    *,
    total: int | None = None,
    last: bool = True,
) -> Iterator[DiagonalGaussian]:
    """`encode` as a stream; see `CausalVAE.stream_encode`."""
    spec = _spec(encoder, Encoder, "stream_encode")
    moments = _stream(encoder, spec, video, encoder.ranks, state, total, last)
    return map(DiagonalGaussian, moments)


def stream_decode(
    decoder: Decoder,
    latents: Tensor | Iterable[Tensor],
    state: DecodeState | None = None,
    *,
    total: int | None = None,
    last: bool = True,
) -> Iterator[Tensor]:
    """`decode` as a stream; see `CausalVAE.stream_decode`."""
    spec = _spec(decoder, Decoder, "stream_decode")
    return _stream(decoder, spec, latents, decoder.ranks, state, total, last)


def _spec(coder: Coder, kind: type[Coder], where: str) -> CoderSpec:
    decodes = kind is Decoder
    if not isinstance(coder, kind):
        wanted = "decoder must be a Decoder" if decodes else "encoder must be an Encoder"
        raise TypeError(f"{where}: {wanted}; got {type(coder).__name__}")
    config, weight = coder.config, coder.conv_out.weight
    return CoderSpec(
        where,
        name="latents" if decodes else "video",
        coder=kind.__name__,
        chunking=(frames.decoder_chunking if decodes else frames.encoder_chunking)(config),
        channels=config.latent_channels if decodes else config.in_channels,
        dtype=weight.dtype,
        device=weight.device,
        multiple=1 if decodes else config.spatial_compression_ratio,
    )


def _stream(
    coder: Coder,
    spec: CoderSpec,
    x: Tensor | Iterable[Tensor],
    relay: VAERanks | None,
    given: StreamState | None = None,
    total: int | None = None,
    last: bool = True,
) -> Iterator[Tensor]:
    """The output of each chunk; `relay`: ranks that run the chunks in turn."""
    state = spec.open(given)
    if relay is not None:
        relay.check_method(spec.where, None)
        if given is not None or not last or (total is None and not isinstance(x, Tensor)):
            raise ValueError(
                f"{spec.where}: {spec.name} must be a whole clip, a tensor or with total=, without "
                f"a state, where chunks are on {relay.size} ranks; got a part, or no total"
            )

    def run(chunk: Tensor, cache: FrameCache) -> Tensor:
        compiling = torch.compiler.is_compiling()
        threads = None if compiling else suited_threads(_largest(coder, chunk), chunk.device)
        with threads or nullcontext(), annotate(f"{spec.coder.lower()}, a chunk"):
            return coder(chunk, cache)

    def run_next(chunk: Tensor) -> Tensor:
        with state.running(chunk.shape[1]):
            return run(chunk, state.cache)

    chunks = spec.chunks(x, state, total, last)
    if relay is None:
        return map(run_next, chunks)  # map holds neither input nor output
    relay.check_alike(spec.where, spec.name, x)

    def shape(chunk: Tensor) -> tuple[int, ...]:
        return _output_shape(coder, chunk, state.taken - chunk.shape[1])

    return relay.relay(run, chunks, state, shape)


def _output_shape(coder: Coder, x: Tensor, before: int = 0) -> tuple[int, ...]:
    """Shape of the output of a piece of a clip that comes after `before` frames."""
    config, decodes = coder.config, isinstance(coder, Decoder)
    count = frames.video_frames if decodes else frames.latent_frames
    made = count(before + x.shape[1], config) - (count(before, config) if before else 0)
    channels = config.out_channels if decodes else 2 * config.latent_channels
    ratio = config.spatial_compression_ratio
    sides = (side * ratio if decodes else side // ratio for side in x.shape[3:])
    return (x.shape[0], made, channels, *sides)


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
    ranks = coder.ranks
    if ranks is not None:
        ranks.check_method(spec.where, tiling)
    cuts = tiling is not None and tiling.cuts(height, width)
    tiles = range(tiling.count(height, width, ratio) if tiling is not None and cuts else 1)
    each: Each = map
    if tiling is not None and ranks is not None:
        ranks.check_alike(spec.where, spec.name, x)
        each = partial(ranks.share, shape=partial(_output_shape, coder))
        tiles = tiles[ranks.rank :: ranks.size]
    slices = x.split(1) if slicing else (x,)
    tick = _ticker(steps * len(tiles) * len(slices), progress)
    chunks = partial(_run_chunks, coder, spec, tick, ranks if tiling is None else None)

    def run(clip: Tensor) -> Tensor:
        if tiling is None or not cuts:
            [result] = each(chunks, [clip])
            return result
        return tiled(chunks, clip, tiling, ratio, scale, each)

    if len(slices) == 1:
        return run(x)
    out = _Concat(x.shape[0], dim=0)
    for clip in slices:
        out.append(run(clip))
    return out.result()


def _run_chunks(
    coder: Coder, spec: CoderSpec, tick: Callable[[], None], relay: VAERanks | None, x: Tensor
) -> Tensor:
    count = _output_shape(coder, x)[1]
    out = _Concat(count if relay is None or relay.receives else 0, dim=1)
    for piece in _stream(coder, spec, x, relay):
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
