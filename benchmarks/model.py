"""`python -m benchmarks.model`: parts of CogVideoX beside diffusers' on the same weights.

Beside diffusers as it is, compiled, compiled with cuDNN's attention first, and, of the VAE, with
channels side by side; ours, of the VAE, also on its ops' references. Outputs are compared before
anything is timed, and ours must agree. Then all run in turn, there and back, in one process. Peak
bytes are those alive in tensors, without weights and arguments (`cogvx.memory.LiveBytes`), and
saved bytes those that a forward keeps for its backward, each storage once, without weights: the
same on any machine. Exit status 1 if outputs differ.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from cogvx.memory import LiveBytes
from cogvx_kernels._backend import INTERPRETED

from . import conditions, report
from .parts import OURS, PARTS, SIDES, SIZES, THEIRS, Call, Scene
from .timing import Times, measure

# What the outputs may differ by, relative to the largest: in fp32 what contract and tests demand;
# in bf16 each is a sum of thousands of roundings of 2^-8, and the tests hold both to fp64.
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
# Of the largest of all: a gradient that is smaller is the rounding of greater ones, and what it
# differs by is measured against this. A bias that attention is blind to has such a gradient.
SMALL = 1e-3
LAPS = 6


@dataclass
class Row:
    """One side of one part. A time is only given on a GPU; everywhere a ratio, there and back.

    speed         diffusers' median time over this one's: 2 is twice as fast
    memory        this one's peak live bytes over diffusers'
    gpu_mib       what a GPU's allocator had at its most, libraries' own memory included, less what
                  it had before
    saved         this one's saved bytes over diffusers'
    relative_gap  the largest difference of an output over the largest of that output: from
                  diffusers', or for gradients from diffusers' in fp32

    Nothing is said of the bytes of compiled code, into which the counter does not see, nor of
    speed where kernels are interpreted.
    """

    part: str
    size: str
    provider: str
    dtype: str
    device: str
    peak_mib: float | None
    memory: float | None
    saved_mib: float | None
    saved: float | None
    relative_gap: float
    gpu_mib: float | None = None
    speed: float | None = None
    noise_percent: float | None = None
    median_ms: float | None = None

    def cells(self) -> dict[str, Any]:
        return asdict(self)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = arguments.size or ("small" if device.type == "cpu" else "5b-480x720-49f")
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    command = " ".join(["python -m benchmarks.model", *(sys.argv[1:] if argv is None else argv)])
    found = conditions.conditions(device, command)
    if INTERPRETED:
        from cogvx_kernels.tools import interpreter

        interpreter.install()
    size = SIZES[name]
    if arguments.frames:
        size = dataclasses.replace(size, frames=arguments.frames)
    if arguments.layers:
        config = dataclasses.replace(size.transformer, num_layers=arguments.layers)
        size = dataclasses.replace(size, transformer=config)
    rows, wrong = [], False
    for part in arguments.part or PARTS:
        for scene in PARTS[part](size, dtype, device):
            for side in set(scene.sides) - {THEIRS, *(arguments.providers or scene.sides)}:
                del scene.sides[side]
            gaps = _gaps(scene)
            bad = {
                side: gap
                for side, gap in gaps.items()
                if side != THEIRS and not gap <= AGREEMENT[dtype]
            }
            for side, gap in bad.items():
                print(f"{scene.title} at {name}: outputs of {side} differ by {gap:.2g}; not timed.")
                del scene.sides[side]
            wrong |= bool(bad)
            if OURS in bad:
                continue
            for side, reason in scene.left_out.items():
                print(f"{scene.title} at {name}: left out: {side}, {reason}")
            rows += _rows(scene, name, dtype, device, gaps, arguments.budget, arguments.laps)
    found["sm_clock_mhz"] = conditions.clock(device)
    if rows:
        print(_table(rows))
        print(report.small_print(found))
    if rows and arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report.add_to_csv(arguments.out / "model.csv", rows, found)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    add = parser.add_argument
    add("--part", action="append", choices=tuple(PARTS), help="may be repeated; default: all")
    add("--size", choices=tuple(SIZES), help="default: 5b-480x720-49f, on a CPU small")
    add("--providers", nargs="+", choices=SIDES, help="which sides, beside diffusers")
    add("--layers", type=int, metavar="N", help="blocks of the transformer; default: all")
    add("--frames", type=int, metavar="N", help="of the clip, 8n + 1; default: the size's")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16, on a CPU float32")
    add("--device", help="default: cuda if there is one")
    add("--budget", type=float, default=2.0, help="seconds for each side and lap (%(default)s)")
    add("--laps", type=int, default=LAPS, choices=(2, 4, 6, 8), help="there and back (%(default)s)")
    add("--out", type=Path, help="folder for model.csv, which is added to")
    return parser


# --- compared, weighed, timed --------------------------------------------------------------------


def _run(scene: Scene, call: Call) -> Mapping[str, Tensor]:
    """With a gradient if the scene is a training step."""
    with torch.set_grad_enabled(bool(scene.forward)):
        return call()


def _gaps(scene: Scene) -> dict[str, float]:
    """By side, how far it is from the truth, which is diffusers' where the scene has none."""
    of = _run(scene, scene.truth or scene.sides[THEIRS])
    truth = {name: x.detach().clone() for name, x in of.items()}
    largest = max(float(x.abs().max()) for x in truth.values())

    def gap(name: str, x: Tensor) -> float:
        of = max(float(truth[name].abs().max()), SMALL * largest)
        return float((x.detach().double() - truth[name].double()).abs().max()) / of

    gaps = {}
    for side, call in scene.sides.items():
        found = _run(scene, call)
        gaps[side] = max(gap(name, found[name]) for name in truth)
    return gaps


def _rows(
    scene: Scene,
    size: str,
    dtype: torch.dtype,
    device: torch.device,
    gaps: Mapping[str, float],
    budget: float,
    laps: int,
) -> list[Row]:
    sides = scene.sides
    peaks = {side: _peak(scene, side) for side in sides}
    saved = {side: _saved(scene, side) for side in sides}
    rows = [
        Row(
            part=scene.title,
            size=size,
            provider=side,
            dtype=str(dtype).removeprefix("torch."),
            device=device.type,
            peak_mib=_mib(peaks[side]),
            memory=_over(peaks[side], peaks[THEIRS]),
            saved_mib=_mib(saved[side]),
            saved=_over(saved[side], saved[THEIRS]),
            relative_gap=gaps[side],
            gpu_mib=_mib(_gpu_peak(scene, side, device)),
        )
        for side in sides
    ]
    if not INTERPRETED:
        _time(scene, device, budget, laps, rows)
    return rows


def _time(
    scene: Scene, device: torch.device, budget: float, laps: int, rows: Sequence[Row]
) -> None:
    """All sides by turns, there and back, into their rows."""
    times: dict[str, list[Times]] = {side: [] for side in scene.sides}
    with torch.set_grad_enabled(bool(scene.forward)):
        for side in [*times, *reversed(times)] * (laps // 2):
            times[side].append(measure([scene.sides[side]], device, budget))
    for row in rows:
        mine = times[row.provider]
        ratios = [a.median / b.median for a, b in zip(times[THEIRS], mine, strict=True)]
        there, back = (statistics.median(t.median for t in mine[i::2]) for i in (0, 1))
        row.speed = statistics.median(ratios)
        row.noise_percent = 100 * abs(there / back - 1)
        if device.type != "cpu":
            row.median_ms = 1e3 * statistics.median(lap.median for lap in mine)


def _peak(scene: Scene, side: str) -> int | None:
    """Of live bytes; None of compiled code, which would run uncompiled under the counter."""
    if "compile" in side:
        return None
    with LiveBytes() as live:
        _run(scene, scene.sides[side])
    return live.peak


def _gpu_peak(scene: Scene, side: str, device: torch.device) -> int | None:
    """Bytes of the allocator, of compiled code too; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _run(scene, scene.sides[side])
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _saved(scene: Scene, side: str) -> int | None:
    """Bytes that the forward of a training step keeps for its backward; None if it is none."""
    if side not in scene.forward or "compile" in side:
        return None
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage
        return x

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda x: x):
        out = scene.forward[side]()
    weights = {x.untyped_storage().data_ptr() for x in scene.weights}
    del out
    return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)


def _mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def _over(count: int | None, other: int | None) -> float | None:
    return None if count is None or not other else count / other


_COLUMNS: Mapping[str, tuple[str, Callable[[Row], Any], str]] = {
    "peak MiB": ("{:.1f}", lambda row: row.peak_mib, ">10"),
    "memory": ("{:.2f}x", lambda row: row.memory, ">8"),
    "GPU MiB": ("{:.0f}", lambda row: row.gpu_mib, ">9"),
    "saved MiB": ("{:.1f}", lambda row: row.saved_mib, ">10"),
    "saved": ("{:.2f}x", lambda row: row.saved, ">7"),
    "speed": ("{:.2f}x", lambda row: row.speed, ">8"),
    "noise": ("{:.1f}%", lambda row: row.noise_percent, ">7"),
    "gap": ("{:.1e}", lambda row: row.relative_gap, ">9"),
    "ms": ("{:.4g}", lambda row: row.median_ms, ">8"),
}


def _table(rows: Sequence[Row]) -> str:
    """Rows under each other; absent numbers as dots."""
    titles = "".join(f"{title:{width}}" for title, (_, _, width) in _COLUMNS.items())
    lines = [f"{'part':<23} {'provider':<24}{titles}"]
    for row in rows:
        cells = "".join(
            f"{'·' if of(row) is None else form.format(of(row)):{width}}"
            for form, of, width in _COLUMNS.values()
        )
        lines.append(f"{row.part:<23} {row.provider:<24}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
