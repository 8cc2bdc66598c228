"""`cogvx-kernels counters`: count what compiled kernels ask of a GPU, at a model's size.

A few CTAs of each launch are executed on a CPU (`cogvx_kernels.ptx`), and the counters of the grid
are held to counters.csv: the exit status is 1 if one has grown by more than 5 %. Times are
predictions, from the counters and a model of each card (`ptx/cards.py`); no card has run a kernel.
"""

import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from .. import _backend
from ..ptx import budgets
from ..ptx.budgets import Key
from ..ptx.cards import Counts
from ..testing import OPS
from . import options as command_line

HEADS = f"{'coal.':>6}{'wavef':>6}{'slot/el':>8}{'pred. us':>9}"
PAGE = budgets.PATH.parents[2] / "docs" / "performance.md"
Found = list[tuple[Key, Counts]]


def main(argv: list[str]) -> int:
    options = command_line.counters(argv)
    if options.table:
        print("\n".join(budgets.predictions(budgets.load(), options.op or OPS)))
        return 0
    if not _backend.HAS_TRITON or _backend.INTERPRETED:
        reason = "unset TRITON_INTERPRET" if _backend.HAS_TRITON else "install triton"
        print(f"cogvx-kernels counters: nothing can be compiled; {reason}", file=sys.stderr)
        return 2
    ops = options.op or [name for name, info in OPS.items() if info.launch is not None]
    targets = options.target or budgets.TARGETS
    now: dict[Key, Counts] = {}
    print(f"{'launch':72}{HEADS:38}  predicted us of each part")
    for found in surveys(ops, targets):
        for key, counts in found:
            now[key] = counts
            print(line(key, counts), flush=True)
    kept = budgets.load() if budgets.PATH.exists() else {}
    if options.write:
        rest = {k: v for k, v in kept.items() if (k.op, k.target) not in set(_pairs(ops, targets))}
        budgets.write(rest | now)
        print(f"{len(now)} launches written to {budgets.PATH}")
        if PAGE.exists():  # a clone
            PAGE.write_text(refreshed(PAGE.read_text()))
        return 0
    messages = budgets.compare(kept, now)
    for message in messages:
        print(f"over budget: {message}", file=sys.stderr)
    print(f"{len(now)} launches, {len(messages)} over budget")
    return 1 if messages or not now else 0


def refreshed(page: str) -> str:
    """The page of docs with the tables between its markers made anew."""
    tables = {"cards": budgets.assumptions(), "launches": budgets.predictions(budgets.load())}
    for name, lines in tables.items():
        mark, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, rest = page.split(mark)
        page = f"{before}{mark}" + "\n".join(lines) + rest[rest.index(end) :]
    return page


def surveys(ops: Sequence[str], targets: Sequence[str]) -> Iterator[Found]:
    """Counters of each op, convention and target, in order, from a process for each core."""
    cases = [
        (op, convention, target)
        for op, target in _pairs(ops, targets)
        for convention in budgets.conventions(OPS[op])
    ]
    # spawned, because torch's threads do not survive a fork
    spawned = multiprocessing.get_context("spawn")
    workers = min(len(cases), os.cpu_count() or 1)
    if workers < 2:
        yield from itertools.starmap(survey, cases)
        return
    with ProcessPoolExecutor(workers, spawned, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(survey, *zip(*cases, strict=True))


def survey(op: str, convention: str, target: str) -> Found:
    """Counters of an op's launches; the machine is imported where it runs."""
    from ..ptx import survey as machine

    return list(machine.survey(op, budgets.SIZE, convention, target))


def line(key: Key, counts: Counts) -> str:
    name = f"{key.op} {key.convention} {key.kernel} {key.number} {key.target}"
    return f"{name:72}{budgets.summary(key, counts):38}  {budgets.parts(key, counts)}"


def _pairs(ops: Sequence[str], targets: Sequence[str]) -> Iterator[tuple[str, str]]:
    return itertools.product(ops, targets)
