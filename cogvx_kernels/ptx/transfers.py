"""Translation of loads, stores, copies, barriers and matrix instructions into calls of the machine.

What has no translation is refused by name in `REFUSED`.
"""

import re

from .emitter import TYPES, Emitter, vector
from .parse import Address, Instruction, Unsupported, integer, registers_of

# Opcode prefix -> what it belongs to. Kernels here have no use for them.
REFUSED = {
    "atom": "atomics",
    "red": "atomics",
    "cp.async.bulk": "TMA",
    "cp.reduce.async.bulk": "TMA",
    "mbarrier": "TMA",
    "prefetch": "prefetches",
    "barrier.cluster": "clusters",
    "mapa": "clusters",
    "tcgen05": "tensor memory of sm_100",
    "setmaxnreg": "warp specialisation",
    "call": "function calls",
}


def refusal(opcode: str) -> str | None:
    """The feature that an instruction belongs to, if that is refused as a whole."""
    prefixes = (p for p in REFUSED if opcode == p or opcode.startswith(p + "."))
    return next((REFUSED[p] for p in prefixes), None)


def _unguarded(i: Instruction) -> None:
    if i.guard:
        raise Unsupported(f"{i.opcode} under a predicate")


def _size(modifiers: list[str]) -> tuple[int, int]:
    """(registers, bytes of each) of an access."""
    count = next((int(m[1:]) for m in modifiers if re.fullmatch(r"v\d", m)), 1)
    return count, int(TYPES[modifiers[-1]][1])


def _space(i: Instruction, modifiers: list[str]) -> tuple[str, str]:
    """The part of the machine that has the memory, and the dtype of its addresses."""
    qualifiers = {"shared", "global", "shared::cta", "L1::evict_first", "L1::evict_last"}
    known = qualifiers | {"v2", "v4", "v8", "nc", modifiers[-1]}
    hints = {m for m in modifiers if m.startswith(("L1::", "L2::"))}
    if set(modifiers) - known - hints:
        raise Unsupported(i.opcode)
    if modifiers[0].startswith("shared"):
        return "shared", "u4"
    if modifiers[0] == "global":
        return "globals", "u8"
    raise Unsupported(i.opcode)


def ld(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    if "param" in modifiers:
        return _parameter(e, i, modifiers)
    space, pointer = _space(i, modifiers)
    count, each = _size(modifiers)
    targets = vector(i.operands[0])
    if any(int(e.names.dtype(t)[1]) != each for t in targets):
        raise Unsupported("a load into a wider register")
    address, guard = e.address(i.operands[1], pointer), e.guard(i)
    old = ", ".join(e.use(t, f"u{each}") for t in targets) if i.guard else ""
    parts = e.new()
    e.out(f"{parts} = m.{space}.load({e.site(i)}, {address}, {guard}, {count}, {each}, [{old}])")
    merged = Instruction(i.opcode, i.operands, None, False, i.line)
    e.define_all(targets, parts, f"u{each}", merged)


def _parameter(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    kind, source = TYPES[modifiers[-1]], i.operands[1]
    if not isinstance(source, Address) or source.offset or i.guard:
        raise Unsupported("a part of a parameter")
    value = f"m.parameter({source.base!r}).view({kind})"
    if source.base.startswith("%"):  # an address that was chosen at run time
        value = f"m.parameter_at({e.use(source.base, 'u8')}, {kind})"
    size = e.names.dtype(vector(i.operands[0])[0])[1]
    if size != kind[1]:
        kind, value = kind[0] + size, f"{value}.astype({kind[0]}{size})"
    e.define(i.operands[0], value, kind, i)


def st(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    space, pointer = _space(i, modifiers)
    _, each = _size(modifiers)
    address = e.address(i.operands[0], pointer)
    parts = ", ".join(e.use(x, f"u{each}") for x in vector(i.operands[1]))
    e.out(f"m.{space}.store({e.site(i)}, {address}, {e.guard(i)}, {each}, [{parts}])")


def cp(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    if modifiers[:2] == ["async", "commit_group"]:
        _unguarded(i)
        e.out("m.copies.commit()")
    elif modifiers[:2] in (["async", "wait_group"], ["async", "wait_all"]):
        _unguarded(i)
        count = integer(vector(i.operands[0])[0]) if i.operands else 0
        e.out(f"m.copies.wait({count})")
    elif modifiers[0] == "async" and modifiers[2:4] == ["shared", "global"]:
        to, source = e.address(i.operands[0], "u4"), e.address(i.operands[1], "u8")
        read = e.use(i.operands[3], "u4") if len(i.operands) > 3 else "None"
        size = integer(vector(i.operands[2])[0])
        e.out(f"m.copies.start({e.site(i)}, {to}, {source}, {e.guard(i)}, {size}, {read})")
    else:
        raise Unsupported(i.opcode)


def bar(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    _unguarded(i)
    if modifiers == ["warp", "sync"] and _all_lanes(i, -1):
        e.out("m.warp_barrier()")
    elif modifiers == ["sync"] and i.operands == ["0"]:
        e.out(f"m.barrier({e.site(i)})")
    else:
        raise Unsupported(f"{i.opcode} {i.operands}: a barrier of some threads")


def _all_lanes(i: Instruction, operand: int) -> bool:
    """The member mask of a warp is a constant with all its lanes."""
    mask = i.operands[operand]
    constant = isinstance(mask, str) and mask[0] != "%"
    return constant and integer(str(mask)) & 0xFFFFFFFF == 0xFFFFFFFF


def shfl(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    _unguarded(i)
    target, source, distance, limits = vector(i.operands[0])[0], *i.operands[1:4]
    if "|" in target or modifiers[0] != "sync" or not _all_lanes(i, 4):
        raise Unsupported(f"{i.opcode} {i.operands}")
    wanted = 0 if modifiers[1] == "up" else 31
    if not isinstance(limits, str) or limits[0] == "%" or integer(limits) != wanted:
        raise Unsupported(f"{i.opcode} within a part of a warp")
    x = e.use(source, "u4")
    constant = isinstance(distance, str) and distance[0] != "%"
    by = str(integer(str(distance))) if constant else e.use(distance, "u4")
    text = f"m.shuffle({e.site(i)}, {x}, {modifiers[1]!r}, {by})"
    e.define(i.operands[0], text, "u4", i)


def vote(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    _unguarded(i)
    if modifiers[0] != "sync" or not _all_lanes(i, 2):
        raise Unsupported(f"{i.opcode} {i.operands}")
    text = f"m.vote({e.site(i)}, {modifiers[1]!r}, {e.use(i.operands[1], 'b')})"
    e.define(i.operands[0], text, "u4" if modifiers[1] == "ballot" else "b", i)


MATRICES = re.compile(
    r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.(trans\.)?shared(::cta)?\.b16"
)
MMA = re.compile(r"mma\.sync\.aligned\.(m16n8k\d+)\.row\.col\.f32\.(\w+)\.\2\.f32")
SHAPES = {"bf16": ("m16n8k16", "m16n8k8"), "f16": ("m16n8k16", "m16n8k8"),
          "tf32": ("m16n8k8", "m16n8k4")}  # fmt: skip
WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(b?f16)\.\2")


def _matched(pattern: re.Pattern[str], i: Instruction) -> re.Match[str]:
    """The opcode's parts; refuse one that is not of this form, or has a guard."""
    _unguarded(i)
    found = pattern.fullmatch(i.opcode)
    if found is None:
        raise Unsupported(i.opcode)
    return found


def ldmatrix(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    found = _matched(MATRICES, i)
    count, trans = int(found[1]), found[2] is not None
    parts, address = e.new(), e.address(i.operands[1], "u4")
    e.out(f"{parts} = m.shared.load_matrix({e.site(i)}, {address}, {count}, {trans})")
    e.define_all(i.operands[0], parts, "u4", i)


def stmatrix(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    trans = _matched(MATRICES, i)[2] is not None
    parts = ", ".join(e.use(r, "u4") for r in vector(i.operands[1]))
    address = e.address(i.operands[0], "u4")
    e.out(f"m.shared.store_matrix({e.site(i)}, {address}, [{parts}], {trans})")


def mma(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    """mma.sync with sums in fp32. The fragments of an operand are put together once in a block."""
    shape, kind = _matched(MMA, i).groups()
    if shape not in SHAPES.get(kind, ()):
        raise Unsupported(i.opcode)
    matrices = []
    for side, operand in zip("ab", i.operands[1:3], strict=True):
        parts = tuple(e.use(r, "u4") for r in vector(operand))
        if (side, parts) not in e.seen:
            e.seen[side, parts] = e.new()
            e.out(f"{e.seen[side, parts]} = m.fragments_{side}([{', '.join(parts)}], {kind!r})")
        matrices.append(e.seen[side, parts])
    sums = ", ".join(e.use(r, "f4") for r in vector(i.operands[3]))
    out = e.new()
    e.out(f"{out} = m.multiply({e.site(i)}, {matrices[0]}, {matrices[1]}, [{sums}])")
    e.define_all(i.operands[0], out, "f4", i)


def fence(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    _unguarded(i)
    if modifiers[:2] != ["proxy", "async"]:
        raise Unsupported(i.opcode)
    e.out(f"m.fence({e.site(i)})")


def wgmma(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    _unguarded(i)
    if modifiers[0] == "fence":
        return  # orders registers, which are never late here
    if modifiers[0] == "commit_group":
        return e.out("m.warpgroups.commit()")
    if modifiers[0] == "wait_group":
        return e.out(f"m.warpgroups.wait({integer(vector(i.operands[0])[0])})")
    kind = _matched(WGMMA, i)[2]
    d, a, b, keep, *rest = i.operands
    signs_and_turns = [integer(x) for x in rest if isinstance(x, str)]
    if signs_and_turns[:2] != [1, 1]:
        raise Unsupported(f"{i.opcode} of negated operands")
    turned = signs_and_turns[2:]
    if isinstance(a, list):
        turned = [0, *turned]
        left = f"m.fragments_a([{', '.join(e.use(r, 'u4') for r in a)}], {kind!r})"
    else:
        left = e.use(a, "u8")
    sums = ", ".join(e.use(r, "f4") for r in vector(d))
    out = e.new()
    e.out(f"{out} = m.warpgroups.multiply({e.site(i)}, {left}, {e.use(b, 'u8')}, [{sums}], "
          f"{kind!r}, {e.use(keep, 'b')}, {turned})")  # fmt: skip
    e.define_all(d, out, "f4", i)


HANDLERS = {
    "bar": bar,
    "cp": cp,
    "fence": fence,
    "ld": ld,
    "ldmatrix": ldmatrix,
    "mma": mma,
    "shfl": shfl,
    "st": st,
    "stmatrix": stmatrix,
    "vote": vote,
    "wgmma": wgmma,
}

# Instructions that write no register; wgmma writes its sums.
STORES = ("st", "stmatrix", "bar", "cp", "fence")


def reads_writes(i: Instruction) -> tuple[list[str], list[str]]:
    """The registers that an instruction reads, and those that it writes."""
    if i.base in STORES or i.base == "wgmma":
        reads = [r for x in i.operands for r in registers_of(x)]
        writes = registers_of(i.operands[0]) if i.opcode.startswith("wgmma.mma") else []
    else:
        writes = registers_of(i.operands[0]) if i.operands else []
        reads = [r for x in i.operands[1:] for r in registers_of(x)]
        if i.guard:
            reads += writes  # a guarded write keeps what was there
    return reads + ([i.guard] if i.guard else []), writes
