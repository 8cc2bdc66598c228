"""Shared memory of a batch of CTAs: loads, stores, ldmatrix and stmatrix."""

from typing import TYPE_CHECKING

import numpy as np

from .global_access import scatter
from .memory import VIEWS
from .shared_history import SharedHistory
from .values import Array

if TYPE_CHECKING:
    from .batch import Batch

POISON = 0xFF  # bytes that nothing has written, or that a copy is writing: NaN as floats


def poison(width: int) -> Array:
    """A scalar of `width` bytes of POISON."""
    return np.full(width, POISON, np.uint8).view(VIEWS[width])[0]


class SharedMemory:
    """`size` bytes for each CTA, side by side; `limit` is what the kernel requested."""

    def __init__(self, batch: "Batch") -> None:
        self.batch, self.limit = batch, batch.run.shared
        self.size = -(-self.limit // 128) * 128
        total = batch.ctas * self.size
        self.bytes = np.full(total + 16, POISON, np.uint8)
        self.views = {width: self.bytes[:total].view(kind) for width, kind in VIEWS.items()}
        self.first = np.arange(batch.ctas, dtype=np.int64)[:, None] * self.size
        self.history = SharedHistory(batch, self.size)

    def locate(
        self, site: int, address: Array, mask: Array | None, width: int
    ) -> tuple[Array, tuple[int, ...]]:
        """Places in `bytes` of active threads, and the shape of the access; faults are reported."""
        shape = np.broadcast_shapes(address.shape, (self.batch.ctas, 1))
        if mask is None:
            a, first = np.broadcast_to(address, shape), self.first
        else:
            shape = np.broadcast_shapes(shape, mask.shape)
            full = np.broadcast_to(mask, shape)
            a = np.broadcast_to(address, shape)[full]
            first = np.broadcast_to(self.first, shape)[full]
        a = a.astype(np.int64)
        used = self.batch.run.program.sites[site].used
        span = width if used < 0 else used.bit_length()
        if (a & (width - 1)).any():
            self.batch.report(site, f"misaligned: shared address, {width} bytes")
            a = a & ~(width - 1)
        if a.max() + span > self.limit:
            self.batch.report(site, f"out of bounds: shared byte {a.max()} of {self.limit}")
            a = np.minimum(a, self.size - width)
        return a + first, shape

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
        where, shape = self.locate(site, address, mask, width)
        self.history.read(site, address, mask, width)
        rows = np.ascontiguousarray(self.views[width][where >> (width.bit_length() - 1)])
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
        address = np.broadcast_to(address, (len(address), self.batch.threads))
        where, shape = self.locate(site, address, mask, width)
        data = np.stack([np.broadcast_to(v, shape) for v in values], -1)
        if mask is not None:
            data = data[np.broadcast_to(mask, shape)]
        at = where >> (width.bit_length() - 1)
        data = np.ascontiguousarray(data).view(VIEWS[width])[..., 0]
        view = self.views[width]
        with self.history.writing(site, address, mask, width):
            view[at] = data
        if len(self.history.ctas) and (view[at] != data).any():
            wrong = np.flatnonzero(view[at].ravel() != data.ravel())
            byte = int(where.ravel()[wrong[0]]) % self.size
            self.batch.report(
                site,
                "race in shared memory, threads of one instruction store different values: "
                f"{len(wrong)} of {data.size}, at byte {byte}",
            )

    def count(self, site: int, address: Array, mask: Array | None, width: int) -> None:
        if self.batch.run.counting:
            self.batch.run.counters.count_shared(site, address, mask, width, self.batch.shape)

    # --- matrices of 8 by 8 elements of 16 bits: lane 8 k + r of a warp has the address of row r
    # of matrix k, and lane 4 r + c holds elements 2 c and 2 c + 1 of row r.

    def load_matrix(self, site: int, address: Array, count: int, trans: bool) -> list[Array]:
        """ldmatrix: a register for each of `count` matrices."""
        where, lanes, active = self._rows(site, address, count)
        self.history.read(site, lanes, active, 16)
        tile = np.ascontiguousarray(self.views[16][where >> 4]).view(np.uint16)
        tile = tile.reshape(*where.shape, 8)
        if trans:
            tile = np.ascontiguousarray(tile.swapaxes(-1, -2))
        words = tile.view(np.uint32)  # (CTAs, warps, count, 8, 4)
        return [
            np.ascontiguousarray(words[:, :, k]).reshape(self.batch.shape) for k in range(count)
        ]

    def store_matrix(self, site: int, address: Array, values: list[Array], trans: bool) -> None:
        """stmatrix: the reverse of ldmatrix."""
        batch, count = self.batch, len(values)
        where, rows, lanes = self._rows(site, address, count)
        spread = (batch.ctas, batch.warps, 8, 4)
        words = [np.broadcast_to(v, batch.shape).reshape(spread) for v in values]
        tile = np.ascontiguousarray(np.stack(words, 2)).view(np.uint16)
        if trans:
            tile = np.ascontiguousarray(tile.swapaxes(-1, -2))
        active = self._active()[:, :, :count]
        with self.history.writing(site, rows, lanes, 16):
            self.views[16][where[active] >> 4] = tile.view("V16")[..., 0][active]

    def _active(self) -> Array:
        """Active threads, (CTAs, warps, 4, 8)."""
        batch = self.batch
        active = np.ones((1, 1), bool) if batch.active is None else batch.active
        return np.broadcast_to(active, batch.shape).reshape(batch.ctas, batch.warps, 4, 8)

    def _rows(self, site: int, address: Array, count: int) -> tuple[Array, Array, Array]:
        """Places of the rows of matrices (CTAs, warps, count, 8), counted and checked; the
        addresses that the threads give, and which of them do."""
        batch = self.batch
        batch.together(site, "warp")
        active = self._active().copy()
        active[:, :, count:] = False  # lanes whose address is not used
        a = np.broadcast_to(address, batch.shape).astype(np.int64)
        rows = a.reshape(batch.ctas, batch.warps, 4, 8)
        if batch.run.counting:
            flat = np.where(active, rows, -1)[:, :, :count].reshape(-1, 8)
            requests = int(active.any((2, 3)).sum())
            batch.run.counters.count_wavefronts(site, flat, 16, requests, 1)
        if (((rows & 15) != 0) & active).any():
            batch.report(site, "misaligned: a row of a matrix in shared memory, 16 bytes")
        wrong = (rows + 16 > self.limit) & active
        if wrong.any():
            byte = int(rows[wrong].max())
            batch.report(site, f"out of bounds: shared byte {byte} of {self.limit}")
        inside = np.clip(rows[:, :, :count] & ~15, 0, self.size - 16)
        given = np.where(active, rows, 0).reshape(batch.shape)
        return inside + self.first[:, :, None, None], given, active.reshape(batch.shape)
