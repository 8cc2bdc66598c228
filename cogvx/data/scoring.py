"""How often a model's clips show what their sentences say, over sentences it was not trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from ..pipeline import CogVideoX
from ..vae import CausalVAE
from ..video import PSNR
from .procedural import ProceduralClips
from .reading import Score, score
from .scenes import Scene, describe

NAMES = ("color", "shape", "motion", "count", "all")
AT_ONCE = 10
CLIPS_OF_PSNR = 50

# How models of these clips are sampled. What the first steps predict is a mean over all places
# where a thing may be; guidance makes more of it, until one thing comes twice: 1 is without.
STEPS, GUIDANCE = 30, 1.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scores:
    """Parts of the clips, in [0, 1], that show the right colors, shapes, motions, number of things,
    and all of it; `prompts` is how many clips there were."""

    prompts: int
    color: float
    shape: float
    motion: float
    count: float
    all: float

    @classmethod
    def of(cls, scores: Sequence[Score]) -> "Scores":
        parts = {name: sum(getattr(s, name) for s in scores) / len(scores) for name in NAMES}
        return cls(prompts=len(scores), **parts)

    def to_dict(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def held_out_prompts(count: int, skip: int = 0) -> dict[str, Scene]:
    """So many sentences of the test split, all different, each with its scene; the first `skip` of
    them left out."""
    clips = ProceduralClips("test", 100 * (skip + count))
    found: dict[str, Scene] = {}
    for index in range(len(clips)):
        scene = clips.scene(index)
        found[describe(scene)] = scene
        if len(found) == skip + count:
            return dict(list(found.items())[skip:])
    raise ValueError(
        f"held_out_prompts: skip + count must be at most {len(found)}; got {skip} + {count}"
    )


def score_model(
    pipe: CogVideoX,
    prompts: int = 200,
    *,
    skip: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Scores, Scores]:
    """(scores, control): a clip for each of so many held-out sentences, read by `score`.

    `skip` leaves out so many of the sentences, the first, as those that a choice was made with.
    The control reads the same clips against the sentences of others, and so says what chance gives.
    Seeds are `seed` and those after it, one for every ten clips.
    """
    scenes = held_out_prompts(prompts, skip)
    said, wanted = list(scenes), list(scenes.values())
    own, others = [], []
    for first in range(0, prompts, AT_ONCE):
        batch = said[first : first + AT_ONCE]
        number = seed + first // AT_ONCE
        videos = pipe.generate(batch, steps=steps, guidance=guidance, seed=number)
        for index, video in enumerate(videos, first):
            own.append(score(video, wanted[index]))
            others.append(score(video, wanted[(index + prompts // 2) % prompts]))
        if progress is not None:
            progress(len(own), prompts)
    return Scores.of(own), Scores.of(others)


@torch.no_grad()
def score_vae(vae: CausalVAE, clips: int = CLIPS_OF_PSNR) -> float:
    """Decibels of the peak signal over the noise of held-out clips, encoded and decoded: over all
    their values together."""
    measure, weight = PSNR(), next(vae.parameters())
    data = ProceduralClips("test", clips)
    for index in range(clips):
        video = data[index].video[None]
        measure.add(video, vae.decode(vae.encode(video.to(weight)).mode()).float().cpu())
    return measure.decibels
