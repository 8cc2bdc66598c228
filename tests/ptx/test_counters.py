"""Counters of compiled kernels at a model's size, their budgets, and the model of four cards."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvx_kernels import _backend

if not _backend.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

from cogvx_kernels.ptx import budgets, cards, classes
from cogvx_kernels.ptx.batch import Run
from cogvx_kernels.ptx.budgets import Key
from cogvx_kernels.ptx.cards import CARDS, Card, Counts
from cogvx_kernels.ptx.counters import Counters, Faults
from cogvx_kernels.ptx.memory import Memory
from cogvx_kernels.ptx.parse import parse
from cogvx_kernels.ptx.translate import Program
from cogvx_kernels.testing import OPS
from cogvx_kernels.tools import counters as counters_tool
from cogvx_kernels.tools import options
from tests.harness.selection import rest
from tests.test_tools import run_tool

from . import snippets

ROOT = Path(__file__).resolve().parents[2]
FEW = ("rope3d", "expert_adaln", "residual_moments")
ELEMENTWISE = (*FEW, "qk_norm_rope3d", "gated_residual", "gated_residual_adaln")


@pytest.mark.parametrize(
    ("ops", "target"),
    [
        (FEW, "sm_90"),
        *(
            rest(ops, target)  # the longest first, so that each is in a part of its own
            for ops in (("expert_ffn",), ("temporal_conv",), ("spatial_norm_silu",), ELEMENTWISE)
            for target in budgets.TARGETS
        ),
    ],
)
def test_counters_are_within_budget(ops, target):
    """In a new process, without the interpreter."""
    done = run_tool("counters", "--target", target, *(f"--op={op}" for op in ops))
    assert done.returncode == 0, done.stderr


def test_a_worse_kernel_is_over_budget(tmp_path):
    """Compile and count a copy that loads odd and even dims apart."""
    subprocess.run(["cp", "-r", ROOT / "cogvx_kernels", tmp_path / "cogvx_kernels"], check=True)
    kernel = tmp_path / "cogvx_kernels" / "rope3d" / "kernel.py"
    old = (
        "        d = tl.arange(0, 2 * P.HALF)\n"
        "        at = ptr + (rows[:, None] + d.to(tl.int64)[None, :] * stride_dim)\n"
        "        x = tl.load(at, mask=row_mask[:, None] & (d < P.HEADDIM)[None, :], other=0.0)\n"
        "        a, b = tl.split(tl.reshape(x, (rows.shape[0], P.HALF, 2)))\n"
    )
    new = (
        "        d = 2 * tl.arange(0, P.HALF)\n"
        "        at = ptr + (rows[:, None] + d.to(tl.int64)[None, :] * stride_dim)\n"
        "        mask = row_mask[:, None] & (d < P.HEADDIM)[None, :]\n"
        "        a = tl.load(at, mask=mask, other=0.0)\n"
        "        b = tl.load(at + stride_dim, mask=mask, other=0.0)\n"
    )
    text = kernel.read_text()
    assert text.count(old) == 1
    kernel.write_text(text.replace(old, new))
    code = (
        "import os, sys; sys.path.insert(0, '.'); os.environ.pop('TRITON_INTERPRET', None)\n"
        "from cogvx_kernels.__main__ import main\nif __name__ == '__main__':\n"
        "    sys.exit(main(['counters', '--op', 'rope3d', '--target', 'sm_90']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "_rope3d_fwd_kernel 1: sectors: " in done.stderr


def test_targets_can_be_named_without_torch():
    assert options.COUNTED == budgets.TARGETS


def test_every_launch_has_a_budget_on_every_target():
    kept = budgets.load()
    wanted = {
        (info.name, budgets.SIZE, convention, target)
        for info in OPS.values()
        if info.launch is not None
        for convention in budgets.conventions(info)
        for target in budgets.TARGETS
    }
    assert {key[:4] for key in kept} == wanted
    for target in budgets.TARGETS:
        assert {k._replace(target=target) for k in kept} == set(kept) - {
            k for k in kept if k.target != target
        }


def test_budgets_are_read_as_written(tmp_path):
    copy = tmp_path / "counters.csv"
    budgets.write(budgets.load(), copy)
    assert copy.read_bytes() == budgets.PATH.read_bytes()


def counts(**other: float) -> Counts:
    return Counts(*("forward" if name == "direction" else other.get(name, 0.0)
                    for name in Counts._fields))  # fmt: skip


def test_growth_of_over_5_percent_is_named():
    kept, key = counts(sectors=1e6, slots=1e7), Key("op", "size", "", "sm_90", "k", 1)
    now = counts(sectors=1.06e6, slots=1.04e7)
    assert budgets.worse(kept, now) == ["sectors: 1.06e+06, budget 1e+06 and 5 %"]
    assert budgets.compare({key: kept}, {key: now})[0].startswith("op size sm_90 k 1: sectors")
    assert budgets.compare({key: kept}, {key: kept}) == []
    assert "no budget" in budgets.compare({}, {key: now})[0]
    assert budgets.worse(counts(slots=100), counts(slots=1000)) == []  # well under a microsecond


CARD = Card("card", "sm_90", sms=100, clock=1e9, hbm=1e12, l2=2e12, mma=1e14, wgmma=2e14, fp32=2)


@pytest.mark.parametrize(
    ("given", "part", "seconds"),
    [
        ({"bytes": 3e9}, "HBM", 3e-3),
        ({"sectors": 1e9}, "L2", 16e-3),  # 32 GB
        ({"slots": 4e11}, "issue", 1.0),
        ({"float_slots": 4e11}, "fp32", 2.0),
        ({"int_slots": 4e11}, "int", 2.0),
        ({"mufu": 1e11}, "MUFU", 2.0),
        ({"wavefronts": 2e11, "shuffles": 1e11, "accesses": 1e11}, "LSU", 4.0),
        ({"mma": 1e14, "wgmma": 1e14}, "tensor", 1.5),
    ],
)
def test_the_busiest_part_bounds_a_launch(given, part, seconds):
    assert cards.bound(counts(**given), CARD) == (part, pytest.approx(seconds))


def test_cards_are_complete():
    assert [card.name for card in CARDS] == ["H200", "H100", "A100", "4090"]
    numbers = [f.name for f in fields(Card) if f.name not in ("name", "target", "wgmma")]
    assert all(getattr(card, name) > 0 for card in CARDS for name in numbers)


# CTAs below 3 loop 4 times, others once; the store of the last CTA is masked.
LOOPS = """
.visible .entry f(.param .u64 p0) .reqntid 64
{
.reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %d<4>;
mov.u32 %r1, %ctaid.x;
setp.lt.u32 %p1, %r1, 3;
selp.b32 %r2, 4, 1, %p1;
setp.lt.u32 %p2, %r1, 999;
ld.param.b64 %d1, [p0];
mul.wide.u32 %d2, %r1, 4;
add.s64 %d3, %d1, %d2;
$L0:
add.u32 %r2, %r2, -1;
setp.ne.u32 %p3, %r2, 0;
@%p3 bra $L0;
@%p2 st.global.b32 [%d3], %r1;
ret;
}
"""


def run_of(text: str, grid: int) -> Run:
    program = Program(parse(text))
    return Run(program, {"p0": np.zeros((1, 1), np.uint64)}, Memory([], True), 0, (grid, 1, 1),
               Counters(program), Faults(program))  # fmt: skip


def test_ctas_are_sampled_by_the_work_they_do():
    """Three CTAs of 1,000 loop, one stores nothing: each class stands for its number."""
    run = run_of(LOOPS, 1000)
    hashes, slots = classes.work(run, np.arange(1000))
    assert len({*hashes}) == 3 and {*hashes[:3]} & {*hashes[3:]} == set()
    assert hashes[999] not in hashes[:999] and slots[0] > slots[3]
    chosen = classes.choose(run, 4)
    assert {(frozenset(hashes[n]), times * len(n)) for n, times in chosen} == {
        (frozenset([hashes[0]]), 3.0),
        (frozenset([hashes[3]]), 996.0),
        (frozenset([hashes[999]]), 1.0),
    }
    two = classes.choose(run, 2)  # without a sample of its own: the class with the least work
    assert [times * len(n) for n, times in two] == [997.0, 3.0]


def test_control_flow_that_depends_on_data_has_no_classes():
    text = LOOPS.replace("selp.b32 %r2, 4, 1, %p1;", "ld.global.b32 %r2, [%d3];")
    run = run_of(text, 1000)
    assert classes.work(run, np.arange(8)) is None
    (spread,) = classes.choose(run, 4)
    assert len(spread[0]) == 4 and spread[1] == 250


def test_a_small_grid_is_executed_whole():
    ((numbers, times),) = classes.choose(run_of(LOOPS, 3), 4)
    assert numbers.tolist() == [0, 1, 2] and times == 1


def test_what_is_loaded_and_stored_counts_twice():
    """Of three tensors of 128 bytes: changed in place, stored, not touched by the CTA that ran."""
    tensors = [torch.zeros(32, dtype=torch.int32) for _ in range(3)]
    state = snippets.run(
        "ld.global.b32 %r1, [%d1];\nst.global.b32 [%d1], %r1;\nst.global.b32 [%d2], %r1;", *tensors
    )
    assert state.memory.footprint == 4 * 128


def test_the_page_has_the_predicted_times():
    page = counters_tool.PAGE.read_text()
    assert counters_tool.refreshed(page) == page
    assert budgets.predictions(budgets.load())[-1] in page and budgets.assumptions()[-1] in page
