"""Scenes as clips: shapes with smooth edges, on straight ways that nothing else is on.

Things begin in the middle of a cell of a coarse grid and go to the next one: in 17 frames of 64x64
one pixel a frame. To a transformer with tokens of 16x16 pixels all of them look alike at their
places, so that a small one has few things to learn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .scenes import COLORS, GROUNDS, SIZES, WAYS, Scene, Thing

GRID = 4  # cells in the picture's width and in its height, in whose middles things begin
TRAVEL = 0.25  # of the picture's smaller side, from the first frame to the last
STEPS = 16  # in which two ways are compared
APART = 0.04  # between two things at the least, likewise


@dataclass(frozen=True)
class Placed:
    """A thing where it begins, x and y as parts of the picture's width and height."""

    thing: Thing
    x: float
    y: float


def place(scene: Scene, generator: torch.Generator) -> tuple[Placed, ...]:
    """Places at random for the things of a scene, all within the picture all the time and apart
    from each other. Of a square picture; of another one there is only more room.

    Of two things the first is in the left half all the time, and the second in the right one, as
    one tells of a picture. Every scene has room, of whatever sizes and ways.
    """
    columns = GRID // len(scene.things)
    while True:
        placed = tuple(
            _placed(thing, n * columns, columns, generator) for n, thing in enumerate(scene.things)
        )
        if len(placed) == 1 or _apart(*placed):
            return placed


def draw(placed: tuple[Placed, ...], ground: str, frames: int, height: int, width: int) -> Tensor:
    """(frames, 3, height, width) in [-1, 1]: each thing goes its way in equal steps."""
    side = min(height, width)
    rows = torch.arange(height, dtype=torch.float32).add(0.5).view(1, -1, 1)
    columns = torch.arange(width, dtype=torch.float32).add(0.5).view(1, 1, -1)
    time = torch.linspace(0, 1, frames).view(-1, 1, 1)
    video = _color(GROUNDS[ground]).expand(frames, 3, height, width)
    for one in placed:
        dx, dy = WAYS[one.thing.way]
        x = columns - (one.x * width + dx * TRAVEL * side * time)
        y = rows - (one.y * height + dy * TRAVEL * side * time)
        inside = covered(one.thing.shape, x, y, SIZES[one.thing.size] * side)
        video = torch.lerp(video, _color(COLORS[one.thing.color]), inside[:, None])
    return video * 2 - 1


def covered(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """How much of each pixel is a shape's, in [0, 1]; x and y as seen from it, in pixels."""
    return (0.5 - _distance(shape, x, y, radius)).clamp(0, 1)


def _placed(thing: Thing, left: int, columns: int, generator: torch.Generator) -> Placed:
    """Within `columns` columns of cells from `left` on, at the beginning and at the end."""
    at = []
    for step, begin, count in zip(WAYS[thing.way], (left, 0), (columns, GRID), strict=True):
        cells = round(step * TRAVEL * GRID)
        first, last = begin + max(0, -cells), begin + count - max(0, cells)
        cell = int(torch.randint(first, last, (), generator=generator))
        at.append((cell + 0.5) / GRID)
    return Placed(thing, *at)


def _apart(one: Placed, two: Placed) -> bool:
    """All the time, as squares around them are."""
    least = SIZES[one.thing.size] + SIZES[two.thing.size] + APART
    ways = WAYS[one.thing.way], WAYS[two.thing.way]
    for step in range(STEPS + 1):
        far = step / STEPS * TRAVEL
        gaps = (
            abs(one.x - two.x + far * (ways[0][0] - ways[1][0])),
            abs(one.y - two.y + far * (ways[0][1] - ways[1][1])),
        )
        if max(gaps) < least:
            return False
    return True


def _distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Pixels from the edge of a shape around the origin, negative inside; half its width given."""
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius
    if shape == "cross":
        arm = 0.33 * radius
        upright = torch.maximum(x.abs() - arm, y.abs() - radius)
        level = torch.maximum(x.abs() - radius, y.abs() - arm)
        return torch.minimum(upright, level)
    # A triangle that stands on its base, as wide as high.
    slope = 2 / 5**0.5 * (x.abs() - 0.5 * (y + radius))
    return torch.maximum(slope, y - radius)


def _color(rgb: tuple[int, int, int]) -> Tensor:
    return torch.tensor(rgb, dtype=torch.float32).div(255).view(3, 1, 1)
