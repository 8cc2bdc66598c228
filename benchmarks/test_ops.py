"""For those who use pytest-benchmark: `pytest benchmarks --benchmark-only`.

At `tiny`, so what it times is mostly launches, and on a CPU only one column against another means
anything. The numbers this project shows come from `python -m benchmarks`.
"""

from functools import partial

import pytest
import torch

from cogvx_kernels.testing import OPS, SIZES

from . import inputs
from .providers import PROVIDERS, Unavailable, providers_of

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIMED = [p for p in PROVIDERS if not p.asked and (p.on_cpu or DEVICE.type == "cuda")]


def _finish(call):
    with torch.no_grad():
        outputs = call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return outputs


@pytest.mark.filterwarnings("default")  # of a compiler, on its own code
@pytest.mark.parametrize("provider", TIMED, ids=lambda provider: provider.name)
@pytest.mark.parametrize("info", OPS.values(), ids=str)
def test_forward(benchmark, info, provider):
    benchmark.group = info.name
    convention = next(iter(provider.conventions), inputs.MODEL)
    sample = inputs.conventions(info, SIZES["tiny"]).get(convention)
    if sample is None or provider not in providers_of(info):
        pytest.skip(f"{provider.name} has no such call of {info.name}")
    arguments = inputs.make(sample, torch.float32, DEVICE, 0)
    try:
        call = partial(provider.make(info, arguments), **arguments)
    except Unavailable as reason:
        pytest.skip(str(reason))
    _finish(call)  # compilation is not what is timed
    benchmark(_finish, call)
