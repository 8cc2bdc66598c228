"""Observe launches in Triton's interpreter: races, undefined loads, grids, bytes moved.

It hooks the interpreter's loads and stores, and its loop over the programs of a launch, on top of
`cogvx_kernels.tools.interpreter`, and removes the hooks when the context is left. For Triton 3.6.0
and 3.7.1.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from cogvx_kernels import _launch

from .races import Access, find_races

# Limits of a CUDA launch in x, y and z, which the interpreter does not check.
GRID_LIMITS = (2**31 - 1, 65535, 65535)

Hooked = Callable[..., Any]


@dataclass
class Launch:
    """A kernel launch; bytes are those requested by all lanes whose mask is true."""

    kernel: str
    inside_device_context: bool  # of `cogvx_kernels._launch.on_device`
    grid: tuple[int, int, int] = (0, 0, 0)
    bytes_read: int = 0
    bytes_written: int = 0
    atomics: int = 0

    @property
    def grid_fits(self) -> bool:
        return all(size <= limit for size, limit in zip(self.grid, GRID_LIMITS, strict=True))


@dataclass
class Observation:
    """Observed launches, and messages for faults.

    races     two programs of a launch at one address, one of them storing
    unmasked  loads without `other=` and with masked lanes, undefined on a GPU
    """

    launches: list[Launch] = field(default_factory=list)
    races: list[str] = field(default_factory=list)
    unmasked: list[str] = field(default_factory=list)

    @property
    def bytes_read(self) -> int:
        return sum(launch.bytes_read for launch in self.launches)

    @property
    def bytes_written(self) -> int:
        return sum(launch.bytes_written for launch in self.launches)

    def faults(self) -> list[str]:
        """Messages: races, undefined loads, launches outside `on_device` or too large."""
        outside = [
            f"{launch.kernel}: launched outside `on_device`"
            for launch in self.launches
            if not launch.inside_device_context
        ]
        large = [
            f"{launch.kernel}: grid {launch.grid} exceeds {GRID_LIMITS}"
            for launch in self.launches
            if not launch.grid_fits
        ]
        return self.races + self.unmasked + outside + large


@contextlib.contextmanager
def observe(shuffle: int | None = None) -> Iterator[Observation]:
    """Observe the launches in this context; with a seed, run their programs in random order."""
    watch = _Watch(shuffle)
    with contextlib.ExitStack() as patches:
        for owner, hooks in watch.hooks().items():
            for name, hook in hooks.items():
                hooked = _hooked(hook, getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, hooked))
        patches.enter_context(watch.device_contexts())
        yield watch.seen


class _Watch:
    """The state of one `observe`. Hooks get the original first, then the call's arguments."""

    def __init__(self, shuffle: int | None) -> None:
        self.seen = Observation()
        self.random = None if shuffle is None else np.random.default_rng(shuffle)
        self.contexts = 0  # open device contexts
        self.program = 0  # index of the running program in the grid
        self.order: np.ndarray | None = None
        self.accesses: list[Access] = []

    def hooks(self) -> dict[type, dict[str, Hooked]]:
        return {
            GridExecutor: {"__call__": self.launch},
            InterpreterBuilder: {
                "set_grid_dim": self.set_grid,
                "set_grid_idx": self.set_program,
                "create_masked_load": self.load,
                "create_masked_store": self.store,
                "create_atomic_rmw": self.atomic_rmw,
                "create_atomic_cas": self.atomic_cas,
            },
        }

    # --- launches and their programs ---------------------------------------------------------

    def launch(self, original: Hooked, executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        launch = Launch(executor.fn.__name__, self.contexts > 0)
        self.seen.launches.append(launch)
        self.accesses.clear()
        original(executor, *args, **kwargs)
        for race in find_races(self.accesses):
            pair = race.first, race.second
            first, second = (self.coordinates(access.program) for access in pair)
            kinds = ", ".join(f"{access.kind} at {access.where}" for access in pair)
            self.seen.races.append(
                f"{launch.kernel}: programs {first} and {second} at one address, {race.address:#x}"
                f" ({kinds}); {race.bytes} bytes contested"
            )
        self.accesses.clear()

    def set_grid(self, original: Hooked, builder: InterpreterBuilder, *grid: int) -> None:
        self.seen.launches[-1].grid = grid
        if self.random is not None:
            self.order = self.random.permutation(math.prod(grid))
        original(builder, *grid)

    def set_program(self, original: Hooked, builder: InterpreterBuilder, *at: int) -> None:
        """Hook before each program; with a seed it selects another program."""
        _, ny, nz = self.seen.launches[-1].grid
        self.program = (at[0] * ny + at[1]) * nz + at[2]
        if self.order is not None:
            self.program = int(self.order[self.program])
        original(builder, *self.coordinates(self.program))

    def coordinates(self, program: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(program, self.seen.launches[-1].grid))

    # --- loads and stores --------------------------------------------------------------------

    def load(
        self,
        original: Hooked,
        builder: Any,
        ptrs: Any,
        mask: Any,
        other: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        access = self.record("load", ptrs, mask)
        self.seen.launches[-1].bytes_read += access.addresses.size * access.itemsize
        if other is None and access.addresses.size < ptrs.data.size:
            note = f"{self.seen.launches[-1].kernel}: masked load without other= at {access.where}"
            if note not in self.seen.unmasked:
                self.seen.unmasked.append(note)
        return original(builder, ptrs, mask, other, *args, **kw)

    def store(
        self,
        original: Hooked,
        builder: Any,
        ptrs: Any,
        value: Any,
        mask: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        access = self.record("store", ptrs, mask)
        self.seen.launches[-1].bytes_written += access.addresses.size * access.itemsize
        return original(builder, ptrs, value, mask, *args, **kw)

    def atomic_rmw(
        self, original: Hooked, builder: Any, op: Any, ptrs: Any, value: Any, mask: Any, *args: Any
    ) -> Any:
        self.atomic(ptrs, mask)
        return original(builder, op, ptrs, value, mask, *args)

    def atomic_cas(self, original: Hooked, builder: Any, ptrs: Any, *args: Any) -> Any:
        self.atomic(ptrs, None)
        return original(builder, ptrs, *args)

    def atomic(self, ptrs: Any, mask: Any) -> None:
        access = self.record("atomic", ptrs, mask)
        launch = self.seen.launches[-1]
        launch.atomics += access.addresses.size
        launch.bytes_read += access.addresses.size * access.itemsize
        launch.bytes_written += access.addresses.size * access.itemsize

    def record(self, kind: Any, ptrs: Any, mask: Any) -> Access:
        addresses = np.asarray(ptrs.data)
        if mask is not None:  # a handle, or for block pointers an array; both have `.data`
            addresses = addresses[np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)]
        # A bool, of 1 bit, takes a byte.
        itemsize = max(8, ptrs.get_element_ty().primitive_bitwidth) // 8
        access = Access(kind, self.program, addresses.ravel(), itemsize, _where())
        if access.addresses.size:
            self.accesses.append(access)
        return access

    # --- the device context ------------------------------------------------------------------

    @contextlib.contextmanager
    def device_contexts(self) -> Iterator[None]:
        """Count open `on_device` contexts, also where the function was imported by name."""
        original = _launch.on_device

        @contextlib.contextmanager
        def on_device(x: Any) -> Iterator[None]:
            with original(x):
                self.contexts += 1
                try:
                    yield
                finally:
                    self.contexts -= 1

        _replace_everywhere("on_device", original, on_device)
        try:
            yield
        finally:
            _replace_everywhere("on_device", on_device, original)


def _hooked(hook: Hooked, original: Hooked) -> Hooked:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return method


def _replace_everywhere(name: str, old: object, new: object) -> None:
    for module, value in list(sys.modules.items()):
        if module.startswith(("cogvx_kernels", "tests")) and value.__dict__.get(name) is old:
            setattr(value, name, new)


def _where() -> str:
    """The running line of the kernel: the nearest frame outside this file and the interpreter."""
    frame = sys._getframe(1)
    while _is_of_the_interpreter(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    path = frame.f_code.co_filename.rsplit("/", 2)
    return f"{'/'.join(path[-2:])}:{frame.f_lineno}"


def _is_of_the_interpreter(module: str) -> bool:
    return module in (__name__, "triton") or module.startswith(
        ("triton.", "cogvx_kernels.tools.interpreter")
    )
