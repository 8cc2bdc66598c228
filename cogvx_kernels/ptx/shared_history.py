"""Who touched shared memory last, to find accesses that no barrier, wait or fence keeps apart.

Threads run in lock-step, so a missing barrier does not show in results; it shows here. The unit is
2 bytes. Threads of one warp are apart only behind a bar.warp.sync.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .values import Array

if TYPE_CHECKING:
    from .batch import Batch

CTA_EPOCH = 20  # bits of an epoch that count barriers of single warps
NOBODY, SEVERAL = -1, -2


class Touched(NamedTuple):
    """Units that threads touch, flat: where, thread, and epoch of its CTA."""

    at: Array
    who: Array
    when: Array


class SharedHistory:
    """The last write and read of each unit, in the watched CTAs of a batch."""

    def __init__(self, batch: "Batch", size: int) -> None:
        """`size`: bytes of shared memory of a CTA."""
        self.batch, self.size = batch, size
        watched = batch.run.watched if size else 0
        step = max(1, batch.ctas // watched) if watched else 1
        self.ctas = np.arange(0, batch.ctas, step)[:watched]
        units = len(self.ctas) * size // 2
        self.write_who, self.write_when = np.full(units, NOBODY, np.int32), np.zeros(units, int)
        self.read_who, self.read_when = np.full(units, NOBODY, np.int32), np.zeros(units, int)
        self.in_flight = np.zeros(units, bool)  # a copy is writing it
        self.multiplied = np.zeros(units, bool)  # a wgmma may be reading it
        self.unfenced = np.zeros(units, bool)  # written by threads since the last proxy fence

    def touched(self, address: Array, mask: Array | None, width: int, used: int = -1) -> Touched:
        """Units of accesses; `used` is a mask of the bytes that count."""
        batch, ctas = self.batch, self.ctas
        a = np.broadcast_to(address, batch.shape)[ctas].astype(np.int64)
        a = a + (np.arange(len(ctas)) * self.size)[:, None]
        who = np.broadcast_to(np.arange(batch.threads, dtype=np.int32), a.shape)
        when = np.broadcast_to(batch.epoch[ctas], a.shape)
        if mask is not None:
            full = np.broadcast_to(mask, batch.shape)[ctas]
            a, who, when = a[full], who[full], when[full]
        units = [k for k in range(max(1, width // 2)) if used < 0 or used >> 2 * k & 3]
        at = (a[..., None] >> 1) + np.array(units)
        at = np.minimum(at, len(self.write_who) - 1)  # what is beyond was reported
        return Touched(at.ravel(), *(np.repeat(x.ravel(), len(units)) for x in (who, when)))

    def read(self, site: int, address: Array, mask: Array | None, width: int) -> None:
        """Check and record a load by threads."""
        if not len(self.ctas):
            return
        used = self.batch.run.program.sites[site].used
        at, who, when = touched = self.touched(address, mask, width, used)
        self._check_order(site, "read", touched, "write", self.write_who, self.write_when)
        self._check_copies(site, at)
        same = self.read_when[at] >> CTA_EPOCH == when >> CTA_EPOCH
        several = same & (self.read_who[at] != who) & (self.read_who[at] != NOBODY)
        self.read_who[at] = np.where(several, SEVERAL, who)
        self.read_when[at] = when
        again = self.read_who[at] != who  # by several threads of this instruction
        self.read_who[at[again]] = SEVERAL

    @contextlib.contextmanager
    def writing(
        self, site: int, address: Array, mask: Array | None, width: int, copying: bool = False
    ) -> Iterator[None]:
        """Context of a store by threads, or of the start of a copy: check and record it.

        A write of what is there already races with nothing.
        """
        if not len(self.ctas):
            yield
            return
        at, who, when = touched = self.touched(address, mask, width)
        before = self._contents(at)
        yield
        changed = (self._contents(at) != before) | copying
        self._check_copies(site, at)
        touched = Touched(at[changed], who[changed], when[changed])
        self._check_order(site, "write", touched, "write", self.write_who, self.write_when)
        self._check_order(site, "write", touched, "read", self.read_who, self.read_when)
        if self.multiplied[touched.at].any():
            self._race(site, "write of what a wgmma may still be reading", "")
        self.write_who[at], self.write_when[at] = who, when
        (self.in_flight if copying else self.unfenced)[at] = True

    def _contents(self, at: Array) -> Array:
        """What units hold."""
        units = self.size // 2
        place = self.ctas[at // units] * units + at % units
        contents: Array = self.batch.shared.views[2][place]
        return contents

    def arrive(self, address: Array, mask: Array, width: int) -> None:
        """Record that copies have arrived, which is a write at the time of the wait."""
        if not len(self.ctas):
            return
        at, who, when = self.touched(address, mask, width)
        self.in_flight[at] = False
        self.unfenced[at] = True
        self.write_who[at], self.write_when[at] = who, when

    def multiply(self, site: int, address: Array) -> Array:
        """Check a wgmma's reads, (CTAs, ...) of 2-byte elements; return its units."""
        ctas = self.ctas[self.batch.active_ctas()[self.ctas]]
        rows = np.flatnonzero(self.batch.active_ctas()[self.ctas])
        a = address[ctas].reshape(len(ctas), -1) + (rows * self.size)[:, None]
        at = a.ravel() >> 1
        if self.in_flight[at].any():
            self._race(site, "wgmma of what a copy is still writing", "")
        if self.unfenced[at].any():
            self._race(site, "wgmma of what threads wrote, without a fence.proxy.async between", "")
        when = np.repeat(self.batch.epoch[ctas].ravel(), a.shape[1])
        same = self.write_when[at] >> CTA_EPOCH == when >> CTA_EPOCH
        if (same & (self.write_who[at] != NOBODY)).any():
            self._race(site, "wgmma of what was written, no barrier between", "")
        self.multiplied[at] = True
        return at

    def fence(self) -> None:
        """Writes by threads of active CTAs are visible to wgmma from here on."""
        rows = self.batch.active_ctas()[self.ctas]
        self.unfenced.reshape(len(self.ctas), self.size // 2)[rows] = False

    def _check_copies(self, site: int, at: Array) -> None:
        if self.in_flight[at].any():
            self._race(site, "access to what a copy is still writing", "")

    def _check_order(
        self, site: int, this: str, touched: Touched, other: str, whose: Array, times: Array
    ) -> None:
        """Report accesses with no barrier after an `other` one by another thread."""
        at, who, when = touched
        before, then = whose[at], times[at]
        apart = (before != who) & (before != NOBODY)
        warps = (before >> 5 != who >> 5) | (before == SEVERAL)
        race = apart & np.where(warps, then >> CTA_EPOCH == when >> CTA_EPOCH, then == when)
        if race.any():
            k = int(np.flatnonzero(race)[0])
            former = "threads" if before[k] == SEVERAL else f"thread {before[k]}"
            place = f"thread {who[k]} after {former}, byte {2 * at[k] % self.size}"
            within = "between warps" if warps[k] else "within a warp"
            self._race(site, f"{this} after {other}, no barrier {within}", place)

    def _race(self, site: int, kind: str, detail: str) -> None:
        self.batch.report(
            site, f"race in shared memory, {kind}" + (f": {detail}" if detail else "")
        )
