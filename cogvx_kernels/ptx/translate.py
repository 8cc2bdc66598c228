"""Translation of a PTX function: a Python function for each basic block, on all threads at once."""

from collections.abc import Callable
from typing import Any

from . import arithmetic, transfers
from .emitter import NAMESPACE, Emitter, Names
from .issue import uses
from .parse import Block, Function, Instruction, Unsupported
from .transfers import reads_writes
from .values import Array

HANDLERS = {**arithmetic.HANDLERS, **transfers.HANDLERS}

Registers = list[Any]
BlockFunction = Callable[[Any, Registers], Array | None]


class Program:
    """A translated function.

    blocks     a function for each block: (batch, registers) -> condition of its branch, or None
    uses       for each block what one warp issues (`issue.uses`)
    sites      instructions that touch memory or other threads, which are counted and checked
    registers  registers that live beyond a block -> their place in the list
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        names = Names(function.types, _live(function))
        lines: list[str] = []
        for number, block in enumerate(function.blocks):
            lines += _translate(names, number, block)
        self.source = "\n".join(lines)
        space: dict[str, Any] = {**NAMESPACE, **names.constants}
        exec(compile(self.source, f"<{function.name}>", "exec"), space)
        self.blocks: list[BlockFunction] = [space[f"block{n}"] for n in range(len(function.blocks))]
        self.uses = [uses(block) for block in function.blocks]
        self.sites, self.registers = names.sites, names.registers


def _live(function: Function) -> list[str]:
    """Registers that some block reads before it writes them."""
    live: dict[str, None] = {}
    for block in function.blocks:
        written: set[str] = set()
        for i in block.instructions:
            reads, writes = reads_writes(i)
            live.update(dict.fromkeys(r for r in reads if r not in written))
            written.update(writes)
    return list(live)


def _translate(names: Names, number: int, block: Block) -> list[str]:
    e = Emitter(names, number)
    pending: set[str] = set()  # sums of wgmma that no wait has been for
    for i in block.instructions:
        if i.base in ("bra", "ret", "exit"):
            continue  # the machine's
        _check_sums(e, i, pending)
        if feature := transfers.refusal(i.opcode):
            raise Unsupported(f"{i}: no support for {feature}")
        if i.base not in HANDLERS:
            raise Unsupported(f"{i}: unknown instruction")
        try:
            HANDLERS[i.base](e, i, i.modifiers)
        except (Unsupported, KeyError, IndexError, ValueError) as error:
            detail = str(error) if isinstance(error, Unsupported) else "an unknown form"
            raise Unsupported(f"{i}: {detail}; operands {i.operands}") from error
    for register in e.written:
        if register in names.registers:
            value = e.use(register, names.dtype(register))
            e.out(f"m.put(R, {names.registers[register]}, {value})")
    e.out(f"return {e.use(block.guard, 'b') if block.guard else None}")
    return e.lines


def _check_sums(e: Emitter, i: Instruction, pending: set[str]) -> None:
    """Within a block: the sums of a wgmma may not be read before a wait for all products."""
    if i.opcode.startswith("wgmma.wait_group") and i.operands == ["0"]:
        pending.clear()
    elif i.opcode.startswith("wgmma.mma"):
        pending.update(reads_writes(i)[1])
    elif pending and i.base != "wgmma":
        reads, writes = reads_writes(i)
        if pending.intersection(reads):
            e.out(f"m.report({e.site(i)}, 'race: sums of a wgmma are read before a wait for them')")
        pending.difference_update(writes)
