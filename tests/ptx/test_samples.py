"""The compiled code of the kernels, executed on a CPU and compared with the references."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from cogvx_kernels import _backend

if not _backend.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

from cogvx_kernels.testing import OPS  # noqa: E402
from cogvx_kernels.tools import options, ptx  # noqa: E402
from tests.harness.selection import rest  # noqa: E402
from tests.test_tools import ROOT, run_tool  # noqa: E402


def test_architectures_and_dtypes_can_be_named_without_torch():
    assert options.ARCHES == tuple(ptx.ARCHES) and options.DTYPES == tuple(ptx.DTYPES)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        (arch, dtype) if (arch, dtype) == ("sm_90", "bf16") else rest(arch, dtype)
        for arch in ptx.ARCHES
        for dtype in ptx.DTYPES
    ],
)
def test_every_kernel_forward_and_backward(arch, dtype):
    """In a new process without the interpreter; wgmma among them on sm_90, mma.sync elsewhere."""
    words = ("--quick", "--arch", arch, "--dtype", dtype, "--jobs", "1", "--json", "-")
    done = run_tool("ptx", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    executed = {(row["op"], kernel) for row in rows for kernel in row["kernels"]}
    assert executed >= {(op, b.kernel) for op, info in OPS.items() for b in info.budgets
                        if info.launch}  # fmt: skip
    total = Counter()
    for row in rows:
        total.update(row["classes"])
    if dtype != "fp32":
        assert total["mma"] and (total["wgmma"] > 0) == (arch == "sm_90")
    assert total["cp.async"] and total["shfl"] and total["sync"]


def test_a_few_ctas_at_the_size_of_a_model():
    """On meta tensors: addresses, masks and counters are real, values made up."""
    code = """
import torch
from cogvx_kernels.ptx.launch import executing
from cogvx_kernels.rope3d import kernel
from cogvx_kernels.testing import OPS, SIZES, materialize
info, launches = OPS["rope3d"], []
sample = info.at_size(SIZES["5b-480x720-49f"])
with executing(90, done=launches.append, dry=True, ctas=lambda total: [0, total // 2, total - 1]):
    info.launch(kernel, materialize(sample, torch.bfloat16, device="meta"))
(launch,) = launches
stores = [(x.units, x.least, x.bytes) for x, i in
          zip(launch.counters.sites, launch.program.sites) if i.base == "st"]
print(launch.counters.ctas, launch.grid[0] > 1000, launch.faults, launch.footprint > 10**8)
print(all(units == least for units, least, _ in stores), sum(b for *_, b in stores) > 0)
"""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=kept
    )
    assert done.stdout.split("\n")[:2] == ["3 True [] True", "True True"], done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--op", "nonsense"), "invalid choice: 'nonsense'"),
        (("--arch", "sm_70"), "invalid choice: 'sm_70'"),
        (("--jobs", "0"), "must be 1 or more; got 0"),
        (("--op", "rope3d", "--sample", "nonsense"), "no sample has 'nonsense'; there are: "),
        (("--op", "frame_cache_join"), "its kernel is not Triton's"),
    ],
)
def test_wrong_options(words, message, capsys, monkeypatch):
    monkeypatch.setattr(_backend, "INTERPRETED", False)
    try:
        status = ptx.main(list(words))
    except SystemExit as error:  # by argparse
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


def test_the_interpreter_compiles_nothing(capsys, monkeypatch):
    monkeypatch.setattr(_backend, "INTERPRETED", True)
    assert ptx.main([]) == 2 and "unset TRITON_INTERPRET" in capsys.readouterr().err
