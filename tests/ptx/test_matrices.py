"""Matrix instructions of the PTX machine against products of integers and layouts of the ISA."""

import pytest
import torch

from .snippets import at, run

# --- ldmatrix and stmatrix -------------------------------------------------------------------


def row_addresses(count: int) -> str:
    """%r1: for lane 8 k + r the shared address of row r of matrix k, of those there are."""
    return f"mov.u32 %r1, global_smem;\nrem.u32 %r2, %r0, {8 * count};\n" \
           "mad.lo.u32 %r1, %r2, 16, %r1;\n"  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(count, trans):
    """Lane 4 r + c holds elements 2 c and 2 c + 1 of row r (transposed: of column r)."""
    x = torch.arange(64 * count, dtype=torch.int16)
    out = torch.zeros(32, count, 2, dtype=torch.int16)
    fill = at("%d1", "%d3", 4 * count) + "mov.u32 %r3, global_smem;\n"
    fill += f"mad.lo.u32 %r3, %r0, {4 * count}, %r3;\n"
    for k in range(count):
        fill += f"ld.global.b32 %r4, [%d3 + {4 * k}];\nst.shared.b32 [%r3 + {4 * k}], %r4;\n"
    registers = [f"%r{10 + k}" for k in range(count)]
    body = fill + "bar.sync 0;\n" + row_addresses(count)
    body += f"ldmatrix.sync.aligned.m8n8.x{count}.{'trans.' if trans else ''}shared.b16 "
    body += f"{{{', '.join(registers)}}}, [%r1];\n" + at("%d2", "%d4", 4 * count)
    for k, register in enumerate(registers):
        body += f"st.global.b32 [%d4 + {4 * k}], {register};\n"
    state = run(body, x, out, shared=128 * count)
    for lane in range(32):
        for k in range(count):
            r, c = lane // 4, 2 * (lane % 4)
            places = [(c, r), (c + 1, r)] if trans else [(r, c), (r, c + 1)]
            assert out[lane, k].tolist() == [64 * k + 8 * i + j for i, j in places]
    assert not state.faults.texts


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix(count, trans):
    """The reverse: what the lanes hold, loaded row by row."""
    x = torch.arange(64 * count, dtype=torch.int16).reshape(32, count, 2)
    out = torch.zeros(count, 8, 8, dtype=torch.int16)
    registers = [f"%r{10 + k}" for k in range(count)]
    body = at("%d1", "%d3", 4 * count) + row_addresses(count)
    for k, register in enumerate(registers):
        body += f"ld.global.b32 {register}, [%d3 + {4 * k}];\n"
    body += f"stmatrix.sync.aligned.m8n8.x{count}.{'trans.' if trans else ''}shared.b16 "
    body += f"[%r1], {{{', '.join(registers)}}};\nbar.sync 0;\n" + at("%d2", "%d4", 4 * count)
    body += f"mov.u32 %r3, global_smem;\nmad.lo.u32 %r3, %r0, {4 * count}, %r3;\n"
    for k in range(count):
        body += f"ld.shared.b32 %r4, [%r3 + {4 * k}];\nst.global.b32 [%d4 + {4 * k}], %r4;\n"
    state = run(body, x, out, shared=128 * count)
    wanted = torch.empty_like(out)
    for lane in range(32):
        for k in range(count):
            r, c = lane // 4, 2 * (lane % 4)
            for e in range(2):
                i, j = (c + e, r) if trans else (r, c + e)
                wanted[k, i, j] = x[lane, k, e]
    assert torch.equal(out, wanted) and not state.faults.texts


def test_ldmatrix_needs_a_barrier_and_aligned_rows():
    x = torch.zeros(64, dtype=torch.int16)
    fill = at("%d1", "%d3", 4) + "mov.u32 %r3, global_smem;\nmad.lo.u32 %r3, %r0, 4, %r3;\n"
    fill += "ld.global.b32 %r4, [%d3];\nst.shared.b32 [%r3], %r4;\n"
    load = row_addresses(1) + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r1"
    assert "read after write" in run(fill + load + "];", x, shared=128).faults.texts[0]
    odd = run(fill + "bar.sync 0;\n" + load + " + 2];", x, shared=256)
    assert "misaligned" in odd.faults.texts[0]
    beyond = run(fill + "bar.sync 0;\n" + load + " + 16];", x, shared=128)
    assert "out of bounds" in beyond.faults.texts[0]


# --- mma.sync: for each register of lane 4 g + t its elements, as in the ISA -----------------


def of_a(k: int, bits: int):
    """(row, column) of the elements of A's registers."""
    each = 32 // bits
    return lambda g, t: [
        [(g + 8 * (r % 2), each * t + e + 4 * each * (r // 2)) for e in range(each)]
        for r in range(2 * (k // (4 * each)))
    ]


def of_b(k: int, bits: int):
    each = 32 // bits
    return lambda g, t: [
        [(each * t + e + 4 * each * r, g) for e in range(each)] for r in range(k // (4 * each))
    ]


def of_c(g: int, t: int):
    return [[(g, 2 * t)], [(g, 2 * t + 1)], [(g + 8, 2 * t)], [(g + 8, 2 * t + 1)]]


def fragments(matrix: torch.Tensor, layout) -> torch.Tensor:
    """Registers of 32 lanes, as int32 (32, registers)."""
    lanes = [
        torch.stack([torch.stack([matrix[i, j] for i, j in r]) for r in layout(n // 4, n % 4)])
        for n in range(32)
    ]
    return torch.stack(lanes).view(torch.int32).reshape(32, -1)


def multiply(shape: str, kind: str, a, b, c) -> torch.Tensor:
    """One mma.sync of fragments, which lanes load and store."""
    bits, k = (32, int(shape[6:])) if kind == "tf32" else (16, int(shape[6:]))
    inputs = [fragments(a, of_a(k, bits)), fragments(b, of_b(k, bits)), fragments(c, of_c)]
    out, body, names = torch.zeros(32, 4, dtype=torch.int32), "", []
    for n, x in enumerate(inputs):
        names.append([f"%r{20 * (n + 1) + j}" for j in range(x.shape[1])])
        body += at(f"%d{n + 1}", "%d9", 4 * x.shape[1])
        for j, name in enumerate(names[-1]):
            body += f"ld.global.b32 {name}, [%d9 + {4 * j}];\n"
    a_, b_, c_ = (f"{{{', '.join(x)}}}" for x in names)
    body += f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {c_}, {a_}, {b_}, {c_};\n"
    body += at("%d4", "%d9", 16)
    for j, name in enumerate(names[2]):
        body += f"st.global.b32 [%d9 + {4 * j}], {name};\n"
    run(body, *inputs, out)
    result = torch.zeros(16, 8)
    for n in range(32):
        for j, ((place,),) in enumerate(zip(of_c(n // 4, n % 4), strict=True)):
            result[place] = out[n].view(torch.float32)[j]
    return result


MMA = {
    ("m16n8k16", "bf16"): torch.bfloat16,
    ("m16n8k16", "f16"): torch.float16,
    ("m16n8k8", "bf16"): torch.bfloat16,
    ("m16n8k8", "f16"): torch.float16,
    ("m16n8k8", "tf32"): torch.float32,
    ("m16n8k4", "tf32"): torch.float32,
}


@pytest.mark.parametrize(("shape", "kind"), MMA)
def test_mma(shape, kind):
    k, dtype = int(shape[6:]), MMA[shape, kind]
    a = (torch.arange(16 * k).reshape(16, k) * 7 % 11 - 5).to(dtype)
    b = (torch.arange(8 * k).reshape(k, 8) * 5 % 13 - 6).to(dtype)
    c = torch.arange(128).reshape(16, 8).float()
    assert torch.equal(multiply(shape, kind, a, b, c), a.float() @ b.float() + c)


def test_sums_of_tensor_cores_are_rounded_towards_zero():
    """1 + 1.5 * 2**-24 lies between 1 and 1 + 2**-23, -1 + 1.5 * 2**-24 between -1 + 2**-24 and
    -1 + 2 * 2**-24."""
    a, b = (torch.zeros(n, dtype=torch.bfloat16) for n in ((16, 16), (16, 8)))
    a[0, 0], b[0, 0] = 1.5, 2.0**-24
    result = multiply("m16n8k16", "bf16", a, b, torch.ones(16, 8))
    assert torch.equal(result, torch.ones(16, 8))
    result = multiply("m16n8k16", "bf16", a, b, -torch.ones(16, 8))
    assert result[0, 0] == -1 + 2.0**-23


def test_tf32_has_ten_bits():
    a, b = torch.zeros(16, 8), torch.zeros(8, 8)
    a[0, 0], b[0, 0] = 1 + 2.0**-10 + 2.0**-11, 1.0
    assert multiply("m16n8k8", "tf32", a, b, torch.zeros(16, 8))[0, 0] == 1 + 2.0**-10


# --- wgmma: where an element of an operand lies in shared memory -----------------------------

# (leading byte offset, stride byte offset, swizzle mode, byte of (row, k))
K_MAJOR = {
    "none": (128, 256, 0, lambda r, k: r // 8 * 256 + k // 8 * 128 + r % 8 * 16 + k % 8 * 2),
    "32 bytes": (16, 256, 3, lambda r, k: r * 32 + (k // 8 ^ r // 4 % 2) * 16 + k % 8 * 2),
    "64 bytes": (16, 512, 2, lambda r, k: r * 64 + (k // 8 ^ r // 2 % 4) * 16 + k % 8 * 2),
    "128 bytes": (16, 1024, 1, lambda r, k: r * 128 + (k // 8 ^ r % 8) * 16 + k % 8 * 2),
}
# the rows are contiguous: 64 of them in a line of 128 bytes, for each k; further rows 4096 bytes on
MN_MAJOR = {
    "128 bytes": (
        4096, 1024, 1,
        lambda r, k: r // 64 * 4096 + k * 128 + (r % 64 // 8 ^ k % 8) * 16 + r % 8 * 2,
    ),
    "64 bytes": (
        2048, 512, 2,
        lambda r, k: r // 32 * 2048 + k * 64 + (r % 32 // 8 ^ k // 2 % 4) * 16 + r % 8 * 2,
    ),
}  # fmt: skip
B_AT = 16384  # of B in shared memory
SHARED = 32768

FILL = (
    "mov.u32 %r1, global_smem;\nmad.lo.u32 %r1, %r0, 16, %r1;\n" + at("%d1", "%d9", 16)
    + "".join(
        f"ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d9 + {n}];\n"
        f"st.shared.v4.b32 [%r1 + {n}], {{%r2, %r3, %r4, %r5}};\n"
        for n in range(0, SHARED, 2048)
    )
)  # fmt: skip
READY = "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
DONE = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"


def image(a: torch.Tensor, b: torch.Tensor, of_a, of_b) -> torch.Tensor:
    """Shared memory with A (64, k) and B (n, k) as the layouts have them."""
    memory = torch.full((SHARED // 2,), float("nan"), dtype=a.dtype)
    for matrix, layout, first in ((a, of_a, 0), (b, of_b, B_AT)):
        for r in range(matrix.shape[0]):
            for k in range(matrix.shape[1]):
                memory[(first + layout[3](r, k)) // 2] = matrix[r, k]
    return memory


def descriptor(layout, start: int) -> int:
    leading, stride, mode, _ = layout
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def wgmma(n: int, kind: str, a: str, b: int, keep: int, turned: str) -> str:
    """One product into %r100, %r101, ..."""
    sums = ", ".join(f"%r{100 + j}" for j in range(n // 2))
    return (
        f"mov.b64 %d6, {b};\nsetp.ne.s32 %p1, {keep}, 0;\nwgmma.fence.sync.aligned;\n"
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{sums}}}, {a}, %d6, %p1, "
        f"1, 1, {turned};\n"
    )


def store(n: int) -> str:
    text = at("%d2", "%d9", 2 * n)
    return text + "".join(f"st.global.b32 [%d9 + {4 * j}], %r{100 + j};\n" for j in range(n // 2))


def product(out: torch.Tensor, n: int) -> torch.Tensor:
    """The (64, n) sums in the registers of 128 threads."""
    result = torch.zeros(64, n)
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for j in range(n // 2):
            row, column = 16 * warp + g + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * t + j % 2
            result[row, column] = out[thread, j]
    return result


def integers(rows: int, columns: int, factor: int, dtype=torch.bfloat16) -> torch.Tensor:
    return (torch.arange(rows * columns).reshape(rows, columns) * factor % 11 - 5).to(dtype)


@pytest.mark.parametrize("swizzle", K_MAJOR)
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_wgmma_of_operands_with_contiguous_k(swizzle, kind):
    """Two products into one sum, the second further along K where the line is long enough."""
    dtype, layout, n = {"bf16": torch.bfloat16, "f16": torch.float16}[kind], K_MAJOR[swizzle], 16
    steps = 2 if "128" in swizzle or "64" in swizzle else 1
    a, b = integers(64, 16 * steps, 7, dtype), integers(n, 16 * steps, 5, dtype)
    out = torch.zeros(128, n // 2)
    body = FILL + READY
    for step in range(steps):
        body += f"mov.b64 %d5, {descriptor(layout, 32 * step)};\n"
        body += wgmma(n, kind, "%d5", descriptor(layout, B_AT + 32 * step), step, "0, 0")
    state = run(body + DONE + store(n), image(a, b, layout, layout), out, threads=128,
                shared=SHARED)  # fmt: skip
    assert torch.equal(product(out, n), a.float() @ b.float().T)
    assert not state.faults.texts


@pytest.mark.parametrize(("swizzle", "n"), [("128 bytes", 128), ("64 bytes", 64)])
def test_wgmma_of_operands_with_contiguous_rows(swizzle, n):
    layout, a, b = MN_MAJOR[swizzle], integers(64, 16, 7), integers(n, 16, 5)
    out = torch.zeros(128, n // 2)
    body = FILL + READY + f"mov.b64 %d5, {descriptor(layout, 0)};\n"
    body += wgmma(n, "bf16", "%d5", descriptor(layout, B_AT), 0, "1, 1") + DONE + store(n)
    state = run(body, image(a, b, layout, layout), out, threads=128, shared=SHARED)
    assert torch.equal(product(out, n), a.float() @ b.float().T)
    assert not state.faults.texts


def test_wgmma_of_registers():
    """A as fragments of m16n8k16, of each warp."""
    layout, a, b, n = K_MAJOR["128 bytes"], integers(64, 16, 7), integers(16, 16, 5), 16
    held = torch.cat([fragments(x, of_a(16, 16)) for x in a.split(16)])
    out = torch.zeros(128, n // 2)
    body = FILL + READY + at("%d3", "%d9", 16)
    body += "".join(f"ld.global.b32 %r{20 + j}, [%d9 + {4 * j}];\n" for j in range(4))
    body += wgmma(n, "bf16", "{%r20, %r21, %r22, %r23}", descriptor(layout, B_AT), 0, "0")
    state = run(body + DONE + store(n), image(a, b, layout, layout), out, held, threads=128,
                shared=SHARED)  # fmt: skip
    assert torch.equal(product(out, n), a.float() @ b.float().T)
    assert not state.faults.texts


FENCE, BARRIER = READY.splitlines(keepends=True)
COPIED = (
    FILL.replace("ld.global.v4.b32", "// ").replace("st.shared.v4.b32", "// ")
    + "".join(
        f"cp.async.cg.shared.global [%r1 + {n}], [%d9 + {n}], 16;\n" for n in range(0, SHARED, 2048)
    )
    + "cp.async.commit_group;\n"
)  # fmt: skip
WAIT = "cp.async.wait_group 0;\n"
OVERWRITE = "st.shared.b32 [%r1], %r0;\n"


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        (FILL + FENCE + BARRIER, DONE, None),
        (FILL + BARRIER + FENCE, DONE, None),
        (FILL + FENCE, DONE, "no barrier between"),
        (FILL + BARRIER, DONE, "without a fence.proxy.async"),
        (COPIED + WAIT + FENCE + BARRIER, DONE, None),
        (COPIED + WAIT + BARRIER + FENCE, DONE, None),
        (COPIED + WAIT + BARRIER, DONE, "without a fence.proxy.async"),
        (COPIED + FENCE + WAIT + BARRIER, DONE, "without a fence.proxy.async"),
        (COPIED + FENCE + BARRIER, DONE + WAIT, "still writing"),
        (FILL + READY, DONE + BARRIER + OVERWRITE, None),
        (FILL + READY, BARRIER + OVERWRITE + DONE, "may still be reading"),
        (FILL + READY, "add.f32 %r9, %r100, %r100;\n" + DONE, "read before a wait"),
    ],
)
def test_what_must_stand_around_a_wgmma(before, after, fault):
    layout, a, b = K_MAJOR["128 bytes"], integers(64, 16, 7), integers(8, 16, 5)
    body = before + f"mov.b64 %d5, {descriptor(layout, 0)};\n"
    body += wgmma(8, "bf16", "%d5", descriptor(layout, B_AT), 0, "0, 0") + after
    texts = run(body, image(a, b, layout, layout), threads=128, shared=SHARED).faults.texts
    assert (fault in " | ".join(texts)) if fault else not texts


def test_races_are_not_looked_for_where_no_cta_is_watched():
    layout, a, b, out = (
        K_MAJOR["128 bytes"],
        integers(64, 16, 7),
        integers(8, 16, 5),
        torch.zeros(128, 4),
    )
    body = FILL + f"mov.b64 %d5, {descriptor(layout, 0)};\n"
    body += wgmma(8, "bf16", "%d5", descriptor(layout, B_AT), 0, "0, 0") + READY + DONE + store(8)
    state = run(body, image(a, b, layout, layout), out, threads=128, shared=SHARED, watched=0)
    assert torch.equal(product(out, 8), a.float() @ b.float().T)
    assert not state.faults.texts
