"""`cogvx-kernels ptx`: execute the compiled code of the kernels on a CPU, on the ops' samples.

The kernels are compiled for a GPU that is not here, and `cogvx_kernels.ptx` executes their PTX.
Each output and gradient is compared by the rule of `verify`, and every access, barrier, wait and
fence is checked. Prints a line for each op and architecture, then what is wrong; the exit status is
1 if anything is.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__, _backend
from .._opinfo import OpInfo
from ..testing import OPS
from . import options as command_line

ARCHES = {"sm_80": 80, "sm_90": 90}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Samples that launch what the op's first does not: depthwise kernels, wgmma, other layouts.
QUICK = {
    "expert_ffn": ("more rows of an expert than a tile",),
    "spatial_norm_silu": ("channels last",),
    "temporal_conv": ("depthwise", "more pixels than a tile"),
}
LINE = "{:22}{:8}{:>6}{:>10}{:>8}{:>9}{:>9}  {}"
ROW = "{:22}{:8}{:44}{:6}{:>7}{:>8}  {}"


class Case(NamedTuple):
    """A sample in a dtype for an architecture, by names, to send to another process."""

    op: str
    arch: str
    sample: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A case that was executed; `refused` is the instruction that the machine does not know."""

    op: str
    arch: str
    sample: str
    dtype: str
    kernels: list[str]
    classes: dict[str, int]
    worst: float | None
    missed: list[str]
    faults: list[str]
    refused: str | None
    seconds: float
    compile_seconds: float

    @property
    def ok(self) -> bool:
        return not (self.missed or self.faults or self.refused)

    def __str__(self) -> str:
        worst = "" if self.worst is None else f"{self.worst:.2f}x"
        wrong = [*(f"MISS: {x}" for x in self.missed), *(f"FAULT: {x}" for x in self.faults)]
        wrong += [f"REFUSED: {self.refused}"] if self.refused else []
        result = "; ".join(wrong) or "ok"
        return ROW.format(
            self.op, self.arch, self.sample, self.dtype, worst, f"{self.seconds:.1f}", result
        )


def quick(info: OpInfo) -> list[int]:
    """Samples of an op that together launch each of its kernels."""
    more = QUICK.get(info.name, ())
    return [0, *(n for n, s in enumerate(info.samples) if s.reason in more)]


def cases(options: Any) -> list[Case]:
    """What was requested, by op, architecture, sample and dtype."""
    found = []
    ops = options.op or [name for name, info in OPS.items() if info.launch is not None]
    for op, arch in product(ops, options.arch or ["sm_90"]):
        info = OPS[op]
        numbers: Sequence[int] = quick(info) if options.quick else range(len(info.samples))
        for number in numbers:
            reason = info.samples[number].reason
            if options.sample and not any(words in reason for words in options.sample):
                continue
            for dtype in options.dtype or DTYPES:
                if DTYPES[dtype] in info.dtypes:
                    found.append(Case(op, arch, number, dtype))
    return found


def execute(case: Case) -> Row:
    """Run a case in this process."""
    from ..ptx import parse, samples

    info = OPS[case.op]
    sample = info.samples[case.sample]
    named = case.op, case.arch, sample.reason, case.dtype
    try:
        result = samples.run_sample(
            info, sample, DTYPES[case.dtype], ARCHES[case.arch], counting=False
        )
    except parse.Unsupported as error:
        return Row(*named, [], {}, None, [], [], str(error), 0.0, 0.0)
    worst = max((c.multiple for c in result.comparisons), default=0.0)
    return Row(
        *named,
        [x.name for x in result.launches],
        dict(result.classes),
        worst if math.isfinite(worst) else None,
        [str(c) for c in result.missed],
        result.faults,
        None,
        sum(x.seconds for x in result.launches),
        sum(x.compile_seconds for x in result.launches),
    )


def rows(wanted: Sequence[Case], jobs: int) -> Iterator[Row]:
    """Execute cases in order."""
    if jobs == 1:
        torch.set_num_threads(1)
        yield from map(execute, wanted)
        return
    # spawned, because torch's threads do not survive a fork
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawned, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(execute, wanted)


def _unsupported_reason(options: Any) -> str | None:
    """Return why nothing can be executed; None if it can."""
    if not _backend.HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if _backend.INTERPRETED:
        return "the interpreter compiles nothing; unset TRITON_INTERPRET"
    for op in options.op or ():
        if OPS[op].launch is None:
            return f"--op {op}: its kernel is not Triton's, and has no PTX"
    return None


def _no_sample(options: Any) -> str:
    reasons = sorted({s.reason for op in options.op or OPS for s in OPS[op].samples})
    return (
        f"no sample has {' or '.join(map(repr, options.sample))}; there are: {'; '.join(reasons)}"
    )


def _line(op: str, arch: str, found: Sequence[Row]) -> str:
    wrong = sum(not row.ok for row in found)
    worst = max((row.worst for row in found if row.worst is not None), default=0.0)
    return LINE.format(
        op, arch, len(found), sum(len(row.kernels) for row in found), f"{worst:.2f}x",
        f"{sum(row.seconds for row in found):.1f}",
        f"{sum(row.compile_seconds for row in found):.1f}",
        f"{wrong} WRONG" if wrong else "ok",
    ).rstrip()  # fmt: skip


def main(argv: list[str]) -> int:
    options = command_line.ptx(argv)
    if reason := _unsupported_reason(options):
        print(f"cogvx-kernels ptx: cannot run: {reason}", file=sys.stderr)
        return 2
    wanted = cases(options)
    if not wanted:
        print(f"cogvx-kernels ptx: {_no_sample(options)}", file=sys.stderr)
        return 2
    quiet = options.json == "-"
    show = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    show(f"cogvx {__version__}, torch {torch.__version__}, PTX executed on a CPU")
    show("worst: the kernel's error against fp64 to the reference's own in that dtype")
    heads = ("op", "arch", "cases", "launches", "worst", "seconds", "compile", "")
    show(LINE.format(*heads).rstrip() if not options.all_rows else
         ROW.format("op", "arch", "sample", "dtype", "worst", "seconds", "result"))  # fmt: skip
    done = []
    found = rows(wanted, options.jobs or min(os.cpu_count() or 1, 8))
    for (op, arch), group in groupby(found, lambda row: (row.op, row.arch)):
        these = []
        for row in group:
            these.append(row)
            if options.all_rows:
                show(row)
        done += these
        if not options.all_rows:
            show(_line(op, arch, these))
            for row in these:
                if not row.ok:
                    show(f"  {row}")
    wrong = sum(not row.ok for row in done)
    show(f"{len(done)} cases, {sum(len(row.kernels) for row in done)} launches, {wrong} wrong")
    if options.json:
        text = json.dumps([dataclasses.asdict(row) for row in done], indent=1)
        if quiet:
            print(text)
        else:
            Path(options.json).write_text(text + "\n")
    return 1 if wrong else 0
