"""`cogvx plan`, `params`, `convert`."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import sat
from ..assets import located
from ..config import PRESETS, TransformerConfig, VAEConfig
from ..factorized import build_transformer, build_vae
from ..pipeline import default_size
from ..plan import forecast, forecast_meshes
from ..transformer import ExpertTransformer
from ..vae import CausalVAE
from . import loading
from .console import Console
from .outputs import claimed
from .parser import FAMILY

T5_PARAMETERS = 4_762_310_656  # of the encoder of T5 v1.1 XXL, which every released model has


@torch.no_grad()
def plan(options: argparse.Namespace, console: Console) -> None:
    transformer, vae = _configs(options)
    if vae is None:
        raise ValueError(f"{options.model}: must have a vae/ to be planned")
    dtype = loading.dtype_of(options)
    frames, size, text = 49, (vae.sample_height, vae.sample_width), 0
    if transformer is not None:
        frames, size = transformer.sample_frames, default_size(transformer, vae)
        text = T5_PARAMETERS * dtype.itemsize
    if options.model is not None:
        text = loading.text_encoder_bytes(_folder(options))
    console.progress("plan")
    clip: dict[str, Any] = {
        "frames": frames if options.frames is None else options.frames,
        "height": size[0] if options.height is None else options.height,
        "width": size[1] if options.width is None else options.width,
        "guidance": not options.no_guidance,
        "cfg": options.cfg,
        "dtype": dtype,
        "tiling": loading.tiling_of(options),
        "text_bytes": 0 if options.no_text_encoder else text,
        "budget": options.vram_budget,
    }
    if options.gpus is not None:
        if transformer is None:
            raise ValueError(f"{options.model}: must have a transformer/ for --gpus")
        meshes = forecast_meshes(transformer, vae, gpus=options.gpus, **clip)
        console.print_summary(meshes.to_dict(), str(meshes))
        return
    made = forecast(transformer, vae, **clip)
    console.print_summary(made.to_dict(), str(made))


@torch.no_grad()
def params(options: argparse.Namespace, console: Console) -> None:
    sizes = {name: getattr(options, name) for name in FAMILY}
    card = {name: value for name, value in sizes.items() if value is not None}
    modules: dict[str, nn.Module] = {}
    with torch.device("meta"):
        if options.preset is None and options.model is None:
            channels = options.base_channels
            latent = {name: card[name] for name in card if name == "latent_channels"}
            base = {} if channels is None else {"base_channels": channels}
            modules["transformer"] = build_transformer(**card)
            modules["encoder"], modules["decoder"] = build_vae(**latent, **base)
        elif card or options.base_channels is not None:
            raise ValueError("params takes --preset, --model or sizes; got two of them")
        else:
            transformer, vae = _configs(options)
            if transformer is not None:
                modules["transformer"] = ExpertTransformer(transformer)
            if vae is not None:
                built = CausalVAE(vae)
                modules.update(encoder=built.encoder, decoder=built.decoder)
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    counts["total"] = sum(counts.values())
    console.print_summary(
        counts, "\n".join(f"{name:11} {count:15,}" for name, count in counts.items())
    )


@torch.no_grad()
def convert(options: argparse.Namespace, console: Console) -> None:
    target = options.out or options.target
    if target is None or (options.out and options.target):
        raise ValueError("convert needs the folder to write, once: --out DIR")
    console.hold(claimed(target))
    if target.is_dir() and any(target.iterdir()) and not options.force:
        raise ValueError(f"{target}: has files in it already; --force writes there")
    dtype = None if options.dtype is None else loading.dtype_of(options)
    console.progress("convert")
    sat.convert(options.source, target, dtype, vae=options.vae, preset=options.preset)
    written = sorted(path for path in target.rglob("*") if path.is_file())
    names = [path.relative_to(target).as_posix() for path in written]
    console.print_summary({"out": str(target), "files": names, "seconds": console.seconds})


def _folder(options: argparse.Namespace) -> Path:
    """Folder of `--model`; nothing is downloaded."""
    return located(
        options.model, revision=options.revision, variant=options.variant, local_files_only=True
    )


def _configs(options: argparse.Namespace) -> tuple[TransformerConfig | None, VAEConfig | None]:
    if options.preset is None:
        return loading.read_configs(_folder(options))
    preset = PRESETS[options.preset]
    return preset.transformer, preset.vae
