"""Scalar instructions of the PTX machine against values worked out by hand."""

import math
import struct

import pytest
import torch

from cogvx_kernels.ptx.parse import Unsupported

from . import snippets
from .snippets import evaluate

ALL = 0xFFFFFFFF
NAN = math.nan

INTEGERS = {
    # instruction -> type of the result, operands, results
    "add.s32": ("s32", [("s32", [2**31 - 1, -1]), ("s32", [1, -1])], [-(2**31), -2]),
    "sub.s64": ("s64", [("s64", [-(2**63), 5]), ("s64", [1, 7])], [2**63 - 1, -2]),
    "mul.lo.s32": ("s32", [("s32", [65536, -3]), ("s32", [65536, 7])], [0, -21]),
    "mul.lo.u64": ("u64", [("u64", [2**63]), ("u64", [3])], [2**63]),
    "mul.hi.u32": ("u32", [("u32", [ALL, 2]), ("u32", [ALL, 3])], [ALL - 1, 0]),
    "mul.hi.s32": ("s32", [("s32", [-1, 2**30]), ("s32", [1, 8])], [-1, 2]),
    "mul.hi.u16": ("u16", [("u16", [0xFFFF]), ("u16", [0xFFFF])], [0xFFFE]),
    "mul.hi.u64": (
        "u64", [("u64", [2**63, 2**64 - 1]), ("u64", [2, 2**64 - 1])], [1, 2**64 - 2]
    ),
    "mul.hi.s64": (
        "s64", [("s64", [-1, 2**62, 3 - 2**63]), ("s64", [1, 8, -4])], [-1, 2, 1]
    ),
    "mul.wide.s32": ("s64", [("s32", [-2, -(2**31)]), ("s32", [3, 2])], [-6, -(2**32)]),
    "mul.wide.u16": ("u32", [("u16", [0xFFFF]), ("u16", [0xFFFF])], [4294836225]),
    "mad.lo.s32": ("s32", [("s32", [3]), ("s32", [-4]), ("s32", [5])], [-7]),
    "mad.wide.u32": ("u64", [("u32", [ALL]), ("u32", [2]), ("u64", [1])], [2**33 - 1]),
    "div.s32": ("s32", [("s32", [-7, 7, -8]), ("s32", [2, -2, 2])], [-3, -3, -4]),
    "div.u32": ("u32", [("u32", [ALL]), ("u32", [2])], [2**31 - 1]),
    "rem.s32": ("s32", [("s32", [-7, 7]), ("s32", [2, -2])], [-1, 1]),
    "rem.u64": ("u64", [("u64", [2**64 - 1]), ("u64", [10])], [5]),
    "neg.s32": ("s32", [("s32", [5, -(2**31)])], [-5, -(2**31)]),
    "abs.s32": ("s32", [("s32", [-5, 3])], [5, 3]),
    "min.s32": ("s32", [("s32", [-1]), ("s32", [1])], [-1]),
    "min.u32": ("u32", [("u32", [ALL]), ("u32", [1])], [1]),
    "max.s64": ("s64", [("s64", [-1]), ("s64", [1])], [1]),
    "and.b32": ("u32", [("u32", [0b1100]), ("u32", [0b1010])], [0b1000]),
    "or.b64": ("u64", [("u64", [2**63]), ("u64", [1])], [2**63 + 1]),
    "xor.b16": ("u16", [("u16", [0b1100]), ("u16", [0b1010])], [0b0110]),
    "not.b32": ("u32", [("u32", [1])], [ALL - 1]),
    "shl.b32": ("u32", [("u32", [1, 1, 3]), ("u32", [31, 32, 40])], [2**31, 0, 0]),
    "shr.s32": ("s32", [("s32", [-8, -8, 8]), ("u32", [1, 40, 2])], [-4, -1, 2]),
    "shr.u64": ("u64", [("u64", [2**63, 1]), ("u32", [63, 64])], [1, 0]),
    # bytes 0 to 3 are of the first operand, 4 to 7 of the second; with 8 added: the byte's sign
    "prmt.b32": (
        "u32",
        [("u32", [0x33221180] * 3), ("u32", [0x77665544] * 3), ("u32", [0x7531, 0x0008, 0x3210])],
        [0x77553311, 0x808080FF, 0x33221180],
    ),
    # of the 64 bits (second, first)
    "shf.l.wrap.b32": (
        "u32", [("u32", [2**31] * 2), ("u32", [1] * 2), ("u32", [1, 33])], [3, 3]
    ),
    "shf.r.wrap.b32": ("u32", [("u32", [0]), ("u32", [1]), ("u32", [1])], [2**31]),
    "shf.r.clamp.b32": ("u32", [("u32", [7]), ("u32", [5]), ("u32", [40])], [5]),
}  # fmt: skip

FLOATS = {
    "add.f32": ("f32", [("f32", [1e8, 0.5]), ("f32", [1.0, 0.25])], [1e8, 0.75]),
    "add.rn.ftz.f32": ("f32", [("f32", [1e-40, 2.0]), ("f32", [0.0, 1.0])], [0.0, 3.0]),
    "sub.rn.f32": ("f32", [("f32", [1.0]), ("f32", [3.0])], [-2.0]),
    "mul.f32": ("f32", [("f32", [3.0]), ("f32", [-0.5])], [-1.5]),
    # one rounding: the product alone would round to 1 + 2**-11
    "fma.rn.f32": (
        "f32", [("f32", [1 + 2**-12]), ("f32", [1 + 2**-12]), ("f32", [-1 - 2**-11])], [2**-24]
    ),
    "neg.f32": ("u32", [("f32", [0.0, 1.0])], [0x80000000, 0xBF800000]),
    "abs.f32": ("f32", [("f32", [-2.5])], [2.5]),
    "min.f32": ("f32", [("f32", [NAN, 1.0]), ("f32", [2.0, -1.0])], [2.0, -1.0]),
    "max.NaN.f32": ("u32", [("f32", [NAN, 1.0]), ("f32", [2.0, -1.0])], [0x7FC00000, 0x3F800000]),
    "div.rn.f32": ("u32", [("f32", [1.0]), ("f32", [3.0])], [0x3EAAAAAB]),
    "div.full.f32": ("f32", [("f32", [6.0]), ("f32", [3.0])], [2.0]),
    "ex2.approx.ftz.f32": ("f32", [("f32", [3.0, -1.0])], [8.0, 0.5]),
    "lg2.approx.f32": ("f32", [("f32", [8.0, 0.5])], [3.0, -1.0]),
    "rcp.approx.f32": ("f32", [("f32", [4.0])], [0.25]),
    "rsqrt.approx.f32": ("f32", [("f32", [4.0, 0.25])], [0.5, 2.0]),
    "sqrt.rn.f32": ("u32", [("f32", [2.0])], [0x3FB504F3]),
    "tanh.approx.f32": ("f32", [("f32", [0.0, 20.0])], [0.0, 1.0]),
    "add.rn.bf16x2": ("u32", [("u32", [0x3F804000]), ("u32", [0x3F803F80])], [0x40004040]),
    "mul.rn.f16": ("u16", [("u16", [0x3E00]), ("u16", [0x4000])], [0x4200]),
    "fma.rn.bf16": (
        "u16", [("u16", [0x4000]), ("u16", [0x4040]), ("u16", [0x3F80])], [0x40E0]
    ),
}  # fmt: skip

CONVERSIONS = {
    "cvt.s64.s32": ("s64", [("s32", [-1])], [-1]),
    "cvt.u64.u32": ("u64", [("u32", [ALL])], [ALL]),
    "cvt.u16.u32": ("u16", [("u32", [0x12345678])], [0x5678]),
    # a tie goes to the even mantissa
    "cvt.rn.bf16.f32": (
        "u16", [("f32", [1 + 2**-8, 1 + 3 * 2**-8, NAN])], [0x3F80, 0x3F82, 0x7FFF]
    ),
    "cvt.rn.bf16x2.f32": ("u32", [("f32", [1.0]), ("f32", [2.0])], [0x3F804000]),
    "cvt.rn.f16.f32": ("u16", [("f32", [65519.0, 65520.0])], [0x7BFF, 0x7C00]),
    "cvt.f32.bf16": ("f32", [("u16", [0x3FC0])], [1.5]),
    "cvt.f32.f16": ("f32", [("u16", [0x3E00])], [1.5]),
    "cvt.rzi.s32.f32": ("s32", [("f32", [-1.7, NAN, 3e9, -3e9])], [-1, 0, 2**31 - 1, -(2**31)]),
    "cvt.rni.s32.f32": ("s32", [("f32", [2.5, 3.5])], [2, 4]),
    "cvt.rmi.s32.f32": ("s32", [("f32", [-1.5])], [-2]),
    "cvt.rpi.s64.f32": ("s64", [("f32", [-1.5, 2.0**63])], [-1, 2**63 - 1]),
    "cvt.rzi.u32.f32": ("u32", [("f32", [-1.0, 3e9])], [0, 3000000000]),
    "cvt.rn.f32.s32": ("f32", [("s32", [16777217])], [16777216.0]),
    "cvt.rmi.f32.f32": ("f32", [("f32", [-1.5])], [-2.0]),
}  # fmt: skip

COMPARISONS = {
    "setp.lt.s32": ([("s32", [-1, 1]), ("s32", [1, 1])], [1, 0]),
    "setp.lt.u32": ([("u32", [ALL]), ("u32", [1])], [0]),
    "setp.hs.u64": ([("u64", [2**63, 0]), ("u64", [1, 1])], [1, 0]),
    "setp.eq.b16": ([("u16", [7, 8]), ("u16", [7, 7])], [1, 0]),
    "setp.lt.f32": ([("f32", [1.0, NAN]), ("f32", [2.0, 1.0])], [1, 0]),
    "setp.ltu.f32": ([("f32", [1.0, NAN, 3.0]), ("f32", [2.0, 1.0, 2.0])], [1, 1, 0]),
    "setp.ne.f32": ([("f32", [1.0, NAN]), ("f32", [2.0, 1.0])], [1, 0]),
    "setp.neu.f32": ([("f32", [1.0, NAN]), ("f32", [1.0, 1.0])], [0, 1]),
    "setp.equ.f32": ([("f32", [1.0, NAN]), ("f32", [2.0, 1.0])], [0, 1]),
    "setp.num.f32": ([("f32", [1.0, NAN]), ("f32", [2.0, 1.0])], [1, 0]),
    "setp.nan.f32": ([("f32", [1.0, NAN]), ("f32", [2.0, 1.0])], [0, 1]),
    "setp.gt.bf16": ([("u16", [0x4000, 0x3F80]), ("u16", [0x3F80, 0x3F80])], [1, 0]),
}


def operands(count: int) -> str:
    return ", ".join(f"${k}" for k in range(count + 1))


@pytest.mark.parametrize("opcode", [*INTEGERS, *FLOATS, *CONVERSIONS])
def test_results(opcode):
    kind, inputs, results = {**INTEGERS, **FLOATS, **CONVERSIONS}[opcode]
    assert evaluate(f"{opcode} {operands(len(inputs))};", kind, *inputs) == results


@pytest.mark.parametrize("opcode", COMPARISONS)
def test_comparisons(opcode):
    inputs, results = COMPARISONS[opcode]
    assert evaluate(f"{opcode} {operands(len(inputs))};", "pred", *inputs) == results


@pytest.mark.parametrize(
    ("text", "kind", "inputs", "results"),
    [
        ("bfe.u32 $0, $1, 8, 8;", "u32", [("u32", [0x12345678])], [0x56]),
        ("bfe.s32 $0, $1, 4, 4;", "s32", [("u32", [0xF0, 0x70])], [-1, 7]),
        ("bfe.u32 $0, $1, 28, 8;", "u32", [("u32", [0x92345678])], [9]),
        ("bfi.b32 $0, $1, $2, 4, 4;", "u32", [("u32", [0xAF]), ("u32", [0x12345678])],
         [0x123456F8]),
        ("lop3.b32 $0, $1, $2, $3, 150;", "u32",  # exclusive or of three
         [("u32", [0b11110000]), ("u32", [0b11001100]), ("u32", [0b10101010])], [0b10010110]),
        ("lop3.b32 $0, $1, $2, $3, 232;", "u32",  # majority
         [("u32", [0b11110000]), ("u32", [0b11001100]), ("u32", [0b10101010])], [0b11101000]),
        ("lop3.b32 $0, $1, $2, $3, 216;", "u32",  # bit 4 of 216 is 1
         [("u32", [ALL]), ("u32", [0]), ("u32", [0])], [ALL]),
        ("mov.b32 $0, {$1, $2};", "u32", [("u16", [0x1111]), ("u16", [0x2222])], [0x22221111]),
        ("mov.b64 {%r1, $0}, $1;", "u32", [("u64", [2**32 + 5])], [1]),
        ("mov.b64 {$0, %r1}, $1;", "u32", [("u64", [2**32 + 5])], [5]),
        ("mov.b64 $0, {$1, $2};", "u64", [("u32", [5]), ("u32", [1])], [2**32 + 5]),
        ("setp.lt.s32 %p1, $1, 2;\nselp.b32 $0, 10, 20, %p1;", "u32", [("s32", [1, 2])], [10, 20]),
        ("mov.b32 $0, 7;\nsetp.lt.s32 %p1, $1, 2;\n@%p1 mov.b32 $0, 9;", "u32", [("s32", [1, 2])],
         [9, 7]),
        ("mov.b32 $0, 7;\nsetp.lt.s32 %p1, $1, 2;\n@!%p1 add.s32 $0, $0, $1;", "u32",
         [("s32", [1, 2])], [7, 9]),
        ("setp.lt.s32 %p1, $1, 2;\nnot.pred %p2, %p1;\nxor.pred $0, %p2, %p1;", "pred",
         [("s32", [1, 2])], [1, 1]),
        ("mov.b32 %r9, 0f3FC00000;\nadd.f32 $0, %r9, $1;", "f32", [("f32", [1.0])], [2.5]),
    ],
)  # fmt: skip
def test_constants_vectors_and_guards(text, kind, inputs, results):
    assert evaluate(text, kind, *inputs) == results


def test_float_as_integer_register():
    """A register holds bits: a float's are shifted as those of an integer."""
    results = evaluate("shr.u32 $0, $1, 23;", "u32", ("f32", [1.0, 2.0]))
    assert results == [127, 128]


@pytest.mark.parametrize("ulps", [1, 2])
def test_approximate_functions_can_be_off(ulps):
    """By at most so many units in the last place, in both directions, and not always."""
    inputs = [1 + k / 7 for k in range(32)]
    exact = evaluate("rsqrt.approx.f32 $0, $1;", "f32", ("f32", inputs))
    near = evaluate("rsqrt.approx.f32 $0, $1;", "f32", ("f32", inputs), ulps=ulps)
    bits = [[struct.unpack("<i", struct.pack("<f", x))[0] for x in row] for row in (exact, near)]
    off = {b - a for a, b in zip(*bits, strict=True)}
    assert off <= set(range(-ulps, ulps + 1)) and min(off) == -ulps and max(off) == ulps


def test_branches_diverge_and_meet_again():
    """Each thread counts to its number; then all add one."""
    out = torch.zeros(32, dtype=torch.int32)
    state = snippets.run(
        """mov.u32 %r1, 0;
        $L__loop:
        setp.ge.u32 %p1, %r1, %r0;
        @%p1 bra $L__done;
        add.u32 %r1, %r1, 1;
        bra.uni $L__loop;
        $L__done:
        add.u32 %r1, %r1, 1;
        """
        + snippets.at("%d1", "%d2", 4)
        + "st.global.b32 [%d2], %r1;",
        out,
    )
    assert out.tolist() == [n + 1 for n in range(32)] and not state.faults.texts
    assert state.counters.blocks[-1] == 1, "the warp runs the last block once"


def test_guarded_loads_keep_and_guarded_stores_leave():
    x, y = torch.arange(32, dtype=torch.int32), torch.full((32,), -1, dtype=torch.int32)
    snippets.run(
        snippets.at("%d1", "%d3", 4)
        + snippets.at("%d2", "%d4", 4)
        + """setp.lt.u32 %p1, %r0, 4;
        setp.lt.u32 %p2, %r0, 6;
        mov.b32 %r5, 100;
        @%p1 ld.global.b32 %r5, [%d3];
        @%p2 st.global.b32 [%d4], %r5;""",
        x, y,
    )  # fmt: skip
    assert y.tolist() == [0, 1, 2, 3, 100, 100] + [-1] * 26


REFUSED = {
    "atom.global.add.u32 %r1, [%d1], 1;": "atomics",
    "red.global.add.f32 [%d1], 0f3F800000;": "atomics",
    "cp.async.bulk.tensor.2d.shared::cluster.global [%r1], [%d1];": "TMA",
    "mbarrier.init.shared.b64 [%r1], 1;": "TMA",
    "mapa.u64 %d2, %d1, 0;": "clusters",
    "barrier.cluster.arrive;": "clusters",
    "tcgen05.wait::ld.sync.aligned;": "tensor memory",
    "setmaxnreg.inc.sync.aligned.u32 232;": "warp specialisation",
    "vadd4.u32.u32.u32 %r1, %r0, %r0, %r0;": "unknown instruction",
    "add.sat.s32 %r1, %r0, %r0;": "add.sat.s32",
    "fma.rz.f32 %r1, %r0, %r0, %r0;": "fma.rz.f32",
    "shfl.sync.bfly.b32 %r1, %r0, 1, 31, 15;": "shfl.sync.bfly",
    "shfl.sync.bfly.b32 %r1, %r0, 1, 7199, -1;": "a part of a warp",
    "bar.sync 1, 64;": "a barrier of some threads",
    "ldmatrix.sync.aligned.m8n8.x1.trans.trans.shared.b16 {%r1}, [%r0];": "trans.trans",
    "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};": "row.row",
    "ld.global.acquire.gpu.b32 %r1, [%d1];": "ld.global.acquire",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_known_is_refused_by_name(text):
    with pytest.raises(Unsupported, match=REFUSED[text]):
        snippets.run(text, torch.zeros(4, dtype=torch.int32))


def test_clusters_are_refused(monkeypatch):
    clusters = snippets.TEXT.replace(".reqntid", ".reqnctapercluster 2\n.reqntid")
    monkeypatch.setattr(snippets, "TEXT", clusters)
    with pytest.raises(Unsupported, match="clusters of 2 CTAs"):
        snippets.run("")
