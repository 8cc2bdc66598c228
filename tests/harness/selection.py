"""Test selection: by default every test function with each value of each parameter once, not in all
combinations.

`--part K/N` adds one of N parts of the other combinations, `--all` all of them.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any
from zlib import crc32

import pytest

Part = tuple[int, int]  # number of a part, from 0, and of how many; (0, 0) is none, (0, 1) is all
COLLECTED = pytest.StashKey[list[pytest.Item]]()  # all that was found


def rest(*values: Any) -> Any:
    """A row of `parametrize` that the default run leaves out."""
    return pytest.param(*values, marks=pytest.mark.rest)


def add_options(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        type=as_part,
        default=(0, 0),
        metavar="K/N",
        help="add part K of N, K from 0, of the tests that the default leaves out",
    )
    parser.addoption(
        "--all",
        action="store_const",
        const=(0, 1),
        dest="part",
        help="every test with all combinations of its parameters",
    )


def as_part(text: str) -> Part:
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"must be K/N with K from 0 to N - 1; got {text!r}")
    return int(number), int(parts)


def apply(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remove the items that are not selected; a test named on the command line always runs."""
    if any("::" in argument for argument in config.args):
        return
    taken = select(items, config.option.part)
    config.hook.pytest_deselected(items=[item for item in items if item not in taken])
    items[:] = [item for item in items if item in taken]


def select(items: Iterable[pytest.Item], part: Part = (0, 0)) -> set[pytest.Item]:
    """The default cases and those of the part.

    A case marked `rest` is a default case only if its function has no other.
    """
    functions: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    number, parts = part
    taken = set()
    for name, cases in functions.items():
        candidates = [case for case in cases if not case.get_closest_marker("rest")] or cases
        default = {candidates[i] for i in cover([values(case) for case in candidates])}
        # Counted from a hash, or part 0 would have the first case of every function.
        others = enumerate((case for case in cases if case not in default), crc32(name.encode()))
        taken |= default | {case for i, case in others if parts and i % parts == number}
    return taken


def values(item: pytest.Item) -> set[Hashable]:
    """The `parametrize` rows and fixture parameters of a case."""
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec else {}
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    rows = [row.replace(",", " ").split() if isinstance(row, str) else [*row] for row in names]
    rows += [[name] for name in params if not any(name in row for row in rows)]
    # By identity, because tensors have no boolean value and lists no hash.
    return {(*row, *(id(params[name]) for name in row)) for row in rows}


def cover(cases: Sequence[set[Hashable]]) -> set[int]:
    """Indices of few cases that together have every value of all cases.

    Ties go to the case with the least used values, which combines the values of one parameter with
    different ones of another; then to the first.
    """
    frequency = Counter(value for case in cases for value in case)
    chosen = {i for i, case in enumerate(cases) if not case or any(frequency[v] == 1 for v in case)}
    taken = Counter(value for i in chosen for value in cases[i])
    while missing := frequency.keys() - taken.keys():
        best = max(
            (i for i in range(len(cases)) if i not in chosen),
            key=lambda i: (len(cases[i] & missing), -sum(taken[v] for v in cases[i]), -i),
        )
        chosen.add(best)
        taken.update(cases[best])
    return chosen
