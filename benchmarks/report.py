"""Report of a run: rows as a table, a CSV to append to, a JSON and a plot for each benchmark."""

import csv
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cogvx_kernels._opinfo import Cost

from .conditions import CONDITIONS
from .timing import Times

Conditions = Mapping[str, Any]


@dataclass
class Row:
    """One provider in one pass. A number that was not measured, or means nothing here, is None.

    convention         of the call: as the model makes it, or another
    gb_per_s           the least bytes that the pass must move, over the median
    percent_of_copy    that rate over the rate of a large copy in the same run
    tflop_per_s        the operations of the pass over the median, where they are what bounds it
    percent_of_matmul  that rate over the rate of a large matrix product in the same run
    ratio              the baseline's median over this one, in the same run: 2 is twice as fast; the
                       baseline is eager, diffusers, or the first row of a convolution
    noise_percent      how far the medians of its turns forth and back lie apart
    relative_error     the largest error over the largest value
    peak_mib           the most bytes alive in tensors, without weights and arguments
    saved_mib          bytes that a forward keeps for its backward, without weights
    gpu_mib            the most that the allocator of a GPU had, less what it had before
    """

    benchmark: str
    size: str
    convention: str
    which: str
    provider: str
    dtype: str
    device: str
    median_ms: float | None = None
    p25_ms: float | None = None
    p75_ms: float | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    tflop_per_s: float | None = None
    percent_of_matmul: float | None = None
    ratio: float | None = None
    noise_percent: float | None = None
    relative_error: float | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    gpu_mib: float | None = None
    note: str = ""

    def add_times(self, times: Times, cost: Cost | None) -> None:
        """The times, and the rates that they make of the least the pass must move and compute."""
        self.median_ms = 1e3 * times.median
        self.p25_ms, self.p75_ms = (1e3 * x for x in times.quartiles)
        if cost is None:
            return
        self.gb_per_s = cost.bytes / times.median / 1e9
        if bound_by_products(cost):
            self.tflop_per_s = cost.flops / times.median / 1e12

    def cells(self) -> dict[str, Any]:
        """By column."""
        names = (f.name for f in fields(self))
        return {"pass" if name == "which" else name: getattr(self, name) for name in names}


# Operations a byte from which a GPU of today computes for longer than it moves; an H200 does 790
# TFLOP/s of bf16 beside 4.3 TB/s, and of fp32 without tensor cores a tenth.
MANY_FLOPS_A_BYTE = 150


def bound_by_products(cost: Cost) -> bool:
    return cost.flops >= MANY_FLOPS_A_BYTE * cost.bytes


# --- the table -------------------------------------------------------------------------------

_SHORT = {
    "median_ms": ("ms", "{:.4g}"),
    "p25_ms": ("p25", "{:.4g}"),
    "p75_ms": ("p75", "{:.4g}"),
    "gb_per_s": ("GB/s", "{:.0f}"),
    "percent_of_copy": ("% copy", "{:.0f}"),
    "tflop_per_s": ("TFLOP/s", "{:.0f}"),
    "percent_of_matmul": ("% matmul", "{:.0f}"),
    "ratio": ("x base", "{:.2f}"),
    "noise_percent": ("noise %", "{:.1f}"),
    "relative_error": ("error", "{:.0e}"),
    "peak_mib": ("peak MiB", "{:.1f}"),
    "saved_mib": ("saved", "{:.1f}"),
    "gpu_mib": ("GPU MiB", "{:.0f}"),
}


def table(rows: Sequence[Row]) -> str:
    """Rows under each other, by benchmark, convention and pass; absent numbers as dots.

    A column is there if a row has a number in it.
    """
    short = {
        name: column
        for name, column in _SHORT.items()
        if any(getattr(row, name) is not None for row in rows)
    }
    wide = max((len(row.provider) for row in rows), default=0) + 1
    lines: list[str] = []
    heading = ""
    for row in rows:
        above = f"{row.benchmark}  {row.size}  {row.which}  {row.dtype}  {row.device}"
        above += "" if row.convention == "model" else f"  ({row.convention})"
        if above != heading:
            heading = above
            names = "".join(f"{title:>9}" for title, _ in short.values())
            lines += ["", above, f"  {'provider':<{wide}}{names}  note"]
        numbers = (
            "·" if getattr(row, name) is None else form.format(getattr(row, name))
            for name, (_, form) in short.items()
        )
        lines.append(f"  {row.provider:<{wide}}{''.join(f'{x:>9}' for x in numbers)}  {row.note}")
    return "\n".join(lines[1:])


def small_print(conditions: Conditions) -> str:
    """The known conditions in a line or two."""
    copied, clock = conditions["copy_gb_per_s"], conditions["sm_clock_mhz"]
    parts = [
        conditions["device_name"],
        f"driver {conditions['driver']}" if conditions["driver"] != "none" else None,
        f"{clock} MHz" if clock else None,
        f"copy {copied:.0f} GB/s" if copied else None,
        f"torch {conditions['torch']}",
        f"CUDA {conditions['cuda']}" if conditions["cuda"] != "none" else None,
        f"triton {conditions['triton']}" if conditions["triton"] != "none" else None,
        f"commit {conditions['commit']}",
        conditions["date"],
    ]
    return " · ".join(filter(None, parts))


# --- files -----------------------------------------------------------------------------------


def write(folder: Path, stem: str, rows: Sequence[Row], conditions: Conditions, **more: Any) -> str:
    """Append to results.csv, write a JSON and a plot; returns a line about it."""
    folder.mkdir(parents=True, exist_ok=True)
    add_to_csv(folder / "results.csv", rows, conditions)
    content = {"conditions": conditions, "rows": [row.cells() for row in rows], **more}
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    missing = plot(folder / f"{stem}.png", rows, conditions)
    return missing or f"written to {folder}: results.csv, {stem}.json, {stem}.png"


def add_to_csv(path: Path, rows: Sequence[Row], conditions: Conditions) -> None:
    """Append; a file with other columns is refused."""
    header = [*rows[0].cells(), *CONDITIONS]
    old = path.read_text().splitlines() if path.exists() else []
    if old and next(csv.reader(old)) != header:
        raise ValueError(f"{path} has other columns than these rows; move it away first")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        if not old:
            writer.writeheader()
        for row in rows:
            cells = {**row.cells(), **conditions}
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in cells.items()}
            )


# --- the plot --------------------------------------------------------------------------------

OURS, THEIRS, PLAIN = "#0f766e", "#94a3b8", "#cbd5e1"
REFERENCES = ("eager", "cogvx-auto", "cogvx-reference")


def plot(path: Path, rows: Sequence[Row], conditions: Conditions) -> str | None:
    """Write a PNG of bars: percent of the ceiling if that is known for all, ratios if not.

    The ceiling is a copy's rate, or that of a matrix product where products are what bounds.
    Returns the reason if there is none.
    """
    timed = [row for row in rows if row.ratio is not None]
    if not timed:
        return "no plot: nothing was timed"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    panels: dict[str, list[Row]] = {}
    for row in timed:
        panels.setdefault(f"{row.which}, {row.convention}", []).append(row)
    bounded = all(_percent(row) is not None and row.median_ms for row in timed)
    heights = [len(panel) + 1 for panel in panels.values()]
    figure = Figure((9, 1.5 + 0.36 * sum(heights)), dpi=150, layout="constrained")
    axes = figure.subplots(
        len(panels), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for ax, (title, panel) in zip(axes, panels.items(), strict=True):
        panel.sort(key=lambda row: (_percent(row) if bounded else row.ratio) or 0.0)
        ours = [row.provider.startswith("cogvx") for row in panel]
        plain = [row.provider in REFERENCES for row in panel]
        bars = ax.barh(
            [row.provider for row in panel],
            [(_percent(row) if bounded else row.ratio) or 0.0 for row in panel],
            color=[PLAIN if p else OURS if o else THEIRS for o, p in zip(ours, plain, strict=True)],
        )
        ax.bar_label(bars, [_label(row, bounded) for row in panel], padding=5, fontsize=8.5)
        ax.axvline(100 if bounded else 1, color="#64748b", linewidth=0.8, linestyle="--", zorder=0)
        ax.set_title(title, loc="left", fontsize=10)
        ax.margins(x=0.4)
        ax.spines[["top", "right", "left"]].set_visible(False)
    units = "percent of a copy's rate, or of a matrix product's where products are what bounds"
    axes[-1].set_xlabel(units if bounded else "times as fast as the baseline, in the same run")
    first, where = timed[0], conditions["device_name"]
    figure.suptitle(f"{first.benchmark} at {first.size}, {first.dtype}, {where}", x=0.02, ha="left")
    figure.supxlabel(textwrap.fill(small_print(conditions), 150), fontsize=6.5, x=0.02, ha="left")
    figure.savefig(path)
    return None


def _percent(row: Row) -> float | None:
    """Share of the ceiling that bounds the row."""
    return row.percent_of_copy if row.tflop_per_s is None else row.percent_of_matmul


def _label(row: Row, bounded: bool) -> str:
    noise = f" (noise {row.noise_percent:.0f}%)" if (row.noise_percent or 0) >= 5 else ""
    times = f"{_percent(row):.0f}%  {row.median_ms:.3g} ms  " if bounded else ""
    return f"{times}{row.ratio:.2f}x{noise}"
