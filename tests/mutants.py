"""`make mutants`: mutation tests of the kernels, with one seeded bug in a copy of the project each.

A mutant replaces a text of a file. It is killed if the kernels' tests fail, which must pass without
it. Exit status 1 if one survives.
"""

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .mutants_frame_cache import FRAME_CACHE_MUTANTS, SOURCES, build
from .mutants_spatial_norm import SPATIAL_NORM_MUTANTS
from .mutants_temporal_conv import TEMPORAL_CONV_MUTANTS

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/kernels",)


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str = "rope3d"  # -k expression of tests that must fail


ROPE3D = "cogvx_kernels/rope3d/kernel.py"
ADALN = "cogvx_kernels/expert_adaln/kernel.py"

UNCHANGED = Mutant("no bug", ROPE3D, "import torch\n", "import torch\n")

# --- rope3d ----------------------------------------------------------------------------------

ROPE3D_MUTANTS = (
    Mutant("sign of sin", ROPE3D, "a * cos - b * sin", "a * cos + b * sin"),
    Mutant("the first video token not rotated", ROPE3D, "(position >= 0)", "(position > 0)"),
    Mutant(
        "stride of the last dim ignored", ROPE3D,
        "[None, :] * stride_dim)\n        x = tl.load",
        "[None, :])\n        x = tl.load",
    ),
    Mutant("gradient of half the bias dropped", ROPE3D, "dbias_b += db", "dbias_b += 0.0 * db"),
    Mutant(
        "offsets of 32 bits", ROPE3D,
        "head.to(tl.int64) * x.head) * P.ALIGN",
        "head.to(tl.int64) * x.head).to(tl.int32) * P.ALIGN",
    ),
    Mutant("eps forgotten", ROPE3D, "tl.rsqrt(variance + P.EPS)", "tl.rsqrt(variance)"),
    Mutant(
        "one head too many", ROPE3D,
        "mask = head < NHEADS\n        rows = _rows(x,",
        "mask = head <= NHEADS\n        rows = _rows(x,",
    ),
    Mutant(
        "backward rotates forward", ROPE3D,
        "*douts, inverse=True)", "*douts)",
    ),
    Mutant(
        "gradient of the mean forgotten", ROPE3D, "da, db = da - mean, db - mean", "da, db = da, db"
    ),
    Mutant(
        "padding lanes in the variance", ROPE3D, "if 2 * P.HALF != P.HEADDIM:", "if P.HALF < 0:"
    ),
    Mutant(
        "k normalised with q's weights", ROPE3D,
        "k_out, k, None, *affine[2:])", "k_out, k, None, *affine[:2])",
    ),
    Mutant(
        "partial sums of dweight overlap", ROPE3D,
        "program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)",
        "program = tl.program_id(0).to(tl.int64)",
    ),
    Mutant(
        "masked lanes undefined", ROPE3D, "tl.load(cos_ptr + at, mask=turning, other=0.0)",
        "tl.load(cos_ptr + at, mask=turning)",
    ),
    Mutant(
        "rounded twice", ROPE3D,
        "        a, b = _rotate(a, b, cos, sin, turning)\n",
        "        a = a.to(x.ptr.dtype.element_ty).to(P.COMPUTE)\n"
        "        a, b = _rotate(a, b, cos, sin, turning)\n",
    ),
    Mutant(
        "tokens skipped between strips", ROPE3D,
        "ntokens, tl.num_programs(0))", "ntokens, tl.num_programs(0) + 1)",
    ),
    Mutant(
        "launched on the current device", ROPE3D,
        "q_out, k_out)\n    with on_device(q):",
        "q_out, k_out)\n    if True:",
    ),
    Mutant(
        "an angle of 0 instead of a select", ROPE3D,
        "tl.where(turning, a * cos - b * sin, a)", "a * tl.where(turning, cos, 1.0) - b * sin",
    ),
    Mutant(
        "half-split dims that pass through overwritten", ROPE3D,
        "tl.where(turning, j + P.ROTARY // 2, j + P.HEADDIM // 2)", "j + P.ROTARY // 2",
    ),
)  # fmt: skip

# --- expert_adaln ----------------------------------------------------------------------------

ADALN_MUTANTS = tuple(
    Mutant(name, ADALN, old, new, "adaln or residual")
    for name, old, new in (
        (
            "text modulated as video",
            "_forward_strip(tensors, text,", "_forward_strip(tensors, video,",
        ),
        (
            "the last token of a strip left out",
            "P.TOKENS)):\n        token = first + step\n        row = _load",
            "P.TOKENS) - 1):\n        token = first + step\n        row = _load",
        ),
        (
            "a run that is always the first",
            "group * modality.run + begin\n    for step in range(0, "
            "tl.minimum(modality.run - begin, P.TOKENS)):\n        token = first + step\n"
            "        row",
            "begin\n    for step in range(0, "
            "tl.minimum(modality.run - begin, P.TOKENS)):\n        token = first + step\n"
            "        row",
        ),
        ("no 1 in 1 + scale",
         "[1.0 + part for part in _load(modality.scale, batch, group, cols, P)]\n        term",
         "_load(modality.scale, batch, group, cols, P)\n        term"),
        ("bias not scaled", "_add(term, _multiply(bias, factor, P), P)", "_add(term, bias, P)"),
        ("eps forgotten", "_multiply(x, x, P), P) + P.EPS)", "_multiply(x, x, P), P))"),
        ("padding lanes in the variance",
         "x = (tl.where(cols[0] < P.DIM, x[0], 0.0),)", "x = (x[0],)"),
        ("the norm of an unrounded stream",
         "row = _store(tensors.stream, batch, token, cols, row, P)",
         "_store(tensors.stream, batch, token, cols, row, P)"),
        ("the stream's own gradient forgotten",
         "_add(grad, _load(tensors.dstream, batch, token, cols, P), P)", "grad"),
        ("gradient of the mean forgotten",
         "mean = _mean(grad, P) * rstd", "mean = 0.0 * rstd"),
        ("gradient of y without its gate", "cols, _multiply(grad, gate, P), P)", "cols, grad, P)"),
        ("a part left out of a mean", "tl.static_range(1, PARTS):\n        total",
         "tl.static_range(2, PARTS):\n        total"),
        ("sums of another program",
         "sums_ptr += tl.program_id(0).to(tl.int64) * (VECTORS * P.DIM)",
         "sums_ptr += place.to(tl.int64) * (VECTORS * P.DIM)"),
        ("offsets of 32 bits",
         "tl.cast(batch, tl.int64) * rows.batch + tl.cast(index, tl.int64) * rows.seq",
         "(batch * rows.batch + index * rows.seq).to(tl.int32)"),
        ("offsets of 32 bits between tokens alone",
         "tl.cast(index, tl.int64) * rows.seq", "(index * rows.seq).to(tl.int32)"),
    )
)  # fmt: skip

# --- expert_ffn ------------------------------------------------------------------------------

FFN_KERNEL, FFN_DEVICE, FFN_GRADIENTS = (
    f"cogvx_kernels/expert_ffn/{name}.py" for name in ("kernel", "device_utils", "gradients")
)

EXPERT_FFN_MUTANTS = tuple(
    Mutant(name, file, old, new, "expert_ffn")
    for file, name, old, new in (
        (FFN_DEVICE, "text's run for the video's rows",
         "+ tl.where(expert == 0, 0, text_len)\n", "\n"),
        (FFN_DEVICE, "the first row of a sample taken for one of the sample before",
         "pair += tl.where(place >= run, others, 0)", "pair += tl.where(place > run, others, 0)"),
        (FFN_DEVICE, "a tile of at most two samples", "(P.BLOCK_ROWS - 1) // run + 1", "1"),
        (FFN_DEVICE, "the last, partial tile of an expert left out",
         "tiles = (count + (P.BLOCK_ROWS - 1)) // P.BLOCK_ROWS", "tiles = count // P.BLOCK_ROWS"),
        (FFN_DEVICE, "the tile at the boundary goes to the expert before",
         "inside = (tile >= tiles_before) & (tile < tiles_before + tiles)",
         "inside = (tile >= tiles_before) & (expert < 0) & (tile <= tiles_before + tiles)"),
        (FFN_DEVICE, "rows of an expert counted from the first expert's",
         "first = tl.where(inside, base, first)", "first = tl.where(inside, 0 * base, first)"),
        (FFN_DEVICE, "a choice taken for a token",
         "token = pair // P.TOP_K", "token = pair % (groups.samples * groups.seqlen)"),
        (FFN_DEVICE, "the last, partial step of a product left out",
         "for begin in range(0, INNER, P.BLOCK_INNER):",
         "for begin in range(0, INNER // P.BLOCK_INNER * P.BLOCK_INNER, P.BLOCK_INNER):"),
        (FFN_DEVICE, "offsets of 32 bits",
         "return (sample * x.batch + place * x.seq) * P.ALIGN",
         "return (sample * x.batch + place * x.seq).to(tl.int32) * P.ALIGN"),
        (FFN_DEVICE, "an exact GELU without its half",
         "out = 0.5 * pre * (1.0 + tl.erf(pre * SQRT_HALF))",
         "out = pre * (1.0 + tl.erf(pre * SQRT_HALF))"),
        (FFN_DEVICE, "values and gates swapped",
         "out = pre * gate * sigmoid(gate)", "out = pre * gate * sigmoid(pre)"),
        (FFN_DEVICE, "a slope of GELU without its cube",
         "TWICE_SQRT_2_OVER_PI * (1.0 + 0.134145 * square)", "TWICE_SQRT_2_OVER_PI"),
        (FFN_KERNEL, "the weight of a choice forgotten",
         "acc *= tl.load(groups.share + pair).to(P.COMPUTE)[:, None]",
         "acc *= 0.0 * tl.load(groups.share + pair).to(P.COMPUTE)[:, None] + 1.0"),
        (FFN_KERNEL, "a bias for pairs without an expert",
         "if expert < P.EXPERTS:\n            rows = rows_ptr",
         "if expert <= P.EXPERTS:\n            rows = rows_ptr"),
        (FFN_KERNEL, "a program too few",
         "return pairs // plan.BLOCK_ROWS + plan.EXPERTS + 1",
         "return pairs // plan.BLOCK_ROWS + plan.EXPERTS - 1"),
        (FFN_KERNEL, "one choice too few summed",
         "for choice in tl.static_range(TOP_K):", "for choice in tl.static_range(TOP_K - 1):"),
        (FFN_GRADIENTS, "the gradient of a weight without its bias",
         "along += _dot_bias(", "along += 0.0 * _dot_bias("),
        (FFN_GRADIENTS, "the hidden activation without its weight",
         "            hidden *= share\n", ""),
        (FFN_GRADIENTS, "a bias' gradient without the weights",
         "a *= share.to(P.COMPUTE)[None, :]", "a *= 1.0 + 0.0 * share.to(P.COMPUTE)[None, :]"),
        (FFN_GRADIENTS, "the last rows of an expert left out of its gradient",
         "there = place < run\n            at =", "there = place < run - 1\n            at ="),
    )
)  # fmt: skip

MUTANTS = (
    *ROPE3D_MUTANTS,
    *ADALN_MUTANTS,
    *EXPERT_FFN_MUTANTS,
    *itertools.starmap(
        Mutant, (*SPATIAL_NORM_MUTANTS, *TEMPORAL_CONV_MUTANTS, *FRAME_CACHE_MUTANTS)
    ),
)


class Result(NamedTuple):
    mutant: Mutant
    killed: bool
    passed: bool  # all tests, and at least one
    seconds: float
    output: str


def misplaced() -> list[str]:
    """Mutants whose old text is not exactly once in their file."""
    counts = [((ROOT / m.file).read_text().count(m.old), m) for m in MUTANTS]
    return [f"{m.file}: {m.name}: {count} times" for count, m in counts if count != 1]


def run(mutant: Mutant) -> Result:
    """Apply the mutant to a copy and run the tests there until the first failure."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("cogvx_kernels", "examples", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in SOURCES:
            put = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            put(ROOT / name, copy / name)
        path = copy / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        if mutant.file.startswith("csrc/"):
            build(copy)
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--all",
             "--fuzz", "100", "--seed", "1", "-k", mutant.tests, *TESTS],
            cwd=copy, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(copy)},
        )  # fmt: skip
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        output = (
            failed[0].removeprefix("FAILED ") if failed else done.stdout[-300:] + done.stderr[-300:]
        )
        crashed = done.returncode == -signal.SIGSEGV  # a kernel that writes out of bounds
        killed = crashed or (done.returncode == 1 and bool(failed))
        if crashed:
            output = "the process of the tests crashed: SIGSEGV"
        return Result(mutant, killed, done.returncode == 0, time.monotonic() - start, output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", metavar="WORDS", help="mutants whose name or file contains these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    if wrong := misplaced():
        parser.error("old text must be in its file once; got " + ", ".join(wrong))
    mutants = [m for m in MUTANTS if (options.only or "") in f"{m.file} {m.name}"]
    for tests in sorted({m.tests for m in mutants}):
        healthy = run(UNCHANGED._replace(tests=tests))
        if not healthy.passed:
            print(f"the tests of {tests} fail without a mutant: {healthy.output}")
            return 2
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(run, mutants):
            survivors += not result.killed
            outcome = "killed" if result.killed else "SURVIVED"
            print(
                f"{outcome:9}{result.mutant.name:45}{result.seconds:5.0f} s  {result.output}",
                flush=True,
            )
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed")
    return 1 if survivors or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
