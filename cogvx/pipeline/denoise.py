"""The loop from noise to latents: predict, guide, step."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schedulers import Generators, Solver, TimestepSchedule, dynamic_guidance
from ..threads import suited_threads
from ..transformer import STEPS_AHEAD, ExpertTransformer, Modulations, ProjectedText
from .params import Request, check_finite

OFS = 2.0  # the only one that CogVideoX1.5-5B-I2V was trained with

Callback = Callable[[int, int, Tensor], Tensor | None]


@dataclass(frozen=True)
class Conditioning:
    """What every prediction is told.

    text      embeddings of the prompts, (batch, text_len, dim)
    negative  of what to stay away from, the same shape; None without guidance
    image     latents of the first frame and zeros after it, as the noisy latents but for noise;
              None in a model that takes no image
    """

    text: Tensor
    negative: Tensor | None = None
    image: Tensor | None = None


@dataclass(frozen=True)
class State:
    """Where a run is: latents after `done` steps, and the solver's memory of the last of them."""

    latents: Tensor
    prev_x0: Tensor | None = None
    done: int = 0


def denoise(
    transformer: ExpertTransformer,
    solver: Solver,
    steps: TimestepSchedule,
    state: State,
    conditioning: Conditioning,
    request: Request,
    generator: Generators,
    callback: Callback | None = None,
) -> Iterator[State]:
    """Yields the state after each step that is left, until all are done.

    What depends on the text alone is computed once, and what depends on the time alone for
    `STEPS_AHEAD` steps at a time.

    callback  called with the number of the step, from 0, its timestep and the latents after it;
              what it returns, unless None, takes their place

    Raises FloatingPointError, naming the step, as soon as latents are not finite. (To know it, each
    step waits for the device; that is what a progress bar is about, too.)
    """
    latents, prev_x0 = state.latents, state.prev_x0
    texts = prepare_text(transformer, conditioning, request.cfg == "batch")
    for index, modulations in iter_modulations(transformer, steps, state.done):
        timestep = steps.timesteps[index]
        guidance = request.guidance
        if request.dynamic_guidance:
            guidance = dynamic_guidance(guidance, timestep, len(steps))
        v = predict(transformer, latents, conditioning.image, texts, modulations, guidance)
        latents, prev_x0 = solver.step(latents, v, index, steps, prev_x0, generator)
        check_finite(latents, f"step {index + 1} of {len(steps)}, timestep {timestep},")
        if callback is not None:
            changed = callback(index, timestep, latents)
            latents = latents if changed is None else changed.to(latents)
        yield State(latents, prev_x0, index + 1)


def prepare_text(
    transformer: ExpertTransformer, conditioning: Conditioning, together: bool
) -> list[ProjectedText]:
    """The texts of every prediction of a step, in the order in which the transformer is asked.

    together  the negative text and the text in one batch, the negative half first; else one after
              the other, in half the memory
    """
    if conditioning.negative is None:
        texts = [conditioning.text]
    elif together:
        texts = [torch.cat([conditioning.negative, conditioning.text])]
    else:
        texts = [conditioning.negative, conditioning.text]
    return [transformer.project_text(text) for text in texts]


def iter_modulations(
    transformer: ExpertTransformer, steps: TimestepSchedule, done: int
) -> Iterator[tuple[int, Modulations]]:
    """The number of each step that is left, and its modulations.

    They are made for the same runs of steps wherever a generation is gone on with, because a
    product's bits may depend on how many rows it has.
    """
    ofs = None if transformer.config.ofs_embed_dim is None else torch.tensor(OFS)
    for first in range(done - done % STEPS_AHEAD, len(steps), STEPS_AHEAD):
        run = steps.timesteps[first : first + STEPS_AHEAD]
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
) -> Tensor:
    """v at a step, in float32: without - and away from - the negative text, with the text.

    v = v_negative + guidance·(v_text - v_negative). Where the texts (`told`) have no negative one,
    v_text.
    """
    if image is not None:
        latents = torch.cat([latents, image], 2)

    def ask(latents: Tensor, text: ProjectedText) -> Tensor:
        with suited_threads(_values(transformer, latents, text), latents.device):
            v: Tensor = transformer(latents, text, modulations=modulations)
        return v.float()

    if len(texts) == 2:
        away, towards = (ask(latents, text) for text in texts)
    elif len(texts[0].tokens) == len(latents):
        return ask(latents, texts[0])
    else:
        away, towards = ask(torch.cat([latents, latents]), texts[0]).chunk(2)
    return away + guidance * (towards - away)


def _values(transformer: ExpertTransformer, latents: Tensor, text: ProjectedText) -> int:
    """Values of the joint sequence of a prediction."""
    patches = latents.numel() // latents.shape[2] // math.prod(transformer.patch)
    return text.tokens.numel() + patches * transformer.config.hidden_size


def make_generator(seed: int | None, generator: Generators | None, batch: int) -> Generators:
    """The caller's; or one of the seed, on the CPU; or of a seed that torch itself draws."""
    if generator is not None:
        if seed is not None:
            raise ValueError("CogVideoX.generate: seed must be None beside a generator; got both")
        if isinstance(generator, torch.Generator):
            return generator
        several = list(generator) if isinstance(generator, Sequence) else [generator]
        if any(not isinstance(item, torch.Generator) for item in several):
            raise TypeError(
                "CogVideoX.generate: generator must be a torch.Generator or a list of them; got "
                f"{type(several[0]).__name__}"
            )
        if len(several) != batch:
            raise ValueError(
                f"CogVideoX.generate: generator must be one, or one for each of {batch} videos; "
                f"got {len(several)}"
            )
        return several if batch > 1 else several[0]
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"CogVideoX.generate: seed must be an integer; got {seed!r}")
    return torch.Generator().manual_seed(seed)


def each(generator: Generators) -> list[torch.Generator]:
    """One generator, or all of several, as a list."""
    return [generator] if isinstance(generator, torch.Generator) else list(generator)
