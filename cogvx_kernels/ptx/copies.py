"""cp.async: copies from global to shared memory, which are there after a wait for their group."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .memory import VIEWS
from .shared_memory import poison
from .values import Array

if TYPE_CHECKING:
    from .batch import Batch

MADE_UP = np.frombuffer(b"\x8f\x3f" * 8, np.uint8)  # of a source with nothing behind it


@dataclass
class Copy:
    """One cp.async of all threads, until all have waited for it.

    to       shared addresses (CTAs, threads), `where` their places in `SharedMemory.bytes`
    data     bytes (CTAs, threads, size)
    waiting  threads whose copy has not arrived
    group    number of its group, of each CTA
    """

    to: Array
    where: Array
    data: Array
    waiting: Array
    group: Array


class Copies:
    """Copies in flight. Sources are read at once, targets are poison until the wait."""

    def __init__(self, batch: "Batch") -> None:
        self.batch = batch
        self.committed = np.zeros((batch.ctas, 1), np.int64)
        self.pending: list[Copy] = []

    def start(
        self, site: int, to: Array, source: Array, guard: Array | None, size: int,
        read: Array | None,
    ) -> None:  # fmt: skip
        """Copy `size` bytes a thread; if `read` is given, that many of them, and zeros."""
        batch, shared = self.batch, self.batch.shared
        mask = batch.mask(guard)
        if mask is False:
            return
        data = np.zeros((*batch.shape, size), np.uint8)
        active = np.broadcast_to(np.ones((1, 1), bool) if mask is None else mask, batch.shape)
        sizes = np.full((1, 1), size, np.uint32) if read is None else read
        if (sizes > size).any():
            batch.report(site, f"copy: a source of more than {size} bytes")
        for part in (int(n) for n in np.unique(np.minimum(sizes, size)) if n):
            wants = mask if (sizes == part).all() else active & (sizes == part)
            if wants is None or wants.any():
                self._read(site, source, wants, part, data)
        full = np.broadcast_to(np.where(active, to, np.uint32(0)), batch.shape)
        where, _ = shared.locate(site, full, None, size)
        with shared.history.writing(site, full, mask, size, copying=True):
            shared.views[size][where[active] >> (size.bit_length() - 1)] = poison(size)
        self.pending.append(Copy(full, where, data, active.copy(), self.committed.copy()))

    def _read(self, site: int, source: Array, wants: Array | None, part: int, data: Array) -> None:
        """Read `part` bytes of the sources into `data`."""
        memory, size = self.batch.globals, data.shape[-1]
        memory.count(site, source, wants, part)
        wanted = np.broadcast_to(np.ones((1, 1), bool) if wants is None else wants, data.shape[:2])
        source = np.broadcast_to(source, data.shape[:2])
        if part == size:
            rows, _ = memory.read(site, source, wanted, size)
            got = None if rows is None else rows.view(np.uint8).reshape(-1, size)
        else:
            got = memory.read_part(site, source, wanted, part, size)
        data[wanted, :part] = MADE_UP[:part] if got is None else got

    def commit(self) -> None:
        """Close a group."""
        self.committed = self.committed + self.batch.active_ctas()[:, None]

    def wait(self, count: int) -> None:
        """Let copies of all groups but the latest `count` arrive, of the threads that wait."""
        batch, shared = self.batch, self.batch.shared
        left = []
        for copy in self.pending:
            done = copy.waiting & (copy.group < self.committed - count)
            if batch.active is not None:
                done &= batch.active
            if done.any():
                size = copy.data.shape[-1]
                at = copy.where[done] >> (size.bit_length() - 1)
                shared.views[size][at] = copy.data[done].view(VIEWS[size])[:, 0]
                shared.history.arrive(copy.to, done, size)
                copy.waiting &= ~done
            if copy.waiting.any():
                left.append(copy)
        self.pending = left
