"""What a run starts from: the inputs of the first step, or a file of latents."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint.record import Record, check_record, record_of_config, record_of_model
from ..schedulers import Generators, Solver, TimestepSchedule, randn_tensor
from . import resume
from .conditioning import Progress, embeddings, encoded, image_condition, noisy_video
from .denoise import Conditioning, State, each
from .params import Request
from .ranks import begin_together
from .resume import Saved

if TYPE_CHECKING:
    from .cogvideox import CogVideoX


def begin(
    pipe: "CogVideoX",
    request: Request,
    solver: Solver,
    timesteps: TimestepSchedule,
    generator: Generators,
    progress: Progress,
) -> Saved:
    """All that the first remaining step needs; of a finished run, its latents."""
    recorded = request.save_latents is not None or request.resume is not None
    record = _record(pipe, request, generator) if recorded or pipe.ranks is not None else {}

    def first() -> Saved:
        if request.resume is not None:
            return _resume(pipe, request, record, generator)
        conditioning, state = _prepare(pipe, request, solver, timesteps, generator, progress)
        return Saved(record, len(timesteps), state, conditioning, states(generator))

    if pipe.ranks is None:
        return first()
    encoder = pipe.vae.encoder
    kept, encoder.ranks = encoder.ranks, None  # the first rank encodes alone
    try:
        return begin_together(pipe.ranks, record, first, generator, pipe.device)
    finally:
        encoder.ranks = kept


def _prepare(
    pipe: "CogVideoX",
    request: Request,
    solver: Solver,
    timesteps: TimestepSchedule,
    generator: Generators,
    progress: Progress,
) -> tuple[Conditioning, State]:
    """Inputs of the first step: text, then image or video, then noise, in this order."""
    weight = next(pipe.transformer.parameters())
    like = weight.new_empty(request.shape)
    text, negative = embeddings(pipe.text_encoder, request, progress)
    text, negative = text.to(like), None if negative is None else negative.to(like)
    image = None
    if request.mode != "text":
        source = request.image[:, None] if request.mode == "image" else request.video
        raw = encoded(pipe.vae, source, generator, progress, request.tiling)
        if request.mode == "video":
            latents = noisy_video(raw, pipe.vae, request, solver, timesteps, generator, like)
            return Conditioning(text, negative), State(latents)
        image = image_condition(raw, pipe.vae, request, like)
    if request.latents is None:
        latents = randn_tensor(like, generator)
    else:
        latents = request.latents.to(like)
    return Conditioning(text, negative, image), State(latents)


def _record(pipe: "CogVideoX", request: Request, generator: Generators) -> Record:
    """Everything that must be the same when a file of latents is resumed."""
    adapters = pipe._adapters_of_transformer()
    weights = None if adapters is None else adapters.weights()
    seeds = [one.initial_seed() for one in each(generator)]
    return {
        **resume.record_of(request),
        **record_of_model("transformer", pipe.transformer, weights),
        "lora": None if adapters is None else adapters.record(),
        **record_of_model("vae", pipe.vae),
        **record_of_config("scheduler", pipe.scheduler),
        "generator": ", ".join(one.device.type for one in each(generator)),
        "seed": seeds[0] if len(seeds) == 1 else seeds,
    }


def _resume(pipe: "CogVideoX", request: Request, record: Record, generator: Generators) -> Saved:
    """Read a file to the transformer's device, and restore the generators."""
    assert request.resume is not None
    saved = resume.read(request.resume)
    wanted = {
        name: value for name, value in record.items() if request.seed is not None or name != "seed"
    }
    check_record(request.resume, saved.record, wanted)
    saved.restore(each(generator))
    return saved.to(pipe.device)


def states(generator: Generators) -> Tensor:
    """State of a generator, (bytes,), or of several, (batch, bytes)."""
    found = [one.get_state() for one in each(generator)]
    return found[0] if len(found) == 1 else torch.stack(found)
