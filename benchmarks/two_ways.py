"""`python -m benchmarks.tune --op expert_ffn --dense`: the grouped way beside the dense one.

Both are checked and timed as in `python -m benchmarks`, where no sorting is needed, that is for one
expert and for one each of text and video. What is printed is a row of
`cogvx_kernels.expert_ffn.heuristics`, to be written there by hand: nothing is tuned at run time.
"""

from collections.abc import Sequence
from typing import Any

import torch

from cogvx_kernels.testing import OPS, SIZES

from . import conditions, inputs
from .report import Row, table
from .suite import Options, Outcome, Wrong, run

GROUPED, DENSE = "cogvx-grouped", "cogvx-dense"


def compare(
    size: str, dtype: str, device: torch.device, passes: tuple[str, ...], budget: float
) -> int:
    """Prints both ways at a size and the rows of the table; 1 if one of them is wrong."""
    info = OPS["expert_ffn"]
    calls = inputs.conventions(info, SIZES[size])
    unsorted = {name: call for name, call in calls.items() if call.arguments["index"] is None}
    kind = getattr(torch, dtype)
    options = Options(
        kind, device, passes, (GROUPED, DENSE), conventions=tuple(unsorted), budget=budget
    )
    found = conditions.conditions(device, f"benchmarks.tune --op expert_ffn --dense --size {size}")
    try:
        outcome = run(info, size, options)
    except Wrong as wrong:
        print(f"outside the rule of numerics; nothing was timed.\n{wrong}")
        return 1
    print(table(outcome.rows))
    for name, call in unsorted.items():
        print(f"\n{name}: {_measured(outcome, name, call.specs()['up'].shape, found)}")
    return 0


def _measured(outcome: Outcome, convention: str, up: Sequence[int], found: dict[str, Any]) -> str:
    """The row, by the sum of the passes' medians; or why there is none."""
    rows = [row for row in outcome.rows if row.convention == convention]
    grouped, dense = (_sum(rows, name) for name in (GROUPED, DENSE))
    if not grouped or not dense:
        return "not timed, so there is no row"
    faster, ratio = ("grouped", dense / grouped) if grouped <= dense else ("dense", grouped / dense)
    experts, ffn_dim, dim = up
    device, dtype, date = found["device_name"], rows[0].dtype, found["date"][:10]
    return (
        f"Measured({device!r}, {dtype!r}, {dim}, {ffn_dim}, {experts}, {faster!r}, "
        f"{ratio:.2f}, {date!r}),"
    )


def _sum(rows: Sequence[Row], provider: str) -> float:
    """Milliseconds of all passes; 0 if one has none."""
    times = [row.median_ms for row in rows if row.provider == provider]
    return sum(t for t in times if t) if all(times) else 0.0
