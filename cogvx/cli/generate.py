"""`cogvx generate`: text-, image- or video-to-video."""

import argparse

import torch

from ..parallel import context_parallel
from ..profiling import NVTX, profiled
from . import clips, ranks
from .console import Console
from .jobs import Job, Model, decode, denoise, latents_of, seed_of
from .loading import tiling_of, warn_if_long
from .outputs import output
from .prompts import generate_all


@torch.no_grad()
def generate(options: argparse.Namespace, console: Console) -> None:
    if options.prompts is not None:
        if options.profile is not None:
            raise ValueError("--profile must come with --prompt; got --prompts")
        generate_all(options, console)
        return
    if options.ray is not None:
        raise ValueError("--ray must come with --prompts; got one --prompt")
    processes = ranks.start(options, console, guided=options.guidance > 1)

    def claim() -> int | None:
        return _claim(options, console)

    options.seed = claim() if processes is None else processes.shared(claim)
    model = Model.of(options)
    job = Job.of(options, model)
    warn_if_long(console, job.flops, model.device, model.dtype)
    first = processes is None or processes.first
    pipe = model.load(options, console, text_encoder=first)
    if processes is not None:
        context_parallel(pipe, processes.mesh)
    with profiled(options.profile if first else None):
        denoise(pipe, job, options, console, resume_it=options.resume)
        vae = pipe.vae
        del pipe  # decoding needs no transformer
        ranks.share(vae, processes, tiling_of(options))
        frames = decode(vae, job, options, console, processes)
    ranks.end(processes)
    if options.profile is not None and str(options.profile) != NVTX:
        console.note(f"profile: {options.profile}, for https://ui.perfetto.dev")
    facts = {"frames": frames, "fps": job.fps, "seed": job.seed, "latents": str(job.latents)}
    console.print_summary({**facts, "out": str(job.out), "seconds": console.seconds})


def _claim(options: argparse.Namespace, console: Console) -> int | None:
    """Check and lock the outputs; returns the seed."""
    latents, seed = latents_of(options.out), options.seed
    console.hold(output(options.out, options.force, clips.VIDEOS))
    console.hold(output(latents, options.force or options.resume, (".safetensors",)))
    if options.profile is not None and str(options.profile) != NVTX:
        console.hold(output(options.profile, options.force, (".json",), "--profile"))
    elif options.profile is not None and not torch.cuda.is_available():
        raise ValueError("--profile must be a .json file where there is no CUDA device; got nvtx")
    if options.resume and not latents.is_file():
        raise ValueError(f"{latents}: must be there to --resume; it is not")
    if seed is None:
        seed = seed_of(latents) if options.resume else int(torch.randint(1 << 31, ()))
    return seed if seed is None else int(seed)
