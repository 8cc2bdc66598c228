"""Classes of CTAs that do the same work, by executing what their control flow depends on.

A slice of the program keeps the instructions that its branches and the masks of its global accesses
depend on, and adds up what each block and mask stands for. It runs for thousands of CTAs with 32
threads of each, in the time of a few whole ones.
"""

import dataclasses

import numpy as np

from .batch import Batch, Run
from .issue import classify
from .machine import execute_batch
from .parse import Block, Function, Instruction
from .transfers import reads_writes
from .translate import Program, Registers
from .values import Array

CTAS = 4096  # whose control flow is executed, of a larger grid
BATCH = 1024  # of them at once
LANES = 32
# Results of these depend on data or on other threads, which a slice has not.
OPAQUE = ("ld", "shfl", "atom", "vote", "activemask", "mma", "wgmma", "ldmatrix", "match")
WORK, SLOTS, TAKEN = "%work0", "%slots0", "%taken0"


def sliced(function: Function) -> Function | None:
    """The control flow of a function; None if it depends on data."""
    wanted = {b.guard for b in function.blocks if b.guard}
    instructions = [i for b in function.blocks for i in b.instructions]
    wanted.update(name for i in instructions for name in _masks(i))
    kept: set[int] = set()
    grown = True
    while grown:
        grown = False
        for number, i in enumerate(instructions):
            if number not in kept and wanted.intersection(reads_writes(i)[1]):
                if i.base in OPAQUE and "param" not in i.modifiers:
                    return None
                kept.add(number)
                wanted.update(reads_writes(i)[0])
                grown = True
    blocks, number = [], 0
    for place, block in enumerate(function.blocks):
        found = [_add(WORK, str(_hash(place))), _add(SLOTS, str(_slots(block)))]
        for i in block.instructions:
            if number in kept or i.base in ("bra", "ret", "exit"):
                found.append(i)
            for name in _masks(i):
                found += _add_mask(name, i, _hash(1000 + number))
            number += 1
        blocks.append(dataclasses.replace(block, instructions=found))
    types = {**function.types, "%work": "b32", "%slots": "b32", "%taken": "b32"}
    return Function(function.name, function.params, LANES, blocks, types)


def work(run: Run, numbers: Array) -> tuple[Array, Array] | None:
    """Of each CTA a hash of its work, and its issue slots; None if they depend on data."""
    function = sliced(run.program.function)
    if function is None:
        return None
    program = Program(function)
    part = dataclasses.replace(run, program=program, shared=0, counting=False)
    threads = run.program.function.threads
    lanes = np.linspace(0, threads - 1, LANES).astype(np.uint32)[None, :]
    found = []
    for first in range(0, len(numbers), BATCH):
        batch = Batch(part, numbers[first : first + BATCH])
        batch.special["%tid.x"], batch.special["%laneid"] = lanes, lanes % LANES
        batch.special["%ntid.x"] = np.array([[threads]], np.uint32)
        with np.errstate(all="ignore"):
            registers = execute_batch(part, batch)
        found.append([_of_ctas(program, registers, name, batch.ctas) for name in (WORK, SLOTS)])
    hashes, slots = (np.concatenate(x) for x in zip(*found, strict=True))
    return hashes, slots / LANES


def choose(run: Run, most: int) -> list[tuple[Array, float]]:
    """(numbers, times) of at most `most` CTAs: each stands for `times` CTAs of the grid.

    The classes with most work have at least one each, and those left out go to the class nearest
    in work. Deterministic.
    """
    total = int(np.prod(run.grid))
    rng = np.random.default_rng(total)
    if total <= most:
        return [(np.arange(total), 1.0)]
    numbers = _spread(total, CTAS, rng)
    profile = work(run, numbers)
    if profile is None:
        return [(_spread(total, most, rng), total / most)]
    hashes, slots = profile
    _, first, inverse, counts = np.unique(
        hashes, return_index=True, return_inverse=True, return_counts=True
    )
    weights = counts * slots[first]
    order = np.argsort(-weights, kind="stable")[:most]
    sizes = np.zeros(len(counts))
    for number, count in enumerate(counts):
        nearest = np.abs(slots[first[order]] - slots[first[number]]).argmin()
        sizes[number if number in order else order[nearest]] += count
    spare = most - len(order)
    chosen = []
    for number in order:
        members = numbers[inverse == number]
        extra = int(spare * weights[number] / weights.sum())
        picks = members[_spread(len(members), 1 + extra, rng)]
        chosen.append((picks, sizes[number] / len(picks) * total / len(numbers)))
    return chosen


def _spread(total: int, most: int, rng: np.random.Generator) -> Array:
    """At most `most` numbers below `total`, one at random in each of as many equal parts."""
    if total <= most:
        return np.arange(total)
    edges = np.linspace(0, total, most + 1).astype(np.int64)
    return rng.integers(edges[:-1], edges[1:])


def _masks(i: Instruction) -> list[str]:
    """Registers that decide how much a global access moves: its guard, the size of a copy."""
    if i.base not in ("ld", "st", "cp") or "global" not in i.modifiers:
        return []
    found = [i.guard] if i.guard else []
    if i.base == "cp" and len(i.operands) > 3 and str(i.operands[3]).startswith("%"):
        found.append(str(i.operands[3]))
    return found


def _hash(number: int) -> int:
    return (number + 1) * 2654435761 % 2**32


def _slots(block: Block) -> int:
    return int(sum(classify(i)[1] for i in block.instructions))


def _add(register: str, value: str) -> Instruction:
    return Instruction("add.u32", [register, register, value], None, False, 0)


def _add_mask(name: str, i: Instruction, value: int) -> list[Instruction]:
    if name != i.guard:  # the bytes of a copy
        return [_add(WORK, name)]
    took = ["0", str(value)] if i.negated else [str(value), "0"]
    return [Instruction("selp.b32", [TAKEN, *took, name], None, False, 0), _add(WORK, TAKEN)]


def _of_ctas(program: Program, registers: Registers, name: str, ctas: int) -> Array:
    """The sum over the threads of each CTA."""
    value = registers[program.registers[name]]
    return np.broadcast_to(value, (ctas, LANES)).astype(np.int64).sum(1)
