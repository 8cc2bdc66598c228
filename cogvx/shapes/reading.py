"""Recognition: the scene that a clip shows, from its pixels, and the score of a generated clip."""

import itertools
from dataclasses import dataclass
from statistics import median_high

import torch
import torch.nn.functional as F
from torch import Tensor

from .drawing import coverage
from .scenes import COLORS, DIRECTIONS, GROUNDS, SHAPES, SIZES, Scene, Thing

OFF_GROUND = 0.22  # least distance of a thing's color from the ground's, colors in [0, 1]
MIN_AREA = 0.004  # of a frame: fewer pixels are noise
REACH = 0.28  # crop around the middle of a thing, relative to the smaller side: none is larger
MIN_MOTION = 0.12  # relative to the smaller side: less is standing still
BLURS = (1, 3, 5)  # box blurs of the templates, in pixels


@dataclass(frozen=True)
class Patch:
    """A connected component of a frame.

    Attributes:
        x, y: its middle, in pixels.
        color: median of its inner part, in [0, 1].
        cover: coverage of each pixel around the middle, (2 REACH + 1) squared.
    """

    x: float
    y: float
    color: tuple[float, ...]
    cover: Tensor


@dataclass(frozen=True)
class Score:
    """Which of colors, shapes, motions and number of things of a clip are all right."""

    color: bool
    shape: bool
    motion: bool
    count: bool

    @property
    def all(self) -> bool:
        return self.color and self.shape and self.motion and self.count


def score(video: Tensor, scene: Scene) -> Score:
    """Compare (frames, 3, height, width) in [-1, 1] with a scene.

    Things are matched so that most is right. With a wrong number of things nothing is right.
    """
    return score_things(read(video).things, scene)


def score_things(seen: tuple[Thing, ...], scene: Scene) -> Score:
    """`score` of a clip that has been read."""
    if len(seen) != len(scene.things):
        return Score(False, False, False, False)

    def compare(order: tuple[Thing, ...]) -> Score:
        pairs = list(zip(order, scene.things, strict=True))
        names = ("color", "shape", "direction")
        color, shape, motion = (
            all(getattr(a, n) == getattr(b, n) for a, b in pairs) for n in names
        )
        return Score(color, shape, motion, True)

    scores = map(compare, itertools.permutations(seen))
    return max(scores, key=lambda s: s.color + s.shape + s.motion)


@dataclass(frozen=True)
class Seen:
    """A recognised scene, with any number of things."""

    things: tuple[Thing, ...]
    ground: str


def read(video: Tensor) -> Seen:
    """Recognise the things of most frames of (frames, 3, height, width) in [-1, 1]."""
    video = video.detach().float().cpu().add(1).div(2).clamp(0, 1)
    edge = torch.cat([video[:, :, 0], video[:, :, -1], video[..., 0], video[..., -1]], -1)
    color = edge.movedim(1, -1).flatten(0, 1).median(0).values
    masks = (video - color.view(1, 3, 1, 1)).square().sum(1) > OFF_GROUND**2
    frames = [
        _patches(frame, mask, labels, color)
        for frame, mask, labels in zip(video, masks, _labels(masks), strict=True)
    ]
    count = median_high(map(len, frames))
    side = min(video.shape[2:])
    tracks = _tracks([patches for patches in frames if len(patches) == count])
    things = tuple(_thing(track, side) for track in tracks)
    return Seen(things, _nearest(tuple(color.tolist()), GROUNDS))


def _labels(masks: Tensor) -> Tensor:
    """Connected components of (frames, height, width): a positive number for each."""
    numbers = torch.arange(1, masks[0].numel() + 1, dtype=torch.float32).view(masks[0].shape)
    labels = numbers * masks
    while True:
        grown = _widened(_widened(labels).mT).mT * masks
        if torch.equal(grown, labels):
            return labels
        labels = grown


def _widened(x: Tensor) -> Tensor:
    """Maximum of each number and its neighbors in a row; `F.max_pool2d` takes ten times as long."""
    wide = x.clone()
    torch.maximum(wide[..., 1:], x[..., :-1], out=wide[..., 1:])
    torch.maximum(wide[..., :-1], x[..., 1:], out=wide[..., :-1])
    return wide


def _patches(frame: Tensor, there: Tensor, labels: Tensor, ground: Tensor) -> list[Patch]:
    reach = int(REACH * min(there.shape))
    found = []
    for label in labels[there].unique():
        mask = labels == label
        if mask.sum() < MIN_AREA * mask.numel():
            continue
        core = F.avg_pool2d(mask[None].float(), 3, 1, 1)[0] > 0.99
        color = frame[:, core if core.any() else mask].median(1).values
        # project each pixel onto the line from the ground's color to the thing's
        line = (color - ground).view(3, 1, 1)
        cover = ((frame - ground.view(3, 1, 1)) * line).sum(0) / line.square().sum()
        cover = cover.clamp(0, 1) * F.max_pool2d(mask[None].float(), 5, 1, 2)[0]
        rows, columns = mask.nonzero().float().mean(0).tolist()
        padded = F.pad(cover, [reach] * 4)
        around = padded[round(rows) :, round(columns) :][: 2 * reach + 1, : 2 * reach + 1]
        found.append(Patch(columns, rows, tuple(color.tolist()), around))
    return found


def _tracks(frames: list[list[Patch]]) -> list[list[Patch]]:
    """Patches of each thing, frame after frame: those nearest in place and color."""
    tracks = [[patch] for patch in frames[0]] if frames else []
    for patches in frames[1:]:
        orders = itertools.permutations(patches)
        best = min(
            orders, key=lambda o: sum(_cost(t[-1], p) for t, p in zip(tracks, o, strict=True))
        )
        for track, patch in zip(tracks, best, strict=True):
            track.append(patch)
    return tracks


def _cost(one: Patch, two: Patch) -> float:
    color = sum((a - b) ** 2 for a, b in zip(one.color, two.color, strict=True)) ** 0.5
    return abs(one.x - two.x) + abs(one.y - two.y) + 30 * color


def _thing(track: list[Patch], side: int) -> Thing:
    color = tuple(median_high(p.color[i] for p in track) for i in range(3))
    shape, size = _form(torch.stack([p.cover for p in track]).mean(0), side)  # averages noise
    few = max(1, len(track) // 4)
    dx, dy = (
        sum(getattr(p, axis) for p in track[-few:]) / few
        - sum(getattr(p, axis) for p in track[:few]) / few
        for axis in "xy"
    )
    direction = ""
    if max(abs(dx), abs(dy)) >= MIN_MOTION * side:
        direction = max(DIRECTIONS, key=lambda d: DIRECTIONS[d][0] * dx + DIRECTIONS[d][1] * dy)
    return Thing(_nearest(color, COLORS), shape, size, direction)


def _form(cover: Tensor, side: int) -> tuple[str, str]:
    """Shape and size of the nearest template, drawn at the same middle and blurred."""
    grid = torch.arange(len(cover)) + 0.5
    middle = [float((cover.sum(d) * grid).sum() / cover.sum()) for d in (0, 1)]
    x, y = grid.view(1, -1) - middle[0], grid.view(-1, 1) - middle[1]
    errors = {}
    for shape, size in itertools.product(SHAPES, SIZES):
        drawn = coverage(shape, x, y, SIZES[size] * side)
        # a triangle's middle is below its origin
        low = float((drawn.sum(1, keepdim=True) * y).sum() / drawn.sum())
        drawn = coverage(shape, x, y + low, SIZES[size] * side)
        for blur in BLURS:
            soft = F.avg_pool2d(drawn[None], blur, 1, blur // 2)[0]
            errors[shape, size, blur] = float((cover - soft).square().sum())
    shape, size, _ = min(errors, key=lambda form: errors[form])
    return shape, size


def _nearest(color: tuple[float, ...], known: dict[str, tuple[int, int, int]]) -> str:
    return min(
        known, key=lambda n: sum((a - b / 255) ** 2 for a, b in zip(color, known[n], strict=True))
    )
