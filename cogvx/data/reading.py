"""What a clip of shapes shows, read off its pixels: how a made clip is held to its sentence."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .drawing import covered
from .scenes import COLORS, GROUNDS, SHAPES, SIZES, WAYS, Scene, Thing

OFF_GROUND = 0.22  # of colors in [0, 1]: further than this from the ground's is a thing
LEAST = 0.004  # of a picture's pixels: fewer are no thing
REACH = 0.28  # around the middle of a thing, of a picture's smaller side: no thing is larger
MOVED = 0.12  # of its smaller side: less is no motion
BLURS = (1, 3, 5)  # of what is drawn to compare with, in pixels of a square


@dataclass(frozen=True)
class Patch:
    """What lies together in a frame.

    Attributes:
        x, y: its middle, in pixels.
        color: of its inner part, in [0, 1].
        cover: how much of each pixel around the middle is the thing's, (2 REACH + 1) squared.
    """

    x: float
    y: float
    color: tuple[float, ...]
    cover: Tensor


@dataclass(frozen=True)
class Score:
    """Whether a clip shows what it should: all things' colors, all shapes, all ways, how many."""

    color: bool
    shape: bool
    motion: bool
    count: bool

    @property
    def all(self) -> bool:
        return self.color and self.shape and self.motion and self.count


def score(video: Tensor, scene: Scene) -> Score:
    """video: (frames, 3, height, width) in [-1, 1]. Things are paired so that most is right; where
    their number is wrong nothing else is right."""
    seen = read(video).things
    if len(seen) != len(scene.things):
        return Score(False, False, False, False)

    def held(order: tuple[Thing, ...]) -> Score:
        pairs = list(zip(order, scene.things, strict=True))
        color, shape, way = (
            all(getattr(a, n) == getattr(b, n) for a, b in pairs) for n in ("color", "shape", "way")
        )
        return Score(color, shape, way, True)

    return max(map(held, itertools.permutations(seen)), key=lambda s: s.color + s.shape + s.motion)


@dataclass(frozen=True)
class Seen:
    """As a `Scene`, of any number of things."""

    things: tuple[Thing, ...]
    ground: str


def read(video: Tensor) -> Seen:
    """The things that move or stand in most frames of (frames, 3, height, width) in [-1, 1]."""
    video = video.detach().float().cpu().add(1).div(2).clamp(0, 1)
    edge = torch.cat([video[:, :, 0], video[:, :, -1], video[..., 0], video[..., -1]], -1)
    color = edge.movedim(1, -1).flatten(0, 1).median(0).values
    there = (video - color.view(1, 3, 1, 1)).norm(dim=1) > OFF_GROUND
    frames = [
        _patches(picture, mask, names, color)
        for picture, mask, names in zip(video, there, _labels(there), strict=True)
    ]
    counts = sorted(map(len, frames))
    count = counts[len(counts) // 2]
    side = min(video.shape[2:])
    tracks = _tracks([patches for patches in frames if len(patches) == count])
    return Seen(
        tuple(_thing(track, side) for track in tracks), _nearest(tuple(color.tolist()), GROUNDS)
    )


def _labels(there: Tensor) -> Tensor:
    """A number for every pixel of (frames, height, width), the same where pixels lie together."""
    numbers = torch.arange(1, there[0].numel() + 1, dtype=torch.float32).view(there[0].shape)
    labels = numbers * there
    while True:
        grown = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * there
        if torch.equal(grown, labels):
            return labels
        labels = grown


def _patches(picture: Tensor, there: Tensor, labels: Tensor, ground: Tensor) -> list[Patch]:
    reach = int(REACH * min(there.shape))
    found = []
    for label in labels[there].unique():
        mask = labels == label
        if mask.sum() < LEAST * mask.numel():
            continue
        core = F.avg_pool2d(mask[None].float(), 3, 1, 1)[0] > 0.99
        color = picture[:, core if core.any() else mask].median(1).values
        apart = (color - ground).view(3, 1, 1)
        cover = ((picture - ground.view(3, 1, 1)) * apart).sum(0) / apart.square().sum()
        cover = cover.clamp(0, 1) * F.max_pool2d(mask[None].float(), 5, 1, 2)[0]
        rows, columns = mask.nonzero().float().mean(0).tolist()
        padded = F.pad(cover, [reach] * 4)
        around = padded[round(rows) :, round(columns) :][: 2 * reach + 1, : 2 * reach + 1]
        found.append(Patch(columns, rows, tuple(color.tolist()), around))
    return found


def _tracks(frames: list[list[Patch]]) -> list[list[Patch]]:
    """Of each thing its patches, frame after frame: those nearest in place and color."""
    tracks = [[patch] for patch in frames[0]] if frames else []
    for patches in frames[1:]:
        orders = itertools.permutations(patches)
        best = min(
            orders, key=lambda o: sum(_far(t[-1], p) for t, p in zip(tracks, o, strict=True))
        )
        for track, patch in zip(tracks, best, strict=True):
            track.append(patch)
    return tracks


def _far(one: Patch, two: Patch) -> float:
    color = sum((a - b) ** 2 for a, b in zip(one.color, two.color, strict=True)) ** 0.5
    return abs(one.x - two.x) + abs(one.y - two.y) + 30 * color


def _thing(track: list[Patch], side: int) -> Thing:
    def middle(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    color = tuple(middle([p.color[i] for p in track]) for i in range(3))
    # Of all frames together, in which noise is little.
    shape, size = _form(torch.stack([p.cover for p in track]).mean(0), side)
    few = max(1, len(track) // 4)
    dx, dy = (
        sum(getattr(p, axis) for p in track[-few:]) / few
        - sum(getattr(p, axis) for p in track[:few]) / few
        for axis in "xy"
    )
    far = max(abs(dx), abs(dy)) >= MOVED * side
    way = max(WAYS, key=lambda w: WAYS[w][0] * dx + WAYS[w][1] * dy) if far else ""
    return Thing(_nearest(color, COLORS), shape, size, way)


def _form(cover: Tensor, side: int) -> tuple[str, str]:
    """The shape and the size that, drawn with the same middle and made as soft, are nearest."""
    at = torch.arange(len(cover)) + 0.5
    middle = [float((cover.sum(d) * at).sum() / cover.sum()) for d in (0, 1)]
    x, y = at.view(1, -1) - middle[0], at.view(-1, 1) - middle[1]
    far = {}
    for shape, size in itertools.product(SHAPES, SIZES):
        drawn = covered(shape, x, y, SIZES[size] * side)
        # Below or above its origin, as a triangle's middle is.
        low = float((drawn.sum(1, keepdim=True) * y).sum() / drawn.sum())
        drawn = covered(shape, x, y + low, SIZES[size] * side)
        for blur in BLURS:
            soft = F.avg_pool2d(drawn[None], blur, 1, blur // 2)[0]
            far[shape, size, blur] = float((cover - soft).square().sum())
    shape, size, _ = min(far, key=lambda form: far[form])
    return shape, size


def _nearest(color: tuple[float, ...], known: dict[str, tuple[int, int, int]]) -> str:
    return min(
        known, key=lambda n: sum((a - b / 255) ** 2 for a, b in zip(color, known[n], strict=True))
    )
