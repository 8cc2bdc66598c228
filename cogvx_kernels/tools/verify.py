"""`cogvx-kernels verify`: compare every op's kernel with its reference, on all samples.

On a GPU, or with `--device cpu` in Triton's interpreter. Prints a line for each op: the number of
cases (a sample in a dtype), the worst ratio of the kernel's error against fp64 to the reference's
error in that dtype, over outputs and gradients, and the seconds of all processes together. Failures
are printed in full, and the exit status is 1. An op that passed is not compared again until
something changes.
"""

import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__, _backend, _checks
from .._opinfo import SIZES, OpInfo, Sample
from ..testing import OPS, Comparison, compare
from . import options as command_line
from .passed import Passes

ROW = "{:21}{:43}{:10}{:10}{:>7}  {}"
ROW_HEADS = ROW.format("op", "sample", "dtype", "worst", "ratio", "result")
LINE = "{:22}{:>6}{:>9}{:>9}  {}"
EVERY = 10.0  # seconds between two lines of progress


class Case(NamedTuple):
    """A sample in a dtype, by name and index, to send to another process."""

    op: str
    sample: int  # index into `_samples`
    dtype: torch.dtype


class Compared(NamedTuple):
    """A case and the comparisons of its tensors; None if it does not fit into memory."""

    info: OpInfo
    sample: Sample
    dtype: torch.dtype
    comparisons: list[Comparison] | None
    seconds: float

    @property
    def missed(self) -> list[Comparison]:
        return [v for v in self.comparisons or () if not v.ok]

    def __str__(self) -> str:
        """A row of the table."""
        kind = _checks.dtype_name(self.dtype)
        if self.comparisons is None:
            worst, ratio, result = "", "", "not compared: out of memory"
        else:
            found = max(self.comparisons, key=lambda v: (not v.ok, v.multiple))
            worst, ratio = found.name, f"{found.multiple:.2f}x"
            result = "MISS: " + "; ".join(map(str, self.missed)) if self.missed else "ok"
        return ROW.format(self.info.name, self.sample.reason, kind, worst, ratio, result)


class OpResult(NamedTuple):
    """All cases of an op."""

    name: str
    cases: list[Compared]

    @property
    def missed(self) -> list[Compared]:
        return [case for case in self.cases if case.missed]

    @property
    def left_out(self) -> int:
        """The number of cases that did not fit into memory."""
        return sum(case.comparisons is None for case in self.cases)

    @property
    def worst(self) -> float:
        return max((v.multiple for case in self.cases for v in case.comparisons or ()), default=0.0)

    @property
    def passed(self) -> bool:
        return not self.missed and not self.left_out and math.isfinite(self.worst)

    def __str__(self) -> str:
        """A line for the op, then the rows that are not ok."""
        outcome = f"{len(self.missed)} MISSED" if self.missed else "ok"
        if self.left_out:
            outcome += f", {self.left_out} not compared"
        seconds = sum(case.seconds for case in self.cases)
        line = LINE.format(
            self.name, len(self.cases), f"{self.worst:.2f}x", f"{seconds:.1f}", outcome
        )
        wrong = [f"  {case}" for case in self.cases if case.missed or case.comparisons is None]
        return "\n".join([line, *wrong])


def comparisons(
    ops: list[OpInfo], device: str, quick: bool, seed: int, jobs: int
) -> Iterator[Compared]:
    """Yield each sample of each op in each dtype, compared, in order."""
    samples = {info.name: _samples(info, device, quick) for info in ops}
    cases = [
        Case(info.name, index, dtype)
        for info in ops
        for index in range(len(samples[info.name]))
        for dtype in info.dtypes
    ]
    compared = partial(_compared, device=device, quick=quick, seed=seed)
    progress = _Progress(len(cases))
    with ExitStack() as stack:
        if jobs > 1:
            # spawned, because torch's threads do not survive a fork
            spawned = multiprocessing.get_context("spawn")
            processes = stack.enter_context(ProcessPoolExecutor(jobs, spawned, _begin))
            results = processes.map(compared, cases, chunksize=4)
        else:
            results = map(compared, cases)
        for case, (comparisons, seconds) in zip(cases, results, strict=True):
            progress.done(case.op)
            info, sample = OPS[case.op], samples[case.op][case.sample]
            yield Compared(info, sample, case.dtype, comparisons, seconds)


def _samples(info: OpInfo, device: str, quick: bool) -> tuple[Sample, ...]:
    """The samples of an op; on a GPU also a model's size, whose fp64 reference takes 20 GB."""
    if quick:
        return info.samples[::4]
    if device == "cpu":
        return info.samples
    return (*info.samples, info.at_size(SIZES["2b-480x720-49f"]))


def _compared(
    case: Case, device: str, quick: bool, seed: int
) -> tuple[list[Comparison] | None, float]:
    """The comparisons of a case, None if out of memory, and the seconds it took."""
    info = OPS[case.op]
    sample = _samples(info, device, quick)[case.sample]
    start = time.perf_counter()
    comparisons = None
    try:
        comparisons = compare(info, sample, case.dtype, device=device, seed=seed)
    except torch.OutOfMemoryError:
        pass
    return comparisons, time.perf_counter() - start


def _begin() -> None:
    """Prepare a worker process, with one thread."""
    torch.set_num_threads(1)
    _fix_interpreter()


class _Progress:
    """A line on stderr every few seconds."""

    def __init__(self, total: int) -> None:
        self.count, self.total, self.next_line = 0, total, time.monotonic() + EVERY

    def done(self, op: str) -> None:
        """Count a case of an op."""
        self.count += 1
        if time.monotonic() >= self.next_line:
            print(f"verify: {self.count} of {self.total} cases, {op}", file=sys.stderr, flush=True)
            self.next_line = time.monotonic() + EVERY


def main(argv: list[str]) -> int:
    options = command_line.verify(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    reason = _unsupported_reason(device)
    if reason:
        print(f"cogvx-kernels verify: cannot run: {reason}", file=sys.stderr)
        return 2
    names = list(options.op or OPS)
    passes = Passes(_describe(device), options.seed)
    old: dict[str, dict[str, Any]] = {}
    if not (options.again or options.all_rows or options.json):
        found = {name: passes.find(name, options.quick) for name in names}
        old = {name: one for name, one in found.items() if one is not None}
    new = [OPS[name] for name in names if name not in old]
    if new:
        _prepare(device, argv)
    print(f"cogvx {__version__}, torch {torch.__version__}, on {_describe(device)}")
    print("worst: the kernel's error against fp64 to the reference's own in that dtype")
    heads = ROW_HEADS if options.all_rows else LINE.format("op", "cases", "worst", "seconds", "")
    print(heads.rstrip())
    for name, one in old.items():
        line = LINE.format(name, one["cases"], f"{one['worst']:.2f}x", "-", f"ok, {one['date']}")
        print(line)
    jobs = options.jobs or (min(os.cpu_count() or 1, 8) if device == "cpu" else 1)
    results = []
    compared = comparisons(new, device, options.quick, options.seed, jobs)
    for name, cases in groupby(compared, lambda case: case.info.name):
        results.append(result := OpResult(name, []))
        for case in cases:
            result.cases.append(case)
            if options.all_rows:
                print(case, flush=True)
        passes.put(name, _pass_of(result, options.quick) if result.passed else None)
        if not options.all_rows:
            print(result, flush=True)
    report = [entry for result in results for case in result.cases for entry in _entries(case)]
    misses = sum(len(result.missed) for result in results)
    if new:
        left_out = sum(result.left_out for result in results)
        print(_summary(len(report), misses, left_out, options.quick))
    if old:
        print(f"{len(old)} of {len(names)} ops passed here before and nothing has changed since; "
              "--again repeats them")  # fmt: skip
    if options.json:
        facts = {"cogvx": __version__, "torch": torch.__version__, "device": _describe(device)}
        Path(options.json).write_text(json.dumps({**facts, "rows": report}, indent=1) + "\n")
    return 1 if misses or (new and not report) else 0


def _unsupported_reason(device: str) -> str | None:
    """Return why kernels cannot run on `device`; None if they can."""
    if not _backend.HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if device != "cpu" and not torch.cuda.is_available():
        return f"--device {device}, and torch {torch.__version__} finds no GPU"
    return None


def _prepare(device: str, argv: list[str]) -> None:
    """Make the kernels runnable on `device`."""
    if device == "cpu" and not _backend.INTERPRETED:
        # Triton reads the variable on import: run the same command in a new process.
        command = [sys.executable, "-m", "cogvx_kernels", "verify", *argv]
        sys.stdout.flush()
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
    if device == "cpu":
        _begin()
    else:
        _fix_interpreter()


def _fix_interpreter() -> None:
    if _backend.INTERPRETED:
        from . import interpreter

        interpreter.install()


def _describe(device: str) -> str:
    if device == "cpu":
        return "Triton's interpreter, cpu"
    how = "Triton's interpreter, " if _backend.INTERPRETED else ""
    return how + torch.cuda.get_device_name(device)


def _pass_of(result: OpResult, quick: bool) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "quick": quick,
        "cases": len(result.cases),
        "worst": result.worst,
    }


def _entries(case: Compared) -> list[dict[str, Any]]:
    """The tensors of a case, for --json."""
    return [
        {"op": case.info.name, "sample": case.sample.reason,
         "dtype": _checks.dtype_name(case.dtype), "tensor": v.name, "ok": v.ok,
         "error": _number(v.error), "reference_error": _number(v.baseline),
         "ulp": v.ulp, "multiple": _number(v.multiple)}
        for v in case.comparisons or ()
    ]  # fmt: skip


def _summary(tensors: int, misses: int, left_out: int, quick: bool) -> str:
    left = f", {left_out} rows not compared" if left_out else ""
    some = "; every fourth sample: without --quick all" if quick else ""
    return f"{tensors} tensors compared, {misses} rows missed the rule{left}{some}"


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
