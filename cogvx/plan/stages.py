"""Forecast the memory of a clip, by stage.

The models run on the meta device under `LiveBytes`, so the forecast is of the real code, for any
size. Workspaces inside one operation and the allocator's overhead are not included (see
`cogvx.memory`): leave a tenth. (On a CPU the workspaces of torch's 3-D convolution can be larger
than all the rest.) If Triton is installed, the ops of `cogvx_kernels` are counted with kernels.

Only two layers of the transformer and three chunks of the VAE run, because the others repeat them.
A run of fewer than `STEPS_AHEAD` steps has fewer modulations.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogvx_kernels import module_backend
from cogvx_kernels.context_parallel import Context

from .. import frames as frame_rule
from ..config import TransformerConfig, VAEConfig
from ..memory import LiveBytes, module_bytes
from ..transformer import STEPS_AHEAD, ExpertTransformer, Modulations
from ..vae import CausalVAE, Decoder, DecodeState, Encoder, EncodeState, Tiling

MIB, GIB = 1 << 20, 1 << 30
LAYERS_COUNTED, CHUNKS_COUNTED = 2, 3

HELP = {
    "text": "encode the prompt elsewhere and give its embeddings",
    "encode": "tiling, a smaller size",
    "denoise": 'cfg="two_pass" (half the activations), fewer frames, a smaller size',
    "decode": "tiling, a smaller size; latents are saved first, to be decoded elsewhere",
}


class PlanError(ValueError):
    """A clip does not fit; the message names the stage, what it needs and what helps."""


@dataclass(frozen=True)
class Stage:
    """Memory of one stage, in bytes.

    weights      of the stage's own model
    activations  peak of all other tensors, inputs and results included
    streamed     the same if the clip is streamed from and to a file; it does not grow with the
                 clip. 0 if the stage has no stream
    cache        kept between two chunks; part of both
    chunks       frames (encode) or latent frames (decode) of each chunk
    """

    name: str
    weights: int
    activations: int
    streamed: int = 0
    cache: int = 0
    chunks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Forecast of a clip. `total` is the weights of all stages, which stay on the device, and the
    activations of the worst stage."""

    frames: int
    height: int
    width: int
    batch: int
    latent_frames: int
    text_tokens: int
    video_tokens: int
    stages: tuple[Stage, ...]

    @property
    def weights(self) -> int:
        return sum(stage.weights for stage in self.stages)

    @property
    def total(self) -> int:
        return max(map(self.needed, self.stages))

    def needed(self, stage: Stage) -> int:
        """Peak bytes of a stage, with the weights of all stages."""
        return self.weights + stage.activations

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def check(self, budget: int) -> None:
        """Raises PlanError, naming the worst stage, if the clip needs more than `budget` bytes."""
        if self.total <= budget:
            return
        worst = max(self.stages, key=self.needed)
        helps = HELP[worst.name]
        if self.weights > budget:
            helps = "fewer bytes a weight (dtype), or no text encoder (give embeddings)"
        raise PlanError(
            f"plan: {worst.name} must fit into {size(budget)} for {self.frames} frames of "
            f"{self.height}x{self.width}; it needs {size(self.needed(worst))}, "
            f"{size(self.weights)} of it weights. What helps: {helps}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, bytes as integers."""
        return {**dataclasses.asdict(self), "weights": self.weights, "total": self.total}

    def __str__(self) -> str:
        lines = [
            f"{self.frames} frames of {self.height}x{self.width}: {self.latent_frames} latent "
            f"frames, {self.video_tokens:,} video and {self.text_tokens:,} text tokens",
            f"{'':8} {'weights':>10} {'activations':>12} {'streamed':>10} {'cache':>10}  chunks",
        ]
        for stage in self.stages:
            numbers = (stage.weights, stage.activations, stage.streamed, stage.cache)
            a, b, c, d = (size(number) if number else "-" for number in numbers)
            lines.append(f"{stage.name:8} {a:>10} {b:>12} {c:>10} {d:>10}  {_runs(stage.chunks)}")
        worst = max(self.stages, key=self.needed)
        lines.append(f"at once   {size(self.total)}, in {worst.name}, besides workspaces")
        return "\n".join(line.rstrip() for line in lines)


def forecast(
    transformer: TransformerConfig | None,
    vae: VAEConfig,
    *,
    frames: int,
    height: int,
    width: int,
    batch: int = 1,
    guidance: bool = True,
    cfg: str = "batch",
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype | None = None,
    tiling: Tiling | None = None,
    text_bytes: int = 0,
    encoded: int | None = None,
    backend: str | None = None,
    context: int = 1,
    budget: int | None = None,
) -> Plan:
    """Forecast generating a clip; without a transformer, encoding and decoding it.

    frames, height, width: of the video, in pixels.
    guidance: two predictions a step; `cfg` is "batch" for both at once, "two_pass" for one by one.
    dtype: of the transformer; the VAE's is the same unless `vae_dtype` is given.
    text_bytes: of the text encoder's weights, if it is on the device; its activations, for one
        prompt, are small and not forecast.
    encoded: number of frames encoded first: 1 for an image, all for video-to-video. By default 1 if
        the transformer takes an image, else none; all without a transformer.
    backend: as in `load_transformer`; "reference", plain torch, as on a CPU, needs more.
    context: ranks that share a clip's tokens; the denoising of the first of them is forecast.
    budget: bytes; `Plan.check` is called with it.

    Raises ValueError for a clip that the models cannot take, PlanError if it does not fit.
    """
    patch = transformer.patch_size if transformer is not None else 1
    frame_rule.check("forecast", "frames", frames, vae)
    frame_rule.check_size("forecast", None, height, width, vae.spatial_compression_ratio * patch)
    if cfg not in ("batch", "two_pass"):
        raise ValueError(f'forecast: cfg must be "batch" or "two_pass"; got {cfg!r}')
    if encoded is None:
        takes_image = transformer is not None and transformer.in_channels > transformer.out_channels
        encoded = frames if transformer is None else int(takes_image)
    vae_dtype = vae_dtype or dtype
    latents = frame_rule.latent_frames(frames, vae)
    stages = [Stage("text", text_bytes, 0)] if text_bytes else []
    tokens = (0, 0)
    with torch.no_grad(), torch.device("meta"), module_backend(backend):
        model = CausalVAE(vae).to(vae_dtype)
        if encoded:
            stages.append(_encode(model, batch, encoded, height, width, tiling))
        if transformer is not None:
            ratio = vae.spatial_compression_ratio
            padded = latents + -latents % (transformer.patch_size_t or 1)
            shape = (batch, padded, transformer.in_channels, height // ratio, width // ratio)
            copies = 2 if guidance and cfg == "batch" else 1
            stages.append(_denoise(transformer, shape, copies, dtype, context))
            grid = padded // (transformer.patch_size_t or 1), *(n // patch for n in shape[3:])
            tokens = (transformer.max_text_seq_length, grid[0] * grid[1] * grid[2])
        stages.append(_decode(model, batch, latents, height, width, tiling))
    plan = Plan(frames, height, width, batch, latents, *tokens, tuple(stages))
    if budget is not None:
        plan.check(budget)
    return plan


def size(count: int) -> str:
    """Format bytes: 2.62 GiB, 411 MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.4g} MiB"


def _denoise(
    config: TransformerConfig,
    shape: tuple[int, ...],
    copies: int,
    dtype: torch.dtype,
    context: int,
) -> Stage:
    whole = ExpertTransformer(config).to(dtype)
    few = dataclasses.replace(config, num_layers=min(config.num_layers, LAYERS_COUNTED))
    model = ExpertTransformer(few).to(dtype)
    if context > 1:
        model.context = _Ranks("", rank=0, size=context)
    with LiveBytes() as live:
        text = torch.empty(copies * shape[0], config.max_text_seq_length, config.text_embed_dim,
                           dtype=dtype)  # fmt: skip
        latents = torch.empty(shape, dtype=dtype)
        projected = whole.project_text(text)
        ofs = None if config.ofs_embed_dim is None else torch.empty(1)
        ahead = whole.modulations(torch.empty(STEPS_AHEAD), ofs)
        # The rows of the last layers, with those of the final norm.
        rows = ahead.at(0).values[:, -(12 * few.num_layers + 2) :]
        model(torch.cat([latents] * copies), projected, modulations=Modulations(rows)).float()
    return Stage("denoise", module_bytes(whole), live.peak)


class _Ranks(Context):
    """A context without a process group; torch's `wait_tensor` allocates on the meta device."""

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return x.new_empty(sum(received))


def _encode(
    vae: CausalVAE, batch: int, frames: int, height: int, width: int, tiling: Tiling | None
) -> Stage:
    chunks = frame_rule.encode_plan(frames, vae.config)
    ratio, channels = vae.config.spatial_compression_ratio, 2 * vae.config.latent_channels
    shape = (batch, vae.config.in_channels, height, width)
    out = (frame_rule.latent_frames(frames, vae.config), channels, height // ratio, width // ratio)

    def run(pieces: Iterable[Tensor], state: EncodeState) -> Iterator[Tensor]:
        return (g.moments for g in vae.stream_encode(pieces, state, total=frames))

    return _estimate(
        "encode", vae.encoder, run, EncodeState(), chunks, shape, out, tiling, (ratio, 1)
    )


def _decode(
    vae: CausalVAE, batch: int, latents: int, height: int, width: int, tiling: Tiling | None
) -> Stage:
    chunks = frame_rule.decode_plan(latents, vae.config)
    ratio, channels = vae.config.spatial_compression_ratio, vae.config.out_channels
    shape = (batch, vae.config.latent_channels, height // ratio, width // ratio)
    out = (frame_rule.video_frames(latents, vae.config), channels, height, width)

    def run(pieces: Iterable[Tensor], state: DecodeState) -> Iterator[Tensor]:
        return vae.stream_decode(pieces, state, total=latents)

    return _estimate(
        "decode", vae.decoder, run, DecodeState(), chunks, shape, out, tiling, (1, ratio)
    )


def _estimate(
    name: str,
    coder: Encoder | Decoder,
    run: Callable[[Iterable[Tensor], Any], Iterator[Tensor]],
    state: EncodeState | DecodeState,
    chunks: tuple[int, ...],
    shape: tuple[int, int, int, int],
    out: tuple[int, int, int, int],
    tiling: Tiling | None,
    scale: tuple[int, int],
) -> Stage:
    """Forecast a stage of the VAE; `run` streams chunks through a state.

    shape: (batch, channels, height, width) of the input; out: (frames, channels, height, width) of
    the output; scale: of both, relative to a latent.
    """
    dtype = next(coder.parameters()).dtype
    batch, channels, *sides = shape
    given = sum(chunks) * math.prod(shape) * dtype.itemsize
    whole = batch * math.prod(out) * dtype.itemsize
    ratio = coder.config.spatial_compression_ratio
    pixels = sides[0] * ratio // scale[0], sides[1] * ratio // scale[0]
    tiled = tiling is not None and tiling.cuts(*pixels)
    tile_out, around = whole, given
    if tiling is not None and tiled:
        tiling.check("forecast", ratio)
        tile = min(pixels[0], tiling.height), min(pixels[1], tiling.width)
        sides = [n * scale[0] // ratio for n in tile]
        part = tile[0] * tile[1] / (pixels[0] * pixels[1])
        tile_out = int(whole * part)
        # The whole result, the last rows of the tiles above, the last columns of the previous one.
        rows = tiling.overlap_height * tile[0] / pixels[0] / (1 - tiling.overlap_width)
        around += int(whole * (1 + rows + part * tiling.overlap_width))
    peaks, cache, largest = [], 0, 0
    with LiveBytes() as live:
        pieces = (torch.empty(batch, n, channels, *sides, dtype=dtype) for n in chunks)
        stream = run(pieces, state)
        for _ in chunks[:CHUNKS_COUNTED]:
            largest = max(largest, next(stream).nbytes)  # freed before the next one
            peaks.append(live.peak)
            cache = max(cache, state.nbytes)
            live.reset()
        streamed = max(peaks) + largest  # the consumer may hold the last chunk
        if len(chunks) == 1:  # no cache if it is the whole clip
            live.reset()
            coder(torch.empty(batch, *chunks, channels, *sides, dtype=dtype))
            peaks = [live.peak]
    activations = max(peaks[0], largest + tile_out, *(peak + tile_out for peak in peaks[1:]))
    return Stage(
        name, module_bytes(coder), activations + around, 0 if tiled else streamed, cache, chunks
    )


def _runs(chunks: tuple[int, ...]) -> str:
    """Format 9, 8, 8, 8 as "9, 3 x 8"."""
    groups = [(size, len(list(same))) for size, same in itertools.groupby(chunks)]
    return ", ".join(f"{count} x {size}" if count > 1 else f"{size}" for size, count in groups)
