"""Large frames in overlapping tiles, each run as a clip of its own, and blended.

Norms take their statistics over a tile, so the result differs from that of the whole frame: tiling
is for frames that do not fit otherwise. Source: `docs/model.md`, section 4.10.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product, starmap
from typing import Any

import torch
from torch import Tensor

from ..frames import nearest_multiples

Run = Callable[[Tensor], Tensor]
Each = Callable[[Run, Iterable[Tensor]], Iterable[Tensor]]  # as `map`


@dataclass(frozen=True)
class Tiling:
    """Size of a tile in pixels, and the fraction of it that overlaps the tile before.

    The defaults are those of the released VAE. Sizes must be multiples of the VAE's spatial
    compression, 8. Tiles are placed in whole latents: overlaps are rounded down, so that every
    pixel is covered. Frames no larger than a tile are not cut.
    """

    height: int = 240
    width: int = 360
    overlap_height: float = 1 / 6
    overlap_width: float = 1 / 5

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            size: Any = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"Tiling: {name} must be an integer; got {size!r}")
            if size < 1:
                raise ValueError(f"Tiling: {name} must be at least 1; got {size}")
        for name in ("overlap_height", "overlap_width"):
            overlap: Any = getattr(self, name)
            if isinstance(overlap, bool) or not isinstance(overlap, (int, float)):
                raise TypeError(f"Tiling: {name} must be a number; got {overlap!r}")
            if not 0 <= overlap < 1:
                raise ValueError(f"Tiling: {name} must be in [0, 1); got {overlap}")

    def check(self, where: str, ratio: int) -> None:
        """Raises ValueError unless the tile's sides are multiples of `ratio` pixels."""
        for name in ("height", "width"):
            size = getattr(self, name)
            if size % ratio:
                raise ValueError(
                    f"{where}: tiling must have a {name} that is a multiple of {ratio}, nearest "
                    f"{nearest_multiples(size, ratio)}; got {size}"
                )

    def cuts(self, height: int, width: int) -> bool:
        """True if a frame of so many pixels needs more than one tile."""
        return height > self.height or width > self.width

    def count(self, height: int, width: int, ratio: int) -> int:
        """Number of tiles of a frame of so many pixels."""
        rows, columns = self._sides(ratio)
        return len(range(0, height // ratio, rows.step)) * len(
            range(0, width // ratio, columns.step)
        )

    def _sides(self, ratio: int) -> tuple["_Side", "_Side"]:
        return (
            _Side.of(self.height // ratio, self.overlap_height),
            _Side.of(self.width // ratio, self.overlap_width),
        )


@dataclass(frozen=True)
class _Side:
    """One side of a tile, in latents."""

    size: int
    overlap: int

    @classmethod
    def of(cls, size: int, overlap: float) -> "_Side":
        return cls(size, min(int(size * overlap + 1e-6), size - 1))  # 1/6 of 30 is 5, not 4.99…

    @property
    def step(self) -> int:
        return self.size - self.overlap


def tiled(
    run: Run,
    x: Tensor,
    tiling: Tiling,
    ratio: int,
    scale: tuple[int, int],
    each: Each = map,
) -> Tensor:
    """`run` on every tile of x (batch, frames, channels, height, width), blended into one result.

    ratio: pixels of a latent's side. scale: sizes of x and of the result, in units of a latent:
    (ratio, 1) to encode, (1, ratio) to decode. each: called as `map`, which runs the tiles here.
    """
    before, after = scale
    rows, columns = tiling._sides(ratio)
    height, width = x.shape[3] // before, x.shape[4] // before
    corners = list(product(range(0, height, rows.step), range(0, width, columns.step)))

    def cut(top: int, start: int) -> Tensor:
        down = slice(top * before, (top + rows.size) * before)
        return x[..., down, start * before : (start + columns.size) * before]

    result: Tensor | None = None
    above: dict[int, Tensor] = {}  # the lowest rows of the tiles above, by column
    left = x  # the last columns of the tile to the left
    for (top, start), tile in zip(corners, each(run, starmap(cut, corners)), strict=True):
        if start in above:
            _blend(above.pop(start), tile, dim=3)
        if start:
            _blend(left, tile, dim=4)
        if result is None:
            result = tile.new_empty([*tile.shape[:3], height * after, width * after])
        above[start] = _end(tile, rows.overlap * after, dim=3)
        left = _end(tile, columns.overlap * after, dim=4)
        kept = tile[..., : rows.step * after, : columns.step * after]
        down, right = top * after, start * after
        result[..., down : down + kept.shape[3], right : right + kept.shape[4]] = kept
    assert result is not None
    return result


def _end(tile: Tensor, extent: int, dim: int) -> Tensor:
    """A copy of the last `extent` rows or columns, so that the tile itself can be freed."""
    extent = min(extent, tile.shape[dim])
    return tile.narrow(dim, tile.shape[dim] - extent, extent).clone()


def _blend(before: Tensor, tile: Tensor, dim: int) -> None:
    """Blend the end of the tile before linearly into the beginning of `tile`, in place."""
    extent = min(before.shape[dim], tile.shape[dim])
    if extent == 0:
        return
    wide = torch.promote_types(tile.dtype, torch.float32)
    ramp = torch.arange(extent, dtype=torch.float64, device=tile.device) / extent
    ramp = ramp.reshape([-1] + [1] * (4 - dim))
    old = before.narrow(dim, before.shape[dim] - extent, extent)
    new = tile.narrow(dim, 0, extent)
    new.copy_(old * (1 - ramp).to(wide) + new * ramp.to(wide))
