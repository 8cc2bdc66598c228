"""Resolve options to a device, a dtype, a model's folder, configs, a VAE."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from cogvx_kernels import module_backend

from ..assets import located
from ..checkpoint import load_vae
from ..config import PRESETS, Config, TransformerConfig, VAEConfig
from ..factorized import build_vae
from ..files import CONFIG_BYTES, read_json
from ..pipeline import default_dtype
from ..plan import vae_flops
from ..vae import CausalVAE, Tiling
from ..validation import dtype_name
from .arguments import DTYPES
from .console import Console

C = TypeVar("C", bound=Config)
LONG = 600.0  # seconds; longer runs are announced
SLOWEST = 1e9  # operations a second of the slowest device
SIDE = 512  # of the matrices whose product is timed


def device_of(options: argparse.Namespace) -> torch.device:
    """Device of `--device`, which must be available; by default a GPU if there is one."""
    here = devices()
    name = {"gpu": "cuda"}.get(options.device, options.device)
    if name is None:
        return torch.device("cuda" if "cuda" in here else "cpu")
    if name not in here:
        raise ValueError(
            f"--device must be one of those that are here, {', '.join(here)}; got {options.device}"
        )
    return torch.device(name)


def devices() -> list[str]:
    """Names of the available devices."""
    gpus = ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *(gpus if torch.cuda.is_available() else []), *mps]


def dtype_of(
    options: argparse.Namespace, transformer: TransformerConfig | None = None
) -> torch.dtype:
    """Dtype of `--dtype`, or the default of a model with this transformer."""
    if options.dtype is not None:
        dtype = getattr(torch, DTYPES[options.dtype])
        assert isinstance(dtype, torch.dtype)
        return dtype
    return default_dtype(transformer or PRESETS["5b"].transformer, device_of(options))


def model_of(options: argparse.Namespace, parts: Sequence[str] | None = None) -> Path:
    """Folder of `--model`; from the hub `parts`, by default all, are downloaded."""
    return located(options.model, parts=parts, revision=options.revision, variant=options.variant)


def usual_fps(transformer: TransformerConfig | None) -> float:
    """Default frames per second: 16 for CogVideoX 1.5, which patches frames, else 8."""
    return 16.0 if transformer is not None and (transformer.patch_size_t or 1) > 1 else 8.0


def read_configs(folder: Path) -> tuple[TransformerConfig | None, VAEConfig | None]:
    """Read the configs in a model's folder."""
    transformer = _config(folder / "transformer", TransformerConfig)
    vae = _config(folder / "vae", VAEConfig)
    if transformer is None and vae is None:
        what = "one without them" if folder.is_dir() else "no folder of that name"
        raise ValueError(
            f"{folder}: must be a model's folder, with transformer/ or vae/ in it, or a name on "
            f"the Hugging Face hub, such as THUDM/CogVideoX-5b; got {what}"
        )
    return transformer, vae


@dataclass(frozen=True)
class VAESource:
    """VAE of `arguments.add_vae`, before its weights are read.

    folder       None for a random one
    transformer  config of the model that it is part of, or None
    """

    options: argparse.Namespace
    folder: Path | None
    config: VAEConfig
    transformer: TransformerConfig | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> "VAESource":
        """Find the VAE and read its config; checks device and tile size."""
        device_of(options)
        if options.vae == "random":
            with torch.device("meta"):
                config = build_vae(base_channels=options.base_channels)[0].config
            source = cls(options, None, config)
        else:
            name = options.model or options.vae
            folder = located(
                name, parts=["vae"], revision=options.revision, variant=options.variant
            )
            found = _config(folder / "vae", VAEConfig) or _config(folder, VAEConfig)
            if found is None:
                raise ValueError(
                    f"{name}: must be a folder with config.json or vae/ in it, or the name of a "
                    "model on the hub"
                )
            transformer = _config(folder / "transformer", TransformerConfig)
            source = cls(options, folder, found, transformer)
        check_tiling(options, source.config)
        return source

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.options, self.transformer)

    def warn_if_long(
        self, console: Console, frames: int, height: int, width: int, *kinds: str
    ) -> None:
        """Print an estimate if "encode", "decode" or both of these latents take long."""
        flops = [vae_flops(self.config, frames, height, width, decode=k == "decode") for k in kinds]
        warn_if_long(console, sum(flops), device_of(self.options), self.dtype)

    def load(self, console: Console) -> CausalVAE:
        """Load the VAE to its device."""
        options = self.options
        device, dtype = device_of(options), self.dtype
        if self.folder is not None:
            console.progress("load weights")
            return load_vae(self.folder, dtype, device, options.backend, variant=options.variant)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            with module_backend(options.backend):
                vae = CausalVAE(self.config)
        return vae.to(device, dtype).eval()


def tiling_of(options: argparse.Namespace) -> Tiling | None:
    """Tiles of `--tiling`, or None."""
    return None if options.tiling is None else Tiling(*options.tiling)


def check_tiling(options: argparse.Namespace, vae: VAEConfig) -> None:
    """Raises ValueError if tiles are not a multiple of a latent."""
    tiling = tiling_of(options) if "tiling" in options else None
    if tiling is not None:
        tiling.check("cogvx", vae.spatial_compression_ratio)


def warn_if_long(console: Console, flops: float, device: torch.device, dtype: torch.dtype) -> None:
    """Print an estimate of the time for `flops` operations, if it is long."""
    if flops < LONG * SLOWEST:
        return
    rate = matmul_rate(device, dtype)
    seconds = flops / rate
    if seconds >= LONG:
        name = dtype_name(dtype)
        console.note(
            f"this will take about {duration(seconds)} on {device} in {name} (estimated from "
            f"{flops:.1e} operations and the {rate:.1e} a second of a matrix product here)"
        )


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Measured floating-point operations per second of a matrix product."""
    x, count = torch.ones(SIDE, SIDE, device=device, dtype=dtype), 0
    float((x @ x)[0, 0])  # warm-up
    start = now = time.perf_counter()
    while now < start + seconds:
        float((x @ x)[0, 0])  # waits for the device
        count, now = count + 1, time.perf_counter()
    return 2 * SIDE**3 * count / (now - start)


def duration(seconds: float) -> str:
    """Format seconds as 25 min, 3 h 20 min, or 12 days."""
    minutes = round(seconds / 60)
    if minutes >= 2 * 24 * 60:
        return f"{round(minutes / (24 * 60)):,} days"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def text_encoder_bytes(folder: Path) -> int:
    """Bytes of the text encoder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("text_encoder/*.safetensors"))


def _config(folder: Path, kind: type[C]) -> C | None:
    path = folder / "config.json"
    return kind.from_dict(read_json(path, CONFIG_BYTES)) if path.is_file() else None
