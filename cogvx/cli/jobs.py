"""A model and a video of `cogvx generate`, checked before weights are read; and its two halves."""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import load_scheduler
from ..checkpoint.lora import read_lora
from ..checkpoint.record import Record
from ..config import SchedulerConfig, TransformerConfig, VAEConfig
from ..generation import GenerationParams
from ..parallel import Ranks
from ..pipeline import CogVideoX, default_size, resume
from ..pipeline.params import Request, resolve
from ..plan import denoise_flops, forecast, vae_flops
from ..schedulers import SOLVERS
from ..transformer import ExpertTransformer
from ..vae import CausalVAE
from ..video import check_video_output, open_video, read_image
from . import clips, loading
from .console import Console

SAMPLING = ("steps", "guidance", "dynamic_guidance", "solver", "cfg", "image_latent_scale")


@dataclass(frozen=True)
class Model:
    """The model of a command line, checked as far as possible without weights.

    adapters  files of `--lora`, each with its scale
    """

    folder: Path
    dtype: torch.dtype
    device: torch.device
    transformer: TransformerConfig
    vae: VAEConfig
    solver: str
    scheduler: SchedulerConfig
    adapters: list[tuple[Path, float]]

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Model":
        device = loading.device_of(options)
        adapters = _adapters(options)
        folder = loading.model_of(options)
        transformer, vae = loading.read_configs(folder)
        if transformer is None or vae is None:
            raise ValueError(
                f"{options.model}: must be a model's folder, with transformer/ and vae/"
            )
        solver, scheduler = load_scheduler(folder)
        dtype = loading.dtype_of(options, transformer)
        loading.check_tiling(options, vae)
        if adapters:
            with torch.device("meta"):
                empty = ExpertTransformer(transformer)
            for path, _ in adapters:
                read_lora(path, empty)
        return cls(folder, dtype, device, transformer, vae, solver, scheduler, adapters)

    def load(
        self, options: argparse.Namespace, console: Console, text_encoder: bool = True
    ) -> CogVideoX:
        """Read the weights."""
        console.progress("load weights")
        pipe = CogVideoX.from_pretrained(
            self.folder,
            self.dtype,
            self.device,
            options.backend,
            text_encoder=text_encoder,
            variant=options.variant,
        )
        for path, scale in self.adapters:
            pipe.load_lora(path, scale)
        return pipe


@dataclass(frozen=True)
class Job:
    """One video, checked before anything is computed.

    latents  the file beside the video
    params   options of `CogVideoX.generate`, and `record` those that decide the video
    flops    floating-point operations to denoise and decode it
    """

    out: Path
    latents: Path
    seed: int | None
    params: GenerationParams
    record: Record
    fps: float
    flops: float

    @classmethod
    def of(cls, options: argparse.Namespace, model: Model) -> "Job":
        transformer, vae = model.transformer, model.vae
        params = GenerationParams(
            options.prompt,
            negative_prompt=options.negative,
            **{name: getattr(options, name) for name in SAMPLING},
            **_source(options, transformer, vae),
        )
        request = resolve(transformer, vae, params, model.solver)
        solver = SOLVERS[request.solver](model.scheduler)
        steps = solver.timestep_schedule(request.steps, request.strength)
        fps = loading.usual_fps(transformer) if options.fps is None else options.fps
        check_video_output(options.out, fps, request.height, request.width)
        _check_budget(options, request, model)
        _, frames, _, height, width = request.shape
        flops = vae_flops(vae, frames, height, width, decode=True)
        step = denoise_flops(transformer, frames, height, width)
        flops += len(steps) * (1 + request.guided) * step
        record = {**resume.record_of(request), "seed": options.seed}
        latents = latents_of(options.out)
        return cls(options.out, latents, options.seed, params, record, fps, flops)


def latents_of(video: Path) -> Path:
    """The file of latents beside a video."""
    return video.with_suffix(".latents.safetensors")


def seed_of(latents: Path) -> int | None:
    """The seed that saved latents were begun with."""
    seed = resume.read_record(latents).get("seed")
    return seed if isinstance(seed, int) else None


def denoise(
    pipe: CogVideoX, job: Job, options: argparse.Namespace, console: Console, resume_it: bool
) -> None:
    """Write the file of latents; go on with it if `resume_it`."""
    pipe.generate(
        params=job.params,
        seed=job.seed,
        tiling=loading.tiling_of(options),
        output="latents",
        progress=console.progress,
        save_latents=job.latents,
        checkpoint_every=options.checkpoint_every,
        resume=job.latents if resume_it else None,
    )


def decode(
    vae: CausalVAE,
    job: Job,
    options: argparse.Namespace,
    console: Console,
    processes: Ranks | None = None,
) -> int:
    """Write the video from the file of latents; returns its number of frames."""
    done = partial(console.progress, "decode")
    try:
        if processes is None:
            saved = resume.read(job.latents)
        else:  # the other machines may not have the file
            saved = processes.shared(lambda: resume.read(job.latents))
        return clips.write_latents(job.out, vae, saved, job.fps, loading.tiling_of(options), done)
    except (ValueError, RuntimeError, OSError) as error:
        raise RuntimeError(
            f"{error}. The latents are saved: cogvx decode {job.latents} --model {options.model} "
            f"--out {job.out} --fps {job.fps:g} (--tiling needs less memory)"
        ) from error


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


def _check_budget(options: argparse.Namespace, request: Request, model: Model) -> None:
    if options.vram_budget is None:
        return
    forecast(
        model.transformer,
        model.vae,
        frames=request.num_frames,
        height=request.height,
        width=request.width,
        guidance=request.guided,
        cfg=options.cfg,
        dtype=model.dtype,
        tiling=loading.tiling_of(options),
        text_bytes=loading.text_encoder_bytes(model.folder),
        encoded=request.num_frames if options.video else None,
        backend=options.backend if model.device.type == "cuda" else "reference",
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
