"""Loads and stores of global memory by a batch of CTAs, and races between CTAs."""

from typing import TYPE_CHECKING

import numpy as np

from .memory import VIEWS
from .values import Array

if TYPE_CHECKING:
    from .batch import Batch

# Values of a load with nothing behind it: between 1 and 2 as fp32 and bf16; by bytes of a register.
MADE_UP = {1: 0x3F, 2: 0x3F8F, 4: 0x3F8F3F8F, 8: 1}


class GlobalAccess:
    """Global memory, as the threads of a batch see it."""

    def __init__(self, batch: "Batch") -> None:
        self.batch, self.memory = batch, batch.run.memory

    def load(
        self, site: int, address: Array, guard: Array | None, count: int, each: int,
        old: list[Array],
    ) -> list[Array]:  # fmt: skip
        """`count` registers of `each` bytes; `old` where threads are not active."""
        mask = self.batch.mask(guard)
        if mask is False:
            return old
        width = count * each
        self.count(site, address, mask, width)
        rows, shape = self.read(site, address, mask, width)
        if rows is None:
            values = [np.full(shape, MADE_UP[each], VIEWS[each])] * count
            return values if mask is None else [
                np.where(mask, v, old[k] if old else v.dtype.type(0)) for k, v in enumerate(values)
            ]  # fmt: skip
        flat = rows.view(VIEWS[each]).reshape(*rows.shape, count)
        values = [np.ascontiguousarray(flat[..., k]) for k in range(count)]
        return values if mask is None else scatter(values, old, mask, shape)

    def store(
        self, site: int, address: Array, guard: Array | None, each: int, values: list[Array]
    ) -> None:
        mask = self.batch.mask(guard)
        if mask is False:
            return
        width = len(values) * each
        self.count(site, address, mask, width)
        shape = np.broadcast_shapes(
            address.shape, *(v.shape for v in values), (1, 1) if mask is None else mask.shape
        )
        data = np.stack([np.broadcast_to(v, shape) for v in values], -1)
        a = np.broadcast_to(address, shape)
        if mask is not None:
            full = np.broadcast_to(mask, shape)
            a, data = a[full], data[full]
        where, wrong = self.memory.locate(a, width)
        if wrong:
            return self.batch.report(site, f"{wrong}: global write")
        self.memory.note(a, self.memory.stored)
        if where is None:
            return
        self._check_races(site, where, shape, mask, width, writes=True)
        at = (where >> np.uint64(width.bit_length() - 1)).astype(np.int64)
        data = np.ascontiguousarray(data).view(VIEWS[width])[..., 0]
        self.memory.views[width][at] = data
        if (self.memory.views[width][at] != data).any():
            self.batch.report(site, "race, threads store different values to one address: global")

    def read(
        self, site: int, address: Array, mask: Array | None, width: int
    ) -> tuple[Array | None, tuple[int, ...]]:
        """The bytes there, those of active threads in one dim if there is a mask; the shape."""
        shape, where = self._read_places(site, address, mask, width, width)
        if where is None:
            return None, shape
        at = (where >> np.uint64(width.bit_length() - 1)).astype(np.int64)
        return np.ascontiguousarray(self.memory.views[width][at]), shape

    def read_part(
        self, site: int, address: Array, mask: Array, width: int, align: int
    ) -> Array | None:
        """The first `width` bytes, of any number, at addresses aligned to `align`."""
        _, where = self._read_places(site, address, mask, width, align)
        if where is None:
            return None
        return self.memory.bytes[where.astype(np.int64)[..., None] + np.arange(width)]

    def _read_places(
        self, site: int, address: Array, mask: Array | None, width: int, align: int
    ) -> tuple[tuple[int, ...], Array | None]:
        """The shape of a read, and its checked places in memory; None if nothing is behind them."""
        shape, a = active(address, mask)
        where, wrong = self.memory.locate(a, width, align)
        if wrong:
            self.batch.report(site, f"{wrong}: global read")
            where = None if self.memory.dry else np.zeros(a.shape, np.uint64)
        else:
            self.memory.note(a, self.memory.loaded)
        if where is not None:
            self._check_races(site, where, shape, mask, width, writes=False)
        return shape, where

    def count(self, site: int, address: Array, mask: Array | None, width: int) -> None:
        if self.batch.run.counting:
            self.batch.run.counters.count_global(site, address, mask, width, self.batch.shape)

    def _check_races(
        self, site: int, where: Array, shape: tuple[int, ...], mask: Array | None, width: int,
        *, writes: bool,
    ) -> None:  # fmt: skip
        """Report CTAs of one launch of which one touches what another writes."""
        several = shape[0] != self.batch.ctas  # one row for all CTAs
        cta = np.full((1, 1), -1, np.int32) if several else self.batch.cta
        if mask is not None:
            cta = np.broadcast_to(cta, shape)[np.broadcast_to(mask, shape)]
        memory = self.memory
        for offset in {0, max(0, width - 2)}:
            at = ((where + np.uint64(offset)) >> np.uint64(1)).astype(np.int64)
            who = np.broadcast_to(cta, at.shape)
            writer, reader = memory.writer[at], memory.reader[at]
            if ((writer != 0) & ((writer != who) | several)).any() or (writes and several):
                kind = "write" if writes else "read"
                self.batch.report(site, f"race of CTAs, {kind} after another's write: global")
            if not writes:
                memory.reader[at] = np.where((reader == 0) | (reader == who), who, -1)
                continue
            if ((reader != 0) & ((reader != who) | several)).any():
                self.batch.report(site, "race of CTAs, write after another's read: global")
            memory.writer[at] = who


def active(address: Array, mask: Array | None) -> tuple[tuple[int, ...], Array]:
    """The shape of an access, and the addresses of the active threads."""
    if mask is None:
        return address.shape, address
    shape = np.broadcast_shapes(address.shape, mask.shape)
    return shape, np.broadcast_to(address, shape)[np.broadcast_to(mask, shape)]


def scatter(
    values: list[Array], old: list[Array], mask: Array, shape: tuple[int, ...]
) -> list[Array]:
    """Values of active threads, put among the old ones (zeros if there are none)."""
    out = []
    for k, value in enumerate(values):
        new = np.zeros(shape, value.dtype)
        if old:
            new[...] = old[k]
        new[np.broadcast_to(mask, shape)] = value
        out.append(new)
    return out
