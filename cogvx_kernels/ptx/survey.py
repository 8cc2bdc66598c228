"""Counters of every kernel at a model's size: launchers on meta tensors, a few CTAs of each launch.

Nothing is behind the addresses; addresses, masks, sectors and bank conflicts are real. They are
held to those of `budgets`.
"""

import importlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from .._opinfo import SIZES, OpInfo
from ..testing import OPS, materialize
from . import classes
from .batch import Run
from .budgets import Key
from .cards import SECTOR, Counts
from .counters import Counters
from .launch import Launch, executing
from .machine import execute

CTAS = 16  # executed of each grid
PRODUCT_CTAS = 4  # of those with long loops


def survey(name: str, size: str, convention: str, target: str) -> Iterator[tuple[Key, Counts]]:
    """Count each launch of an op's call, forward and backward, in bf16."""
    info = OPS[name]
    assert info.launch is not None
    sample = (info.conventions[convention] if convention else info.at_size)(SIZES[size])
    arguments = materialize(sample, torch.bfloat16, device="meta")
    elements = max(x.numel() for x in arguments.values() if isinstance(x, torch.Tensor))
    launchers = _Launchers(info)
    found: list[tuple[str, Launch]] = []

    def few(run: Run) -> Counters:
        return _sampled(run, PRODUCT_CTAS if info.products else CTAS)

    with executing(
        int(target[3:]), done=lambda x: found.append((launchers.direction, x)), dry=True,
        sample=few, watched=1,
    ):  # fmt: skip
        info.launch(launchers, arguments)
    numbers: dict[str, int] = defaultdict(int)
    for direction, launch in found:
        if launch.faults:
            raise RuntimeError(f"{name} {size} {target}: {launch.name}: {launch.faults[0]}")
        numbers[launch.name] += 1
        key = Key(name, size, convention, target, launch.name, numbers[launch.name])
        yield key, counts_of(launch, direction, elements)


def counts_of(launch: Launch, direction: str, elements: int) -> Counts:
    """The counts of a launch that was executed."""
    counters, program = launch.counters, launch.program
    instructions: dict[str, float] = defaultdict(float)
    slots: dict[str, float] = defaultdict(float)
    for warps, uses in zip(counters.blocks, program.uses, strict=True):
        for kind, use in uses.items():
            instructions[kind] += float(warps) * use.instructions
            slots[kind] += float(warps) * use.slots
    sectors = least = accesses = wavefronts = few = 0.0
    for site, i in zip(counters.sites, program.sites, strict=True):
        if "global" in i.modifiers:
            sectors, least = sectors + site.units, least + site.least
            accesses += site.requests
        elif "shared" in i.opcode:
            wavefronts, few = wavefronts + site.units, few + site.least
    return Counts(
        direction, elements, min(launch.footprint, SECTOR * sectors), sectors, least, accesses,
        wavefronts, few, sum(slots.values()), slots["float"], slots["int"], instructions["mufu"],
        instructions["shfl"], instructions["mma.flops"], instructions["wgmma.flops"],
    )  # fmt: skip


def _sampled(run: Run, most: int) -> Counters:
    """Counters of the whole grid, estimated from `most` CTAs of its classes."""
    total = Counters(run.program)
    for numbers, times in classes.choose(run, most):
        run.counters = Counters(run.program)
        execute(run, numbers)
        total.add(run.counters, times)
    return total


class _Launchers:
    """The kernel module of an op, which notes whether its forward or backward launches."""

    def __init__(self, info: OpInfo) -> None:
        package = info.op.__module__.rpartition(".")[0]
        self.module = importlib.import_module(package + ".kernel")
        self.direction = "forward"

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        if not name.endswith(("_fwd", "_bwd")):
            return value

        def launch(*args: Any, **options: Any) -> Any:
            self.direction = "backward" if name.endswith("_bwd") else "forward"
            return value(*args, **options)

        return launch
