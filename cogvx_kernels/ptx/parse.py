"""Parser of PTX text, as Triton's compiler writes it, into basic blocks of instructions.

It reads one entry function; anything that it does not know raises `Unsupported`.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

SPECIAL = re.compile(r"^%(n?ctaid|n?tid|laneid|warpid|nwarpid|clock|clock64|smid|globaltimer)\b")
ADDRESS = re.compile(r"^\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$")


class Unsupported(Exception):
    """An instruction, or a form of one, that the machine does not execute."""


class Address(NamedTuple):
    """A memory operand: a register or a symbol, and a constant offset in bytes."""

    base: str
    offset: int


Operand = str | list[str] | Address


@dataclass
class Instruction:
    """One instruction.

    opcode    with its modifiers: "ld.global.v2.b32"
    operands  registers and constants as text, vectors as lists, memory as `Address`
    guard     predicate register of `@%p1` or `@!%p1` (`negated`)
    line      of the PTX text
    source    file and line of the kernel's Python, from .loc
    used      mask of the bytes of a load that are used (.pragma used_bytes_mask), -1 for all
    """

    opcode: str
    operands: list[Operand]
    guard: str | None
    negated: bool
    line: int
    source: str = ""
    used: int = -1

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        where = f", {self.source}" if self.source else ""
        return f"{guard}{self.opcode} (PTX line {self.line}{where})"


@dataclass
class Block:
    """A basic block.

    `end` is "fall", "jump", "cond" or "exit". `target` is the number of the block that a taken
    branch goes to, -1 for the end of the program.
    """

    label: str
    instructions: list[Instruction] = field(default_factory=list)
    end: str = "fall"
    target: int = -1
    target_label: str = ""
    guard: str | None = None
    negated: bool = False


@dataclass
class Function:
    """An entry function. `types` maps the prefix of a register's name to its type."""

    name: str
    params: list[tuple[str, str]]
    threads: int
    blocks: list[Block]
    types: dict[str, str]


def integer(text: str) -> int:
    """The value of an integer constant."""
    text = text.rstrip("U")
    sign = -1 if text.startswith("-") else 1
    return sign * int(text.lstrip("-"), 0)


def parse(text: str) -> Function:
    """Parse a module with one entry function."""
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", text, re.S)
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    if head is None or threads is None:
        raise Unsupported("PTX without .entry or .reqntid")
    clusters = re.search(r"\.reqnctapercluster\s+(\d+)", text)
    if clusters and int(clusters[1]) > 1:
        raise Unsupported(f"clusters of {clusters[1]} CTAs")
    params = [
        (p.split()[-1], next(w[1:] for w in p.split() if re.match(r"\.[usbf]\d+$", w)))
        for p in head[2].replace("\n", " ").split(",")
        if p.strip()
    ]
    start = text.index("{", head.end())
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    body = _Body(files)
    body.read(text[start:], text[:start].count("\n") + 1)
    numbers = {block.label: n for n, block in enumerate(body.blocks) if block.label}
    for block in body.blocks:
        if block.target_label:
            block.target = numbers[block.target_label]
    return Function(head[1], params, int(threads[1]), body.blocks, body.types)


class _Body:
    """The body of a function, read line by line."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.blocks = [Block("entry")]
        self.types: dict[str, str] = {}
        self.scopes: list[dict[str, str]] = []  # of { }, that of inline assembly: its registers
        self.source, self.used, self.scoped = "", -1, 0

    def read(self, text: str, first_line: int) -> None:
        for number, raw in enumerate(text.split("\n"), first_line):
            line = raw.split("//")[0].strip()
            while line:
                if line[0] == "{":
                    self.scopes.append({})
                    line = line[1:].strip()
                elif line[0] == "}":
                    self.scopes.pop()
                    line = line[1:].strip()
                    if not self.scopes:
                        return
                elif label := re.match(r"([$\w]+):", line):
                    if not label[1].startswith(("$L__tmp", "$L__func")):
                        self.blocks.append(Block(label[1]))
                    line = line[label.end() :].strip()
                elif line.startswith(".loc"):
                    _, file, row, *_ = line.split()
                    self.source = f"{self.files.get(file, file).rsplit('/', 1)[-1]}:{row}"
                    break
                else:
                    statement, _, line = line.partition(";")
                    line = line.strip()
                    self.statement(statement.strip(), number)
        raise Unsupported("a function without an end")

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".pragma"):
            mask = re.search(r"used_bytes_mask (0x[0-9a-f]+)", text)
            self.used = int(mask[1], 16) if mask else -1
        elif text.startswith(".reg"):
            self.declare(text)
        elif not text.startswith("."):
            self.instruction(text, line)

    def declare(self, text: str) -> None:
        """Record the types of declared registers; those of a scope get names of their own."""
        _, kind, names = text.split(None, 2)
        for name in names.split(","):
            name = name.strip()
            if len(self.scopes) > 1:
                self.scoped += 1
                fresh = f"%scoped{self.scoped}_{name.strip('%')}"
                self.scopes[-1][name] = fresh
                self.types[fresh] = kind[1:]
            elif prefix := re.match(r"%[A-Za-z_]+", name):
                self.types[prefix[0]] = kind[1:]

    def instruction(self, text: str, line: int) -> None:
        for scope in self.scopes[::-1]:
            for name, fresh in scope.items():
                text = re.sub(rf"(?<![\w%$]){re.escape(name)}(?!\w)", fresh, text)
        guard, negated = None, False
        if guarded := re.match(r"@(!?)(%\w+)\s+(.*)", text, re.S):
            guard, negated, text = guarded[2], guarded[1] == "!", guarded[3]
        opcode, _, rest = " ".join(text.split()).partition(" ")
        if self.blocks[-1].end != "fall":
            self.blocks.append(Block(""))
        block = self.blocks[-1]
        branch = opcode.split(".")[0]
        if branch in ("bra", "ret", "exit"):
            block.end = "cond" if guard else "jump" if branch == "bra" else "exit"
            block.target_label = rest if branch == "bra" else ""
            block.guard, block.negated = guard, negated
            operands = []
        else:
            operands = [_operand(x) for x in _split(rest)]
        block.instructions.append(
            Instruction(opcode, operands, guard, negated, line, self.source, self.used)
        )
        self.used = -1


def _split(text: str) -> list[str]:
    """Split operands at the commas outside of brackets."""
    parts, depth, part = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += c
    return parts + ([part.strip()] if part.strip() else [])


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return [x.strip() for x in text[1:-1].split(",")]
    if text.startswith("["):
        found = ADDRESS.match(text)
        if not found:
            raise Unsupported(f"the address {text}")
        return Address(found[1], integer(found[2] or "0"))
    return text


def registers_of(operand: Operand) -> list[str]:
    """The registers that an operand names, but for special ones."""
    if isinstance(operand, Address):
        return registers_of(operand.base)
    if isinstance(operand, list):
        return [r for x in operand for r in registers_of(x)]
    if operand.startswith("%") and not SPECIAL.match(operand):
        return operand.split("|")
    return []
