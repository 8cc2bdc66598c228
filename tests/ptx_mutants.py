"""`make mutants-ptx`: does the PTX machine notice bugs in compiled code, put in one at a time?

A mutant changes one line of a kernel's PTX. It is killed by a fault (a race, a wrong address) or a
result that misses the rule of `cogvx_kernels.testing`. A survivor must be explained in
`tests/ptx_survivors.json`; exit status 1 if one is not. Changes that alter no execution of the
sample are not made: lines that do not run, and predicates that are always true.
"""

import argparse
import contextlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from cogvx_kernels.ptx import launch
from cogvx_kernels.ptx.batch import Batch
from cogvx_kernels.ptx.copies import Copies
from cogvx_kernels.ptx.global_access import GlobalAccess
from cogvx_kernels.ptx.parse import parse
from cogvx_kernels.ptx.shared_memory import SharedMemory
from cogvx_kernels.ptx.translate import Program
from cogvx_kernels.ptx.warpgroups import Warpgroups
from cogvx_kernels.testing import (
    OPS,
    as_tuple,
    compare,
    evaluate,
    grad_outputs_like,
    materialize,
)

SURVIVORS = Path(__file__).with_name("ptx_survivors.json")

# Of an architecture: op and sample.
SAMPLES = {
    "sm_80": [
        ("qk_norm_rope3d", "text and video"),
        ("gated_residual_adaln", "frames longer than a strip"),
        ("spatial_norm_silu", "more pixels than a strip"),
        ("temporal_conv", "more channels than a tile"),
        ("expert_ffn", "wider than a tile"),
    ],
    "sm_90": [
        ("spatial_norm_silu", "more pixels than a strip"),
        ("temporal_conv", "more channels than a tile"),
        ("expert_ffn", "wider than a tile"),
    ],
}

Change = Callable[[str], str | None]


def drop(pattern: str) -> Change:
    return lambda line: "" if re.search(pattern, line) else None


def swap(pattern: str, to: Any) -> Change:
    return lambda line: re.sub(pattern, to, line) if re.search(pattern, line) else None


def turn(opcode: str) -> Change:
    """Change a matrix that is transposed to one that is not, and the reverse."""
    return swap(
        rf"({opcode}\S*?)\.(trans\.)?shared",
        lambda m: m[1] + (".shared" if m[2] else ".trans.shared"),
    )


def wrong_distance(distance: int) -> int:
    return distance * 2 % 31


GUARD = r"@!?%p\d+ "
KINDS: dict[str, Change] = {
    "a barrier left out": drop(r"\bbar\.sync"),
    "a wait for copies left out": drop(r"cp\.async\.wait_group"),
    "a wait for one group of copies fewer": swap(
        r"(cp\.async\.wait_group\s+)(\d)", lambda m: m[1] + str(int(m[2]) + 1)
    ),
    "a fence of proxies left out": drop(r"fence\.proxy\.async"),
    "a wait for products left out": drop(r"wgmma\.wait_group"),
    "a wait for one group of products fewer": swap(
        r"(wgmma\.wait_group\S+\s+)(\d)", lambda m: m[1] + str(int(m[2]) + 1)
    ),
    "a product that forgets its sum": swap(
        r"(wgmma\.mma_async\S+ \{[^}]*\}, \S+ \S+ )%p\d+", r"\g<1>0"
    ),
    "a product's operand not turned": swap(r"(wgmma\.mma_async.*, )1;", r"\g<1>0;"),
    "an accumulator's registers exchanged": swap(
        r"(mma\S* \{ ?)(%r\d+), (%r\d+)", r"\1\3, \2"
    ),
    "an ldmatrix transposed or not": turn("ldmatrix"),
    "an stmatrix transposed or not": turn("stmatrix"),
    "a shuffle of the wrong distance": swap(
        r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )(\d+)",
        lambda m: m[1] + str(wrong_distance(int(m[2]))),
    ),
    "a store off by 2 bytes": swap(r"(st\.global\S* \[ %rd\d+ \+ )0", r"\g<1>2"),
    "a load off by 16 bytes": swap(r"(ld\.global\S* [^\[]*\[ %rd\d+ \+ )0", r"\g<1>16"),
    "a shared address off by 16 bytes": swap(r"(st\.shared\S* \[ %r\d+ \+ )0", r"\g<1>16"),
    "a mask of a store ignored": swap(rf"{GUARD}(st\.global)", r"\1"),
    "a copy's size ignored": swap(r"(cp\.async\.\S+ \[.*\], \[.*\], \S+), \S+;", r"\1;"),
    "halves of a pair exchanged": swap(
        r"cvt\.rn\.bf16x2\.f32\s+(%r\d+), (%r\d+), (%r\d+)", r"cvt.rn.bf16x2.f32 \1, \3, \2"
    ),
    "an exclusive or left out": swap(
        r"xor\.b32\s+(%r\d+), (%r\d+), (%r\d+|\d+);", r"mov.b32 \1, \2;"
    ),
}  # fmt: skip
# Kinds that change something only with some operands: a predicate that is true, or false, for a
# thread, a copy of a part, values that differ between lanes.
CONDITIONS = (
    "a load off by 16 bytes",
    "a shared address off by 16 bytes",
    "a mask of a store ignored",
    "a copy's size ignored",
    "a product that forgets its sum",
    "a shuffle of the wrong distance",
    "an ldmatrix transposed or not",
    "an stmatrix transposed or not",
)


def change(kind: str, line: str) -> str | None:
    """The line with a bug of this kind; None if there is no place for one."""
    new = KINDS[kind](line)
    return None if new == line else new


class Mutant(NamedTuple):
    arch: str
    op: str
    sample: str
    kernel: str
    kind: str
    line: int  # from 0
    text: str
    compiled: Any

    @property
    def key(self) -> str:
        """What an explanation is for; without the line, which a change of the kernel moves."""
        return f"{self.arch} {self.op}, {self.sample}: {self.kernel}: {self.kind}"


class Subject:
    """A sample of an op, its results as it is, and the PTX of its kernels."""

    def __init__(self, arch: str, op: str, sample: str) -> None:
        self.arch, self.info = arch, OPS[op]
        self.sample = next(s for s in self.info.samples if s.reason == sample)
        self.arguments = materialize(self.sample, torch.bfloat16)
        self.grad_outputs = grad_outputs_like(as_tuple(self.info.reference(**self.arguments)), 0)
        # Lines on which a mutant of CONDITIONS changes something.
        self.conditional: set[tuple[Program, int]] = set()
        with conditions(self.conditional):
            self.launches, self.results = self.run()
        if faults := [text for x in self.launches for text in x.faults] or self.missed(
            self.results
        ):
            raise RuntimeError(f"{op}, {sample}: without a mutant: {faults}")

    def run(self) -> tuple[list[launch.Launch], dict[str, torch.Tensor]]:
        launches: list[launch.Launch] = []
        with launch.executing(int(self.arch[3:]), done=launches.append, counting=False):
            results = evaluate(self.info.op, self.arguments, self.info.differentiable,
                               self.grad_outputs, backend="kernel")  # fmt: skip
        return launches, results

    def missed(self, results: dict[str, torch.Tensor]) -> list[str]:
        found = compare(self.info, self.sample, torch.bfloat16, arguments=self.arguments,
                        ours=results)  # fmt: skip
        return [str(c) for c in found if not c.ok]

    def mutants(self, most: int) -> Iterator[Mutant]:
        """At most so many of each kind in each kernel, spread over its lines."""
        seen = set()
        for x in self.launches:
            if x.compiled.hash in seen:
                continue
            seen.add(x.compiled.hash)
            lines = x.compiled.asm["ptx"].split("\n")
            ran = self.lines_that_ran(x.compiled.hash)
            for kind in KINDS:
                applies = ran
                if kind in CONDITIONS:
                    applies = {n for program, n in self.conditional if program is x.program}
                places = [
                    n
                    for n, line in enumerate(lines)
                    if n + 1 in ran & applies and change(kind, line) is not None
                ]
                step = max(1, len(places) // most)
                for n in places[::step][:most]:
                    yield Mutant(
                        self.arch, self.info.name, self.sample.reason, x.name, kind, n,
                        lines[n].strip(), x.compiled,
                    )  # fmt: skip

    def lines_that_ran(self, key: str) -> set[int]:
        return {
            i.line
            for x in self.launches
            if x.compiled.hash == key
            for warps, block in zip(x.counters.blocks, x.program.function.blocks, strict=True)
            if warps
            for i in block.instructions
        }

    def killed_by(self, mutant: Mutant) -> str | None:
        """The first fault or miss with the mutant; None if it survives."""
        compiled = mutant.compiled
        lines = compiled.asm["ptx"].split("\n")
        lines[mutant.line] = change(mutant.kind, lines[mutant.line]) or ""
        before = launch.programs[compiled.hash]
        try:
            launch.programs[compiled.hash] = Program(parse("\n".join(lines)))
            launches, results = self.run()
        except Exception as error:  # refused, or a result that the launcher cannot use
            return f"{type(error).__name__}: {error}"
        finally:
            launch.programs[compiled.hash] = before
        if faults := [text for x in launches for text in x.faults]:
            return faults[0]
        if all(torch.equal(results[name], x) for name, x in self.results.items()):
            return None
        return next(iter(self.missed(results)), None)


@contextlib.contextmanager
def conditions(lines: set[tuple[Program, int]]) -> Iterator[None]:
    """Context that records the lines on which a mutant of CONDITIONS changes something."""

    def record(batch: Batch, site: int) -> None:
        program = batch.run.program
        lines.add((program, program.sites[site].line))

    def store(access: GlobalAccess, site: int, address: Any, guard: Any, *values: Any) -> None:
        stores(access, site, address, guard, *values)
        if guard is None or guard.all():
            return
        memory, faults = access.memory, access.batch.run.faults
        kept = memory.bytes.copy(), memory.writer.copy(), dict(faults.found)
        stores(access, site, address, None, *values)
        if faults.found != kept[2] or (memory.bytes != kept[0]).any():
            record(access.batch, site)
        memory.bytes[:], memory.writer[:], faults.found = kept

    def load(access: GlobalAccess, site: int, address: Any, guard: Any, *values: Any) -> Any:
        if access.batch.mask(guard) is not False:
            record(access.batch, site)
        return loads(access, site, address, guard, *values)

    def put(shared: SharedMemory, site: int, address: Any, guard: Any, *values: Any) -> None:
        if shared.batch.mask(guard) is not False:
            record(shared.batch, site)
        puts(shared, site, address, guard, *values)

    def start(copies: Copies, site: int, *operands: Any) -> None:
        *_, size, read = operands
        if read is not None and (read != size).any():
            record(copies.batch, site)
        starts(copies, site, *operands)

    def multiply(groups: Warpgroups, site: int, *operands: Any) -> Any:
        if operands[4].any():
            record(groups.batch, site)
        return products(groups, site, *operands)

    def shuffle(batch: Batch, site: int, x: Any, mode: str, by: Any) -> Any:
        result = shuffles(batch, site, x, mode, by)
        if mode == "bfly" and (result != shuffles(batch, site, x, mode, wrong_distance(by))).any():
            record(batch, site)
        return result

    def load_matrix(shared: SharedMemory, site: int, address: Any, count: int, trans: bool) -> Any:
        result = matrices(shared, site, address, count, trans)
        other = matrices(shared, site, address, count, not trans)
        if any((x != y).any() for x, y in zip(result, other, strict=True)):
            record(shared.batch, site)
        return result

    def store_matrix(shared: SharedMemory, site: int, address: Any, data: Any, trans: bool) -> None:
        puts_matrix(shared, site, address, data, not trans)
        other = shared.bytes.copy()
        puts_matrix(shared, site, address, data, trans)
        if (shared.bytes != other).any():
            record(shared.batch, site)

    puts_matrix = SharedMemory.store_matrix
    stores, starts, products = GlobalAccess.store, Copies.start, Warpgroups.multiply
    shuffles, matrices = Batch.shuffle, SharedMemory.load_matrix
    loads, puts = GlobalAccess.load, SharedMemory.store
    with contextlib.ExitStack() as stack:
        for owner, name, function in (
            (GlobalAccess, "load", load),
            (GlobalAccess, "store", store),
            (SharedMemory, "store", put),
            (Copies, "start", start),
            (Warpgroups, "multiply", multiply),
            (Batch, "shuffle", shuffle),
            (SharedMemory, "load_matrix", load_matrix),
            (SharedMemory, "store_matrix", store_matrix),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def explained() -> dict[str, dict[str, Any]]:
    """Of each key: how many survivors there may be, and why."""
    return json.loads(SURVIVORS.read_text())


def unexplained(survivors: Sequence[Mutant], known: dict[str, dict[str, Any]]) -> list[str]:
    """Keys with more survivors than are explained."""
    counts = Counter(m.key for m in survivors)
    return [
        f"{key}: {count} survive, {known.get(key, {}).get('survivors', 0)} explained"
        for key, count in counts.items()
        if count > known.get(key, {}).get("survivors", 0)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx_mutants", description=__doc__)
    parser.add_argument("--arch", choices=SAMPLES, action="append", help="default: all")
    parser.add_argument("--op", choices=sorted({op for x in SAMPLES.values() for op, _ in x}))
    parser.add_argument("--kind", default="", help="kinds whose name contains this")
    parser.add_argument("--most", type=int, default=3, help="of a kind in a kernel; default 3")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN
    survivors, total = [], Counter()
    for arch in options.arch or SAMPLES:
        for op, sample in SAMPLES[arch]:
            if options.op not in (None, op):
                continue
            subject = Subject(arch, op, sample)
            for mutant in subject.mutants(options.most):
                if options.kind not in mutant.kind:
                    continue
                begun = time.monotonic()
                by = subject.killed_by(mutant)
                total[arch] += 1
                survivors += [mutant] if by is None else []
                outcome = f"SURVIVED  {mutant.text}" if by is None else f"killed    {by[:120]}"
                print(f"{mutant.key} (line {mutant.line + 1}, {time.monotonic() - begun:.1f} s)\n"
                      f"    {outcome}", flush=True)  # fmt: skip
    wrong = unexplained(survivors, explained())
    print("\n".join(f"not explained: {text}" for text in wrong))
    alive = Counter(m.arch for m in survivors)
    for arch in total:
        print(f"{arch}: {total[arch]} mutants, {total[arch] - alive[arch]} killed, "
              f"{alive[arch]} survive")  # fmt: skip
    return 1 if wrong or not total else 0


if __name__ == "__main__":
    sys.exit(main())
