"""Budgets of the counters of every kernel: counters.csv, a line for each launch at a named size.

`cogvx-kernels counters --write` counts and writes them.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .._opinfo import OpInfo
from ..testing import OPS
from .cards import CARDS, Counts, bound, times

PATH = Path(__file__).with_name("counters.csv")
SIZE = "5b-480x720-49f"
TARGETS = tuple(dict.fromkeys(card.target for card in CARDS))
WORSE = 1.05  # a counter may grow by this much
# What takes under a microsecond of any card may grow: a grid of a few CTAs.
SMALL = {"bytes": 1e6, "sectors": 3e4, "wavefronts": 1e5, "slots": 2e5, "mufu": 5e4}


class Key(NamedTuple):
    """A launch: the `number`-th of its kernel in an op's call at a size."""

    op: str
    size: str
    convention: str
    target: str
    kernel: str
    number: int


Table = Mapping[Key, Counts]


def load(path: Path = PATH) -> dict[Key, Counts]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    found = {}
    for op, size, convention, target, kernel, number, direction, *numbers in rows:
        key = Key(op, size, convention, target, kernel, int(number))
        found[key] = Counts(direction, *map(float, numbers))
    return found


def write(table: Table, path: Path = PATH) -> None:
    """Write a line for each launch, sorted, so that changes of two kernels merge."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Key._fields, *Counts._fields])
        for key, (direction, *numbers) in sorted(table.items()):
            writer.writerow([*key, direction, *(f"{x:.4g}" for x in numbers)])


def conventions(info: OpInfo) -> list[str]:
    """Those of an op's compile budgets, but for one whose control flow is data."""
    named = dict.fromkeys(b.convention for b in info.budgets)
    return [convention for convention in named if "top-" not in convention]


def worse(kept: Counts, now: Counts) -> list[str]:
    """Messages for what has grown by more than 5 %."""
    grown = []
    for name, small in SMALL.items():
        before, after = getattr(kept, name), getattr(now, name)
        if after > max(WORSE * before, small):
            grown.append(f"{name}: {after:.4g}, budget {before:.4g} and 5 %")
    return grown


def compare(kept: Table, now: Table) -> list[str]:
    """Messages for the launches that are worse than kept, or not kept."""
    messages = []
    for key, counts in now.items():
        where = " ".join(str(x) for x in key if x)
        if key in kept:
            messages += [f"{where}: {text}" for text in worse(kept[key], counts)]
        else:
            messages.append(f"{where}: no budget; write one with cogvx-kernels counters --write")
    return messages


def assumptions() -> list[str]:
    """A Markdown table of what is assumed about each card."""
    rows = {
        "compiled for": [card.target for card in CARDS],
        "HBM, TB/s": [f"{card.hbm / 1e12:.2g}" for card in CARDS],
        "L2, TB/s": [f"{card.l2 / 1e12:.2g}" for card in CARDS],
        "multiprocessors": [str(card.sms) for card in CARDS],
        "clock, GHz": [f"{card.clock / 1e9:.3g}" for card in CARDS],
        "mma.sync, TFLOPS": [f"{card.mma / 1e12:.0f}" for card in CARDS],
        "wgmma, TFLOPS": [f"{card.wgmma / 1e12:.0f}" if card.wgmma else "" for card in CARDS],
        "fp32 instructions a clock": [str(card.fp32) for card in CARDS],
    }
    heads = [_row(["", *(card.name for card in CARDS)]), _row(["---"] * (1 + len(CARDS)))]
    return heads + [_row([name, *cells]) for name, cells in rows.items()]


def predictions(table: Table, ops: Iterable[str] = OPS) -> list[str]:
    """A Markdown table of the launches of over 10 MB: bytes, predicted times, what limits them."""
    heads = ["op", "kernel", "pass", "MB", *(f"{card.name}, µs" for card in CARDS)]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for op in ops:
        for key, counts in table.items():
            if key.op != op or key.target != CARDS[0].target or counts.bytes < 1e7:
                continue
            on = [(card, table.get(key._replace(target=card.target))) for card in CARDS]
            bounds = [bound(there, card) if there else ("?", 0.0) for card, there in on]
            predicted = [f"{1e6 * seconds:.0f} {part}" for part, seconds in bounds]
            name = f"`{op}`" + (f", {key.convention}" if key.convention else "")
            kernel = f"`{key.kernel}`" + (f" {key.number}" if key.number > 1 else "")
            lines.append(
                _row([name, kernel, counts.direction, f"{counts.bytes / 1e6:.0f}", *predicted])
            )
    return lines


def summary(key: Key, counts: Counts) -> str:
    """Coalescing, wavefronts, slots an element, predicted time on the target's first card."""
    card = next(card for card in CARDS if card.target == key.target)
    part, seconds = bound(counts, card)
    return (
        f"{100 * counts.coalescing:>5.0f}%{counts.conflicts:>6.1f}{counts.slots_per_element:>8.1f}"
        f"{1e6 * seconds:>8.0f} {part}, {card.name}"
    )


def parts(key: Key, counts: Counts) -> str:
    """Predicted microseconds of each part of the target's first card."""
    card = next(card for card in CARDS if card.target == key.target)
    return " ".join(f"{name} {1e6 * t:.0f}" for name, t in times(counts, card).items())


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
