"""`cogvx plan`, `params`, `convert`: what a model needs, how large it is, where it comes from."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import sat
from ..config import PRESETS, TransformerConfig, VAEConfig
from ..factorized import build_transformer, build_vae
from ..pipeline import default_size
from ..plan import forecast
from ..transformer import ExpertTransformer
from ..vae import CausalVAE
from . import arguments
from .console import Console

T5_PARAMETERS = 4_762_310_656  # of the encoder of T5 v1.1 XXL, which every released model has
CARD = {
    "hidden_size": arguments.count,
    "num_heads": arguments.count,
    "num_layers": arguments.count,
    "text_hidden_size": arguments.count,
    "mlp_ratio": float,
    "num_text_experts": arguments.count,
    "num_video_experts": arguments.count,
    "latent_channels": arguments.count,
}


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("plan", parents=[shared], help="what a clip needs, before it runs")
    _add_which(parser)
    arguments.add_size(parser)
    parser.add_argument("--dtype", choices=arguments.DTYPES, default="bfloat16")
    parser.add_argument("--cfg", choices=("batch", "two_pass"), default="batch")
    parser.add_argument("--no-guidance", action="store_true", help="one prediction a step")
    parser.add_argument("--no-text-encoder", action="store_true", help="embeddings are given")
    arguments.add_tiling(parser)
    parser.add_argument("--vram-budget", type=arguments.size_in_bytes, metavar="BYTES",
                        help="fail if it needs more: 10G")  # fmt: skip
    parser.set_defaults(run=plan)

    parser = commands.add_parser("params", parents=[shared], help="exact numbers of parameters")
    _add_which(parser, required=False)
    group = parser.add_argument_group("a factorised model with experts")
    for name, kind in {**CARD, "base_channels": arguments.count}.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.set_defaults(run=params)

    parser = commands.add_parser("convert", parents=[shared], help="a SAT checkpoint to a folder")
    parser.add_argument("source", type=Path, help="a file or folder of SAT")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--vae", type=Path, help="the file of the VAE, where it is one of its own")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="by default told from the file")
    parser.add_argument("--dtype", choices=arguments.DTYPES, help="by default that of the file")
    parser.add_argument("--force", action="store_true", help="write into a folder with files in it")
    parser.set_defaults(run=convert)


def plan(options: argparse.Namespace, console: Console) -> None:
    transformer, vae = _configs(options)
    if vae is None:
        raise ValueError(f"{options.model}: must have a vae/ to be planned")
    dtype = arguments.DTYPES[options.dtype]
    frames, size, text = 49, (vae.sample_height, vae.sample_width), 0
    if transformer is not None:
        frames, size = transformer.sample_frames, default_size(transformer, vae)
        text = T5_PARAMETERS * dtype.itemsize
    if options.model is not None:
        text = arguments.text_encoder_bytes(options.model)
    made = forecast(
        transformer,
        vae,
        frames=options.frames or frames,
        height=options.height or size[0],
        width=options.width or size[1],
        guidance=not options.no_guidance,
        cfg=options.cfg,
        dtype=dtype,
        tiling=options.tiling,
        text_bytes=0 if options.no_text_encoder else text,
        budget=options.vram_budget,
    )
    console.say(made.to_dict(), str(made))


def params(options: argparse.Namespace, console: Console) -> None:
    card = {name: getattr(options, name) for name in CARD if getattr(options, name) is not None}
    modules: dict[str, nn.Module] = {}
    with torch.device("meta"):
        if options.preset is None and options.model is None:
            channels = options.base_channels
            latent = {name: card[name] for name in card if name == "latent_channels"}
            base = {} if channels is None else {"base_channels": channels}
            modules["transformer"] = build_transformer(**card)
            modules["encoder"], modules["decoder"] = build_vae(**latent, **base)
        elif card or options.base_channels is not None:
            raise ValueError("params: must have a preset, a model or sizes of your own; got two")
        else:
            transformer, vae = _configs(options)
            if transformer is not None:
                modules["transformer"] = ExpertTransformer(transformer)
            if vae is not None:
                built = CausalVAE(vae)
                modules.update(encoder=built.encoder, decoder=built.decoder)
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    console.say({**counts, "total": sum(counts.values())})


def convert(options: argparse.Namespace, console: Console) -> None:
    if options.target.is_dir() and any(options.target.iterdir()) and not options.force:
        raise ValueError(f"{options.target}: has files in it already; --force writes there")
    dtype = None if options.dtype is None else arguments.DTYPES[options.dtype]
    sat.convert(options.source, options.target, dtype, vae=options.vae, preset=options.preset)
    written = sorted(path for path in options.target.rglob("*") if path.is_file())
    names = [path.relative_to(options.target).as_posix() for path in written]
    console.say({"out": str(options.target), "files": names, "seconds": console.seconds})


def _add_which(parser: argparse.ArgumentParser, required: bool = True) -> None:
    which = parser.add_mutually_exclusive_group(required=required)
    which.add_argument("--preset", choices=sorted(PRESETS), help="a released model")
    arguments.add_model(which, required=False)


def _configs(options: argparse.Namespace) -> tuple[TransformerConfig | None, VAEConfig | None]:
    if options.preset is None:
        return arguments.read_configs(options.model)
    preset = PRESETS[options.preset]
    return preset.transformer, preset.vae
