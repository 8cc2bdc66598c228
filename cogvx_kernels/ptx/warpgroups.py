"""wgmma of sm_90: products of warpgroups (4 warps), of operands in shared memory."""

from typing import TYPE_CHECKING

import numpy as np

from . import matrices
from .parse import Unsupported
from .values import WIDEN, Array

if TYPE_CHECKING:
    from .batch import Batch

THREADS = 128
K = 16  # columns of A, of 16-bit elements
ROWS = 64  # of A
SWIZZLED_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # mode of a descriptor -> bytes of a row
SWIZZLE_MASK = {1: 7, 2: 3, 3: 1}  # bits 7 to 9 of an address, xor-ed into bits 4 to 6


def addresses(descriptor: Array, rows: int, turned: int) -> Array:
    """Shared addresses of an operand's elements, (..., rows, K), by its matrix descriptors.

    A descriptor has, in units of 16 bytes, the start address (bits 0 to 13), the leading (16 to 29)
    and the stride (32 to 45) byte offset, and the swizzle mode (62, 63). `turned`: the rows, not
    the K dim, are contiguous (MN-major).
    """
    if len(np.unique(descriptor >> np.uint64(62))) > 1:
        raise Unsupported("matrix descriptors of several swizzle modes")
    if (descriptor >> np.uint64(49) & np.uint64(7)).any():
        raise Unsupported("a matrix descriptor with a base offset")
    mode = int(descriptor.flat[0] >> np.uint64(62))
    start, leading, stride = (
        ((descriptor >> np.uint64(s) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
        [..., None, None]
        for s in (0, 16, 32)
    )  # fmt: skip
    r, k = np.arange(rows)[:, None], np.arange(K)[None, :]
    width = SWIZZLED_BYTES[mode]
    if not turned:
        across = k * 2 if mode else k // 8 * leading + k % 8 * 2
        a = start + r // 8 * stride + r % 8 * width + across
    elif mode:
        each = width // 2  # rows in a swizzled line
        a = start + r // each * leading + r % each * 2 + k % 8 * width + k // 8 * stride
    else:
        a = start + r // 8 * stride + r % 8 * 2 + k % 8 * 16 + k // 8 * leading
    if mode:
        a = a ^ ((a >> 7 & SWIZZLE_MASK[mode]) << 4)
    result: Array = a
    return result


class Warpgroups:
    """Products of all warpgroups of a batch. Sums are there at once; operands are in use until the
    wait for their group."""

    def __init__(self, batch: "Batch") -> None:
        self.batch = batch
        self.groups = 0
        self.reading: list[tuple[Array, int]] = []  # units of shared memory, group

    def commit(self) -> None:
        self.groups += 1

    def wait(self, count: int) -> None:
        """Products of all groups but the latest `count` have read their operands."""
        history = self.batch.shared.history
        for units, _ in (r for r in self.reading if r[1] < self.groups - count):
            history.multiplied[units] = False
        self.reading = [r for r in self.reading if r[1] >= self.groups - count]
        for units, _ in self.reading:  # that a group which is done read, too
            history.multiplied[units] = True

    def multiply(
        self, site: int, a: Array, b: Array, sums: list[Array], kind: str, keep: Array,
        turned: list[int],
    ) -> list[Array]:  # fmt: skip
        """Sums of a @ b, and of what they were where `keep` is true.

        a       descriptors, or fragments of the warps (CTAs, warps, 16, K)
        sums    n / 2 registers: of row 16 warp + 8 h + g and column 8 j + 2 t + e, number
                4 j + 2 h + e of lane 4 g + t
        turned  of a and b (`addresses`)
        """
        batch = self.batch
        batch.together(site, "CTA")
        ctas, groups, n = batch.ctas, batch.warps // 4, 2 * len(sums)
        if a.dtype == np.uint64:
            left = WIDEN[kind](self._operand(site, a, ROWS, turned[0]))
        else:
            left = a.reshape(ctas, groups, ROWS, K)
        right = WIDEN[kind](self._operand(site, b, n, turned[1])).astype(np.float64)
        if batch.run.memory.dry:  # values are made up
            return sums
        total = np.stack([np.broadcast_to(r, batch.shape) for r in sums], -1)
        total = total.reshape(ctas, groups, 4, 8, 4, n // 8, 2, 2)
        total = total.transpose(0, 1, 2, 6, 3, 5, 4, 7).reshape(ctas, groups, ROWS, n)
        kept = np.broadcast_to(keep, batch.shape)[:, ::THREADS].reshape(ctas, groups, 1, 1)
        wide = np.matmul(left.astype(np.float64), right.swapaxes(-1, -2))
        out = matrices.rounded(wide + np.where(kept, total, 0))
        out = out.reshape(ctas, groups, 4, 2, 8, n // 8, 4, 2).transpose(0, 1, 2, 4, 6, 5, 3, 7)
        out = out.reshape(ctas, batch.threads, n // 2)
        return [np.ascontiguousarray(out[..., k]) for k in range(n // 2)]

    def _operand(self, site: int, descriptor: Array, rows: int, turned: int) -> Array:
        """16-bit elements (CTAs, warpgroups, rows, K) of an operand in shared memory."""
        batch, shared = self.batch, self.batch.shared
        a = addresses(np.broadcast_to(descriptor, batch.shape)[:, ::THREADS], rows, turned)
        seen = a[batch.active_ctas()]
        if seen.size and int(seen.max()) + 2 > shared.limit:
            batch.report(site, f"out of bounds: wgmma at {int(seen.max())} of {shared.limit}")
        a = np.clip(a, 0, shared.size - 2)
        if len(shared.history.ctas):
            self.reading.append((shared.history.multiply(site, a), self.groups))
        where = (a + shared.first[:, :, None, None]) >> 1
        return np.ascontiguousarray(shared.views[2][where])
