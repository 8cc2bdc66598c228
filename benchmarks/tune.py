"""`python -m benchmarks.tune`: every launch choice of a kernel, checked, then timed and sorted.

Each choice is checked, not the fastest alone: a compiler that gets a single tile size wrong is a
thing that happens. What wins is written into the kernel's module by hand; nothing is tuned at run
time, so the same input gives the same bits on the same GPU. Exit status 1 if a choice is wrong.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cogvx_kernels._backend import INTERPRETED
from cogvx_kernels.testing import OPS, SIZES, evaluate

from . import conditions, inputs, two_ways
from .__main__ import DTYPES
from .check import Law, results_of
from .providers import PROVIDERS, Provider, Unavailable
from .race import Contest, calls
from .report import bound_by_products
from .timing import copy_rate, measure, sets_to_rotate

Choice = Mapping[str, int]


@dataclass(frozen=True)
class Sweep:
    """Constants of a kernel's module, or of its plan's, and the values to try, for each pass.

    provider  who runs the kernel
    fits      whether a choice is worth compiling
    """

    module: str
    forward: Mapping[str, Sequence[int]]
    backward: Mapping[str, Sequence[int]]
    provider: str = "cogvx"
    fits: Callable[[Choice], bool] = lambda choice: True


_ROPE3D = {"TILE": (512, 1024, 2048, 4096), "NUM_WARPS": (1, 2, 4, 8)}
_ROPE3D_BACKWARD = {**_ROPE3D, "BACKWARD_PROGRAMS": (264, 528, 1056, 2112)}
_KERNEL = "cogvx_kernels.rope3d.kernel"

_ADALN = {"LANES_PER_WARP": (128, 256, 512, 1024)}
_OF_ADALN = Sweep(
    "cogvx_kernels.expert_adaln.kernel",
    {"TOKENS": (2, 4, 8, 16, 32, 40), **_ADALN},
    {"BACKWARD_TOKENS": (8, 16, 32, 40, 64), **_ADALN},
)
_FFN = {
    "BLOCK_ROWS": (64, 128, 256),
    "BLOCK_COLS": (64, 128, 256),
    "BLOCK_INNER": (64, 128),
    "WARPS": (4, 8),
    "STAGES": (3, 4),
}

_NORM = {"TILE": (1024, 2048, 4096), "LANES": (32, 64, 128), "PROGRAMS": (264, 528, 1056, 2112)}
_TEMPORAL = {
    "BLOCK_ROWS": (64, 128, 256),
    "BLOCK_COLS": (64, 128),
    "BLOCK_INNER": (32, 64),
    "WARPS": (4, 8),
    "STAGES": (2, 3, 4),
}


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
    "spatial_norm_silu": Sweep("cogvx_kernels.spatial_norm.device_utils", _NORM, _NORM),
    "residual_moments": Sweep(
        "cogvx_kernels.spatial_norm.statistics",
        {"STRIP": (256, 512, 1024, 2048)},
        {"STRIP": (1024,)},  # it passes a gradient on
    ),
    "temporal_conv": Sweep(
        "cogvx_kernels.temporal_conv.kernel", _TEMPORAL, _TEMPORAL, fits=_fits_hopper
    ),
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
    parser.add_argument("--op", choices=tuple(SWEEPS), default="qk_norm_rope3d")
    parser.add_argument("--size", choices=tuple(SIZES), default="5b-480x720-49f")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--convention", default=inputs.MODEL, help="which call (%(default)s)")
    parser.add_argument(
        "--dense",
        action="store_true",
        help="instead: expert_ffn's grouped way beside its dense one, and the row of heuristics.py",
    )
    parser.add_argument("--pass", dest="which", choices=("forward", "backward", "both"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="write tune-OP-SIZE.json there")
    parser.add_argument("--quick", action="store_true", help="a third of the time for each")
    asked = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not INTERPRETED:
        parser.error(
            "a sweep needs a CUDA device; with TRITON_INTERPRET=1 choices are checked, not timed"
        )
    calls = inputs.conventions(OPS[asked.op], SIZES[asked.size])
    if asked.convention not in calls:
        parser.error(f"argument --convention: no such call; there are {', '.join(calls)}")
    if asked.dense and asked.op != "expert_ffn":
        parser.error("argument --dense: only expert_ffn has two ways")
    passes = ("forward", "backward") if asked.which in (None, "both") else (asked.which,)
    budget = 0.05 if asked.quick else 0.15
    if asked.dense:
        return two_ways.compare(asked.size, asked.dtype, device, passes, budget)
    command = f"benchmarks.tune --op {asked.op} --size {asked.size}"
    found = conditions.conditions(device, command)
    rate = copy_rate(device, budget) if device.type == "cuda" else None
    results = {
        which: _sweep(
            asked.op, asked.size, asked.convention, asked.dtype, which, device, budget, rate
        )
        for which in passes
    }
    found |= {"copy_gb_per_s": rate and rate / 1e9, "sm_clock_mhz": conditions.clock(device)}
    for which, entries in results.items():
        print(f"\n{asked.op}  {asked.size}  {asked.dtype}  {which}")
        for entry in entries:
            print(f"  {_words(entry)}")
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        path = asked.out / f"tune-{asked.op}-{asked.size}.json"
        path.write_text(json.dumps({"conditions": found, **results}, indent=1) + "\n")
        print(f"written: {path.name}")
    return 1 if any(not entry["ok"] for entries in results.values() for entry in entries) else 0


def _provider(op: str, which: str) -> Provider:
    """As a model runs it: over its arguments if it can, where there is no gradient."""
    inplace = which == "forward" and op == "qk_norm_rope3d"
    name = "cogvx-inplace" if inplace else SWEEPS[op].provider
    return next(provider for provider in PROVIDERS if provider.name == name)


def _sweep(
    op: str,
    size: str,
    convention: str,
    dtype: str,
    which: str,
    device: torch.device,
    budget: float,
    rate: float | None,
) -> list[dict[str, Any]]:
    """An entry for each choice, the fastest first and wrong ones last."""
    info, sweep, kind = OPS[op], SWEEPS[op], getattr(torch, dtype)
    module = importlib.import_module(sweep.module)
    sample = inputs.conventions(info, SIZES[size])[convention]
    new = partial(inputs.make, sample, kind, device)
    contest = Contest(info, size, convention, which, new, kind, device)
    arguments = new(0)
    outputs = tuple(evaluate(info.reference, arguments).values())
    douts = inputs.cotangents(outputs, 0) if which == "backward" else None
    law = Law(info, arguments, douts)
    provider = _provider(op, which)
    function = provider.make(info, arguments)
    nsets = sets_to_rotate(inputs.nbytes(arguments), device)
    cost = info.cost(arguments)[which == "backward"]
    entries = []
    for choice in filter(sweep.fits, choices(getattr(sweep, which))):
        entry: dict[str, Any] = {**choice, "now": all(vars(module)[k] == choice[k] for k in choice)}
        with chosen(module, choice):
            try:
                verdicts = law.verdicts(results_of(function, new(0), law, douts))
            except Unavailable:
                raise
            except Exception as error:  # a choice may not compile, or ask for too much
                entries.append({**entry, "ok": False, "why": f"{type(error).__name__}: {error}"})
                continue
            wrong = [str(verdict) for verdict in verdicts if not verdict.ok]
            entry |= {"ok": not wrong, "why": "; ".join(wrong)}
            if not wrong and rate is not None:
                times = measure(calls(contest, function, nsets), device, budget)
                entry["median_ms"] = 1e3 * times.median
                if bound_by_products(cost):
                    entry["tflop_per_s"] = cost.flops / times.median / 1e12
                else:
                    entry["percent_of_copy"] = 100 * cost.bytes / times.median / rate
        entries.append(entry)
    return sorted(entries, key=lambda entry: (not entry["ok"], entry.get("median_ms", 0.0)))


def _words(entry: Mapping[str, Any]) -> str:
    rest = ("ok", "why", "now", "median_ms", "percent_of_copy", "tflop_per_s")
    words = "  ".join(f"{k} {v:<5}" for k, v in entry.items() if k not in rest)
    if not entry["ok"]:
        return f"{words}WRONG  {entry['why'].splitlines()[0]}"
    took = "right, not timed"
    if "median_ms" in entry:
        took = f"{entry['median_ms']:.4f} ms  "
        if "tflop_per_s" in entry:
            took += f"{entry['tflop_per_s']:.0f} TFLOP/s"
        else:
            took += f"{entry['percent_of_copy']:.0f}% of a copy"
    return f"{words}{took}{'  (as it is now)' if entry['now'] else ''}"


if __name__ == "__main__":
    sys.exit(main())
