"""What a run leaves behind: a table to read, a CSV to add to, a JSON to keep, a picture to show."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from cogvx_kernels._opinfo import Cost

from .conditions import CONDITIONS
from .timing import Times

Conditions = Mapping[str, Any]


class Cells(Protocol):
    """A row of any kind: its cells by column."""

    def cells(self) -> dict[str, Any]: ...


@dataclass
class Row:
    """One provider in one pass. A number that was not measured, or means nothing here, is None.

    convention       of the call: a key of `inputs.conventions`
    gb_per_s         the least bytes that the pass must move, over the median; not what it moved
    percent_of_copy  that rate over the rate of a large copy in the same run
    tflop_per_s      the operations of the pass over the median, where they are what bounds it
    percent_of_matmul  that rate over the rate of a large matrix product in the same run
    ratio_to_eager   eager's median over this one: 2 is twice as fast
    noise_percent    how far the medians of its two timings lie apart
    """

    op: str
    size: str
    convention: str
    which: str
    provider: str
    dtype: str
    device: str
    note: str = ""
    median_ms: float | None = None
    p25_ms: float | None = None
    p75_ms: float | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    tflop_per_s: float | None = None
    percent_of_matmul: float | None = None
    ratio_to_eager: float | None = None
    noise_percent: float | None = None

    def add_times(self, times: Times, cost: Cost) -> None:
        """The times, and what they make of the least that the pass must move and compute."""
        self.median_ms = 1e3 * times.median
        self.p25_ms, self.p75_ms = (1e3 * x for x in times.quartiles)
        self.gb_per_s = cost.bytes / times.median / 1e9
        if bound_by_products(cost):
            self.tflop_per_s = cost.flops / times.median / 1e12

    def cells(self) -> dict[str, Any]:
        """By column, `note` last."""
        values = {COLUMN_OF.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        return values | {"note": values.pop("note")}


# Operations a byte from which a GPU of today computes for longer than it moves; an H200 does 790
# TFLOP/s of bf16 beside 4.3 TB/s, and of fp32 without tensor cores a tenth.
MANY_FLOPS_A_BYTE = 150


def bound_by_products(cost: Cost) -> bool:
    return cost.flops >= MANY_FLOPS_A_BYTE * cost.bytes


COLUMN_OF = {"which": "pass"}  # a word that Python keeps for itself

# --- the table -------------------------------------------------------------------------------

_SHORT = {
    "median_ms": ("ms", "{:.4g}"),
    "p25_ms": ("p25", "{:.4g}"),
    "p75_ms": ("p75", "{:.4g}"),
    "gb_per_s": ("GB/s", "{:.0f}"),
    "percent_of_copy": ("% copy", "{:.0f}"),
    "tflop_per_s": ("TFLOP/s", "{:.0f}"),
    "percent_of_matmul": ("% matmul", "{:.0f}"),
    "ratio_to_eager": ("x eager", "{:.2f}"),
    "noise_percent": ("noise %", "{:.1f}"),
}
_OF_PRODUCTS = ("tflop_per_s", "percent_of_matmul")


def table(rows: Sequence[Row]) -> str:
    """Rows under each other, grouped by op, size, convention and pass; absent numbers as dots.

    The columns of matrix products are there if a row has a number in them.
    """
    short = {
        name: column
        for name, column in _SHORT.items()
        if name not in _OF_PRODUCTS or any(getattr(row, name) is not None for row in rows)
    }
    lines: list[str] = []
    heading = ""
    for row in rows:
        above = f"{row.op}  {row.size}  {row.which}  {row.dtype}  {row.device}"
        above += "" if row.convention == "model" else f"  ({row.convention})"
        if above != heading:
            heading = above
            names = "".join(f"{title:>9}" for title, _ in short.values())
            lines += ["", above, f"  {'provider':<21}{names}  note"]
        cells = row.cells()
        numbers = (
            "·" if cells[name] is None else form.format(cells[name])
            for name, (_, form) in short.items()
        )
        lines.append(f"  {row.provider:<21}{''.join(f'{x:>9}' for x in numbers)}  {row.note}")
    return "\n".join(lines[1:])


def small_print(conditions: Conditions) -> str:
    """The conditions in a line or two, those that are known."""
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


def add_to_csv(path: Path, rows: Sequence[Cells], conditions: Conditions) -> None:
    """Append; a file with other columns is somebody else's and is refused."""
    header = [*rows[0].cells(), *CONDITIONS]
    old = path.read_text().splitlines() if path.exists() else []
    if old and next(csv.reader(old)) != header:
        raise ValueError(f"{path} has other columns than these rows; move it away first")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        if not old:
            writer.writeheader()
        writer.writerows(_rounded({**row.cells(), **conditions}) for row in rows)


def write_json(path: Path, rows: Sequence[Cells], conditions: Conditions, **more: Any) -> None:
    content = {"conditions": conditions, "rows": [row.cells() for row in rows], **more}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _rounded(cells: Mapping[str, Any]) -> dict[str, Any]:
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in cells.items()}
