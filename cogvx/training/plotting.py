"""Plots of training losses, and TensorBoard's writer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..extras import extra
from ..files import atomic_path
from .checkpointing import Point

NOT_PLOTTED = ("step", "learning_rate")


def plot_losses(path: Path, name: str, points: Sequence[Point]) -> None:
    """Write a PNG with a panel for each number of the points, logarithmic where all are positive.

    Raises ModuleNotFoundError if matplotlib is not installed.
    """
    if not points:
        return
    extra("matplotlib", "train", "cogvx[train]").use("agg")
    pyplot = extra("matplotlib.pyplot", "train", "cogvx[train]")
    numbers = [number for number in points[-1] if number not in NOT_PLOTTED]
    width = 4 * len(numbers)
    figure, axes = pyplot.subplots(1, len(numbers), figsize=(width, 3), squeeze=False)
    # Margins in inches, and labels without mathtext: to solve for a layout takes twice as long.
    margins = {"left": 0.7 / width, "right": 1 - 0.15 / width, "bottom": 0.17, "top": 0.8}
    figure.subplots_adjust(**margins, wspace=0.26)
    steps = [point["step"] for point in points]
    for panel, number in zip(axes[0], numbers, strict=True):
        values = [point[number] for point in points]
        panel.plot(steps, values, linewidth=1, marker="." if len(points) < 40 else "")
        if min(values) > 0:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(pyplot.LogFormatter())
        panel.set(title=number, xlabel="step")
        panel.grid(alpha=0.3)
    figure.suptitle(f"{name}: {int(steps[-1]):,} steps")
    with atomic_path(path) as part:
        figure.savefig(part, dpi=110)
    pyplot.close(figure)


def tensorboard_writer(folder: Path) -> Any:
    """Writer of TensorBoard's files. Raises ModuleNotFoundError if it is not installed."""
    return extra("torch.utils.tensorboard", "train", "tensorboard").SummaryWriter(str(folder))
