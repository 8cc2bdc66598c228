"""The folder of a training: its recipe, checkpoints and losses.

recipe.json                         the recipe; another one is refused
training/<stage>/losses.jsonl       the logged losses, one JSON object per line
training/<stage>/losses.png         their plot, with samples.png beside it
training/<stage>/checkpoints/<step> weights, optimizers and EMA, by torch.distributed.checkpoint,
                                    for any number of ranks; the last two
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
MAY_CHANGE = tuple(
    f"transformer_training.{key}"
    for key in ("shard", "context", "accumulate", "gradient_checkpointing")
)


class RunFolder:
    """The folder of one recipe's training, new or resumed.

    Raises ValueError for a folder of another recipe, naming the differences, and for one that holds
    something else.
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

    def stage(self, name: str) -> "StageFolder":
        return StageFolder(self.folder / "training" / name)


class StageFolder:
    """Checkpoints and losses of one stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.checkpoints = folder / "checkpoints"
        self.losses = folder / "losses.jsonl"
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    def latest(self) -> tuple[int, Path | None]:
        """Step and path of the latest checkpoint; (0, None) if there is none."""
        found = [path for path in self.checkpoints.iterdir() if path.name.isdigit()]
        latest = max(found, key=lambda path: int(path.name), default=None)
        return (0, None) if latest is None else (int(latest.name), latest)

    def save(self, step: int, write: Callable[[Path], object], main: bool, wait: Any) -> None:
        """Save a checkpoint atomically. Every process calls this.

        write  writes the files into the folder that it gets
        main   True in the main process, which moves the folder into place
        wait   barrier of all processes
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

    def read_points(self, before: int, rewrite: bool = True) -> list[Point]:
        """Read the logged losses up to a step; `rewrite` removes later ones from the file."""
        if not self.losses.is_file():
            return []
        lines = self.losses.read_text(encoding="utf-8").splitlines(keepends=True)
        points = [json.loads(line) for line in lines if line.endswith("\n")]
        kept = [point for point in points if point["step"] <= before]
        if rewrite and len(kept) < len(lines):
            with atomic_path(self.losses) as part:
                part.write_text("".join(json.dumps(p) + "\n" for p in kept), encoding="utf-8")
        return kept

    def append(self, point: Point) -> None:
        with open(self.losses, "a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")


def _check_same(path: Path, has: dict[str, Any], wanted: dict[str, Any]) -> None:
    was, now = _flat(has), _flat(json.loads(json.dumps(wanted)))
    for key in MAY_CHANGE:
        was.pop(key, None)
        now.pop(key, None)
    if found := differences(was, {**dict.fromkeys(was), **now}):
        raise ValueError(f"{path}: is of another recipe: {found}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to keys such as table.key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found
