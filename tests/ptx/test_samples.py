"""The compiled code of the kernels, executed on a CPU and compared with the references."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogvx_kernels import _backend

ROOT = Path(__file__).resolve().parents[2]

if not _backend.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)


def compiled(code: str) -> str:
    """Output of Python code in a process without the interpreter."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=kept
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_op_and_its_gradients_meet_the_rule():
    output = compiled("""
import torch
from cogvx_kernels.ptx.samples import run_sample
from cogvx_kernels.testing import OPS
info = OPS["qk_norm_rope3d"]
result = run_sample(info, info.samples[0], torch.bfloat16, 90)
print(*(c.name for c in result.comparisons))
print(*(x.name for x in result.launches))
print(result.missed, result.faults, result.classes["shfl"] > 0)
""")
    tensors, kernels, outcome = output.splitlines()
    assert {"out0", "out1", "dq", "dk"} <= set(tensors.split())
    assert kernels == "_rope3d_fwd_kernel _qk_norm_rope3d_bwd_kernel"
    assert outcome == "[] [] True"
