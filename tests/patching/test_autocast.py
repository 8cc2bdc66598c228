"""`patch` under `torch.autocast`: the dtype of the model, and an error within tolerance."""

import pytest
import torch

import cogvx_kernels as ck
from tests.patching.every import EVERY
from tests.patching.small import relative

pytestmark = [
    # Mochi turns autocast to fp32, which a CPU does not have and the angles do not need.
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    # Torch's own RMS norm of 16-bit tokens with weights in fp32, as autocast makes them.
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", EVERY)
def test_patched_model_under_autocast_error(name, mode, dtype):
    model, x, f = EVERY[name]()
    with torch.no_grad():
        fp64 = f(x).double()
        with torch.autocast("cpu", dtype):
            theirs = f(x)
            with ck.patched(model, mode=mode) as report:
                ours = f(x)
    assert ours.dtype == theirs.dtype == dtype
    assert relative(ours, fp64) <= 2 * relative(theirs, fp64)
    assert any(row.calls for row in report.rows)


@pytest.mark.parametrize(
    "name", ["CogVideoX 5B", "CogVideoX decoder", "Wan", "HunyuanVideo", "Mochi"]
)
def test_gradient_dtypes_under_autocast(name):
    model, x, f = EVERY[name]()

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = f(x)
        out.float().square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    theirs = gradients()
    ck.patch(model)
    ours = gradients()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
    error = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    size = sum(float(theirs[name].square().sum()) for name in theirs)
    assert error**0.5 <= 5e-2 * size**0.5
