"""The mutants of PTX: what each kind makes of a line, and which survivors are explained."""

import pytest

from cogvx_kernels import _backend

if not _backend.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tests import ptx_mutants  # noqa: E402
from tests.ptx_mutants import KINDS, SAMPLES, Mutant, change, explained, unexplained  # noqa: E402

LINES = {
    "a barrier left out": ("bar.sync 0;", ""),
    "a wait for copies left out": ("cp.async.wait_group 2;", ""),
    "a wait for one group of copies fewer": ("cp.async.wait_group 2;", "cp.async.wait_group 3;"),
    "a fence of proxies left out": ("fence.proxy.async.shared::cta;", ""),
    "a wait for products left out": ("wgmma.wait_group.sync.aligned 1;", ""),
    "a wait for one group of products fewer": (
        "wgmma.wait_group.sync.aligned 0;",
        "wgmma.wait_group.sync.aligned 1;",
    ),
    "a product that forgets its sum": (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1}, %d1, %d2, %p3, 1, 1, 0, 1;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1}, %d1, %d2, 0, 1, 1, 0, 1;",
    ),
    "a product's operand not turned": (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1}, %d1, %d2, %p3, 1, 1, 0, 1;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1}, %d1, %d2, %p3, 1, 1, 0, 0;",
    ),
    "an accumulator's registers exchanged": (
        "mma.sync.aligned.m16n8k16 { %r1, %r2, %r3, %r4 }, { %r5 };",
        "mma.sync.aligned.m16n8k16 { %r2, %r1, %r3, %r4 }, { %r5 };",
    ),
    "an ldmatrix transposed or not": (
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r1}, [%r2];",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1}, [%r2];",
    ),
    "an stmatrix transposed or not": (
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r1};",
        "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r2], {%r1};",
    ),
    "a shuffle of the wrong distance": (
        "shfl.sync.bfly.b32 %r1, %r2, 16, 31, -1;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;",
    ),
    "a store off by 2 bytes": (
        "st.global.b32 [ %rd1 + 0 ], { %r1 };",
        "st.global.b32 [ %rd1 + 2 ], { %r1 };",
    ),
    "a load off by 16 bytes": (
        "ld.global.b32 { %r1 }, [ %rd1 + 0 ];",
        "ld.global.b32 { %r1 }, [ %rd1 + 16 ];",
    ),
    "a shared address off by 16 bytes": (
        "st.shared.b32 [ %r1 + 0 ], %r2;",
        "st.shared.b32 [ %r1 + 16 ], %r2;",
    ),
    "a mask of a store ignored": (
        "@%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };",
        "st.global.b32 [ %rd1 + 0 ], { %r1 };",
    ),
    "a copy's size ignored": (
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;",
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;",
    ),
    "halves of a pair exchanged": (
        "cvt.rn.bf16x2.f32 %r1, %r2, %r3;",
        "cvt.rn.bf16x2.f32 %r1, %r3, %r2;",
    ),
    "an exclusive or left out": ("xor.b32 %r1, %r2, 64;", "mov.b32 %r1, %r2;"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_changes_its_line_and_no_other(kind):
    line, mutant = LINES[kind]
    assert change(kind, line) == mutant
    assert change(kind, "add.s32 %r1, %r2, %r3;") is None


def test_survivors_without_an_explanation_are_named():
    mutant = Mutant("sm_80", "rope3d", "text", "kernel", "a barrier left out", 0, "", None)
    assert unexplained([mutant], {mutant.key: {"survivors": 1, "reason": "x"}}) == []
    (text,) = unexplained([mutant] * 2, {mutant.key: {"survivors": 1, "reason": "x"}})
    assert text == f"{mutant.key}: 2 survive, 1 explained"
    assert unexplained([mutant], {}) == [f"{mutant.key}: 1 survive, 0 explained"]


def test_explanations_are_of_mutants_that_there_are():
    for key, entry in explained().items():
        subject, kernel, kind = key.split(": ")
        arch, op, sample = *subject.split(", ")[0].split(" "), subject.split(", ", 1)[1]
        assert (op, sample) in SAMPLES[arch] and kind in KINDS and kernel
        assert entry["survivors"] > 0 and entry["reason"].endswith(".")
    assert set(ptx_mutants.CONDITIONS) <= set(KINDS)
