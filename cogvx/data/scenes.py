"""Scenes of one or two coloured shapes on the move, and the sentences that tell of them.

    scene   =  thing " " motion [" on " ground]
            |  thing " " motion " and " thing " " motion [" on " ground]
            |  "two " [size] colour shapes [" on " ground] ", " ("one" | "both") " moving " way
    thing   =  "a " [size] colour shape
    motion  =  "moves " way | "stands still"

A size that is not said is the middle one, a ground that is not said is black. `describe` and
`parse` are each other's inverse.
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
SIZES = {"small": 0.088, "": 0.107, "large": 0.125}  # half the width, of the smaller side
WAYS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1), "": (0, 0)}

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
    """A shape: its color, one of SHAPES, a size of SIZES, and a way of WAYS, "" for none."""

    color: str
    shape: str
    size: str = ""
    way: str = ""

    def __post_init__(self) -> None:
        for name, known in (
            ("color", COLORS), ("shape", SHAPES), ("size", SIZES), ("way", WAYS)
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Thing: {name} must be one of {', '.join(filter(None, known))}; "
                    f"got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class Scene:
    """One or two things, and what they are on."""

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
    """The sentence of a scene."""
    ground = "" if scene.ground == "black" else f" on {scene.ground}"
    if len(scene.things) == 2:
        one, two = scene.things
        if _kind(one) == _kind(two) and one.way and two.way in (one.way, ""):
            many = f"two {_sized(one.size)}{one.color} {PLURALS[one.shape]}"
            return f"{many}{ground}, {'both' if two.way else 'one'} moving {one.way}"
    told = " and ".join(f"a {_sized(t.size)}{t.color} {t.shape} {_told(t)}" for t in scene.things)
    return told + ground


def parse(sentence: str) -> Scene:
    """The scene of a sentence. Raises ValueError with the grammar's words if there is none."""
    text = " ".join(sentence.lower().split()).rstrip(".")
    if found := ALIKE.fullmatch(text):
        size, color, plural, ground, how, way = found.groups()
        first = Thing(color, SINGULARS[plural], size or "", way)
        second = Thing(color, first.shape, first.size, way if how == "both" else "")
        return Scene((first, second), ground or "black")
    for pattern in (ONE, OTHER):
        if found := pattern.fullmatch(text):
            *words, ground = found.groups()
            things = zip(*[iter(words)] * 4, strict=True)
            return Scene(
                tuple(
                    Thing(color, shape, size or "", way or "") for size, color, shape, way in things
                ),
                ground or "black",
            )
    raise ValueError(
        f"parse: no scene is told like {sentence!r}; say for example 'a red circle moves right', "
        "'a small blue square stands still on white', 'two green crosses on gray, one moving up', "
        f"with the colors {', '.join(COLORS)}, the shapes {', '.join(SHAPES)}, small or large, "
        f"right, left, up or down, on {', '.join(GROUNDS)}"
    )


def vocabulary() -> tuple[str, ...]:
    """Every word that a sentence can have, and the comma."""
    glue = ("a", "and", "both", "moves", "moving", "on", "one", "stands", "still", "two", ",")
    words = {*glue, *COLORS, *GROUNDS, *SHAPES, *PLURALS.values(), *SIZES, *WAYS} - {""}
    return tuple(sorted(words))


def _kind(thing: Thing) -> tuple[str, str, str]:
    return thing.color, thing.shape, thing.size


def _sized(size: str) -> str:
    return f"{size} " if size else ""


def _told(thing: Thing) -> str:
    return f"moves {thing.way}" if thing.way else "stands still"
