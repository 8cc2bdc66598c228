"""A model of four cards: how long a launch takes at least, from its counters. A prediction.

Nothing waits for anything else: each part of a card is as busy as its counters say, and the busiest
bounds the launch. Latency, occupancy and hits in L1 are left out, so a launch can only be slower.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Card:
    """Assumptions about a card.

    target  that its kernels are compiled for
    sms     multiprocessors
    clock   in Hz: the vendor's boost clock, for Hopper (1.98 GHz) what is assumed under load
    hbm     bytes per second of device memory: 0.9 times the vendor's
    l2      bytes per second of the L2 cache: an estimate, for want of a vendor's number
    mma     operations per second of bf16 matrix instructions with sums in fp32, vendor's, dense
    wgmma   the same for warpgroups; 0 if it has none
    fp32    warps per clock and multiprocessor of fp32 arithmetic
    """

    name: str
    target: str
    sms: int
    clock: float
    hbm: float
    l2: float
    mma: float
    wgmma: float
    fp32: int


# Vendors' datasheets, but for L2. mma.sync is assumed to reach 0.65 of Hopper's matrix units.
CARDS = (
    Card("H200", "sm_90", 132, 1.7e9, 4.3e12, 5.5e12, 640e12, 989e12, 4),
    Card("H100", "sm_90", 132, 1.7e9, 3.0e12, 5.5e12, 640e12, 989e12, 4),
    Card("A100", "sm_80", 108, 1.41e9, 1.8e12, 4.5e12, 312e12, 0, 2),
    Card("4090", "sm_89", 128, 2.52e9, 0.91e12, 5.0e12, 165e12, 0, 4),
)

# Of every card, for each multiprocessor and clock.
ISSUE = 4  # instructions of a warp
INT = 2  # of them, integer ones
MUFU = 0.5  # of them, exponentials, roots, quotients
LSU = 1  # wavefronts of 128 bytes: shared memory, shuffles, L1
SECTOR = 32


class Counts(NamedTuple):
    """Counters of a launch, estimated for its whole grid.

    direction        "forward" or "backward"
    elements         of the op's largest tensor
    bytes            that its tensors span, or that it accesses, if fewer
    sectors          of 32 bytes, that it requests of global memory
    least_sectors    that would hold what it wants
    accesses         instructions of warps on global memory
    wavefronts       of shared memory; least_wavefronts without bank conflicts
    slots            issue slots; those of floating point and of integers
    mufu, shuffles   instructions of warps
    mma, wgmma       operations
    """

    direction: str
    elements: float
    bytes: float
    sectors: float
    least_sectors: float
    accesses: float
    wavefronts: float
    least_wavefronts: float
    slots: float
    float_slots: float
    int_slots: float
    mufu: float
    shuffles: float
    mma: float
    wgmma: float

    @property
    def coalescing(self) -> float:
        """Sectors wanted / requested, at most 1."""
        return self.least_sectors / self.sectors if self.sectors else 1.0

    @property
    def conflicts(self) -> float:
        """Wavefronts of shared memory / the least."""
        return self.wavefronts / self.least_wavefronts if self.least_wavefronts else 1.0

    @property
    def slots_per_element(self) -> float:
        """Issue slots of a thread for each element of the op's largest tensor."""
        return 32 * self.slots / self.elements


def times(counts: Counts, card: Card) -> dict[str, float]:
    """Seconds that each part of a card is busy."""
    clocks = card.sms * card.clock
    lsu = counts.wavefronts + counts.shuffles + max(counts.sectors / 4, counts.accesses)
    return {
        "HBM": counts.bytes / card.hbm,
        "L2": SECTOR * counts.sectors / card.l2,
        "issue": counts.slots / (ISSUE * clocks),
        "fp32": counts.float_slots / (card.fp32 * clocks),
        "int": counts.int_slots / (INT * clocks),
        "MUFU": counts.mufu / (MUFU * clocks),
        "LSU": lsu / (LSU * clocks),
        "tensor": counts.mma / card.mma + (counts.wgmma / card.wgmma if card.wgmma else 0),
    }


def bound(counts: Counts, card: Card) -> tuple[str, float]:
    """The part that is busy longest, and its seconds: the predicted time."""
    found = times(counts, card)
    part = max(found, key=lambda name: found[name])
    return part, found[part]
