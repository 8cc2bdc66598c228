"""An endless data set of drawn clips with captions, each a function of its seed and number."""

import hashlib
import random
from dataclasses import dataclass

import torch

from ..data import Clip
from .drawing import Placed, draw, place
from .scenes import COLORS, DIRECTIONS, GROUNDS, SHAPES, SIZES, Scene, Thing, describe

HELD_OUT = 0.1  # part of all captions that is in the test split


@dataclass(frozen=True)
class DrawnClip(Clip):
    """A clip with the scene that it shows."""

    scene: Scene


class ProceduralClips(torch.utils.data.Dataset[DrawnClip]):
    """Drawn clips: the same one for an index, split and seed, on every machine.

    Args:
        split: "train" or "test"; no caption is in both, one in ten is in "test".
        length: number of clips. It does not change them; it ends an epoch.
        frames, height, width: size of every clip.
        seed: of all clips.

    Raises ValueError for another split, IndexError for an index beyond `length`.
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

    def __getitem__(self, index: int) -> DrawnClip:
        scene, placed = self._placed(index)
        return DrawnClip(draw(placed, scene.ground, *self.size), describe(scene), scene)

    def scene(self, index: int) -> Scene:
        """Scene of a clip, without drawing it."""
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
    """Return True for captions of the test split, by a hash."""
    return hashlib.sha256(caption.encode()).digest()[0] < 256 * HELD_OUT


def random_scene(numbers: random.Random) -> Scene:
    """Draw a scene: one thing in half of all, two equal or two independent ones in a quarter."""
    kind = numbers.choice(("one", "one", "alike", "two"))
    first = _random_thing(numbers)
    ground = numbers.choice(list(GROUNDS))
    if kind == "one":
        return Scene((first,), ground)
    if kind == "alike":
        direction = numbers.choice([d for d in DIRECTIONS if d])
        first = Thing(first.color, first.shape, first.size, direction)
        second = Thing(first.color, first.shape, first.size, numbers.choice((direction, "")))
        return Scene((first, second), ground)
    return Scene((first, _random_thing(numbers)), ground)


def _random_thing(numbers: random.Random) -> Thing:
    words = (numbers.choice(list(names)) for names in (COLORS, SHAPES, SIZES, DIRECTIONS))
    return Thing(*words)
