"""`cogvx-kernels aot`: compile every kernel ahead of time for several GPUs, and check its budget.

The launchers run on meta tensors of a model's size, with a driver that only compiles: kernels have
the specialisations and launch options of a real call. Registers, spills and access widths are
read from the binary. The Triton IR is linted: 64-bit offsets, no fp64, a value for masked lanes of
every load, no atomics.
"""

import bisect
import collections
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .._backend import INTERPRETED
from .._opinfo import SIZES, Budget, OpInfo, Sample
from ..ptx import budgets as counters
from ..ptx.launch import CompileOnly
from ..testing import OPS, materialize
from . import options as command_line

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "gfx1201": GPUTarget("hip", "gfx1201", 32),
}
_KB = 1024
SHARED = {  # bytes of shared memory that a block can have
    "sm_80": 163 * _KB, "sm_89": 99 * _KB, "sm_90": 227 * _KB, "sm_100": 227 * _KB,
    "sm_120": 99 * _KB, "gfx942": 64 * _KB, "gfx1100": 64 * _KB, "gfx1201": 64 * _KB,
}  # fmt: skip
# A lane of RDNA 3's matrix unit holds a column of the result, so a row is stored by element.
STORES_BY_ELEMENT = ("gfx1100",)


@dataclasses.dataclass(frozen=True)
class Report:
    """Resources of a compiled kernel; loads and stores are {width in bits: count}.

    by_element  no limit on the width of stores
    """

    op: str
    kernel: str
    size: str
    target: str
    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    lint: list[str]
    by_element: bool = False

    def violations(self, budget: Budget | None) -> list[str]:
        """Messages for every limit that is exceeded: of the target, and of a budget if given."""
        shared = SHARED[self.target]
        limits = [
            ("spills", self.spills, 0),
            ("shared memory", self.shared, min(shared, budget.shared) if budget else shared),
        ]
        held = (self.loads,) if self.by_element else (self.loads, self.stores)
        if budget is not None:
            widths = [item for accesses in held for item in accesses.items()]
            narrow = sum(count for width, count in widths if width < budget.access)
            limits.append((f"accesses under {budget.access} bits", narrow, budget.narrow))
        if budget is not None and self.target.startswith("sm_"):
            limits.append(("registers", self.registers, budget.registers))
        over = [f"{name}: {got}, at most {most}" for name, got, most in limits if got > most]
        if budget and not all(any(w >= budget.access for w in x) for x in held):
            over.append(f"no load or no store of {budget.access} bits")
        return over + self.lint


def compile_launches(
    info: OpInfo, sample: Sample, dtype: torch.dtype, target: GPUTarget
) -> list[Any]:
    """Compile what the op's launchers launch for a sample; return Triton's compiled kernels.

    The compile-only driver stays active: without a GPU there is no driver to restore.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    if info.launch is None:
        return []
    kernel = importlib.import_module(info.op.__module__.rpartition(".")[0] + ".kernel")
    arguments = materialize(sample, dtype, device="meta")
    driver.set_active(CompileOnly(target))
    JITFunction.run = compile_only
    try:
        info.launch(kernel, arguments)
    finally:
        JITFunction.run = run
    return compiled


Usage = tuple[int, int, int, dict[int, int], dict[int, int]]  # registers … stores of a Report
Key = tuple[str, bool]
_read: dict[Key, tuple[Usage, list[str]]] = {}  # by hash: sizes can have the same kernel


def inspect(
    info: OpInfo, size: str, target: str, compiled: Any, *, accesses: bool = True
) -> Report:
    """Report on a compiled kernel, which is read once; `accesses` needs a disassembly."""
    key = compiled.hash, accesses
    if key not in _read:
        read = partial(_read_cubin, accesses) if "cubin" in compiled.asm else _read_amdgcn
        _read[key] = read(compiled), lint(compiled.asm["ttir"])
    usage, complaints = _read[key]
    by_element = info.products and target in STORES_BY_ELEMENT
    return Report(info.name, compiled.metadata.name, size, target, *usage, complaints, by_element)


def lint(ttir: str) -> list[str]:
    """Lint TTIR for 32-bit offset arithmetic, fp64, masked loads without a value, and atomics."""
    found = []
    for offset, kind in re.findall(r"tt\.addptr %\w+, (%\w+) : [^,\n]+, ([^\n]+?) loc", ttir):
        if re.search(r"\bi32\b|xi32\b", kind) and not re.fullmatch(r"%c(st|\w*_i32)\w*", offset):
            found.append(f"an offset of 32 bits: {offset}")
    for product in re.findall(r"(arith\.muli [^:\n]+) : (?:tensor<\w+xi32>|i32)", ttir):
        found.append(f"a product of 32 bits: {product}")
    for narrowed in re.findall(r"(arith\.trunci [^:\n]+) : \S*i64\S* to \S*i32", ttir):
        found.append(f"64 bits cut to 32: {narrowed}")
    if re.search(r"\bf64\b|xf64\b", ttir):
        found.append("fp64 arithmetic")
    for operands in re.findall(r"tt\.load ([^:{\n]+)", ttir):
        if operands.count("%") == 2:
            found.append(f"a masked load without other=: {operands.strip()}")
    if "tt.atomic" in ttir:
        found.append("an atomic")
    return found


def reports(name: str, target: str, sizes: Sequence[str]) -> list[tuple[Report, Budget | None]]:
    """A report for each budget of an op at these sizes on a target."""
    info, found = OPS[name], list[tuple[Report, Budget | None]]()
    wanted = [b for b in info.budgets if b.size in sizes]
    launched = []
    for size, convention in dict.fromkeys((b.size, b.convention) for b in wanted):
        budgets = [b for b in wanted if (b.size, b.convention) == (size, convention)]
        at_size = info.conventions[convention] if convention else info.at_size
        sample = at_size(SIZES[size])
        for compiled in compile_launches(info, sample, budgets[0].dtype, TARGETS[target]):
            launched.append((size, budgets, compiled))
    _disassemble(*(compiled for _, _, compiled in launched))
    for size, budgets, compiled in launched:
        report = inspect(info, size, target, compiled)
        found += [(report, b) for b in budgets if b.kernel == report.kernel]
    return found


def small_reports(name: str, target: str, which: int) -> list[tuple[Report, Budget | None]]:
    """Reports for one sample, in a dtype by its number: widths and registers are not checked.

    Covers options without a budget. Disassembly takes longer than the compilation.
    """
    info = OPS[name]
    sample, dtype = info.samples[which], info.dtypes[which % len(info.dtypes)]
    compiled = compile_launches(info, sample, dtype, TARGETS[target])
    return [(inspect(info, sample.reason, target, x, accesses=False), None) for x in compiled]


def in_parallel(
    ops: Sequence[str], targets: Sequence[str], sizes: Sequence[str], samples: bool
) -> Iterator[tuple[Report, Budget | None]]:
    """Yield the reports of all ops and targets in order, from a process for each core."""
    pairs = list(itertools.product(ops, targets))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        if samples:
            cases = [(*pair, i) for pair in pairs for i in range(len(OPS[pair[0]].samples))]
            done = pool.map(small_reports, *zip(*cases, strict=True), chunksize=4)
        else:
            done = pool.map(partial(reports, sizes=sizes), *zip(*pairs, strict=True))
        for found in done:
            yield from found


Limited = tuple[Report, Budget | None]


def counted(found: Iterator[Limited]) -> Iterator[tuple[Report, Budget | None, str]]:
    """Add the kept counters of the launch, as text; "" if there are none."""
    kept, numbers = counters.load(), collections.Counter[tuple[str, ...]]()
    for report, budget in found:
        call = report.op, report.size, budget.convention if budget else "", report.target
        numbers[(*call, report.kernel)] += 1
        key = counters.Key(*call, report.kernel, numbers[(*call, report.kernel)])
        there = budget is not None and key in kept
        yield report, budget, f" {counters.summary(key, kept[key])}" if there else ""


def _read_cubin(accesses: bool, compiled: Any) -> Usage:
    """Registers and stack from the resource table, access widths from the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage = _nvidia("cuobjdump", "-res-usage", path)
    if accesses:
        _disassemble(compiled)
    sass = _sass[compiled.asm["cubin"]] if accesses else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    registers, stack, local = map(int, found.groups())
    loads, stores = (widths(p, sass) for p in (r"\bLDG(?:STS)?((?:\.\w+)*)", r"\bSTG((?:\.\w+)*)"))
    return registers, stack + local, compiled.metadata.shared, loads, stores


def _nvidia(tool: str, *words: str | Path) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([program, *words], capture_output=True, text=True, check=True).stdout


_sass: dict[bytes, str] = {}  # cubin -> disassembly


def _disassemble(*kernels: Any) -> None:
    """Fill `_sass` for kernels of one NVIDIA target that are not in it.

    One nvdisasm run disassembles all: its start takes ten times as long as a kernel.
    """
    new = {x.asm["cubin"]: x for x in kernels if "cubin" in x.asm and x.asm["cubin"] not in _sass}
    if not new:
        return
    arch = next(iter(new.values())).metadata.target.arch
    code = [_instructions(cubin) for cubin in new]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code.bin")
        path.write_bytes(b"".join(code))
        listing = _nvidia("nvdisasm", "-b", f"SM{arch}{'a' if arch >= 90 else ''}", path)
    ends = list(itertools.accumulate(map(len, code)))
    lines: list[list[str]] = [[] for _ in code]
    for address, line in re.findall(r"/\*([0-9a-f]{4,})\*/(.*)", listing):
        lines[bisect.bisect_right(ends, int(address, 16))].append(line)
    _sass.update((cubin, "\n".join(own)) for cubin, own in zip(new, lines, strict=True))


def _instructions(cubin: bytes) -> bytes:
    """The .text.* sections of a 64-bit ELF file, concatenated."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    return b"".join(
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", strings + name)
    )


def widths(pattern: str, sass: str) -> dict[int, int]:
    """{width in bits: count} of accesses in SASS; `pattern` captures an instruction's modifiers."""
    counts: collections.Counter[int] = collections.Counter()
    for modifiers in re.findall(pattern, sass):
        width = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", modifiers)
        counts[int(width.group(1)) if width else 32] += 1
    return dict(counts)


def _read_amdgcn(compiled: Any) -> Usage:
    assembly = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    def widths_of(verb: str) -> dict[int, int]:
        kinds = re.findall(rf"\b(?:global|buffer)_{verb}_(\w+)", assembly)
        return dict(collections.Counter(map(amd_width, kinds)))

    registers, shared = number("vgpr_count"), compiled.metadata.shared
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return registers, spills, shared, widths_of("load"), widths_of("store")


def amd_width(kind: str) -> int:
    """Bits of an AMD access: `dwordx4`, `ushort`, `ubyte` of CDNA, `b128`, `d16_hi_b16` of RDNA."""
    if words := re.match(r"dwordx?(\d?)", kind):
        return 32 * int(words.group(1) or 1)
    bits = re.search(r"(?:^|_)[biu](8|16|32|64|96|128)\b", kind)
    return int(bits.group(1)) if bits else 8 if "byte" in kind else 16


def main(argv: list[str]) -> int:
    options = command_line.aot(argv)
    if INTERPRETED:
        print("cogvx-kernels aot: the interpreter compiles nothing; unset TRITON_INTERPRET",
              file=sys.stderr)  # fmt: skip
        return 2
    rows, failures = [], []
    quiet = options.json == "-"
    if not quiet:
        print(
            f"{'kernel':30}{'size':36}{'target':8}{'regs':>5}{'spill':>6}{'shared':>7}"
            f"{'coal.':>7}{'wavef':>6}{'slot/el':>8}{'pred. us':>9}  loads, stores as bits:count"
        )
    ops, targets = options.op or list(OPS), options.target or list(TARGETS)
    sizes = options.size or list(SIZES)
    for report, budget, known in counted(in_parallel(ops, targets, sizes, options.samples)):
        over = report.violations(budget)
        rows.append(dataclasses.asdict(report) | {"violations": over})
        failures += [f"{report.kernel} {report.size} {report.target}: {line}" for line in over]
        if not quiet:
            loads, stores = (
                " ".join(f"{width}:{count}" for width, count in sorted(x.items(), reverse=True))
                for x in (report.loads, report.stores)
            )
            print(f"{report.kernel:30}{report.size:36}{report.target:8}{report.registers:>5}"
                  f"{report.spills:>6}{report.shared:>7}{known:38}  "
                  f"{loads} | {stores}")  # fmt: skip
    if options.json:
        text = json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1)
        if quiet:
            print(text)
        else:
            Path(options.json).write_text(text + "\n")
    for line in failures:
        print(f"over budget: {line}", file=sys.stderr)
    if not quiet:
        print(f"{len(rows)} compiled with triton {triton.__version__}, {len(failures)} over budget")
    return 1 if failures or not rows else 0
