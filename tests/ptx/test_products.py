"""fp32 products of expert_ffn as they are compiled, at the widths of a model."""

import os
import subprocess
import sys

import pytest

from cogvx_kernels import _backend
from tests.harness.selection import rest
from tests.test_tools import ROOT

if not _backend.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

CODE = """
import torch
from cogvx_kernels.expert_ffn.opinfo import _sample
from cogvx_kernels.ptx.launch import executing
from cogvx_kernels.ptx.samples import run_sample
from cogvx_kernels.testing import OPS
info, rows, dim, ffn_dim = OPS["expert_ffn"], ROWS, DIM, FFN_DIM
sample = _sample(
    "wide", text_len=0, video_len=rows, dim=dim, ffn_dim=ffn_dim, experts=1, biases=""
)
result = run_sample(info, sample, torch.float32, 90, counting=False)
print([c.name for c in result.comparisons], *result.missed, *result.faults)
x = torch.ones(1, rows, dim)
x[..., 0] = 2**24
up, down = torch.ones(1, ffn_dim, dim), torch.eye(dim, ffn_dim)[None]
with executing(90, counting=False):
    y = info.op(x, up, None, down, None, backend="kernel")
print((y[..., :ffn_dim] - 2**24).unique().tolist())
"""


@pytest.mark.parametrize(
    ("rows", "dim", "ffn_dim"),
    [(16, 128, 64), rest(16, 3072, 64), rest(16, 64, 12288), rest(3072, 64, 32)],
)
def test_fp32_is_no_chain_of_fma(rows, dim, ffn_dim):
    """It meets the rule, forward and backward, and loses only what is added in one step.

    Next to 2**24 a chain loses every 1; a sum of its own for each step of 32 those of the first.
    """
    code = CODE.replace("FFN_DIM", str(ffn_dim)).replace("DIM", str(dim))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code.replace("ROWS", str(rows))],
        cwd=ROOT, capture_output=True, text=True, env=kept,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "['out0', 'dx', 'dup', 'ddown']",
        f"[{float(dim - 32)}]",
    ], done.stderr
