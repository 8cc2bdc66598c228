"""A batch of CTAs in lock-step: registers, active threads, barriers, shuffles."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from . import matrices, values
from .copies import Copies
from .counters import LANES, Counters, Faults
from .global_access import GlobalAccess
from .memory import Memory
from .parse import Unsupported
from .shared_memory import SharedMemory
from .translate import Program, Registers
from .values import Array
from .warpgroups import Warpgroups

PARAMETERS = 1 << 60  # address of the kernel's parameters, 8 bytes each
BARRIER = 1 << 20  # of an epoch; barriers of single warps count in its lower bits


@dataclass
class Run:
    """What the batches of a launch share.

    parameters  of the kernel by name, arrays (1, 1)
    shared      bytes of shared memory of a CTA
    grid        CTAs in each dim
    watched     CTAs of a batch whose shared memory is checked for races
    counting    collect `counters` of memory instructions
    ulps        error of approximate functions, 0 to 2
    """

    program: Program
    parameters: Mapping[str, Array]
    memory: Memory
    shared: int
    grid: tuple[int, int, int]
    counters: Counters
    faults: Faults
    watched: int = 8
    counting: bool = True
    ulps: int = 0


class Batch:
    """Threads of the CTAs of these numbers; the blocks of a program act on it."""

    def __init__(self, run: Run, numbers: Array) -> None:
        self.run = run
        self.ctas, self.threads = self.shape = len(numbers), run.program.function.threads
        self.warps = self.threads // LANES
        self.active: Array | None = None  # (CTAs, threads or 1); None if all are
        self.cta = numbers[:, None].astype(np.int32) + 1
        self.epoch = np.zeros((self.ctas, 1), np.int64)
        tid = np.arange(self.threads, dtype=np.uint32)[None, :]
        x, y, _ = run.grid
        number, one = numbers[:, None].astype(np.uint32), np.ones((1, 1), np.uint32)
        self.special = {
            "%tid.x": tid, "%tid.y": 0 * one, "%tid.z": 0 * one, "%laneid": tid % LANES,
            "%ntid.x": one * self.threads, "%ntid.y": one, "%ntid.z": one,
            "%ctaid.x": number % np.uint32(x), "%ctaid.y": number // np.uint32(x) % np.uint32(y),
            "%ctaid.z": number // np.uint32(x) // np.uint32(y),
            **{f"%nctaid.{a}": one * np.uint32(n) for a, n in zip("xyz", run.grid, strict=True)},
        }  # fmt: skip
        self.globals = GlobalAccess(self)
        self.shared = SharedMemory(self)
        self.copies = Copies(self)
        self.warpgroups = Warpgroups(self)

    # --- registers and active threads --------------------------------------------------------

    def put(self, registers: Registers, place: int, value: Array) -> None:
        old = registers[place]
        if self.active is None or old is None:
            registers[place] = value
        else:
            registers[place] = np.where(self.active, value, old)

    def get(self, registers: Registers, place: int, kind: str) -> Array:
        """A register; zeros if nothing has been written, as before a guarded load."""
        value: Array | None = registers[place]
        return np.zeros((1, 1), "?" if kind == "b" else kind) if value is None else value

    def mask(self, guard: Array | None) -> Array | Literal[False] | None:
        """Active threads for which the guard is true: None for all, False for none."""
        if guard is None:
            return self.active
        if guard.size == 1:
            return self.active if bool(guard.flat[0]) else False
        both: Array = guard if self.active is None else np.asarray(guard & self.active)
        if both.all():
            return None
        return both if both.any() else False

    def active_ctas(self) -> Array:
        """CTAs with an active thread, (CTAs,)."""
        if self.active is None:
            return np.ones(self.ctas, bool)
        return np.asarray(self.active.any(axis=1))

    def report(self, site: int, text: str) -> None:
        self.run.faults.report(site, text)

    def together(self, site: int, of: Literal["CTA", "warp"]) -> None:
        """Refuse an instruction that only some threads of a CTA or warp reach."""
        if self.active is None or self.active.shape[1] == 1:
            return
        rows = self.active.reshape(self.ctas, self.warps if of == "warp" else 1, -1)
        if (rows.any(2) != rows.all(2)).any():
            raise Unsupported(f"{self.run.program.sites[site]}: not all threads of a {of} reach it")

    # --- parameters and symbols --------------------------------------------------------------

    def parameter(self, name: str) -> Array:
        return self.run.parameters[name]

    def parameter_at(self, address: Array, kind: Any) -> Array:
        """The parameter at an address that the program computed."""
        bits = [int(p.flat[0]) & (2**64 - 1) for p in self.run.parameters.values()]
        place = ((address - np.uint64(PARAMETERS)) >> np.uint64(3)).astype(np.int64)
        found: Array = np.array(bits, np.uint64)[place].astype(f"u{kind().itemsize}")
        return found.view(kind)

    def symbol(self, name: str) -> Array:
        """The address of a parameter, or of shared memory."""
        if name in self.run.parameters:
            number = list(self.run.parameters).index(name)
            return np.full((1, 1), PARAMETERS + 8 * number, np.uint64)
        if name != "global_smem":
            raise Unsupported(f"the symbol {name}")
        return np.zeros((1, 1), np.uint32)

    # --- between threads ---------------------------------------------------------------------

    def barrier(self, site: int) -> None:
        self.together(site, "CTA")
        self.epoch = self.epoch + BARRIER * self.active_ctas()[:, None]

    def warp_barrier(self) -> None:
        step = BARRIER if self.warps == 1 else 1
        self.epoch = self.epoch + step * self.active_ctas()[:, None]

    def fence(self, site: int) -> None:
        """fence.proxy.async: wgmma sees what the threads wrote."""
        self.together(site, "CTA")
        self.shared.history.fence()

    def shuffle(self, site: int, x: Array, mode: str, by: int | Array) -> Array:
        """shfl.sync of whole warps; a lane without a source keeps its own value."""
        self.together(site, "warp")
        if x.shape[1] == 1:
            return x
        thread = np.arange(self.threads)
        lane, first = thread % LANES, thread // LANES * LANES
        if isinstance(by, int):
            lanes = {"bfly": lane ^ by, "idx": 0 * lane + by % LANES, "up": lane - by,
                     "down": lane + by}[mode]  # fmt: skip
            inside = (lanes >= 0) & (lanes < LANES)
            return x[:, np.where(inside, first + lanes, thread)]
        if mode != "idx":
            raise Unsupported(f"shfl.{mode} by a register")
        source = np.broadcast_to(by, (len(by), self.threads)).astype(np.int64) % LANES + first
        if len(source) == 1:
            return x[:, source[0]]
        return np.take_along_axis(np.broadcast_to(x, self.shape), source, 1)

    def vote(self, site: int, mode: str, x: Array) -> Array:
        self.together(site, "warp")
        lanes = np.broadcast_to(x, self.shape).reshape(self.ctas, self.warps, LANES)
        if mode == "ballot":
            bits = lanes.astype(np.uint32) << np.arange(LANES, dtype=np.uint32)
            return np.repeat(bits.sum(2, dtype=np.uint32), LANES, axis=1)
        every, some = lanes.all(2), lanes.any(2)
        return np.repeat({"any": some, "all": every, "uni": every | ~some}[mode], LANES, axis=1)

    # --- arithmetic that depends on the run or on a warp -------------------------------------

    def approximate(self, x: Array) -> Array:
        return values.approximate(x, self.run.ulps)

    def fragments_a(self, parts: list[Array], kind: str) -> Array:
        if self.run.memory.dry:
            return parts[0]
        return matrices.left(self.spread(parts), kind)

    def fragments_b(self, parts: list[Array], kind: str) -> Array:
        if self.run.memory.dry:
            return parts[0]
        return matrices.right(self.spread(parts), kind)

    def multiply(self, site: int, a: Array, b: Array, sums: list[Array]) -> list[Array]:
        """mma.sync: a @ b + sums of every warp; the sums as they are where values are made up."""
        self.together(site, "warp")
        if self.run.memory.dry:
            return sums
        return matrices.multiply(a, b, self.spread(sums))

    def spread(self, parts: list[Array]) -> Array:
        """Registers of all threads, (CTAs, warps, 8, 4, registers)."""
        whole = np.stack([np.broadcast_to(x, self.shape) for x in parts], -1)
        return whole.reshape(self.ctas, self.warps, 8, 4, len(parts))
