"""Denoising loop: predict, guide, step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvx_kernels.context_parallel import Context

from ..generation import WHERE
from ..profiling import annotate
from ..schedulers import Generators, Solver, TimestepSchedule, dynamic_guidance
from ..threads import suited_threads
from ..transformer import STEPS_AHEAD, ExpertTransformer, Modulations, ProjectedText
from ..validation import invalid
from .params import Request, check_finite

OFS = 2.0  # the only value that CogVideoX1.5-5B-I2V was trained with


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of every step.

    text      embeddings of the prompts, (batch, text_len, dim)
    negative  of the negative prompts, the same shape; None without guidance
    image     latents of the first frame, then zeros, of the shape of the noisy latents; None if the
              model takes no image
    """

    text: Tensor
    negative: Tensor | None = None
    image: Tensor | None = None


@dataclass(frozen=True)
class State:
    """State after `done` steps: latents, and the solver's previous x0."""

    latents: Tensor
    prev_x0: Tensor | None = None
    done: int = 0


def denoise(
    transformer: ExpertTransformer,
    solver: Solver,
    timesteps: TimestepSchedule,
    state: State,
    conditioning: Conditioning,
    request: Request,
    generator: Generators,
    guides: Context | None = None,
) -> Iterator[State]:
    """Yield the state after each remaining step.

    guides  two ranks, or groups of them, of which each computes one prediction of guidance

    Text projections are computed once, modulations for `STEPS_AHEAD` steps at a time.

    `request.callback` is called with the index of the step, from 0, its timestep and the latents
    after it; a result other than None replaces them.

    Raises FloatingPointError, naming the step, as soon as latents are not finite. (This waits for
    the device at each step, as a progress bar needs it, too.)
    """
    latents, prev_x0 = state.latents, state.prev_x0
    together = request.cfg == "batch" and guides is None
    texts = prepare_text(transformer, conditioning, together)
    for index, modulations in iter_modulations(transformer, timesteps, state.done):
        timestep = timesteps.timesteps[index]
        guidance = request.guidance
        if request.dynamic_guidance:
            guidance = dynamic_guidance(guidance, timestep, len(timesteps))
        with annotate(f"step {index + 1}"):
            inputs = latents, conditioning.image, texts, modulations, guidance, guides
            v = predict(transformer, *inputs)
            latents, prev_x0 = solver.step(latents, v, index, timesteps, prev_x0, generator)
        check_finite(latents, f"step {index + 1} of {len(timesteps)}, timestep {timestep},")
        if request.callback is not None:
            changed = request.callback(index, timestep, latents)
            latents = latents if changed is None else changed.to(latents)
        yield State(latents, prev_x0, index + 1)


def prepare_text(
    transformer: ExpertTransformer, conditioning: Conditioning, together: bool
) -> list[ProjectedText]:
    """Projected texts of each forward of a step, the negative ones first.

    together  one batch, the negative half first; else one after the other, in half the memory
    """
    if conditioning.negative is None:
        texts = [conditioning.text]
    elif together:
        texts = [torch.cat([conditioning.negative, conditioning.text])]
    else:
        texts = [conditioning.negative, conditioning.text]
    return [transformer.project_text(text) for text in texts]


def iter_modulations(
    transformer: ExpertTransformer, timesteps: TimestepSchedule, done: int
) -> Iterator[tuple[int, Modulations]]:
    """Index and modulations of each remaining step.

    Computed for the same runs of steps wherever a generation is resumed, because the bits of a
    matrix product may depend on its number of rows.
    """
    ofs = None if transformer.config.ofs_embed_dim is None else torch.tensor(OFS)
    for first in range(done - done % STEPS_AHEAD, len(timesteps), STEPS_AHEAD):
        run = timesteps.timesteps[first : first + STEPS_AHEAD]
        ahead = transformer.modulations(torch.tensor(run), ofs)
        for index in range(max(first, done), first + len(run)):
            yield index, ahead.at(index - first)


def predict(
    transformer: ExpertTransformer,
    latents: Tensor,
    image: Tensor | None,
    texts: list[ProjectedText],
    modulations: Modulations,
    guidance: float,
    guides: Context | None = None,
) -> Tensor:
    """Predict v at a step, with guidance, in float32.

    v_negative + guidance·(v_text - v_negative), or v_text without a negative text.
    """
    if image is not None:
        latents = torch.cat([latents, image], 2)

    def forward(latents: Tensor, text: ProjectedText) -> Tensor:
        values = _values(transformer, latents, text)
        with suited_threads(values, latents.device), annotate("transformer"):
            v: Tensor = transformer(latents, text, modulations=modulations)
        return v.float()

    if guides is not None:
        v = forward(latents, texts[guides.rank])
        negative, positive = guides.gather(v[None], [len(v)] * 2)[0].chunk(2)
    elif len(texts) == 2:
        negative, positive = (forward(latents, text) for text in texts)
    elif len(texts[0].tokens) == len(latents):
        return forward(latents, texts[0])
    else:
        negative, positive = forward(torch.cat([latents, latents]), texts[0]).chunk(2)
    return negative + guidance * (positive - negative)


def _values(transformer: ExpertTransformer, latents: Tensor, text: ProjectedText) -> int:
    """Number of values of the joint sequence."""
    patches = latents.numel() // latents.shape[2] // math.prod(transformer.patch)
    return text.tokens.numel() + patches * transformer.config.hidden_size


def drawn_seed() -> int:
    """A seed that torch draws."""
    return int(torch.randint(2**63 - 1, ()))


def make_generator(seed: int | None, generator: Generators | None, batch: int) -> Generators:
    """The caller's generator; or a CPU one with the seed, or a seed that torch draws."""
    if generator is None:
        seed = drawn_seed() if seed is None else seed
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise invalid(WHERE, "seed", "an integer", repr(seed), TypeError)
        return torch.Generator().manual_seed(seed)
    if seed is not None:
        raise invalid(WHERE, "seed", "None beside a generator", "both")
    if isinstance(generator, torch.Generator):
        return generator
    several = list(generator) if isinstance(generator, Sequence) else [generator]
    if any(not isinstance(item, torch.Generator) for item in several):
        wanted, got = "a torch.Generator or a list of them", type(several[0]).__name__
        raise invalid(WHERE, "generator", wanted, got, TypeError)
    if len(several) != batch:
        raise invalid(WHERE, "generator", f"one, or one for each of {batch} videos", len(several))
    return several if batch > 1 else several[0]


def each(generator: Generators) -> list[torch.Generator]:
    """Generators as a list."""
    return [generator] if isinstance(generator, torch.Generator) else list(generator)
