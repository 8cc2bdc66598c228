"""For users of pytest-benchmark: `pytest benchmarks --benchmark-only`.

The forward of every op at size `tiny`, so mostly launches; on a CPU, compare columns only.
`python -m benchmarks` measures more, and compares results first.
"""

import pytest
import torch

from cogvx_kernels.testing import OPS

from . import ops  # noqa: F401 - registers
from .registry import BENCHMARKS, Options, providers_of

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIMED = [
    (op, provider.name)
    for op, info in OPS.items()
    for provider in providers_of(info)
    if not provider.optional and (provider.on_cpu or DEVICE.type == "cuda")
]


def finish(call):
    outputs = call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return outputs


@pytest.mark.filterwarnings("default")  # of a compiler, on its own code
@pytest.mark.parametrize(("op", "provider"), TIMED)
def test_forward(benchmark, op, provider):
    benchmark.group = op
    options = Options(torch.float32, DEVICE, passes=("forward",), providers=("eager", provider))
    case = next(iter(BENCHMARKS[op].cases(options)))
    entries = {entry.name: entry for entry in case.entries}
    if provider not in entries:
        pytest.skip(case.left_out.get(provider, "not for this call"))
    [call] = entries[provider].calls("forward", 1)
    finish(call)  # compilation is not what is timed
    benchmark(finish, call)
