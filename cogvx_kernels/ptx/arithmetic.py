"""Translation of arithmetic, comparisons, conversions and moves between registers."""

from .emitter import TYPES, Emitter, vector
from .parse import SPECIAL, Instruction, Unsupported, integer

FLOATS = ("f32", "f64", "bf16", "f16", "bf16x2", "f16x2")
NARROW = ("f16", "bf16")
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
               "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip
# Of a comparison that is true for a NaN: the one whose negation it is.
UNORDERED = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<", "neu": "=="}
ROUNDINGS = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}


def binary(sign: str) -> str:
    return f"{{}} {sign} {{}}"


def on_integers(e: Emitter, i: Instruction, kind: str, form: str) -> None:
    """A result of operands that all have one dtype."""
    operands = (e.use(x, kind) for x in i.operands[1:])
    e.define(i.operands[0], form.format(*operands), kind, i)


def on_floats(e: Emitter, i: Instruction, modifiers: list[str], form: str) -> None:
    """A result in the type of the last modifier, rounded to nearest."""
    kind = modifiers[-1]
    if set(modifiers[:-1]) - {"rn", "ftz", "approx", "full"}:
        raise Unsupported(i.opcode)
    if kind in ("f32", "f64"):
        if "ftz" in modifiers:
            form = f"flush({form})"
        on_integers(e, i, TYPES[kind], form)
    elif kind in NARROW:
        wide = (f"of_{kind}({e.use(x, 'u2')})" for x in i.operands[1:])
        e.define(i.operands[0], f"{kind}_of(({form.format(*wide)}).astype(f4))", "u2", i)
    elif kind in FLOATS:
        half = kind[:-2]
        pairs = [f"unpack({e.use(x, 'u4')}, u2)" for x in i.operands[1:]]
        both = [form.format(*(f"of_{half}({pair}[{k}])" for pair in pairs)) for k in (0, 1)]
        low, high = (f"{half}_of(({text}).astype(f4))" for text in both)
        e.define(i.operands[0], f"pack([{low}, {high}], u4)", "u4", i)
    else:
        raise Unsupported(i.opcode)


def add(e: Emitter, i: Instruction, modifiers: list[str], sign: str = "+") -> None:
    if modifiers[-1] in FLOATS:
        on_floats(e, i, modifiers, binary(sign))
    elif len(modifiers) > 1:  # .cc, .sat
        raise Unsupported(i.opcode)
    else:
        on_integers(e, i, TYPES[modifiers[-1]].replace("i", "u"), binary(sign))


def sub(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    add(e, i, modifiers, "-")


def mul(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    if modifiers[-1] in FLOATS:
        return on_floats(e, i, modifiers, binary("*"))
    product(e, i, modifiers, None)


def mad(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    if modifiers[-1] in FLOATS:
        raise Unsupported(i.opcode)
    product(e, i, modifiers, i.operands[3])


def product(e: Emitter, i: Instruction, modifiers: list[str], addend: object) -> None:
    """An integer product, its low or high half or all of it, and an addend."""
    part, kind = modifiers[0], TYPES[modifiers[-1]]
    if part == "lo":
        kind = kind.replace("i", "u")
    a, b = (e.use(x, kind) for x in i.operands[1:3])
    size, wide = int(kind[1]), kind
    if part == "lo":
        form = f"{a} * {b}"
    elif part == "wide":
        wide = f"{kind[0]}{2 * size}"
        form = f"{a}.astype({wide}) * {b}.astype({wide})"
    elif part == "hi" and size < 8:
        double = f"{kind[0]}{2 * size}"
        form = f"(({a}.astype({double}) * {b}) >> {double}({8 * size})).astype({kind})"
    elif part == "hi" and kind == "u8":
        form = f"high_product_64({a}, {b})"
    elif part == "hi":
        form = f"high_signed_product_64({a}, {b})"
    else:
        raise Unsupported(i.opcode)
    if isinstance(addend, str):
        form = f"{form} + {e.use(addend, wide)}"
    e.define(i.operands[0], form, wide, i)


def fma(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    if modifiers[-1] == "f64":  # its product is not exact in fp64
        raise Unsupported(i.opcode)
    on_floats(e, i, modifiers, "fma({}, {}, {})")


def neg(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    if modifiers[-1] in FLOATS:
        return on_floats(e, i, modifiers, "-{}")
    on_integers(e, i, TYPES[modifiers[-1]].replace("u", "i"), "-{}")


def absolute(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    if modifiers[-1] in FLOATS:
        return on_floats(e, i, modifiers, "abs({})")
    on_integers(e, i, TYPES[modifiers[-1]], "abs({})")


def minimum(e: Emitter, i: Instruction, modifiers: list[str], which: str = "min") -> None:
    if modifiers[-1] in FLOATS:
        name = f"np.{which}imum" if "NaN" in modifiers else f"np.f{which}"
        return on_floats(e, i, [m for m in modifiers if m != "NaN"], f"{name}({{}}, {{}})")
    on_integers(e, i, TYPES[modifiers[-1]], f"np.{which}imum({{}}, {{}})")


def maximum(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    minimum(e, i, modifiers, "max")


def div(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    kind = TYPES[modifiers[-1]]
    if modifiers[-1] == "f32":
        on_floats(e, i, modifiers, "{} / {}" if "rn" in modifiers else "m.approximate({} / {})")
    elif modifiers[-1] in FLOATS:
        raise Unsupported(i.opcode)
    else:
        on_integers(e, i, kind, "divide({}, {})" if kind[0] == "i" else "{} // {}")


def rem(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    kind = TYPES[modifiers[-1]]
    on_integers(e, i, kind, "remainder({}, {})" if kind[0] == "i" else "{} % {}")


def bitwise(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    form = {"and": "{} & {}", "or": "{} | {}", "xor": "{} ^ {}", "not": "~{}"}[i.base]
    on_integers(e, i, TYPES[modifiers[-1]], form)


def shift(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    kind, amount = TYPES[modifiers[-1]], i.operands[2]
    sign, function = {"shl": ("<<", "shift_left"), "shr": (">>", "shift_right")}[i.base]
    bits, a = 8 * int(kind[1]), e.use(i.operands[1], kind)
    if isinstance(amount, str) and amount[0] != "%" and integer(amount) < bits:
        form = f"{a} {sign} {e.constant(amount, kind)}"
    else:
        form = f"{function}({a}, {e.use(amount, 'u4')}, {bits})"
    e.define(i.operands[0], form, kind, i)


def _constants(i: Instruction, first: int, past: int) -> list[int]:
    found = i.operands[first:past]
    if any(not isinstance(x, str) or x[0] == "%" for x in found):
        raise Unsupported(f"{i.opcode} by a register")
    return [integer(x) for x in found if isinstance(x, str)]


def bfe(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    kind = TYPES[modifiers[-1]]
    start, count = _constants(i, 2, 4)
    e.define(i.operands[0], f"extract({e.use(i.operands[1], kind)}, {start}, {count})", kind, i)


def bfi(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    kind = TYPES[modifiers[-1]]
    a, b = (e.use(x, kind) for x in i.operands[1:3])
    start, count = _constants(i, 3, 5)
    e.define(i.operands[0], f"insert({a}, {b}, {start}, {count})", kind, i)


def lop3(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    a, b, c = (e.use(x, "u4") for x in i.operands[1:4])
    (table,) = _constants(i, 4, 5)
    e.define(i.operands[0], f"lop3({a}, {b}, {c}, {table})", "u4", i)


def prmt(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    if modifiers != ["b32"]:
        raise Unsupported(i.opcode)
    on_integers(e, i, "u4", "permute({}, {}, {})")


def shf(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    left, wrap = "l" in modifiers, "wrap" in modifiers
    on_integers(e, i, "u4", f"funnel({{}}, {{}}, {{}}, {left}, {wrap})")


def setp(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    compare, kind = modifiers[0], TYPES[modifiers[-1]]
    if len(modifiers) != 2 and modifiers[1:-1] != ["ftz"]:
        raise Unsupported(i.opcode)
    a, b = (e.use(x, kind) for x in i.operands[1:3])
    if modifiers[-1] in NARROW:
        a, b = (f"of_{modifiers[-1]}({x})" for x in (a, b))
    if modifiers[-1] not in FLOATS:
        form = f"{a} {COMPARISONS[compare]} {b}"
    elif compare == "ne":  # ordered: false for a NaN
        form = f"({a} != {b}) & ({a} == {a}) & ({b} == {b})"
    elif compare == "nan":
        form = f"({a} != {a}) | ({b} != {b})"
    elif compare == "num":
        form = f"({a} == {a}) & ({b} == {b})"
    elif compare == "equ":
        form = f"({a} == {b}) | ({a} != {a}) | ({b} != {b})"
    elif compare in UNORDERED:
        form = f"~({a} {UNORDERED[compare]} {b})"
    else:
        form = f"{a} {COMPARISONS[compare]} {b}"
    e.define(i.operands[0], form, "b", i)


def selp(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    kind = TYPES[modifiers[-1]]
    a, b = (e.use(x, kind) for x in i.operands[1:3])
    e.define(i.operands[0], f"np.where({e.use(i.operands[3], 'b')}, {a}, {b})", kind, i)


def mov(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    kind = TYPES[modifiers[-1]]
    target, source = i.operands
    if isinstance(source, list):
        each = f"u{int(kind[1]) // len(source)}"
        parts = ", ".join(e.use(x, each) for x in source)
        e.define(target, f"pack([{parts}], {kind})", kind, i)
    elif isinstance(target, list):
        each = f"u{int(kind[1]) // len(target)}"
        whole = e.new()
        e.out(f"{whole} = unpack({e.use(source, kind)}, {each})")
        e.define_all(target, whole, each, i)
    elif (
        isinstance(target, str)
        and isinstance(source, str)
        and source[0] == "%"
        and not (SPECIAL.match(source) or i.guard)
    ):
        e.use(source, e.names.dtype(source)) if source not in e.variables else None
        e.variables[target] = e.variables[source]
        e.written[target] = None
    else:
        e.define(target, e.use(source, kind), kind, i)


def cvta(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    mov(e, i, ["u64"])


def cvt(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    """All conversions; those of floats round to nearest even, or as they name."""
    *how, to, source = modifiers
    if to in ("bf16x2", "f16x2"):
        return _pair(e, i, to[:-2], how)
    target, x = i.operands
    a, b = TYPES[to], TYPES[source]
    integers = to not in FLOATS, source not in FLOATS
    if source == "f32" and to in NARROW and how in (["rn"], ["rn", "ftz"]):
        e.define(target, f"{to}_of({e.use(x, 'f4')})", "u2", i)
    elif source in NARROW and to == "f32" and not how:
        e.define(target, f"of_{source}({e.use(x, 'u2')})", "f4", i)
    elif all(integers) and not how:
        if int(a[1]) < int(e.names.dtype(vector(target)[0])[1]):
            raise Unsupported("cvt into a wider register")
        e.define(target, f"{e.use(x, b)}.astype({a})", a, i)
    elif to in ("f32", "f64") and integers[1] and how == ["rn"]:
        e.define(target, f"{e.use(x, b)}.astype({a})", a, i)
    elif integers[0] and source in ("f32", "f64") and len(how) == 1 and how[0] in ROUNDINGS:
        e.define(target, f"to_integer(np.{ROUNDINGS[how[0]]}({e.use(x, b)}), {a})", a, i)
    elif (to, source, how) in (("f64", "f32", []), ("f32", "f64", ["rn"])):
        e.define(target, f"{e.use(x, b)}.astype({a})", a, i)
    elif to == source == "f32" and len(how) == 1 and how[0] in ROUNDINGS:
        e.define(target, f"np.{ROUNDINGS[how[0]]}({e.use(x, b)})", a, i)
    else:
        raise Unsupported(i.opcode)


def _pair(e: Emitter, i: Instruction, half: str, how: list[str]) -> None:
    if how != ["rn"]:
        raise Unsupported(i.opcode)
    high, low = (f"{half}_of({e.use(x, 'f4')})" for x in i.operands[1:3])
    e.define(i.operands[0], f"pack([{low}, {high}], u4)", "u4", i)


FUNCTIONS = {
    "ex2": "np.exp2({}.astype(f8))",
    "lg2": "np.log2({}.astype(f8))",
    "rcp": "1.0 / {}.astype(f8)",
    "rsqrt": "1.0 / np.sqrt({}.astype(f8))",
    "sqrt": "np.sqrt({}.astype(f8))",
    "tanh": "np.tanh({}.astype(f8)).astype(f2)",  # 11 bits are right
}


def function(e: Emitter, i: Instruction, modifiers: list[str]) -> None:
    """Functions of one fp32 value, by default rounded right."""
    if modifiers[-1] != "f32" or set(modifiers) - {"f32", "approx", "rn", "ftz"}:
        raise Unsupported(i.opcode)
    x = e.use(i.operands[1], "f4")
    form = FUNCTIONS[i.base].format(f"flush({x})" if "ftz" in modifiers else x)
    exact = "rn" in modifiers
    e.define(i.operands[0], f"({form}).astype(f4)" if exact else f"m.approximate({form})", "f4", i)


HANDLERS = {
    **dict.fromkeys(("and", "or", "xor", "not"), bitwise),
    **dict.fromkeys(("shl", "shr"), shift),
    **dict.fromkeys(FUNCTIONS, function),
    "abs": absolute,
    "add": add,
    "bfe": bfe,
    "bfi": bfi,
    "cvt": cvt,
    "cvta": cvta,
    "div": div,
    "fma": fma,
    "lop3": lop3,
    "mad": mad,
    "max": maximum,
    "min": minimum,
    "mov": mov,
    "mul": mul,
    "neg": neg,
    "prmt": prmt,
    "rem": rem,
    "selp": selp,
    "setp": setp,
    "shf": shf,
    "sub": sub,
}
