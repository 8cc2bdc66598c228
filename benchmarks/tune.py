"""`python -m benchmarks.tune`: every launch choice of a kernel, compared, then timed and sorted.

Each choice is compared, not the fastest alone: a compiler that gets a single tile size wrong is a
thing that happens. The winner is written into the kernel's module by hand; nothing is tuned at run
time, so the same input gives the same bits on the same GPU. Exit status 1 if a choice is wrong.
"""

import argparse
import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from cogvx_kernels._backend import INTERPRETED
from cogvx_kernels.testing import OPS, SIZES

from . import conditions, inputs, ops
from .__main__ import DTYPES, publish
from .registry import (
    MODEL,
    MODEL_SIZE,
    PASSES,
    PROVIDERS,
    Benchmark,
    Case,
    Check,
    Entry,
    Options,
)

Choice = Mapping[str, int]


@dataclass(frozen=True)
class Sweep:
    """Constants of a kernel's module, or of its plan's, and the values to try, for each pass.

    provider  the one that runs the kernel
    fits      a choice is worth compiling
    """

    module: str
    forward: Mapping[str, Sequence[int]]
    backward: Mapping[str, Sequence[int]]
    provider: str = "cogvx"
    fits: Callable[[Choice], bool] = lambda choice: True


_ROPE3D = {"TILE": (512, 1024, 2048, 4096), "NUM_WARPS": (1, 2, 4, 8)}
_ROPE3D_BACKWARD = {**_ROPE3D, "BACKWARD_PROGRAMS": (264, 528, 1056, 2112)}
_KERNEL = "cogvx_kernels.rope3d.kernel"

_ADALN = {"LANES_PER_WARP": (192, 384, 768, 1536)}
_OF_ADALN = Sweep(
    "cogvx_kernels.expert_adaln.kernel",
    {"TOKENS": (2, 4, 8, 16, 32, 40), **_ADALN},
    {"BACKWARD_TOKENS": (8, 16, 32, 40, 64), **_ADALN},
)
_COLS = (64, 128, 256)
_FFN = {"BLOCK_ROWS": _COLS, "BLOCK_COLS": _COLS, "BLOCK_INNER": (64, 128), "WARPS": (4, 8)}
_FFN |= {"STAGES": (3, 4)}

_NORM = {"TILE": (1024, 2048, 4096), "LANES": (32, 64, 128), "PROGRAMS": (264, 528, 1056, 2112)}
_STRIP = {"STRIP": (256, 512, 1024, 2048)}
_CONV = "cogvx_kernels.temporal_conv.kernel"
_TEMPORAL = {"BLOCK_ROWS": _COLS, "BLOCK_COLS": (64, 128), "BLOCK_INNER": (32, 64)}
_TEMPORAL |= {"WARPS": (4, 8), "STAGES": (2, 3, 4)}


def _fits_hopper(choice: Choice) -> bool:
    """Tiles of 16-bit elements into 227 KiB of shared memory, sums into half of the registers.

    Of the others none would run, or only by spilling; and tiles that leave most of a multiprocessor
    idle are not tried.
    """
    rows, cols = choice["BLOCK_ROWS"], choice["BLOCK_COLS"]
    shared = 2 * choice["STAGES"] * (rows + cols) * choice["BLOCK_INNER"]
    sums = rows * cols // (32 * choice["WARPS"])  # 4-byte registers of a thread
    return shared <= 227 * 1024 and 64 <= sums <= 128


SWEEPS: Mapping[str, Sweep] = {
    "rope3d": Sweep(_KERNEL, _ROPE3D, _ROPE3D),  # its backward is the forward kernel
    "qk_norm_rope3d": Sweep(_KERNEL, _ROPE3D, _ROPE3D_BACKWARD),
    "expert_adaln": _OF_ADALN,
    "gated_residual": _OF_ADALN,
    "gated_residual_adaln": _OF_ADALN,
    "expert_ffn": Sweep(
        "cogvx_kernels.expert_ffn.kernel", _FFN, _FFN, "cogvx-grouped", _fits_hopper
    ),
    "spatial_norm_silu": Sweep("cogvx_kernels.spatial_norm.launch", _NORM, _NORM),
    "residual_moments": Sweep(  # its backward passes a gradient on
        "cogvx_kernels.spatial_norm.statistics", _STRIP, {"STRIP": (1024,)}
    ),
    "temporal_conv": Sweep(_CONV, _TEMPORAL, _TEMPORAL, fits=_fits_hopper),
}


def choices(values: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


@contextlib.contextmanager
def chosen(module: ModuleType, choice: Choice) -> Iterator[None]:
    """The module's constants set to a choice, and afterwards as they were."""
    before = {name: getattr(module, name) for name in choice}
    vars(module).update(choice)
    try:
        yield
    finally:
        vars(module).update(before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    add = parser.add_argument
    add("--op", choices=tuple(SWEEPS), default="qk_norm_rope3d")
    add("--size", choices=tuple(SIZES), default=MODEL_SIZE)
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--convention", default=MODEL, help="of the call (%(default)s)")
    add("--pass", dest="which", choices=(*PASSES, "both"), default="both")
    add("--out", type=Path, metavar="DIR", help="write JSON and a plot there, add to results.csv")
    add("--quick", action="store_true", help="a third of the time for each")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not INTERPRETED:
        parser.error(
            "a sweep needs a CUDA device; with TRITON_INTERPRET=1 choices are compared, not timed"
        )
    calls = inputs.conventions(OPS[arguments.op], SIZES[arguments.size])
    if arguments.convention not in calls:
        parser.error(f"argument --convention: no such call; there are {', '.join(calls)}")
    passes = PASSES if arguments.which == "both" else (arguments.which,)
    options = Options(getattr(torch, arguments.dtype), device, arguments.size, passes)
    budget = 0.05 if arguments.quick else 0.15
    options = replace(options, conventions=(arguments.convention,), budget=budget, repeats=1)
    command = f"benchmarks.tune --op {arguments.op} --size {arguments.size}"
    found = conditions.conditions(device, command)

    def cases(options: Options) -> Iterator[Case]:
        yield from (_case(arguments.op, which, options) for which in options.passes)

    benchmark = Benchmark(f"tune-{arguments.op}", cases, list, list, ())
    return int(publish(benchmark, options, found, arguments.out))


def _case(op: str, which: str, options: Options) -> Case:
    """The case whose entries are the choices, the present one first."""
    info, sweep = OPS[op], SWEEPS[op]
    module = importlib.import_module(sweep.module)
    (convention,) = options.conventions
    sample = inputs.conventions(info, SIZES[options.size])[convention]
    new = partial(inputs.make, sample, options.dtype, options.device)
    # As a model runs it: over its arguments if it can, where there is no gradient.
    inplace = which == "forward" and op == "qk_norm_rope3d"
    name = "cogvx-inplace" if inplace else sweep.provider
    provider = next(p for p in PROVIDERS if p.name == name)
    function = provider.make(info, new(0))
    one_pass = replace(options, passes=(which,))
    case = ops.make_case(info, convention, new, [(provider, function)], one_pass, {})
    (kernel,) = case.entries
    fitting = [choice for choice in choices(getattr(sweep, which)) if sweep.fits(choice)]
    now = {name: getattr(module, name) for name in getattr(sweep, which)}
    fitting.sort(key=lambda choice: choice != now)
    case.benchmark, case.fastest_first = f"tune-{op}", True

    def check(which: str) -> Sequence[Check]:
        try:
            return kernel.check(which)
        except Exception as error:  # a choice may not compile, or need too much
            return [Check(False, 0.0, f"{type(error).__name__}: {error}".splitlines()[0])]

    def entry(choice: Choice) -> Entry:
        name = ", ".join(f"{key} {value}" for key, value in choice.items())
        note, around = "as it is now" if choice == now else "", partial(chosen, module, choice)
        return replace(kernel, name=name, check=check, note=note, ours=False, around=around)

    case.entries = [entry(choice) for choice in fitting]
    return case


if __name__ == "__main__":
    sys.exit(main())
