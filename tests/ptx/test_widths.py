"""Products of the compiled code in fp32 at the width of a model: the interpreter adds otherwise."""

import os
import subprocess
import sys

import pytest

from cogvx_kernels import _backend
from tests.harness.selection import rest
from tests.test_tools import ROOT

if not _backend.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)


@pytest.mark.parametrize("channels", [160, rest(512)])
def test_temporal_conv_at_many_channels(channels):
    """Its sum over 3 taps of all channels, forward and backward, within the rule of all kernels.

    As one chain of fma its error was over it. A few pixels, in a process without the interpreter.
    """
    code = """
import torch
from cogvx_kernels._opinfo import Sample, TensorSpec
from cogvx_kernels.ptx.samples import run_sample
from cogvx_kernels.testing import OPS
video = {"x": 1, "cache": 2}
specs = {n: TensorSpec((1, CHANNELS, f, 1, 3), layout="channels_last") for n, f in video.items()}
weight, bias = TensorSpec((CHANNELS, CHANNELS, 3), "matrix"), TensorSpec((CHANNELS,), "few")
specs |= {"weight": weight, "bias": bias}
sample = Sample("many channels", {**specs, "stride": 1, "start": None})
result = run_sample(OPS["temporal_conv"], sample, torch.float32, 90, counting=False)
print(len(result.launches), len(result.comparisons), *map(str, result.missed), *result.faults)
"""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code.replace("CHANNELS", str(channels))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=kept,
    )
    assert done.stdout == "3 5\n", done.stdout + done.stderr
