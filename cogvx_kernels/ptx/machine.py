"""Execution of a translated program: CTAs in batches, all threads of a batch in lock-step.

The threads of a batch that are at the earliest block go first, so that they meet again where the
code does. What Triton never makes is refused: a barrier or a shuffle that not all threads of a CTA
or a warp reach together.
"""

from collections.abc import Sequence

import numpy as np

from .batch import Batch, Run
from .parse import Block
from .translate import Registers
from .values import Array

THREADS = 16384  # of a batch
SHARED_BYTES = 2**27  # of a batch


def execute(run: Run, ctas: Sequence[int] | Array | None = None) -> None:
    """Run CTAs of these numbers (x fastest), by default all of the grid."""
    total = run.grid[0] * run.grid[1] * run.grid[2]
    numbers = np.arange(total) if ctas is None else np.asarray(ctas, np.int64)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < total:
        raise ValueError(f"ctas must be in [0, {total}); got {numbers.min()} to {numbers.max()}")
    each = max(1, THREADS // run.program.function.threads)
    if run.shared:
        each = max(1, min(each, SHARED_BYTES // run.shared))
    with np.errstate(all="ignore"):
        for first in range(0, len(numbers), each):
            execute_batch(run, Batch(run, numbers[first : first + each]))


def execute_batch(run: Run, batch: Batch) -> Registers:
    """Run a batch to its end; return the registers that live beyond a block."""
    program = run.program
    blocks, end = program.function.blocks, len(program.blocks)
    registers: Registers = [None] * len(program.registers)
    run.counters.ctas += batch.ctas
    now = 0  # the block that all threads are at
    where: Array | None = None  # that of each, if they are at several
    while True:
        if where is None:
            batch.active = None
        else:
            now = int(where.min())
            active = where == now
            batch.active = None if active.all() else active
        if now >= end:
            break
        run.counters.blocks[now] += _warps(batch)
        condition = program.blocks[now](batch, registers)
        now, where = _next(batch, now, where, blocks[now], end, condition)
    if batch.copies.pending:
        batch.report(-1, "copies: in flight at the end of the program")
    return registers


def _warps(batch: Batch) -> int:
    """The number of warps with active threads."""
    if batch.active is None:
        return batch.ctas * batch.warps
    if batch.active.shape[1] == 1:
        return int(batch.active.sum()) * batch.warps
    return int(batch.active.reshape(batch.ctas, batch.warps, -1).any(2).sum())


def _next(
    batch: Batch, now: int, where: Array | None, block: Block, end: int, condition: Array | None
) -> tuple[int, Array | None]:
    """The block that all threads are at next, or an array with that of each."""
    active = batch.active
    taken = end if block.target < 0 else block.target
    if condition is None:
        there = now + 1 if block.end == "fall" else taken
        if active is None or where is None:
            return there, None
        return now, np.where(active, there, where)
    if block.negated:
        condition = ~condition
    if active is None and condition.all():
        return taken, None
    if active is None and not condition.any():
        return now + 1, None
    each = np.where(condition, taken, now + 1)
    each = np.broadcast_to(each, (batch.ctas, each.shape[1]))
    if active is not None and where is not None:
        each = np.where(active, each, where)
    if each.shape[1] > 1 and (each == each[:, :1]).all():
        each = np.ascontiguousarray(each[:, :1])
    return now, each
