"""The timing of those who were found right: side by side, in one run, there and back."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cogvx_kernels.testing import OpInfo

from .inputs import cotangents, nbytes
from .providers import Function, Provider
from .report import Row
from .timing import (
    CACHES_TO_ROTATE,
    Call,
    Times,
    cache_bytes,
    copy_rate,
    matmul_rate,
    measure,
    sets_to_rotate,
)

PASSES = ("forward", "backward")
# There and back; a CPU is shared and restless, so there more often, for a shorter time each.
LAPS = {"cuda": 2, "cpu": 6}


@dataclass(frozen=True)
class Contest:
    """What is timed, and `new`, which makes its arguments from a seed."""

    info: OpInfo
    size: str
    convention: str
    which: str  # of PASSES
    new: Callable[[int], dict[str, Any]]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Racer:
    """A provider, its function, and for each of its passes the largest of its errors, as a multiple
    of the yardstick's."""

    provider: Provider
    function: Function
    multiples: Mapping[str, float]


def race(contest: Contest, racers: Sequence[Racer], budget: float) -> list[Row]:
    """A row for each racer of this pass, after about `budget` seconds there and as many back.

    Everyone is timed in turn and then again in the opposite order, so that a drift of the clocks
    is nobody's advantage; how far the medians there and back lie apart is reported as noise.
    """
    racers = [racer for racer in racers if contest.which in racer.multiples]
    first = contest.new(0)
    set_bytes = nbytes(first)
    cost = contest.info.cost(first)[PASSES.index(contest.which)]
    del first
    nsets = sets_to_rotate(set_bytes, contest.device)
    cached = set_bytes * nsets < CACHES_TO_ROTATE * cache_bytes(contest.device)
    times, trouble = _run_laps(contest, racers, nsets, budget)
    rows = []
    for racer in racers:
        name = racer.provider.name
        mine = times[name]
        total = _sum(mine)
        multiple = racer.multiples[contest.which]
        notes = [
            racer.provider.note,
            trouble.get(name, ""),
            f"error {multiple:.1f}x the reference's" if multiple > 1.05 else "",
            "bound by launches" if total is not None and total.host_bound else "",
            "inputs fit in the cache" if total is not None and cached else "",
        ]
        row = Row(
            op=contest.info.name,
            size=contest.size,
            convention=contest.convention,
            which=contest.which,
            provider=name,
            dtype=str(contest.dtype).removeprefix("torch."),
            device=contest.device.type,
            note="; ".join(filter(None, notes)),
        )
        if total is not None:
            # On a CPU the ratios of one run mean something, and its milliseconds do not.
            if contest.device.type != "cpu":
                row.add_times(total, cost)
            row.ratio_to_eager = _ratio(times.get("eager", []), mine)
            there, back = _sum(mine[::2]), _sum(mine[1::2])
            row.noise_percent = 100 * abs(there.median / back.median - 1)
            if not cached:
                ceiling = copy_rate(contest.device, budget)
                row.percent_of_copy = 100 * cost.bytes / total.median / ceiling
            if row.tflop_per_s is not None:
                ceiling = matmul_rate(contest.device, contest.dtype, budget)
                row.percent_of_matmul = 100 * 1e12 * row.tflop_per_s / ceiling
        rows.append(row)
    return rows


def _run_laps(
    contest: Contest, racers: Sequence[Racer], nsets: int, budget: float
) -> tuple[dict[str, list[Times]], dict[str, str]]:
    """Everyone's times, lap by lap, and why somebody has none."""
    times: dict[str, list[Times]] = {racer.provider.name: [] for racer in racers}
    trouble: dict[str, str] = {}
    laps = LAPS[contest.device.type]
    for racer in [*racers, *reversed(racers)] * (laps // 2):
        name = racer.provider.name
        if contest.device.type == "cpu" and not racer.provider.on_cpu:
            trouble[name] = "right in Triton's interpreter, which is never timed"
        if name in trouble:
            continue
        try:
            running = calls(contest, racer.function, nsets)
            times[name].append(measure(running, contest.device, 2 * budget / laps))
        except torch.OutOfMemoryError:
            trouble[name] = "out of memory"
            times[name].clear()
        running = []
    return times, trouble


def _ratio(eager: list[Times], mine: list[Times]) -> float | None:
    """Eager's median over mine; of the two of a lap, which lie near in time, and of those laps'."""
    laps = [a.median / b.median for a, b in zip(eager, mine, strict=False)]
    return statistics.median(laps) if laps else None


def _sum(times: list[Times]) -> Times | None:
    return sum(times[1:], times[0]) if times else None


def calls(contest: Contest, function: Function, nsets: int) -> list[Call]:
    """A call for each of `nsets` inputs, each once seen to give finite results."""
    made: list[Call] = []
    for seed in range(1, nsets + 1):
        arguments = contest.new(seed)
        if contest.which == "forward":
            call: Call = partial(_without_grad, partial(function, **arguments))
        else:
            call = _backward(contest.info, function, arguments, seed)
        if not all(bool(x.isfinite().all()) for x in _tensors(call())):
            name = contest.info.name
            raise RuntimeError(f"{name}: a {contest.which} result is not finite, seed {seed}")
        made.append(call)
    return made


def _without_grad(call: Call) -> Any:
    with torch.no_grad():
        return call()


def _backward(info: OpInfo, function: Function, arguments: dict[str, Any], seed: int) -> Call:
    """The backward alone, of a graph that is kept."""
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in info.differentiable
        if arguments.get(name) is not None
    }
    made = _tensors(function(**{**arguments, **leaves}))
    outputs = tuple(x for x in made if x.requires_grad)
    douts = cotangents(outputs, seed)
    wanted = tuple(leaves.values())
    return partial(torch.autograd.grad, outputs, wanted, douts, retain_graph=True)


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
