"""Runner of a benchmark: every entry of a case is compared with the reference, then timed.

All entries are timed in turn and then again in the opposite order, so that a drift of the clocks is
nobody's advantage; how far the medians forth and back lie apart is reported as noise.
"""

import dataclasses
import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from cogvx.memory import LiveBytes
from cogvx_kernels._opinfo import Cost

from .registry import Benchmark, Case, Check, Entry, Options
from .report import Row
from .timing import (
    CACHES_TO_ROTATE,
    Call,
    Times,
    cache_bytes,
    copy_rate,
    matmul_rate,
    measure,
    sets_to_rotate,
)

Checks = dict[str, list[Check]]  # by pass


class Wrong(Exception):
    """An entry of ours is outside the rule, so nothing is timed; the message says how far."""


@dataclass
class Outcome:
    """Rows of one benchmark, and what else there is to report."""

    rows: list[Row] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # wrong ones that are not ours


def run(benchmark: Benchmark, options: Options) -> Outcome:
    """Compare, then time. Raises Wrong if an entry of ours is wrong."""
    options = dataclasses.replace(
        options,
        budget=options.budget or benchmark.budget,
        repeats=options.repeats or benchmark.repeats[options.device.type],
    )
    outcome = Outcome()
    for case in benchmark.cases(options):
        outcome.left_out |= case.left_out
        outcome.compared.append(f"{case.convention}: {case.compared}")
        checked = compare(case, outcome)
        for which in case.passes:
            timed = [(entry, checks[which]) for entry, checks in checked if which in checks]
            outcome.rows += time_all(case, which, timed, options)
    return outcome


def compare(case: Case, outcome: Outcome) -> list[tuple[Entry, Checks]]:
    """The entries whose results are right, in every pass."""
    right, wrong = [], []
    for entry in case.entries:
        check, entry.check = entry.check, None  # with it goes what the reference computed
        where = "" if case.convention == "model" else f" ({case.convention})"
        try:
            with entry.around():
                checks = {which: list(check(which)) for which in entry.passes}
        except torch.OutOfMemoryError:
            outcome.left_out[entry.name + where] = "out of memory"
            continue
        except Exception as error:
            if entry.ours or entry is case.entries[0]:
                raise
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            outcome.left_out[entry.name + where] = f"it failed: {text}"
            continue
        bad = [x for found in checks.values() for x in found if not x.ok]
        if not bad:
            right.append((entry, checks))
        elif entry.ours:
            wrong += [f"{entry.name}, {case.convention}: {x.text}" for x in bad]
        else:
            outcome.refused[entry.name + where] = f"{case.convention}: {bad[0].text}"
    if wrong:
        raise Wrong("\n".join(wrong))
    return right


def time_all(
    case: Case, which: str, entries: list[tuple[Entry, list[Check]]], options: Options
) -> list[Row]:
    """A row for each entry, after `budget` seconds of timing, a part of them in each repeat."""
    device, dtype = options.device, str(options.dtype).removeprefix("torch.")
    nsets = sets_to_rotate(case.nbytes, device) if case.nbytes else 1
    cached = 0 < case.nbytes * nsets < CACHES_TO_ROTATE * cache_bytes(device)
    about = case.benchmark, options.size, case.convention, which
    rows = {entry.name: Row(*about, entry.name, dtype, device.type) for entry, _ in entries}
    times, trouble = _run_repeats(case, which, [e for e, _ in entries], nsets, options, rows)
    baseline = times.get(case.entries[0].name, [])
    for entry, checks in entries:
        row, mine = rows[entry.name], times[entry.name]
        row.relative_error = max((x.error for x in checks), default=0.0)
        multiple = max((x.multiple for x in checks), default=0.0)
        notes = [entry.note, trouble.get(entry.name)]
        notes += [f"error {multiple:.1f}x the reference's" if multiple > 1.05 else None]
        if mine:
            cost = entry.cost or case.costs.get(which)
            total = _fill(row, mine, baseline, cost, cached, options)
            notes += ["bound by launches" if total.host_bound else None]
            notes += ["inputs fit in the cache" if cached else None]
        row.note = "; ".join(filter(None, notes))
    if case.fastest_first:
        return sorted(rows.values(), key=lambda row: row.median_ms or 0.0)
    return list(rows.values())


def _run_repeats(
    case: Case, which: str, entries: list[Entry], nsets: int, options: Options,
    rows: dict[str, Row],
) -> tuple[dict[str, list[Times]], dict[str, str]]:  # fmt: skip
    """The times of every entry, repeat by repeat, and why some have none. Fills in the memory."""
    times: dict[str, list[Times]] = {entry.name: [] for entry in entries}
    trouble = {entry.name: entry.untimed for entry in entries if entry.untimed}
    rounds = [[*entries], [*reversed(entries)]] * options.repeats
    calls: list[Call] = []
    for turn, entry in enumerate(x for some in rounds[: options.repeats] for x in some):
        first = turn < len(entries)
        if entry.name in trouble and not (first and case.memory):
            continue
        try:
            with entry.around():
                calls = entry.calls(which, nsets)
                if first:
                    _count_memory(rows[entry.name], case, entry, calls[0], options.device)
                if entry.name not in trouble:
                    budget = options.budget / options.repeats
                    times[entry.name].append(measure(calls, options.device, budget))
        except torch.OutOfMemoryError:
            trouble[entry.name] = "out of memory"
            times[entry.name].clear()
        calls = []
    return times, trouble


def _fill(
    row: Row, mine: list[Times], baseline: list[Times], cost: Cost | None, cached: bool,
    options: Options,
) -> Times:  # fmt: skip
    """Fill in the numbers of a row; returns all of its times."""
    total = _sum(mine)
    # On a CPU the ratios of one run mean something, and its milliseconds do not.
    if options.device.type != "cpu":
        row.add_times(total, cost)
    row.ratio = _ratio(baseline, mine)
    if len(mine) > 1:
        forth, back = _sum(mine[::2]), _sum(mine[1::2])
        row.noise_percent = 100 * abs(forth.median / back.median - 1)
    if cost is not None and not cached:
        ceiling = copy_rate(options.device)
        row.percent_of_copy = 100 * cost.bytes / total.median / ceiling
    if row.tflop_per_s is not None:
        ceiling = matmul_rate(options.device, options.dtype)
        row.percent_of_matmul = 100 * 1e12 * row.tflop_per_s / ceiling
    return total


def _ratio(baseline: list[Times], mine: list[Times]) -> float | None:
    """The baseline's median over this one's; of the two of a repeat, which lie near in time, and of
    those the median."""
    repeats = [a.median / b.median for a, b in zip(baseline, mine, strict=False)]
    return statistics.median(repeats) if repeats else None


def _sum(times: list[Times]) -> Times:
    return sum(times[1:], times[0])


# --- memory ----------------------------------------------------------------------------------


def _count_memory(row: Row, case: Case, entry: Entry, call: Call, device: torch.device) -> None:
    """Peak bytes: of a GPU's allocator, and of live tensors where the case has that counted.

    The counter does not see into compiled code.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        row.gpu_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    if not case.memory or "compile" in entry.name:
        return
    with LiveBytes() as live:
        call()
    row.peak_mib = live.peak / 2**20
    if entry.forward is not None:
        row.saved_mib = _saved_bytes(entry.forward, case) / 2**20


def _saved_bytes(forward: Call, case: Case) -> int:
    """Bytes that the forward of a training step keeps for its backward, weights apart."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage
        return x

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda x: x):
        out = forward()
    weights = {x.untyped_storage().data_ptr() for x in case.weights}
    del out
    return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)
