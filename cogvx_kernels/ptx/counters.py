"""Counters of a launch: warps in each block, sectors of global and wavefronts of shared memory."""

from collections.abc import Sequence

import numpy as np

from .translate import Program
from .values import Array

LANES = 32
SECTOR = 32  # bytes
BANKS = 32  # of 4 bytes
NOWHERE = np.uint64(2**64 - 1)  # address of an inactive lane


class Site:
    """Counts of one memory instruction.

    requests  of warps
    units     sectors of 32 bytes (global) or wavefronts (shared) that they take
    least     units that would hold what they want
    bytes     that they want
    """

    __slots__ = ("bytes", "least", "requests", "units")

    def __init__(self) -> None:
        self.requests = self.units = self.least = self.bytes = 0.0


class Counters:
    """Counts of a launch, over the CTAs that ran, or estimates for its whole grid."""

    def __init__(self, program: Program) -> None:
        self.blocks = np.zeros(len(program.blocks), np.int64)  # warps that ran each
        self.sites = [Site() for _ in program.sites]
        self.ctas = 0

    def add(self, other: "Counters", times: float) -> None:
        """Add what other CTAs counted, `times` over."""
        self.blocks = self.blocks + times * other.blocks
        self.ctas += other.ctas
        for mine, site in zip(self.sites, other.sites, strict=True):
            for name in Site.__slots__:
                setattr(mine, name, getattr(mine, name) + times * getattr(site, name))

    def count_global(
        self, site: int, address: Array, mask: Array | None, width: int, shape: tuple[int, int]
    ) -> None:
        """Count an access of `width` bytes a thread; `shape` is (CTAs, threads)."""
        counter = self.sites[site]
        ctas, threads = shape
        warps = threads // LANES
        rows = np.broadcast_shapes(address.shape, (1, 1) if mask is None else mask.shape)
        repeat = ctas if rows[0] == 1 else 1
        if rows[1] == 1:  # one address for all lanes
            active = rows[0] if mask is None else int(np.broadcast_to(mask, rows).sum())
            counter.requests += active * repeat * warps
            counter.units += active * repeat * warps * -(-width // SECTOR)
            counter.least += active * repeat * warps * -(-width // SECTOR)
            counter.bytes += active * repeat * warps * width
            return
        a = np.broadcast_to(address, (rows[0], threads))
        if mask is not None:
            a = np.where(mask, a, NOWHERE)
        a = np.sort(a.reshape(-1, LANES), axis=1)
        there = a != NOWHERE
        fresh, opened = there.copy(), there.copy()
        fresh[:, 1:] &= a[:, 1:] != a[:, :-1]
        sector = a >> np.uint64(5)
        opened[:, 1:] &= sector[:, 1:] != sector[:, :-1]
        wanted = fresh.sum(1) * width
        counter.requests += int(there[:, 0].sum()) * repeat
        counter.units += int(opened.sum()) * repeat
        counter.least += int((-(-wanted // SECTOR)).sum()) * repeat
        counter.bytes += int(wanted.sum()) * repeat

    def count_shared(
        self, site: int, address: Array, mask: Array | None, width: int, shape: tuple[int, int]
    ) -> None:
        """Count an access of shared memory; a wavefront serves 128 bytes of a warp at most."""
        ctas, threads = shape
        rows = np.broadcast_shapes(address.shape, (1, 1) if mask is None else mask.shape)
        repeat = ctas if rows[0] == 1 else 1
        a = np.broadcast_to(address, (rows[0], threads)).astype(np.int64)
        if mask is not None:
            a = np.where(mask, a, -1)
        requests = int((a.reshape(-1, LANES) >= 0).any(1).sum())
        lanes = min(LANES, max(1, 4 * BANKS // width))
        self.count_wavefronts(site, a.reshape(-1, lanes), width, requests, repeat)

    def count_wavefronts(self, site: int, a: Array, width: int, requests: int, repeat: int) -> None:
        """Count rows of addresses (-1: inactive): the most words that one bank must give."""
        words = a >> 2
        if width > 4:
            words = (words[..., None] + np.arange(width // 4)).reshape(len(a), -1)
            words = np.where(np.repeat(a < 0, width // 4, axis=1), -1, words)
        words = np.sort(words, axis=1)
        fresh = words >= 0
        fresh[:, 1:] &= words[:, 1:] != words[:, :-1]
        row = np.arange(len(a))[:, None] * BANKS
        banks = np.bincount((row + words % BANKS)[fresh], minlength=BANKS * len(a))
        banks = banks.reshape(-1, BANKS)
        counter = self.sites[site]
        counter.requests += requests * repeat
        counter.units += int(banks.max(1).sum()) * repeat
        counter.least += int((-(-banks.sum(1) // BANKS)).sum()) * repeat
        counter.bytes += int((a >= 0).sum()) * width * repeat


class Faults:
    """Faults of a launch, the first of each kind at each instruction."""

    def __init__(self, program: Program) -> None:
        self.sites = program.sites
        self.found: dict[tuple[int, str], str] = {}

    def report(self, site: int, text: str) -> None:
        """Record a fault, by its kind, the text up to the colon. Site -1: the program's end."""
        kind = text.split(":")[0]
        if (site, kind) not in self.found:
            where = str(self.sites[site]) if site >= 0 else "end of the program"
            self.found[site, kind] = f"{text} [{where}]"

    @property
    def texts(self) -> Sequence[str]:
        return list(self.found.values())
