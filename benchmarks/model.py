"""`python -m benchmarks.model`: parts of CogVideoX beside diffusers' on the same weights.

Outputs are compared first, and nothing is timed if they differ. Then both run in turn, there and
back, in one process. Peak bytes are those alive in tensors, without weights and arguments
(`cogvx.memory.LiveBytes`), so they are the same on any machine. Exit status 1 if outputs differ.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn

from cogvx.checkpoint.folder import transformer_values, vae_values
from cogvx.config import PRESETS, TransformerConfig, VAEConfig
from cogvx.memory import LiveBytes
from cogvx.transformer import ExpertTransformer
from cogvx.vae import CausalVAE

from . import conditions, report
from .timing import Times, measure

# What the outputs may differ by, relative to the largest: in fp32 what contract and tests demand;
# in bf16 each is a sum of thousands of roundings of 2^-8, and the tests hold both to fp64.
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
LAPS = 6

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """A clip, in frames of video and pixels, and the widths of the models that take it."""

    frames: int
    height: int
    width: int
    vae: VAEConfig
    transformer: TransformerConfig


# A tenth of the released widths and a clip with every kind of chunk: what a CPU does in a second.
SMALL = Size(
    17,
    64,
    96,
    VAEConfig(block_out_channels=(32, 64, 64, 128), norm_num_groups=8),
    TransformerConfig(
        num_attention_heads=4,
        num_layers=2,
        text_embed_dim=128,
        use_rotary_positional_embeddings=True,
    ),
)
SIZES = {
    "small": SMALL,
    **{
        f"{name}-{p.height}x{p.width}-{p.frames}f": Size(
            p.frames, p.height, p.width, p.vae, p.transformer
        )
        for name, p in PRESETS.items()
    },
}


@dataclass(frozen=True)
class Row:
    """One side of one part. A time is only given on a GPU; everywhere a ratio, there and back.

    speed         diffusers' median time over this one's: 2 is twice as fast
    memory        this one's peak live bytes over diffusers'
    relative_gap  the largest difference of the outputs over the largest output
    """

    part: str
    size: str
    provider: str
    dtype: str
    device: str
    peak_mib: float
    memory: float
    speed: float
    noise_percent: float
    relative_gap: float
    median_ms: float | None

    def cells(self) -> dict[str, Any]:
        return asdict(self)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = arguments.size or ("small" if device.type == "cpu" else "5b-480x720-49f")
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    command = " ".join(["python -m benchmarks.model", *(sys.argv[1:] if argv is None else argv)])
    found = conditions.conditions(device, command)
    rows = []
    for part in arguments.part or PARTS:
        calls = PARTS[part](SIZES[size], dtype, device)
        gap = _gap(calls)
        if not gap <= AGREEMENT[dtype]:
            print(f"{part} at {size}: the outputs differ by {gap:.2g}; nothing was timed.")
            return 1
        rows += _rows(part, size, dtype, device, calls, gap, arguments.budget)
    found["sm_clock_mhz"] = conditions.clock(device)
    print(_table(rows))
    print(report.small_print(found))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report.add_to_csv(arguments.out / "model.csv", rows, found)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    add = parser.add_argument
    add("--part", action="append", choices=tuple(PARTS), help="may be repeated; default: all")
    add("--size", choices=tuple(SIZES), help="default: 5b-480x720-49f, on a CPU small")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16, on a CPU float32")
    add("--device", help="default: cuda if there is one")
    add("--budget", type=float, default=2.0, help="seconds for each side and lap (%(default)s)")
    add("--out", type=Path, help="folder for model.csv, which is added to")
    return parser


# --- the parts: what a user runs today, and ours, on the same weights and arguments ---------------


def _vae_decode(size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    theirs, ours = _vaes(size, dtype, device)
    ratio = size.vae.spatial_compression_ratio
    latents = _noise(
        (
            1,
            (size.frames - 1) // size.vae.temporal_compression_ratio + 1,
            size.vae.latent_channels,
            size.height // ratio,
            size.width // ratio,
        ),
        dtype,
        device,
    )
    flat = latents.transpose(1, 2)
    return {
        "diffusers": lambda: theirs.decode(flat).sample.transpose(1, 2),
        "cogvx": partial(ours.decode, latents),
    }


def _vae_encode(size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    theirs, ours = _vaes(size, dtype, device)
    video = _noise((1, size.frames, 3, size.height, size.width), dtype, device)
    flat = video.transpose(1, 2)
    return {
        "diffusers": lambda: theirs.encode(flat).latent_dist.mean.transpose(1, 2),
        "cogvx": lambda: ours.encode(video).mean,
    }


def _transformer(size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """One denoising step under guidance: a batch of two."""
    config, vae = size.transformer, size.vae
    theirs = _randomly(
        lambda: CogVideoXTransformer3DModel.from_config(transformer_values(config)), dtype, device
    )
    ours = _with_weights_of(theirs, lambda: ExpertTransformer(config))
    patch = config.patch_size_t or 1
    frames = (size.frames - 1) // vae.temporal_compression_ratio + 1
    latents = _noise(
        (
            2,
            -(-frames // patch) * patch,
            config.in_channels,
            size.height // vae.spatial_compression_ratio,
            size.width // vae.spatial_compression_ratio,
        ),
        dtype,
        device,
    )
    text = _noise((2, config.max_text_seq_length, config.text_embed_dim), dtype, device)
    timestep = torch.tensor([999, 999], device=device)
    ofs = None if config.ofs_embed_dim is None else torch.full((1,), 2.0, device=device)
    maker = CogVideoXPipeline.__new__(CogVideoXPipeline)
    maker.transformer, maker.vae_scale_factor_spatial = theirs, vae.spatial_compression_ratio
    rotary = None
    if config.use_rotary_positional_embeddings:
        rotary = maker._prepare_rotary_positional_embeddings(
            size.height, size.width, latents.shape[1], device
        )
    return {
        "diffusers": lambda: theirs(
            latents, text, timestep, ofs=ofs, image_rotary_emb=rotary, return_dict=False
        )[0],
        "cogvx": partial(ours, latents, text, timestep, ofs),
    }


PARTS: dict[str, Callable[[Size, torch.dtype, torch.device], dict[str, Call]]] = {
    "vae-decode": _vae_decode,
    "vae-encode": _vae_encode,
    "transformer": _transformer,
}


def _vaes(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Any, CausalVAE]:
    theirs = _randomly(
        lambda: AutoencoderKLCogVideoX.from_config(vae_values(size.vae)),
        dtype,
        device,
    )
    return theirs, _with_weights_of(theirs, lambda: CausalVAE(size.vae))


def _randomly(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    diffusers.utils.logging.set_verbosity_error()
    with torch.device(device):
        return make().to(dtype).requires_grad_(False).eval()


def _with_weights_of(theirs: nn.Module, make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        ours = make()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.requires_grad_(False).eval()


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(device, dtype)


# --- checked, weighed, timed ---------------------------------------------------------------------


def _gap(calls: dict[str, Call]) -> float:
    with torch.no_grad():
        theirs, ours = (calls[name]().double() for name in ("diffusers", "cogvx"))
    return float((theirs - ours).abs().max() / theirs.abs().max())


def _rows(
    part: str,
    size: str,
    dtype: torch.dtype,
    device: torch.device,
    calls: dict[str, Call],
    gap: float,
    budget: float,
) -> list[Row]:
    peaks = {name: _peak(call) for name, call in calls.items()}
    times: dict[str, list[Times]] = {name: [] for name in calls}
    with torch.no_grad():
        for name in [*calls, *reversed(calls)] * (LAPS // 2):
            times[name].append(measure([calls[name]], device, budget))
    rows = []
    for name, laps in times.items():
        ratios = [a.median / b.median for a, b in zip(times["diffusers"], laps, strict=True)]
        there, back = (statistics.median(t.median for t in laps[i::2]) for i in (0, 1))
        rows.append(
            Row(
                part=part,
                size=size,
                provider=name,
                dtype=str(dtype).removeprefix("torch."),
                device=device.type,
                peak_mib=peaks[name] / 2**20,
                memory=peaks[name] / peaks["diffusers"],
                speed=statistics.median(ratios),
                noise_percent=100 * abs(there / back - 1),
                relative_gap=0.0 if name == "diffusers" else gap,
                median_ms=None
                if device.type == "cpu"
                else 1e3 * statistics.median(lap.median for lap in laps),
            )
        )
    return rows


def _peak(call: Call) -> int:
    with torch.no_grad(), LiveBytes() as live:
        call()
    return live.peak


def _table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'part':<12} {'provider':<10} {'peak MiB':>10} {'memory':>8} {'speed':>8} {'noise':>7}"
    ]
    for row in rows:
        time = "" if row.median_ms is None else f"  {row.median_ms:.4g} ms"
        lines.append(
            f"{row.part:<12} {row.provider:<10} {row.peak_mib:>10.1f} {row.memory:>7.2f}x "
            f"{row.speed:>7.2f}x {row.noise_percent:>6.1f}%{time}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
