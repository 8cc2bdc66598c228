"""Races between the programs of a launch: two at one address, one of them storing.

The interpreter runs programs one after another, so a race has no effect there; a GPU runs them at
once. Atomics race with loads and stores, not with each other.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np


class Access(NamedTuple):
    """One load or store of a program."""

    kind: Literal["load", "store", "atomic"]
    program: int
    addresses: np.ndarray  # uint64, one for each lane that is not masked
    itemsize: int
    where: str  # in the source


class Race(NamedTuple):
    """Two accesses to one address, and the number of bytes with the same conflict."""

    address: int
    first: Access
    second: Access
    bytes: int


class _Cells(NamedTuple):
    """Accessed memory in units of a common size."""

    cells: np.ndarray
    owners: np.ndarray  # index into the accesses

    def sorted(self) -> "_Cells":
        order = np.argsort(self.cells, kind="stable")
        return _Cells(self.cells[order], self.owners[order])


def find_races(accesses: Sequence[Access]) -> list[Race]:
    """Find one race for each pair of kinds that race.

    `accesses` are in order of time, those of a program contiguous.
    """
    by_kind = {
        kind: [i for i, access in enumerate(accesses) if access.kind == kind]
        for kind in ("store", "atomic", "load")
    }
    written = by_kind["store"] + by_kind["atomic"]
    if not written or len({access.program for access in accesses}) < 2:
        return []
    low = min(int(accesses[i].addresses.min()) for i in written)
    high = max(int(accesses[i].addresses.max()) + accesses[i].itemsize for i in written)
    by_kind["load"] = [  # leave out loads far from all writes
        i
        for i in by_kind["load"]
        if accesses[i].addresses.min() < high
        and accesses[i].addresses.max() + np.uint64(accesses[i].itemsize) > low
    ]
    unit = _unit([accesses[i] for kept in by_kind.values() for i in kept])
    touched = {kind: _cells(accesses, kept, unit).sorted() for kind, kept in by_kind.items()}
    programs = np.array([access.program for access in accesses])
    races = [
        _within(touched["store"], accesses, programs, unit),
        _between(touched["store"], touched["load"], accesses, programs, unit),
        _between(touched["store"], touched["atomic"], accesses, programs, unit),
        _between(touched["atomic"], touched["load"], accesses, programs, unit),
    ]
    return [race for race in races if race is not None]


def _unit(accesses: Sequence[Access]) -> int:
    """The largest power of two that divides all addresses and sizes."""
    bits = 0
    for access in accesses:
        bits |= access.itemsize | int(np.bitwise_or.reduce(access.addresses))
    return bits & -bits


def _cells(accesses: Sequence[Access], kept: Sequence[int], unit: int) -> _Cells:
    cells, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for i in kept:
        start = accesses[i].addresses // np.uint64(unit)
        each = np.arange(accesses[i].itemsize // unit, dtype=np.uint64)
        cells.append((start[:, None] + each).ravel())
        owners.append(np.full(cells[-1].size, i))
    return _Cells(np.concatenate(cells), np.concatenate(owners))


def _within(
    stores: _Cells, accesses: Sequence[Access], programs: np.ndarray, unit: int
) -> Race | None:
    """A race among stores: sorted by cell, two programs in a cell are neighbours."""
    by = programs[stores.owners]
    clash = np.flatnonzero((stores.cells[1:] == stores.cells[:-1]) & (by[1:] != by[:-1]))
    if not clash.size:
        return None
    at = clash[0]
    first, second = (accesses[i] for i in stores.owners[at : at + 2])
    contested = np.unique(stores.cells[clash]).size
    return Race(int(stores.cells[at]) * unit, first, second, contested * unit)


def _between(
    writes: _Cells, others: _Cells, accesses: Sequence[Access], programs: np.ndarray, unit: int
) -> Race | None:
    """A race of `others` with a write of another program to the same cell.

    A program's accesses are contiguous in time and the sort is stable, so if the first and the last
    write of a cell are one program's, so are all.
    """
    if not writes.cells.size or not others.cells.size:
        return None
    first = np.searchsorted(writes.cells, others.cells, side="left")
    last = np.searchsorted(writes.cells, others.cells, side="right") - 1
    found = first <= last
    me = programs[others.owners]
    for end in (first, last):
        writer = writes.owners[np.where(found, end, 0)]
        clash = np.flatnonzero(found & (programs[writer] != me))
        if clash.size:
            at = clash[0]
            contested = np.unique(others.cells[clash]).size
            pair = accesses[writer[at]], accesses[others.owners[at]]
            return Race(int(others.cells[at]) * unit, *pair, contested * unit)
    return None
