"""`cogvx generate`: text-, image- or video-to-video."""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import load_scheduler
from ..checkpoint.lora import read_lora
from ..config import TransformerConfig, VAEConfig
from ..generation import GenerationParams
from ..pipeline import CogVideoX, default_size, resume
from ..pipeline.params import Request, resolve
from ..plan import denoise_flops, forecast, vae_flops
from ..schedulers import SOLVERS
from ..transformer import ExpertTransformer
from ..video import check_video_output, open_video, read_image
from . import clips, loading
from .console import Console
from .outputs import output

SAMPLING = ("steps", "guidance", "dynamic_guidance", "solver", "cfg", "image_latent_scale")


@dataclass(frozen=True)
class Job:
    """A generation, checked as far as possible without weights.

    params  options of `CogVideoX.generate`
    flops   floating-point operations to denoise and decode it
    """

    folder: Path
    dtype: torch.dtype
    device: torch.device
    params: GenerationParams
    fps: float
    flops: float


@torch.no_grad()
def generate(options: argparse.Namespace, console: Console) -> None:
    latents = options.out.with_suffix(".latents.safetensors")
    console.hold(output(options.out, options.force, clips.VIDEOS))
    console.hold(output(latents, options.force or options.resume, (".safetensors",)))
    if options.resume and not latents.is_file():
        raise ValueError(f"{latents}: must be there to --resume; it is not")
    seed = options.seed
    if options.resume:
        before = resume.read(latents).record
        seed = before.get("seed") if seed is None else seed
    elif seed is None:
        seed = int(torch.randint(1 << 31, ()))
    job = _checked(options)
    loading.warn_if_long(console, job.flops, job.device, job.dtype)
    console.progress("load weights")
    pipe = CogVideoX.from_pretrained(
        job.folder, job.dtype, job.device, options.backend, variant=options.variant
    )
    for path, scale in _adapters(options):
        pipe.load_lora(path, scale)
    pipe.generate(
        params=job.params,
        seed=seed,
        tiling=loading.tiling_of(options),
        output="latents",
        progress=console.progress,
        save_latents=latents,
        checkpoint_every=options.checkpoint_every,
        resume=latents if options.resume else None,
    )
    vae = pipe.vae
    del pipe  # decoding needs no transformer
    done = partial(console.progress, "decode")
    try:
        saved = resume.read(latents)
        frames = clips.write_latents(
            options.out, vae, saved, job.fps, loading.tiling_of(options), done
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise RuntimeError(
            f"{error}. The latents are saved: cogvx decode {latents} --model {options.model} "
            f"--out {options.out} --fps {job.fps:g} (--tiling needs less memory)"
        ) from error
    facts = {"frames": frames, "fps": job.fps, "seed": seed, "latents": str(latents)}
    console.print_summary({**facts, "out": str(options.out), "seconds": console.seconds})


def _checked(options: argparse.Namespace) -> Job:
    """Check everything that can be checked before weights are read."""
    device = loading.device_of(options)
    adapters = _adapters(options)
    folder = loading.model_of(options)
    transformer, vae = loading.read_configs(folder)
    if transformer is None or vae is None:
        raise ValueError(f"{options.model}: must be a model's folder, with transformer/ and vae/")
    solver, scheduler = load_scheduler(folder)
    dtype = loading.dtype_of(options, transformer)
    loading.check_tiling(options, vae)
    params = GenerationParams(
        options.prompt,
        negative_prompt=options.negative,
        **{name: getattr(options, name) for name in SAMPLING},
        **_source(options, transformer, vae),
    )
    request = resolve(transformer, vae, params, solver)
    steps = SOLVERS[request.solver](scheduler).timestep_schedule(request.steps, request.strength)
    fps = loading.usual_fps(transformer) if options.fps is None else options.fps
    check_video_output(options.out, fps, request.height, request.width)
    _check_budget(options, request, transformer, vae, dtype, folder)
    if adapters:
        with torch.device("meta"):
            empty = ExpertTransformer(transformer)
        for path, _ in adapters:
            read_lora(path, empty)
    _, frames, _, height, width = request.shape
    flops = vae_flops(vae, frames, height, width, decode=True)
    flops += len(steps) * (1 + request.guided) * denoise_flops(transformer, frames, height, width)
    return Job(folder, dtype, device, params, fps, flops)


def _adapters(options: argparse.Namespace) -> list[tuple[Path, float]]:
    """Files of `--lora`, each with its scale."""
    scales = options.lora_scale or [1.0]
    if options.lora_scale and not options.lora:
        raise ValueError("--lora-scale must come with --lora; got none")
    if len(scales) not in (1, len(options.lora)):
        raise ValueError(
            f"--lora-scale must be given once, or once for each of {len(options.lora)} --lora; got "
            f"{len(scales)}"
        )
    scales = scales * len(options.lora) if len(scales) == 1 else scales
    return list(zip(options.lora, scales, strict=True))


def _check_budget(
    options: argparse.Namespace,
    request: Request,
    transformer: TransformerConfig,
    vae: VAEConfig,
    dtype: torch.dtype,
    folder: Path,
) -> None:
    if options.vram_budget is None:
        return
    forecast(
        transformer,
        vae,
        frames=request.num_frames,
        height=request.height,
        width=request.width,
        guidance=request.guided,
        cfg=options.cfg,
        dtype=dtype,
        tiling=loading.tiling_of(options),
        text_bytes=loading.text_encoder_bytes(folder),
        encoded=request.num_frames if options.video else None,
        backend=options.backend if loading.device_of(options).type == "cuda" else "reference",
        budget=options.vram_budget,
    )


def _source(
    options: argparse.Namespace, transformer: TransformerConfig, vae: VAEConfig
) -> dict[str, Any]:
    """Size, number of frames, and source tensor, as arguments of `generate`."""
    usual = default_size(transformer, vae)
    height = usual[0] if options.height is None else options.height
    width = usual[1] if options.width is None else options.width
    size = {"height": height, "width": width}
    if options.video is None:
        image: Tensor | None = None
        if options.image is not None:
            image = read_image(options.image, **size)
        return {"image": image, "num_frames": options.frames, **size}
    frames = transformer.sample_frames if options.frames is None else options.frames
    clip = open_video(options.video, frames=frames, fps=options.fps, vae=vae, **size)
    return {"video": clip.read(), "strength": options.strength}
