"""Classes of instructions, and the issue slots of SASS that each stands for.

PTX is not SASS: a 64-bit addition becomes two instructions, many moves none. The weights are
estimates.
"""

import re
from typing import NamedTuple

from .parse import Block, Instruction

FLOATS = {"f32", "bf16", "bf16x2", "f16", "f16x2"}
WIDE = {"s64", "u64", "b64"}
ARITHMETIC = ("fma", "add", "mul", "sub", "neg", "abs", "min", "max", "setp", "selp")
FUNCTIONS = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos")
MATRICES = ("mma", "ldmatrix", "stmatrix", "shfl")

# Issue slots, where they are not 1.
SLOTS = {"ld.param": 0, "mov": 0.5, "cvt": 0.5, "add.64": 2, "sub.64": 2, "neg.64": 2, "shl.64": 2,
         "shr.64": 2, "setp.64": 2, "selp.64": 2, "and.64": 2, "or.64": 2, "xor.64": 2,
         "min.64": 4, "max.64": 4, "mul.64": 4, "mad.64": 4, "div.32": 20, "rem.32": 20,
         "div.64": 80, "rem.64": 80, "div.full": 8, "ex2.approx": 3}  # fmt: skip


class Use(NamedTuple):
    """Instructions of a class in a block, and their issue slots, of one warp."""

    instructions: int
    slots: float


def classify(i: Instruction) -> tuple[str, float]:
    """The class of an instruction, and its issue slots."""
    base, modifiers = i.base, i.modifiers
    parts = set(modifiers)
    if base in ("ld", "st"):
        space = "param" if "param" in parts else "shared" if "shared" in i.opcode else "global"
        return f"{base}.{space}", SLOTS.get(f"{base}.{space}", 1)
    if base == "cp":
        return "cp.async" if "shared" in parts else "sync", 1
    if base in ("bar", "fence", "vote"):
        return "sync", 1
    if base in MATRICES:
        return base, 1
    if base == "wgmma":
        return "wgmma" if modifiers[0] == "mma_async" else "sync", 1
    if base in FUNCTIONS:
        return "mufu", SLOTS.get(f"{base}.{modifiers[0]}", 1)
    if base == "div" and "f32" in parts:
        return "mufu", SLOTS["div.full"]
    if base in ("bra", "ret", "exit"):
        return "control", 1
    if base == "mov":
        return "mov", SLOTS["mov"]
    if base == "cvt":
        return ("cvt", 1) if parts & (FLOATS | {"f64"}) else ("int", SLOTS["cvt"])
    if base in ARITHMETIC and parts & FLOATS:
        return "float", 1
    if "wide" in parts:
        return "int", 1
    return "int", SLOTS.get(f"{base}.{64 if parts & WIDE else 32}", 1)


def uses(block: Block) -> dict[str, Use]:
    """What one warp issues in a block, by class; "mma.flops" and "wgmma.flops" count operations."""
    found: dict[str, Use] = {}
    for i in block.instructions:
        kind, slots = classify(i)
        count, total = found.get(kind, Use(0, 0.0))
        found[kind] = Use(count + 1, total + slots)
        if shape := re.search(r"\.m(\d+)n(\d+)k(\d+)\.", i.opcode):
            m, n, k = (int(x) for x in shape.groups())
            operations = 2 * m * n * k // (4 if kind == "wgmma" else 1)  # of 4 warps
            count, _ = found.get(f"{kind}.flops", Use(0, 0.0))
            found[f"{kind}.flops"] = Use(count + operations, 0.0)
    return found
