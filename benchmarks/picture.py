"""One picture of a run: a bar for each provider, and the conditions in small print."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from .report import Conditions, Row, small_print

OURS, THEIRS, EAGER, INK, FAINT = "#0f766e", "#94a3b8", "#cbd5e1", "#1e293b", "#64748b"
PLAIN = ("eager", "cogvx-auto")  # the reference itself
SMALL_NOISE = 5  # percent; more is written beside the bar
NO_MATPLOTLIB = "no picture: matplotlib is not installed (pip install matplotlib)"


def draw(path: Path, rows: Sequence[Row], conditions: Conditions) -> str | None:
    """Write a PNG: percent of the ceiling if that is known, ratios to eager if not.

    The ceiling is a copy's rate, or that of a matrix product where products are what bounds.

    Returns why there is none, or None.
    """
    timed = [row for row in rows if row.ratio_to_eager is not None]
    if not timed:
        return "no picture: nothing was timed"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return NO_MATPLOTLIB
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in timed:
        panels.setdefault((row.convention, row.which), []).append(row)
    bounded = all(_percent(row) is not None and row.median_ms for row in timed)
    heights = [len(panel) + 0.9 for panel in panels.values()]
    tall = 1.75 + 0.36 * sum(heights)
    figure = Figure(figsize=(9, tall), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(panels), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    figure.subplots_adjust(
        left=0.2, right=0.96, top=1 - 0.95 / tall, bottom=0.85 / tall, hspace=0.35
    )
    widest = max(_length(row, bounded) for row in timed)
    for ax, ((convention, which), panel) in zip(axes, panels.items(), strict=True):
        _panel(ax, panel, bounded, 100.0 if bounded else 1.0)
        ax.set_title(
            which if convention == "model" else f"{which}, {convention}",
            loc="left", fontsize=10, color=INK,
        )  # fmt: skip
        ax.set_xlim(0, max(105.0, 1.0 * widest) * 1.38 if bounded else widest * 1.25)
    axes[-1].set_xlabel(_axis(timed, bounded), fontsize=9, color=FAINT)
    first = timed[0]
    figure.text(
        0.02, 1 - 0.35 / tall, f"{first.op}  at  {first.size}",
        fontsize=14, weight="bold", color=INK, va="center",
    )  # fmt: skip
    where = f"{first.dtype} on {conditions['device_name']}"
    if not bounded and first.device == "cpu":
        where += "; ratios alone, and no kernel is timed on a CPU"
    figure.text(0.02, 1 - 0.62 / tall, where, fontsize=9.5, color=FAINT, va="center")
    print_ = textwrap.fill(small_print(conditions), 150)
    figure.text(0.02, 0.12 / tall, print_, fontsize=6.5, color=FAINT, va="bottom")
    figure.savefig(path)
    return None


def _axis(rows: Sequence[Row], bounded: bool) -> str:
    by_products = {row.tflop_per_s is not None for row in rows}
    if not bounded:
        return "times as fast as eager, in the same run"
    if by_products == {True}:
        return "operations over time, percent of a large matrix product's rate"
    if by_products == {False}:
        return "least bytes over time, percent of a copy's rate"
    return "percent of a copy's rate, or of a large matrix product's where products are what bounds"


def _percent(row: Row) -> float | None:
    """Of the ceiling that bounds the row."""
    return row.percent_of_copy if row.tflop_per_s is None else row.percent_of_matmul


def _length(row: Row, bounded: bool) -> float:
    return float((_percent(row) if bounded else row.ratio_to_eager) or 0.0)


def _label(row: Row, bounded: bool) -> str:
    ratio = f"{row.ratio_to_eager:.2f}x"
    if row.noise_percent >= SMALL_NOISE:
        ratio += f"   (noise {row.noise_percent:.0f}%)"
    return f"{_percent(row):.0f}%   {row.median_ms:.3g} ms   {ratio}" if bounded else ratio


def _panel(ax, rows: Sequence[Row], bounded: bool, mark: float) -> None:
    rows = sorted(rows, key=lambda row: _length(row, bounded))
    for place, row in enumerate(rows):
        ours = row.provider.startswith("cogvx") and row.provider not in PLAIN
        length = _length(row, bounded)
        fill = OURS if ours else EAGER if row.provider in PLAIN else THEIRS
        ax.barh(place, length, height=0.68, color=fill)
        ax.annotate(
            _label(row, bounded), (length, place), (5, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=OURS if ours else INK,
            weight="bold" if ours else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    ax.axvline(mark, color=FAINT, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    ax.set_yticks(range(len(rows)), [row.provider for row in rows], fontsize=9, color=INK)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", length=0, labelsize=8, colors=FAINT)
    if bounded:
        ax.set_xticks(range(0, 101, 20))
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(EAGER)
