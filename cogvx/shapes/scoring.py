"""Evaluation: how often a model's clips show what held-out captions describe."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from ..pipeline import CogVideoX
from ..vae import CausalVAE
from ..video import PSNR
from .procedural import ProceduralClips
from .reading import Score, read, score_things
from .scenes import Scene, describe

NAMES = ("color", "shape", "motion", "count", "all")
BATCH = 10
PSNR_CLIPS = 50

# Sampling of models of these clips. The first steps predict a mean over all places where a thing
# may be; guidance above 1 amplifies it, until one thing appears twice.
STEPS, GUIDANCE = 30, 1.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scores:
    """Fractions of `prompts` clips with the right colors, shapes, motions, number, and all four."""

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
        return asdict(self)


def held_out_prompts(count: int, skip: int = 0) -> dict[str, Scene]:
    """`count` different captions of the test split after the first `skip`, with their scenes."""
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
    """(scores, control) of one clip for each of `prompts` held-out captions.

    `skip` leaves out the first captions, such as those that a model was selected with. The control
    compares the same clips with other captions, which gives the level of chance. Each batch of ten
    clips has the next seed, from `seed` on.
    """
    scenes = held_out_prompts(prompts, skip)
    captions, wanted = list(scenes), list(scenes.values())
    own, others = [], []
    for first in range(0, prompts, BATCH):
        batch = captions[first : first + BATCH]
        number = seed + first // BATCH
        videos = pipe.generate(batch, steps=steps, guidance=guidance, seed=number)
        for index, video in enumerate(videos, first):
            seen = read(video).things
            own.append(score_things(seen, wanted[index]))
            others.append(score_things(seen, wanted[(index + prompts // 2) % prompts]))
        if progress is not None:
            progress(len(own), prompts)
    return Scores.of(own), Scores.of(others)


@torch.no_grad()
def score_vae(vae: CausalVAE, clips: int = PSNR_CLIPS) -> float:
    """PSNR in dB of reconstructions of held-out clips, over all their values together."""
    measure, weight = PSNR(), next(vae.parameters())
    data = ProceduralClips("test", clips)
    for index in range(clips):
        video = data[index].video[None]
        measure.add(video, vae.decode(vae.encode(video.to(weight)).mode()).float().cpu())
    return measure.decibels
