"""PTX of a few instructions, executed on tensors."""

import struct
from collections.abc import Sequence

import numpy as np
import torch

from cogvx_kernels.ptx.batch import Run
from cogvx_kernels.ptx.counters import Counters, Faults
from cogvx_kernels.ptx.machine import execute
from cogvx_kernels.ptx.memory import Memory
from cogvx_kernels.ptx.parse import parse
from cogvx_kernels.ptx.translate import Program

TEXT = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel({params})
.reqntid {threads}
{{
.reg .pred %p<99>;
.reg .b16 %h<99>;
.reg .b32 %r<999>;
.reg .b64 %d<99>;
{loads}
mov.u32 %r0, %tid.x;
cvt.u64.u32 %d0, %r0;
{body}
ret;
}}
"""
FORMATS = {"u16": "H", "s16": "h", "b16": "H", "u32": "I", "s32": "i", "b32": "I", "f32": "f",
           "u64": "Q", "s64": "q", "b64": "Q"}  # fmt: skip
TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def run(
    body: str, *tensors: torch.Tensor, threads: int = 32, grid: int = 1, shared: int = 0,
    ctas: Sequence[int] | None = None, ulps: int = 0, watched: int = 8,
) -> Run:  # fmt: skip
    """Run a body, which finds the tensors at %d1, %d2, ..., and %tid.x in %r0 and in %d0."""
    params = ", ".join(f".param .u64 p{k}" for k in range(len(tensors)))
    loads = "\n".join(f"ld.param.u64 %d{k + 1}, [p{k}];" for k in range(len(tensors)))
    program = Program(parse(TEXT.format(params=params, threads=threads, loads=loads, body=body)))
    memory = Memory([(f"p{k}", x) for k, x in enumerate(tensors)])
    parameters = {
        f"p{k}": np.array([[memory.addresses[f"p{k}"]]], np.uint64) for k in range(len(tensors))
    }
    state = Run(program, parameters, memory, shared, (grid, 1, 1), Counters(program),
                Faults(program), ulps=ulps, watched=watched)  # fmt: skip
    execute(state, ctas)
    memory.write_back()
    return state


def site(state: Run, opcode: str) -> int:
    """The number of the only instruction with this opcode among those that are counted."""
    (number,) = (n for n, i in enumerate(state.program.sites) if i.opcode == opcode)
    return number


def at(pointer: str, to: str, size: int) -> str:
    """Lines that put the address of a thread's element into a register."""
    return f"mad.lo.u64 {to}, %d0, {size}, {pointer};\n"


def values(kind: str, numbers: Sequence[float]) -> torch.Tensor:
    """Numbers of a PTX type as the bits of 32 integers, the last repeated."""
    numbers = [*numbers, *[numbers[-1]] * (32 - len(numbers))]
    raw = b"".join(struct.pack("<" + FORMATS[kind], x) for x in numbers)
    return torch.frombuffer(bytearray(raw), dtype=TORCH[struct.calcsize(FORMATS[kind])])


def numbers(kind: str, x: torch.Tensor, count: int) -> list[float]:
    """The first numbers of a tensor's bits, as a PTX type."""
    return list(
        struct.unpack(f"<{count}{FORMATS[kind]}", x.numpy().tobytes()[: count * x.itemsize])
    )


REGISTERS = {2: "%h", 4: "%r", 8: "%d"}


def evaluate(
    text: str, result: str, *operands: tuple[str, Sequence[float]], ulps: int = 0
) -> list[float]:
    """Results of instructions with $0 for the result's register, $1, $2, ... for operands.

    Each thread has one value of every operand; a result "pred" becomes 0 or 1.
    """
    count = max(len(x) for _, x in operands)
    tensors = [values(kind, [*x, *[x[-1]] * (count - len(x))]) for kind, x in operands]
    kind = "u32" if result == "pred" else result
    out = torch.zeros(32, dtype=TORCH[struct.calcsize(FORMATS[kind])])
    target = "%p50" if result == "pred" else f"{REGISTERS[out.itemsize]}50"
    body, text = "", text.replace("$0", target)
    for k, x in enumerate(tensors, 1):
        register = f"{REGISTERS[x.itemsize]}{50 + k}"
        body += at(f"%d{k}", "%d40", x.itemsize)
        body += f"ld.global.b{8 * x.itemsize} {register}, [%d40];\n"
        text = text.replace(f"${k}", register)
    body += text + "\n" + at(f"%d{len(tensors) + 1}", "%d40", out.itemsize)
    if result == "pred":
        body, target = body + "selp.u32 %r50, 1, 0, %p50;\n", "%r50"
    state = run(body + f"st.global.b{8 * out.itemsize} [%d40], {target};", *tensors, out, ulps=ulps)
    assert not state.faults.texts
    return numbers(kind, out, count)
