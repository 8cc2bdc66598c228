"""Registry of benchmarks and of the providers of an op; what a benchmark is made of.

A benchmark (an op, the convolutions, a part of the model) registers itself with `register`: its
sizes, the names of its entries, and a function that makes its cases. A provider of an op registers
itself with `provider`. `run` does the rest: it compares, then times.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cogvx_kernels._opinfo import Cost
from cogvx_kernels.testing import OpInfo

from .timing import Call

Arguments = Mapping[str, Any]
Function = Callable[..., Any]
Maker = Callable[[OpInfo, Arguments], Function]

MODEL = "model"  # convention: the call as CogVideoX makes it
PASSES = ("forward", "backward")
MODEL_SIZE = "5b-480x720-49f"


class Unavailable(Exception):
    """A provider cannot run here; the message gives the reason."""


@dataclass(frozen=True)
class Options:
    """Choices of a run; an empty tuple or None is the benchmark's default.

    budget   seconds of timing for each entry and pass, all repeats together
    repeats  turns of each entry, forth and back through the list; 1, or even
    """

    dtype: torch.dtype
    device: torch.device
    size: str = "tiny"
    passes: tuple[str, ...] = PASSES
    providers: tuple[str, ...] = ()
    conventions: tuple[str, ...] = ()
    max_autotune: bool = False
    budget: float | None = None
    repeats: int | None = None
    layers: int | None = None
    frames: int | None = None

    def selects(self, names: Sequence[str]) -> list[str]:
        """The conventions to run, requested by name or by number."""
        chosen = self.conventions or names
        return [name for i, name in enumerate(names) if name in chosen or str(i) in chosen]


@dataclass(frozen=True)
class Check:
    """Comparison of a result with its reference.

    error     the largest error over the largest value
    multiple  the error over the reference's own, where fp64 gives both
    """

    ok: bool
    error: float
    text: str
    multiple: float = 0.0


@dataclass
class Entry:
    """One implementation in a case.

    check    pass -> comparisons with the reference
    calls    (pass, number of input sets) -> a call for each set
    ours     a wrong result stops the benchmark; of the others it costs the row
    untimed  why it is compared and not timed
    cost     of this entry, where it is not the case's
    forward  of a training step: its forward, whose saved tensors are counted
    around   a context for its check and its timing
    """

    name: str
    check: Callable[[str], Sequence[Check]] | None
    calls: Callable[[str, int], list[Call]]
    passes: tuple[str, ...] = PASSES
    note: str = ""
    ours: bool = False
    untimed: str = ""
    cost: Cost | None = None
    forward: Call | None = None
    around: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass
class Case:
    """Entries that compute the same, the baseline first.

    compared  what is compared, in words
    nbytes    of one set of inputs, which rotate; 0 if they are always the same
    costs     the least that each pass moves and computes
    left_out  name -> why there is no entry
    memory    count live bytes, and of a training step the saved ones, all but those of `weights`
    """

    benchmark: str
    convention: str
    entries: list[Entry]
    passes: tuple[str, ...] = PASSES
    compared: str = ""
    nbytes: int = 0
    costs: Mapping[str, Cost] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    memory: bool = False
    fastest_first: bool = False
    weights: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Benchmark:
    """A registered benchmark.

    cases    makes the cases of a run, one at a time
    entries  the names that `--providers` takes
    budget, repeats  defaults of `Options`; repeats by type of device
    """

    name: str
    cases: Callable[[Options], Iterable[Case]]
    entries: Callable[[], Iterable[str]]
    conventions: Callable[[], Sequence[str]]
    sizes: Sequence[str]
    budget: float = 1.0
    repeats: Mapping[str, int] = field(default_factory=lambda: {"cuda": 2, "cpu": 6})
    group: str = "op"


BENCHMARKS: dict[str, Benchmark] = {}


def register(benchmark: Benchmark) -> None:
    BENCHMARKS[benchmark.name] = benchmark


def named(group: str) -> list[str]:
    return [name for name, benchmark in BENCHMARKS.items() if benchmark.group == group]


# --- providers of ops ------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """An implementation of an op: `make` gets the arguments, untimed, and returns a function.

    ours         held to the rule of numerics; for the others see `ops.close_enough`
    ops          names; none for every op
    conventions  names of `inputs.conventions`; none for every one
    overwrites   its arguments: they are made anew for each result
    optional     runs only if requested by name
    on_cpu       its time there means something: false of kernels, which are interpreted there
    applies      further condition on the op
    """

    name: str
    note: str
    make: Maker
    ours: bool = False
    ops: tuple[str, ...] = ()
    conventions: tuple[str, ...] = ()
    passes: tuple[str, ...] = PASSES
    overwrites: bool = False
    optional: bool = False
    on_cpu: bool = True
    applies: Callable[[OpInfo], bool] = lambda info: True


PROVIDERS: list[Provider] = []


def provider(
    name: str, note: str, *ops: str, compiled: str = "", **options: Any
) -> Callable[[Maker], Maker]:
    """Register a maker; under the name `compiled` also torch.compile of the function it makes."""

    def registered(make: Maker) -> Maker:
        PROVIDERS.append(Provider(name, note, make, ops=ops, **options))
        if compiled:
            note_ = f"torch.compile of {name}, fullgraph, default mode"
            PROVIDERS.append(Provider(compiled, note_, lambda *of: compile_(make(*of)), ops=ops))
        return make

    return registered


def providers_of(info: OpInfo) -> list[Provider]:
    """The registered providers of an op, eager first."""
    fit = (p for p in PROVIDERS if (not p.ops or info.name in p.ops) and p.applies(info))
    return sorted(fit, key=lambda p: p.name != "eager")


def compile_(function: Function, mode: str | None = None) -> Function:
    from torch._functorch import config

    torch.compiler.reset()  # no leftovers of the sizes and conventions before
    config.donated_buffer = False  # a graph that is kept cannot give its buffers away
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def find(library: str, name: str, *modules: str) -> Any:
    """The attribute of the first module that has it; libraries move theirs about.

    Raises Unavailable with the last import's error. Whatever an import raises counts: some look for
    a GPU, a driver or a compiler.
    """
    reason = "no place to look"
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    raise Unavailable(f"{library} does not import ({reason})")
