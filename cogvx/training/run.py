"""The folder of a training: what it was begun with, its checkpoints, and its curve.

recipe.json                         what was asked for; another recipe is refused
training/<stage>/losses.jsonl       a line for each point of the curve
training/<stage>/losses.png         the same as a picture, and samples.png beside it
training/<stage>/checkpoints/<step> what accelerate saves; the newest two
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.record import differences
from ..files import CONFIG_BYTES, atomic_path, read_json, sync
from .recipe import Recipe

PathLike = str | os.PathLike[str]
Point = dict[str, float]
KEPT = 2  # checkpoints


class Run:
    """A folder that belongs to one recipe, made or gone on with.

    Raises ValueError if the folder was begun with another recipe, naming the differences, or if it
    holds something else.
    """

    def __init__(self, folder: PathLike, recipe: Recipe) -> None:
        self.folder = Path(folder)
        self.recipe = recipe
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "recipe.json"
        if path.is_file():
            _check_same(path, read_json(path, CONFIG_BYTES), recipe.to_dict())
            return
        if any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder}: must be an empty folder, or one of this recipe; it holds other "
                "things"
            )
        with atomic_path(path) as part:
            part.write_text(json.dumps(recipe.to_dict(), indent=1) + "\n", encoding="utf-8")

    def stage(self, name: str) -> "Stage":
        return Stage(self.folder / "training" / name)


class Stage:
    """The part of a run's folder that one model's training has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.checkpoints = folder / "checkpoints"
        self.curve = folder / "losses.jsonl"
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    def newest(self) -> tuple[int, Path | None]:
        """The number of steps that are done, and the checkpoint that says so."""
        found = [path for path in self.checkpoints.iterdir() if path.name.isdigit()]
        newest = max(found, key=lambda path: int(path.name), default=None)
        return (0, None) if newest is None else (int(newest.name), newest)

    def save(self, step: int, write: Callable[[Path], object], main: bool, wait: Any) -> None:
        """A checkpoint, whole or not at all; every process calls it, and `main` moves it.

        write  puts the files into a folder that is there
        wait   returns when every process has come so far
        """
        part, whole = self.checkpoints / f".{step:08}.part", self.checkpoints / f"{step:08}"
        if main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
        wait()
        write(part)
        wait()
        if main:
            for file in part.rglob("*"):
                sync(file)
            shutil.rmtree(whole, ignore_errors=True)
            os.replace(part, whole)
            sync(self.checkpoints)
            found = sorted(path for path in self.checkpoints.iterdir() if path.name.isdigit())
            for path in found[:-KEPT]:
                shutil.rmtree(path)
        wait()

    def points(self, before: int, rewrite: bool = True) -> list[Point]:
        """The curve up to a step; what came later was lost with the process that wrote it, and is
        removed from the file."""
        if not self.curve.is_file():
            return []
        lines = self.curve.read_text(encoding="utf-8").splitlines(keepends=True)
        points = [json.loads(line) for line in lines if line.endswith("\n")]
        kept = [point for point in points if point["step"] <= before]
        if rewrite and len(kept) < len(lines):
            with atomic_path(self.curve) as part:
                part.write_text("".join(json.dumps(p) + "\n" for p in kept), encoding="utf-8")
        return kept

    def add(self, point: Point) -> None:
        """One more of the curve."""
        with open(self.curve, "a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")


def _check_same(path: Path, has: dict[str, Any], wanted: dict[str, Any]) -> None:
    was, now = _flat(has), _flat(json.loads(json.dumps(wanted)))
    if told := differences(was, {**dict.fromkeys(was), **now}):
        raise ValueError(f"{path}: is of another recipe: {told}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The keys of tables as table.key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found
