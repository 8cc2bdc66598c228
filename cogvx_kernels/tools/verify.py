"""`cogvx-kernels verify`: every op, every sample, its kernel against its reference.

On a GPU, or with `--device cpu` in Triton's interpreter. Each row is the worst output or gradient
of one sample in one dtype: how far the kernel is from the reference in fp64, as a multiple of how
far the reference itself is in that dtype. Exit status 1 if any row misses the rule.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .. import __version__, _backend, _checks
from .._opinfo import SIZES, OpInfo, Sample
from ..testing import OPS, Verdict, compare


class Case(NamedTuple):
    """A sample in a dtype, by names that another process knows."""

    op: str
    sample: int  # which of `_samples`
    dtype: torch.dtype


def rows(
    ops: list[OpInfo], device: str, quick: bool, seed: int, jobs: int
) -> Iterator[tuple[OpInfo, Sample, torch.dtype, list[Verdict] | None]]:
    """The verdicts on each sample in each dtype, None if it does not fit into memory."""
    samples = {info.name: _samples(info, device, quick) for info in ops}
    cases = [
        Case(info.name, index, dtype)
        for info in ops
        for index in range(len(samples[info.name]))
        for dtype in info.dtypes
    ]
    compared = partial(_compared, device=device, quick=quick, seed=seed)
    with ExitStack() as stack:
        if jobs > 1:
            # begun anew, because threads of torch do not survive a fork
            spawned = multiprocessing.get_context("spawn")
            processes = stack.enter_context(ProcessPoolExecutor(jobs, spawned, _begin))
            verdicts = processes.map(compared, cases, chunksize=4)
        else:
            verdicts = map(compared, cases)
        for case, each in zip(cases, verdicts, strict=True):
            yield OPS[case.op], samples[case.op][case.sample], case.dtype, each


def _samples(info: OpInfo, device: str, quick: bool) -> tuple[Sample, ...]:
    """Those of an op; on a GPU one of a model's size too, whose fp64 truth takes some 20 GB."""
    if quick:
        return info.samples[::4]
    if device == "cpu":
        return info.samples
    return (*info.samples, info.at_size(SIZES["2b-480x720-49f"]))


def _compared(case: Case, device: str, quick: bool, seed: int) -> list[Verdict] | None:
    info = OPS[case.op]
    sample = _samples(info, device, quick)[case.sample]
    try:
        return compare(info, sample, case.dtype, device=device, seed=seed)
    except torch.OutOfMemoryError:
        return None


def _begin() -> None:
    """What a process of several does first: one core is its share."""
    torch.set_num_threads(1)
    _cure_interpreter()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cogvx-kernels verify", description=__doc__)
    parser.add_argument("--op", choices=OPS, action="append", help="default: all")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU if there is one")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--quick", action="store_true", help="every fourth sample")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs; default 0")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes; default: 1 on a GPU, else one for each core, 8 at most",
    )
    options = parser.parse_args(argv)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"argument --jobs: must be 1 or more; got {options.jobs}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    jobs = options.jobs or (min(os.cpu_count() or 1, 8) if device == "cpu" else 1)
    reason = _prepare(device, argv)
    if reason:
        print(f"cogvx-kernels verify: cannot run: {reason}", file=sys.stderr)
        return 2

    print(f"cogvx {__version__}, torch {torch.__version__}, on {_describe(device)}")
    print("error: the kernel's against fp64, as a multiple of the reference's own in that dtype")
    print(f"{'op':21}{'sample':43}{'dtype':10}{'worst':10}{'error':>7}  verdict")
    report, misses, too_large = [], 0, 0
    ops = [OPS[name] for name in options.op or OPS]
    for info, sample, dtype, verdicts in rows(ops, device, options.quick, options.seed, jobs):
        kind = _checks.dtype_name(dtype)
        if verdicts is None:
            too_large += 1
            print(f"{info.name:21}{sample.reason:43}{kind:10}{'':17}  not compared: out of memory")
            continue
        worst = max(verdicts, key=lambda v: (not v.ok, v.multiple))
        ok = all(v.ok for v in verdicts)
        misses += not ok
        verdict = "ok" if ok else "MISS: " + "; ".join(str(v) for v in verdicts if not v.ok)
        print(f"{info.name:21}{sample.reason:43}{kind:10}{worst.name:10}{worst.multiple:>6.2f}x"
              f"  {verdict}")  # fmt: skip
        report += [
            {"op": info.name, "sample": sample.reason, "dtype": kind, "tensor": v.name, "ok": v.ok,
             "error": _number(v.error), "reference_error": _number(v.yardstick),
             "ulp": v.ulp, "multiple": _number(v.multiple)}
            for v in verdicts
        ]  # fmt: skip
    left = f", {too_large} rows not compared" if too_large else ""
    print(f"{len(report)} tensors compared, {misses} rows missed the rule{left}")
    if options.json:
        facts = {"cogvx": __version__, "torch": torch.__version__, "device": _describe(device)}
        Path(options.json).write_text(json.dumps({**facts, "rows": report}, indent=1) + "\n")
    return 1 if misses or not report else 0


def _prepare(device: str, argv: list[str]) -> str | None:
    """Make the kernels runnable on `device`, or say why they are not."""
    if not _backend.HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if device == "cpu" and not _backend.INTERPRETED:
        # Triton decides when it is imported, so begin again, as told.
        command = [sys.executable, "-m", "cogvx_kernels", "verify", *argv]
        sys.stdout.flush()
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
    if device != "cpu" and not torch.cuda.is_available():
        return f"--device {device}, and torch {torch.__version__} finds no GPU"
    _cure_interpreter()
    return None


def _cure_interpreter() -> None:
    if _backend.INTERPRETED:
        from . import interpreter

        interpreter.install()


def _describe(device: str) -> str:
    how = "Triton's interpreter, " if _backend.INTERPRETED else ""
    return how + (device if device == "cpu" else torch.cuda.get_device_name(device))


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
