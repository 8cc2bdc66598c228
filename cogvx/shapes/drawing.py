"""Drawing of scenes: anti-aliased shapes on straight paths that do not meet.

Things start in the middle of a cell of a coarse grid and move to the next one: one pixel a frame in
17 frames of 64x64. For a transformer with tokens of 16x16 pixels every cell then looks alike, which
leaves a small one little to learn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .scenes import COLORS, DIRECTIONS, GROUNDS, SIZES, Scene, Thing

GRID = 4  # cells across and down; things start in the middle of one
TRAVEL = 0.25  # path length, relative to the smaller side
STEPS = 16  # points on two paths at which their distance is checked
GAP = 0.04  # least distance of two things, relative to the smaller side


@dataclass(frozen=True)
class Placed:
    """A thing and its start: x and y relative to the width and height of a frame."""

    thing: Thing
    x: float
    y: float


def place(scene: Scene, generator: torch.Generator) -> tuple[Placed, ...]:
    """Draw random starts at which all things stay inside a square frame and apart from each other.

    Of two things the first stays in the left half and the second in the right one, the order of
    the caption. Every scene has such starts, whatever its sizes and directions.
    """
    columns = GRID // len(scene.things)
    while True:
        placed = tuple(
            _placed(thing, n * columns, columns, generator) for n, thing in enumerate(scene.things)
        )
        if len(placed) == 1 or _apart(*placed):
            return placed


def draw(placed: tuple[Placed, ...], ground: str, frames: int, height: int, width: int) -> Tensor:
    """(frames, 3, height, width) in [-1, 1], every thing moving at constant speed."""
    side = min(height, width)
    rows = torch.arange(height, dtype=torch.float32).add(0.5).view(1, -1, 1)
    columns = torch.arange(width, dtype=torch.float32).add(0.5).view(1, 1, -1)
    time = torch.linspace(0, 1, frames).view(-1, 1, 1)
    video = _color(GROUNDS[ground]).expand(frames, 3, height, width)
    for one in placed:
        dx, dy = DIRECTIONS[one.thing.direction]
        x = columns - (one.x * width + dx * TRAVEL * side * time)
        y = rows - (one.y * height + dy * TRAVEL * side * time)
        mask = coverage(one.thing.shape, x, y, SIZES[one.thing.size] * side)
        video = torch.lerp(video, _color(COLORS[one.thing.color]), mask[:, None])
    return video * 2 - 1


def coverage(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Part of each pixel that a shape covers, in [0, 1]; x, y: pixels from its center."""
    return (0.5 - _distance(shape, x, y, radius)).clamp(0, 1)


def _placed(thing: Thing, left: int, columns: int, generator: torch.Generator) -> Placed:
    """A start whose whole path lies in the `columns` columns of cells from `left` on."""
    start = []
    for step, begin, count in zip(
        DIRECTIONS[thing.direction], (left, 0), (columns, GRID), strict=True
    ):
        cells = round(step * TRAVEL * GRID)
        first, last = begin + max(0, -cells), begin + count - max(0, cells)
        cell = int(torch.randint(first, last, (), generator=generator))
        start.append((cell + 0.5) / GRID)
    return Placed(thing, *start)


def _apart(one: Placed, two: Placed) -> bool:
    """Check that the bounding squares of two things never come closer than GAP."""
    least = SIZES[one.thing.size] + SIZES[two.thing.size] + GAP
    (dx, dy), (other_dx, other_dy) = (DIRECTIONS[p.thing.direction] for p in (one, two))
    paths = (step / STEPS * TRAVEL for step in range(STEPS + 1))
    return all(
        max(abs(one.x - two.x + far * (dx - other_dx)), abs(one.y - two.y + far * (dy - other_dy)))
        >= least
        for far in paths
    )


def _distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Signed distance in pixels to the edge of a shape, negative inside; radius: half its width."""
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius
    if shape == "cross":
        arm = 0.33 * radius
        upright = torch.maximum(x.abs() - arm, y.abs() - radius)
        level = torch.maximum(x.abs() - radius, y.abs() - arm)
        return torch.minimum(upright, level)
    # a triangle on its base, as wide as high
    slope = 2 / 5**0.5 * (x.abs() - 0.5 * (y + radius))
    return torch.maximum(slope, y - radius)


def _color(rgb: tuple[int, int, int]) -> Tensor:
    return torch.tensor(rgb, dtype=torch.float32).div(255).view(3, 1, 1)
