"""Clips of shapes with their sentences, without end and each from its own seed."""

import hashlib
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from .drawing import Placed, draw, place
from .scenes import COLORS, GROUNDS, SHAPES, SIZES, WAYS, Scene, Thing, describe

HELD_OUT = 0.1  # of all sentences


@dataclass(frozen=True)
class Clip:
    """video: (frames, 3, height, width) in [-1, 1]; scene: of a drawn one."""

    video: Tensor
    caption: str
    scene: Scene | None = None


class ProceduralClips(torch.utils.data.Dataset[Clip]):
    """Clip number `index` of a seed is always the same one, on every machine.

    Args:
        split: "train", or "test": one in ten sentences is in no clip of the other.
        length: how many there are; what is beyond them is not another clip, so that epochs end.
        frames, height, width: of every clip.
        seed: of all of them.

    Raises ValueError for a split that is not one of the two, IndexError beyond `length`.
    """

    def __init__(
        self,
        split: str = "train",
        length: int = 100_000,
        frames: int = 17,
        height: int = 64,
        width: int = 64,
        seed: int = 0,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"ProceduralClips: split must be train or test; got {split!r}")
        self.split = split
        self.length = length
        self.size = frames, height, width
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        scene, placed = self._placed(index)
        return Clip(draw(placed, scene.ground, *self.size), describe(scene), scene)

    def scene(self, index: int) -> Scene:
        """What a clip shows; it is not drawn."""
        return self._placed(index)[0]

    def _placed(self, index: int) -> tuple[Scene, tuple[Placed, ...]]:
        if not 0 <= index < self.length:
            raise IndexError(f"ProceduralClips: index must be in [0, {self.length}); got {index}")
        numbers = random.Random(f"{self.seed} {self.split} {index}")
        while True:
            scene = random_scene(numbers)
            generator = torch.Generator().manual_seed(numbers.getrandbits(48))
            if held_out(describe(scene)) == (self.split == "test"):
                return scene, place(scene, generator)


def held_out(caption: str) -> bool:
    """Whether a sentence belongs to the test split, now and for ever."""
    return hashlib.sha256(caption.encode()).digest()[0] < 256 * HELD_OUT


def random_scene(numbers: random.Random) -> Scene:
    """Half of them of one thing, a quarter of two alike, a quarter of two that are not."""
    kind = numbers.choice(("one", "one", "alike", "two"))
    first = _random_thing(numbers)
    ground = numbers.choice(list(GROUNDS))
    if kind == "one":
        return Scene((first,), ground)
    if kind == "alike":
        way = numbers.choice([w for w in WAYS if w])
        first = Thing(first.color, first.shape, first.size, way)
        second = Thing(first.color, first.shape, first.size, numbers.choice((way, "")))
        return Scene((first, second), ground)
    return Scene((first, _random_thing(numbers)), ground)


def _random_thing(numbers: random.Random) -> Thing:
    words = (numbers.choice(list(names)) for names in (COLORS, SHAPES, SIZES, WAYS))
    return Thing(*words)
