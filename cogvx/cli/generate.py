"""`cogvx generate`: a prompt, an image or a video to a video."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import TransformerConfig, VAEConfig
from ..pipeline import CogVideoX
from ..pipeline.request import CHOICES, default_size
from ..plan import forecast
from ..schedulers import SOLVERS
from ..video import open_video, read_image
from . import arguments, clips
from .console import Console


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("generate", parents=[shared], help="a prompt to a video")
    arguments.add_model(parser)
    parser.add_argument("--prompt", required=True)
    arguments.add_output(parser, "the video, .mp4, .mov, .mkv or .gif")
    parser.add_argument("--negative", default="", help="what to stay away from")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image", type=Path, help="the first frame (image-to-video models)")
    source.add_argument("--video", type=Path, help="a video to be made anew")
    parser.add_argument("--strength", type=float, default=0.8, help="how much of --video is new")
    arguments.add_size(parser, fps="of the file; 8, or 16 for CogVideoX1.5")
    steps = parser.add_argument_group("the steps")
    steps.add_argument("--seed", type=arguments.seed, help="by default a new one, which is said")
    steps.add_argument("--steps", type=arguments.count, default=50)
    steps.add_argument("--guidance", type=float, default=6.0, help="how much the prompt weighs")
    steps.add_argument("--dynamic-guidance", action="store_true", help="less at first (5B)")
    steps.add_argument("--scheduler", choices=sorted(SOLVERS), help="by default the model's own")
    steps.add_argument("--cfg", choices=CHOICES["cfg"], default="batch", help="two_pass: half the "
                       "memory")  # fmt: skip
    arguments.add_machine(parser)
    parser.add_argument("--backend", choices=("auto", "kernel", "reference"), default="auto")
    parser.add_argument("--vram-budget", type=arguments.size_in_bytes, metavar="BYTES",
                        help="refuse, before weights are read, what needs more: 10G")  # fmt: skip
    parser.add_argument("--checkpoint-every", type=arguments.count, metavar="STEPS",
                        help="save the latents every so many steps")  # fmt: skip
    parser.add_argument("--resume", action="store_true",
                        help="go on from the latents beside the output")  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> None:
    latents = options.out.with_suffix(".latents.safetensors")
    arguments.check_output(options.out, options.force, clips.VIDEOS)
    if not options.resume:
        arguments.check_output(latents, options.force, (".safetensors",))
    elif not latents.is_file():
        raise ValueError(f"{latents}: must be there to --resume; it is not")
    _check_budget(options)
    pipe = CogVideoX.from_pretrained(
        options.model, arguments.dtype_of(options), arguments.device_of(options), options.backend
    )
    seed = options.seed
    if seed is None and not options.resume:
        seed = int(torch.randint(1 << 31, ()))
    pipe.generate(
        options.prompt,
        negative_prompt=options.negative,
        **_source(options, pipe.transformer.config, pipe.vae.config),
        steps=options.steps,
        guidance=options.guidance,
        dynamic_guidance=options.dynamic_guidance,
        scheduler=options.scheduler,
        cfg=options.cfg,
        seed=seed,
        tiling=options.tiling,
        output="latents",
        progress=console.progress,
        save_latents=latents,
        checkpoint_every=options.checkpoint_every,
        resume=latents if options.resume else None,
    )
    fps = options.fps or (8.0 if pipe.transformer.config.patch_size_t is None else 16.0)
    vae = pipe.vae
    del pipe  # what is denoised needs no transformer
    done = partial(console.progress, "decode")
    try:
        has = clips.read_latents(latents, vae)
        frames = clips.write_latents(options.out, vae, has, fps, options.tiling, done)
    except (ValueError, RuntimeError, OSError) as error:
        raise RuntimeError(
            f"{error}. The latents are saved: cogvx decode {latents} --model {options.model} "
            f"--out {options.out} (--tiling needs less memory)"
        ) from error
    facts = {"frames": frames, "fps": fps, "seed": seed, "latents": str(latents)}
    console.say({**facts, "out": str(options.out), "seconds": console.seconds})


def _check_budget(options: argparse.Namespace) -> None:
    if options.vram_budget is None:
        return
    transformer, vae = arguments.read_configs(options.model)
    if transformer is None or vae is None:
        raise ValueError(f"{options.model}: must be a model's folder, with transformer/ and vae/")
    height, width = default_size(transformer, vae)
    frames = options.frames or transformer.sample_frames
    forecast(
        transformer,
        vae,
        frames=frames,
        height=options.height or height,
        width=options.width or width,
        guidance=options.guidance > 1,
        cfg=options.cfg,
        dtype=arguments.dtype_of(options),
        tiling=options.tiling,
        text_bytes=arguments.text_encoder_bytes(options.model),
        encoded=frames if options.video else None,
        backend=options.backend if arguments.device_of(options).type == "cuda" else "reference",
        budget=options.vram_budget,
    )


def _source(
    options: argparse.Namespace, transformer: TransformerConfig, vae: VAEConfig
) -> dict[str, Any]:
    """Size, frames, and the tensor that the video is made from, as `generate` takes them."""
    usual = default_size(transformer, vae)
    size = {"height": options.height or usual[0], "width": options.width or usual[1]}
    if options.image is not None:
        return {"image": read_image(options.image, **size), "num_frames": options.frames, **size}
    if options.video is None:
        return {"num_frames": options.frames, **size}
    frames = options.frames or transformer.sample_frames
    clip = open_video(options.video, frames=frames, fps=options.fps, vae=vae, **size)
    return {"video": clip.read(), "strength": options.strength}
