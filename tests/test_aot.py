"""Budgets of every kernel, compiled without a GPU; a worse kernel exceeds them."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from cogvx_kernels import _backend, _opinfo

if not _backend.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

from cogvx_kernels._launch import product_options  # noqa: E402
from cogvx_kernels._opinfo import Budget  # noqa: E402
from cogvx_kernels.testing import OPS  # noqa: E402
from cogvx_kernels.tools import aot, options  # noqa: E402
from tests.harness.selection import rest

from .test_tools import run_tool  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


SIZES = sorted({budget.size for info in OPS.values() for budget in info.budgets})


def test_targets_and_sizes_can_be_named_without_torch():
    assert options.TARGETS == tuple(aot.TARGETS)
    assert options.SIZES == tuple(_opinfo.SIZES)


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (target, size) if (target, size[:2]) == ("sm_90", "5b") else rest(target, size)
        for target in aot.TARGETS
        for size in SIZES
    ],
)
def test_every_kernel_is_within_its_budget(target, size):
    """In a new process without the interpreter."""
    done = run_tool("aot", "--target", target, "--size", size, "--json", "-")
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)["kernels"]
    assert [k for k in kernels if k["violations"]] == []
    assert {(k["op"], k["kernel"], k["size"], k["target"]) for k in kernels} == {
        (info.name, budget.kernel, size, target)
        for info in OPS.values()
        for budget in info.budgets
        if budget.size == size
    }


def test_every_op_with_a_kernel_has_budgets():
    assert all(info.budgets for info in OPS.values() if info.launch is not None)


WORSE = {
    # what is done to the kernel -> what its report must complain of
    "odd and even dims apart": (
        "        d = tl.arange(0, 2 * P.HALF)\n"
        "        at = ptr + (rows[:, None] + d.to(tl.int64)[None, :] * stride_dim)\n"
        "        x = tl.load(at, mask=row_mask[:, None] & (d < P.HEADDIM)[None, :], other=0.0)\n"
        "        a, b = tl.split(tl.reshape(x, (rows.shape[0], P.HALF, 2)))\n",
        "        d = 2 * tl.arange(0, P.HALF)\n"
        "        at = ptr + (rows[:, None] + d.to(tl.int64)[None, :] * stride_dim)\n"
        "        mask = row_mask[:, None] & (d < P.HEADDIM)[None, :]\n"
        "        a = tl.load(at, mask=mask, other=0.0)\n"
        "        b = tl.load(at + stride_dim, mask=mask, other=0.0)\n",
        "accesses under 128 bits",
    ),
    "offsets of 32 bits": (
        "    return (batch * x.batch + seq * x.seq + head.to(tl.int64) * x.head) * P.ALIGN",
        "    return ((batch * x.batch + seq * x.seq + head.to(tl.int64) * x.head) * P.ALIGN)"
        ".to(tl.int32)",
        "64 bits cut to 32",
    ),
    "products of 32 bits": (
        "    batch = (token // seqlen).to(tl.int64)",
        "    batch = ((token // seqlen) * 2 // 2).to(tl.int64)",
        "a product of 32 bits",
    ),
    "masked lanes undefined": (
        "sin = tl.load(sin_ptr + at, mask=turning, other=0.0)",
        "sin = tl.load(sin_ptr + at, mask=turning)",
        "a masked load without other=",
    ),
    "fp64 inside": (
        "    return tl.where(turning, a * cos - b * sin, a), ",
        "    a = (a.to(tl.float64) * 1.5).to(tl.float32)\n"
        "    return tl.where(turning, a * cos - b * sin, a), ",
        "fp64 arithmetic",
    ),
    "a tile of 16,384 elements": ("TILE = 1024", "TILE = 16384", "registers"),
}


@pytest.mark.parametrize(
    "what",
    [
        "odd and even dims apart",
        rest("offsets of 32 bits"),
        rest("products of 32 bits"),
        rest("masked lanes undefined"),
        rest("fp64 inside"),
        "a tile of 16,384 elements",
    ],
)
def test_a_worse_kernel_is_over_budget(what, tmp_path):
    """The gate must be able to fail: compile a copy that was made worse."""
    old, new, complaint = WORSE[what]
    package = tmp_path / "cogvx_kernels"
    subprocess.run(["cp", "-r", ROOT / "cogvx_kernels", package], check=True)
    kernel = package / "rope3d" / "kernel.py"
    text = kernel.read_text()
    assert text.count(old) == 1, f"{what}: the text to change is not there once"
    kernel.write_text(text.replace(old, new))
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, '.'); import os; "
         "os.environ.pop('TRITON_INTERPRET', None); from cogvx_kernels.__main__ import main; "
         "sys.exit(main(sys.argv[1:]))", "aot", "--op", "rope3d", "--target", "sm_90",
         "--size", "5b-480x720-49f"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert complaint in done.stderr


@pytest.mark.parametrize(
    ("sass", "widths"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", {128: 1}),
        ("@!P0 LDG.E.U16 R4, [R2]", {16: 1}),
        ("LDG.E R4, [R2] ; LDG.E.64 R4, [R2.64]", {32: 1, 64: 1}),
        ("LDGSTS.E.BYPASS.128 [R1], [R2.64]", {128: 1}),
    ],
)
def test_widths_are_read_from_the_disassembly(sass, widths):
    assert aot.widths(r"\bLDG(?:STS)?((?:\.\w+)*)", sass) == widths


@pytest.mark.parametrize(
    ("access", "bits"),
    [
        ("dwordx4", 128),
        ("dword", 32),
        ("ushort", 16),
        ("ubyte", 8),
        ("short_d16_hi", 16),
        ("b128", 128),
        ("b32", 32),
        ("u16", 16),
        ("d16_hi_b16", 16),
        ("d16_u8", 8),
    ],
)
def test_widths_of_amd_accesses(access, bits):
    """By the names of CDNA (`dwordx4`) and RDNA (`b128`)."""
    assert aot.amd_width(access) == bits


def test_shared_memory_is_held_to_the_target():
    """A GeForce has less than the budget of a kernel may be, with a budget or without."""
    of = partial(aot.Report, "op", "k", "s", registers=1, spills=0, loads={128: 1})
    report = of(target="sm_120", shared=100 * 1024, stores={128: 1}, lint=[])
    message = "shared memory: 102400, at most 101376"
    assert report.violations(None) == [message]
    assert report.violations(Budget("k", "s", registers=64, shared=200 * 1024)) == [message]
    other = of(target="sm_90", shared=100 * 1024, stores={128: 1}, lint=[])
    assert other.violations(Budget("k", "s", registers=64, shared=200 * 1024)) == []


def test_stores_by_element_are_not_held():
    of = partial(aot.Report, "op", "k", "s", "gfx1100", 1, 0, 0, {128: 1}, {16: 64}, [])
    budget = Budget("k", "s", registers=64, shared=0)
    assert of(by_element=True).violations(budget) == []
    assert of().violations(budget) == [
        "accesses under 128 bits: 64, at most 0",
        "no load or no store of 128 bits",
    ]


def test_options_of_a_matrix_product_for_each_target():
    """Two stages fit AMD's shared memory; gfx11 needs more waves and one stage to spill nothing."""
    found = {name: product_options(target, 8, 3) for name, target in aot.TARGETS.items()}
    amd = {"num_warps": 8, "num_stages": 2}
    others = {"gfx942": amd, "gfx1201": amd, "gfx1100": {"num_warps": 16, "num_stages": 1}}
    assert found == dict.fromkeys(aot.TARGETS, {"num_warps": 8, "num_stages": 3}) | others
    assert product_options(None, 8, 3) == {"num_warps": 8, "num_stages": 3}


def test_violations_name_every_limit():
    report = aot.Report(
        "op", "k", "s", "sm_90", 65, 8, 129, {128: 1, 16: 5}, {32: 1}, ["an atomic"]
    )
    messages = report.violations(Budget("k", "s", registers=64, shared=128, narrow=5))
    assert messages == [
        "spills: 8, at most 0",
        "shared memory: 129, at most 128",
        "accesses under 128 bits: 6, at most 5",
        "registers: 65, at most 64",
        "no load or no store of 128 bits",
        "an atomic",
    ]
