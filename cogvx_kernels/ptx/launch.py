"""Triton launches on CPU tensors, compiled for an NVIDIA GPU and executed from their PTX.

`executing()` hooks in below the project's launchers: the same specialisation, launch options and
grid as on a GPU.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .. import _backend
from .batch import Run
from .counters import Counters, Faults
from .machine import execute
from .memory import Memory
from .parse import parse
from .translate import Program
from .values import Array

DTYPES = {"u64": np.uint64, "u32": np.uint32, "u16": np.uint16, "u8": np.uint8,
          "f32": np.float32, "f64": np.float64, "b32": np.uint32, "b64": np.uint64}  # fmt: skip

Chosen = Sequence[int] | Array | None


@dataclasses.dataclass
class Launch:
    """A launch that was executed.

    compiled         Triton's kernel: `.asm["ptx"]`, `.metadata`
    footprint        bytes that its tensors span, twice if both loaded and stored
    seconds          of execution; compile_seconds of compilation and translation
    """

    name: str
    grid: tuple[int, int, int]
    compiled: Any
    program: Program
    counters: Counters
    faults: Sequence[str]
    footprint: int
    seconds: float
    compile_seconds: float


class CompileOnly:
    """A Triton driver for a target without its GPU; `name` is part of the key of its kernels."""

    def __init__(self, target: GPUTarget, name: str = "") -> None:
        self.target, self.name = target, name

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:  # the key of the cache of compiled kernels
        return f"{self.name}{self.target}"

    def get_current_stream(self, device: object) -> int:
        return 0


def _without_cubin(*stage: Any) -> Any:
    """Triton's hook on its stages: ptxas takes half of the time, and its result is not used."""
    if not stage:
        return "ptx", "ptx: no cubin"  # key and hash, for Triton's cache
    stage[1]["cubin"] = lambda source, metadata: b""
    return None


programs: dict[str, Program] = {}  # by hash of the compiled kernel


def program_of(compiled: Any) -> Program:
    if compiled.hash not in programs:
        programs[compiled.hash] = Program(parse(compiled.asm["ptx"]))
    return programs[compiled.hash]


@contextlib.contextmanager
def executing(
    arch: int = 90,
    *,
    done: Callable[[Launch], None] = lambda launch: None,
    dry: bool = False,
    ctas: Callable[[int], Chosen] = lambda total: None,
    watched: int = 8,
    counting: bool = True,
    ulps: int = 0,
    sample: Callable[[Run], Counters] | None = None,
) -> Iterator[None]:
    """Context in which Triton launches on CPU tensors run the PTX for `arch` (80, 90).

    done      is called with each launch
    dry       nothing is behind the addresses: tensors may be meta, loads give made-up values,
              stores go nowhere
    ctas      from the number of CTAs of a launch those to run; None for all
    watched   CTAs of a batch whose shared memory is checked for races
    counting  collect counters of memory instructions
    ulps      largest error of approximate functions: 0, 1 or 2
    sample    executes in place of `ctas`, and returns counters

    TRITON_INTERPRET must not be set. The compile-only driver stays active: without a GPU there is
    none to restore.
    """
    if _backend.INTERPRETED:
        raise RuntimeError("the interpreter compiles nothing; unset TRITON_INTERPRET")
    run, reason = JITFunction.run, _backend.triton_reason

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        program = program_of(compiled)
        arguments = _arguments(self, compiled, args, kwargs)
        sizes = tuple(int(n) for n in (*grid, 1, 1)[:3])
        memory = Memory([(n, v) for n, v in arguments if isinstance(v, torch.Tensor)], dry)
        state = Run(
            program,
            _parameters(program, arguments, memory),
            memory,
            compiled.metadata.shared,
            (sizes[0], sizes[1], sizes[2]),
            Counters(program),
            Faults(program),
            watched,
            counting,
            ulps,
        )
        compiled_at = time.perf_counter()
        if sample is None:
            execute(state, ctas(sizes[0] * sizes[1] * sizes[2]))
        counters = state.counters if sample is None else sample(state)
        if not dry:
            memory.write_back()
        now = time.perf_counter()
        done(
            Launch(compiled.metadata.name, state.grid, compiled, program, counters,
                   state.faults.texts, memory.footprint, now - compiled_at, compiled_at - begun)
        )  # fmt: skip
        return compiled

    driver.set_active(CompileOnly(GPUTarget("cuda", arch, 32), "ptx "))
    JITFunction.run = launch
    knobs.runtime.add_stages_inspection_hook = _without_cubin
    _backend.triton_reason = _dtype_reason
    try:
        yield
    finally:
        JITFunction.run, _backend.triton_reason = run, reason
        knobs.runtime.add_stages_inspection_hook = None


def _dtype_reason(name: str, x: torch.Tensor) -> str | None:
    known = x.dtype in _backend.KERNEL_DTYPES
    return None if known else f"{name} is {x.dtype}, which no kernel takes"


def _arguments(function: Any, compiled: Any, args: Any, options: Any) -> list[tuple[str, Any]]:
    """(name, value) of each parameter of the compiled kernel."""
    binder = function.device_caches[driver.active.get_current_device()][4]
    bound, _, _ = binder(*args, **{**options, "debug": False, "instrumentation_mode": ""})
    signature = compiled.src.signature
    return [
        leaf
        for (name, kind), value in zip(signature.items(), bound.values(), strict=True)
        for leaf in _leaves(kind, value, name)
    ]


def _leaves(kind: Any, value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(kind, tuple):
        names = getattr(kind, "_fields", range(len(kind)))
        for field, inner, part in zip(names, kind, value, strict=True):
            yield from _leaves(inner, part, f"{name}.{field}")
    elif kind != "constexpr":
        yield name, value


def _parameters(
    program: Program, arguments: list[tuple[str, Any]], memory: Memory
) -> dict[str, Array]:
    """Values of the PTX function's parameters, (1, 1); 0 for scratch memory, which is not used."""
    declared = program.function.params
    values = [memory.addresses[n] if isinstance(v, torch.Tensor) else v for n, v in arguments]
    values += [0] * (len(declared) - len(values))
    return {
        name: _array(value, np.dtype(DTYPES[kind]))
        for value, (name, kind) in zip(values, declared, strict=True)
    }


def _array(value: int | float, dtype: "np.dtype[Any]") -> Array:
    if dtype.kind != "f":
        value = int(value) & (2 ** (8 * dtype.itemsize) - 1)
    return np.array([[value]], dtype)
