"""Pictures of a training: its losses over its steps, and TensorBoard's files where asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..extras import extra
from ..files import atomic_path
from .run import Point

NOT_DRAWN = ("step", "learning_rate")


def draw_curve(path: Path, name: str, points: Sequence[Point]) -> None:
    """A PNG with a panel for each number of the points, logarithmic where that can be.

    Raises ModuleNotFoundError if matplotlib is not installed.
    """
    if not points:
        return
    extra("matplotlib", "train", "cogvx[train]").use("agg")
    pyplot = extra("matplotlib.pyplot", "train", "cogvx[train]")
    numbers = [number for number in points[-1] if number not in NOT_DRAWN]
    figure, axes = pyplot.subplots(
        1, len(numbers), figsize=(4 * len(numbers), 3), layout="constrained", squeeze=False
    )
    steps = [point["step"] for point in points]
    for panel, number in zip(axes[0], numbers, strict=True):
        values = [point[number] for point in points]
        panel.plot(steps, values, linewidth=1, marker="." if len(points) < 40 else "")
        if min(values) > 0:
            panel.set_yscale("log")
        panel.set(title=number, xlabel="step")
        panel.grid(alpha=0.3)
    figure.suptitle(f"{name}: {int(steps[-1]):,} steps")
    with atomic_path(path) as part:
        figure.savefig(part, dpi=110)
    pyplot.close(figure)


def board(folder: Path) -> Any:
    """A writer of TensorBoard's files. Raises ModuleNotFoundError if it is not installed."""
    return extra("torch.utils.tensorboard", "train", "tensorboard").SummaryWriter(str(folder))
