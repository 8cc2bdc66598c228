"""Scenes of one or two coloured shapes, and the captions that describe them.

    scene  =  thing " " motion [" on " ground]
           |  thing " " motion " and " thing " " motion [" on " ground]
           |  "two " [size] colour shapes [" on " ground] ", " ("one" | "both") " moving " direction
    thing  =  "a " [size] colour shape
    motion =  "moves " direction | "stands still"

The default size is the middle one, the default ground black. `describe` and `parse` are inverses.
"""

import re
from dataclasses import dataclass

COLORS = {
    "red": (225, 40, 40),
    "green": (30, 170, 60),
    "blue": (50, 80, 235),
    "yellow": (245, 215, 50),
    "purple": (160, 50, 190),
}
GROUNDS = {"black": (12, 12, 12), "gray": (185, 185, 185), "white": (243, 243, 243)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.088, "": 0.107, "large": 0.125}  # half the width, relative to the smaller side
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1), "": (0, 0)}

THING = rf"an? (?:(small|large) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
MOTION = r"(?:moves (right|left|down|up)|stands still)"
GROUND = rf"(?: on ({'|'.join(GROUNDS)}))?"
ONE = re.compile(rf"{THING} {MOTION}{GROUND}")
OTHER = re.compile(rf"{THING} {MOTION} and {THING} {MOTION}{GROUND}")
ALIKE = re.compile(
    rf"two (?:(small|large) )?({'|'.join(COLORS)}) (circles|squares|triangles|crosses){GROUND}"
    r", (one|both) moving (right|left|down|up)"
)
PLURALS = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
SINGULARS = {plural: shape for shape, plural in PLURALS.items()}


@dataclass(frozen=True)
class Thing:
    """A moving shape: keys of COLORS, SHAPES, SIZES and DIRECTIONS; "" is the default."""

    color: str
    shape: str
    size: str = ""
    direction: str = ""

    def __post_init__(self) -> None:
        for name, known in (
            ("color", COLORS), ("shape", SHAPES), ("size", SIZES), ("direction", DIRECTIONS)
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Thing: {name} must be one of {', '.join(filter(None, known))}; "
                    f"got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class Scene:
    """One or two things on a ground."""

    things: tuple[Thing, ...]
    ground: str = "black"

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise ValueError(f"Scene: things must be one or two; got {len(self.things)}")
        if self.ground not in GROUNDS:
            raise ValueError(
                f"Scene: ground must be one of {', '.join(GROUNDS)}; got {self.ground!r}"
            )


def describe(scene: Scene) -> str:
    """Caption of a scene."""
    ground = "" if scene.ground == "black" else f" on {scene.ground}"
    if len(scene.things) == 2:
        one, two = scene.things
        alike = (one.color, one.shape, one.size) == (two.color, two.shape, two.size)
        if alike and one.direction and two.direction in (one.direction, ""):
            many = f"two {_sized(one.size)}{one.color} {PLURALS[one.shape]}"
            return f"{many}{ground}, {'both' if two.direction else 'one'} moving {one.direction}"
    return " and ".join(map(_phrase, scene.things)) + ground


def parse(caption: str) -> Scene:
    """Scene of a caption. Raises ValueError, listing the words of the grammar, if it has none."""
    text = " ".join(caption.lower().split()).rstrip(".")
    if found := ALIKE.fullmatch(text):
        size, color, plural, ground, how, direction = found.groups()
        first = Thing(color, SINGULARS[plural], size or "", direction)
        second = Thing(color, first.shape, first.size, direction if how == "both" else "")
        return Scene((first, second), ground or "black")
    for pattern in (ONE, OTHER):
        if found := pattern.fullmatch(text):
            *words, ground = found.groups()
            things = (
                Thing(color, shape, size or "", direction or "")
                for size, color, shape, direction in zip(*[iter(words)] * 4, strict=True)
            )
            return Scene(tuple(things), ground or "black")
    raise ValueError(
        f"parse: caption must describe a scene, such as 'a red circle moves right', 'a small blue "
        "square stands still on white' or 'two green crosses on gray, one moving up', with the "
        f"colors {', '.join(COLORS)}, the shapes {', '.join(SHAPES)}, small or large, right, left, "
        f"up or down, on {', '.join(GROUNDS)}; got {caption!r}"
    )


def vocabulary() -> tuple[str, ...]:
    """All words of captions, and the comma."""
    glue = ("a", "and", "both", "moves", "moving", "on", "one", "stands", "still", "two", ",")
    words = {*glue, *COLORS, *GROUNDS, *SHAPES, *PLURALS.values(), *SIZES, *DIRECTIONS} - {""}
    return tuple(sorted(words))


def _sized(size: str) -> str:
    return f"{size} " if size else ""


def _phrase(thing: Thing) -> str:
    motion = f"moves {thing.direction}" if thing.direction else "stands still"
    return f"a {_sized(thing.size)}{thing.color} {thing.shape} {motion}"
