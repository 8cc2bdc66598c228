"""Python code of one basic block: operands, constants, results under a guard.

A register is an array (CTAs, threads), either axis 1 where it is uniform. Registers that live
within one block are local variables; others are in the list R, merged under the mask of the
active threads.
"""

import re
import struct

import numpy as np

from . import values
from .parse import SPECIAL, Address, Instruction, Operand, Unsupported, integer
from .values import Array

# PTX type -> dtype of the array, in numpy's short form; "b" is a predicate.
TYPES = {"b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "u2",
         "bf16": "u2", "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8",
         "u64": "u8", "s64": "i8", "f64": "f8", "pred": "b", "f16x2": "u4",
         "bf16x2": "u4"}  # fmt: skip


class Names:
    """The names that the blocks of a program share."""

    def __init__(self, types: dict[str, str], live: list[str]) -> None:
        self.types = types
        self.registers = {name: number for number, name in enumerate(live)}  # places in R
        self.constants: dict[str, Array] = {}
        self.sites: list[Instruction] = []  # instructions that are counted or checked

    def dtype(self, register: str) -> str:
        """The dtype of a register, in the short form of TYPES."""
        prefix = re.match(r"%scoped\w+|%[A-Za-z_]+", register)
        if prefix is None:
            raise Unsupported(f"the register {register}")
        return TYPES[self.types[prefix[0]]]


class Emitter:
    """Lines of a function `block<number>(m, R)`, and the variables that hold its registers."""

    def __init__(self, names: Names, number: int) -> None:
        self.names, self.lines = names, [f"def block{number}(m, R):"]
        self.variables: dict[str, tuple[str, str]] = {}  # register -> (variable, dtype)
        self.seen: dict[tuple[object, ...], str] = {}  # what was computed -> its variable
        self.written: dict[str, None] = {}
        self.count = 0

    def out(self, line: str) -> None:
        self.lines.append("    " + line)

    def new(self) -> str:
        """A fresh variable."""
        self.count += 1
        return f"v{self.count}"

    def constant(self, text: str, kind: str) -> str:
        """The name of a constant array."""
        dtype = np.dtype("?" if kind == "b" else kind)
        if text.startswith("0f"):
            array = np.full((1, 1), struct.unpack(">f", bytes.fromhex(text[2:]))[0], np.float32)
            array = array.view(dtype)
        elif text.startswith("0d"):
            array = np.full((1, 1), struct.unpack(">d", bytes.fromhex(text[2:]))[0])
        elif kind == "b":
            array = np.full((1, 1), integer(text) != 0)
        else:
            bits = 8 * dtype.itemsize
            array = np.array([[integer(text) & (2**bits - 1)]], f"u{dtype.itemsize}").view(dtype)
        name = f"K_{kind}_{re.sub('[^0-9A-Za-z]', '_', text.replace('-', 'm'))}"
        self.names.constants[name] = array
        return name

    def use(self, operand: Operand, kind: str) -> str:
        """An expression for a register, constant or symbol, with this dtype."""
        if not isinstance(operand, str):
            raise Unsupported(f"the operand {operand}")
        if operand[0] in "-0123456789":
            return self.constant(operand, kind)
        if SPECIAL.match(operand):
            text = f"m.special[{operand!r}]"
            return text if kind == "u4" else f"{text}.astype({kind})"
        if not operand.startswith("%"):
            return f"m.symbol({operand!r}).astype({kind})"
        if operand not in self.variables:
            name, dtype = self.new(), self.names.dtype(operand)
            self.out(f"{name} = m.get(R, {self.names.registers[operand]}, {dtype!r})")
            self.variables[operand] = name, dtype
        name, has = self.variables[operand]
        if has == kind:
            return name
        if (name, kind) not in self.seen:
            if "b" in (kind, has) or int(has[1]) != int(kind[1]):
                raise Unsupported(f"{operand} is {has}, wanted {kind}")
            self.seen[name, kind] = self.new()
            self.out(f"{self.seen[name, kind]} = {name}.view({kind})")
        return self.seen[name, kind]

    def define(self, register: Operand, expression: str, kind: str, i: Instruction) -> None:
        """Assign to a register; where the instruction's guard is false it keeps its value."""
        if not isinstance(register, str):
            raise Unsupported(f"the result {register}")
        if register == "_":
            return
        dtype = self.names.dtype(register)
        if "b" in (kind, dtype):
            if kind != dtype:
                raise Unsupported(f"{register} is {dtype}, gets {kind}")
        elif int(kind[1]) != int(dtype[1]):
            raise Unsupported(f"{register} is {dtype}, gets {kind}")
        if i.guard:
            old, condition = self.use(register, kind), self.use(i.guard, "b")
            a, b = (old, expression) if i.negated else (expression, old)
            expression = f"np.where({condition}, {a}, {b})"
        name = self.new()
        self.out(f"{name} = {expression}")
        self.variables[register] = name, kind
        self.written[register] = None

    def define_all(self, registers: Operand, parts: str, kind: str, i: Instruction) -> None:
        """Assign the parts of a list to registers."""
        for k, register in enumerate(vector(registers)):
            self.define(register, f"{parts}[{k}]", kind, i)

    def site(self, i: Instruction) -> int:
        """The number under which an instruction is counted and reported."""
        self.names.sites.append(i)
        return len(self.names.sites) - 1

    def guard(self, i: Instruction) -> str:
        if not i.guard:
            return "None"
        return ("~" if i.negated else "") + self.use(i.guard, "b")

    def address(self, operand: Operand, kind: str) -> str:
        if not isinstance(operand, Address):
            raise Unsupported(f"the address {operand}")
        text = self.use(operand.base, kind)
        if not operand.offset:
            return text
        return f"({text} + {self.constant(str(operand.offset), kind)})"


def vector(operand: Operand) -> list[str]:
    """The registers of a vector operand, or of a single one."""
    if isinstance(operand, Address):
        raise Unsupported(f"the operand {operand}")
    return operand if isinstance(operand, list) else [operand]


NAMESPACE = {**vars(values), "np": np}
