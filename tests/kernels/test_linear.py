"""`linear`: the linear layers of a model, on a CPU by oneDNN."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx_kernels.linear import linear

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()),
    reason="needs oneDNN, and MKL to replace",
)


class Ops(TorchDispatchMode):
    """Names of the torch ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def by_onednn(layer, x, gelu=False):
    with Ops() as ops:
        linear(layer, x, gelu)
    return "mkldnn::_linear_pointwise" in ops.names


@needs_onednn
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_are_those_of_the_layer(gelu, bias):
    layer, x = nn.Linear(40, 56, bias=bias), 3 * torch.randn(2, 70, 40)
    with torch.no_grad():
        assert by_onednn(layer, x, gelu)
        out = linear(layer, x, gelu)
        theirs, fp64 = layer(x), layer.double()(x.double())
        if gelu:
            theirs, fp64 = (F.gelu(z, approximate="tanh") for z in (theirs, fp64))
    errors = [(z - fp64).abs().max() for z in (out, theirs)]
    assert errors[0] <= 2 * errors[1] and out.shape == fp64.shape


@needs_onednn
def test_what_is_no_plain_layer_in_fp32_is_called():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x = torch.randn(2, 3, 8)
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    layers = {
        "a subclass": (Adapted(8, 8), x),
        "a hook": (hooked, x),
        "bf16": (nn.Linear(8, 8).bfloat16(), x.bfloat16()),
        "no rows": (nn.Linear(8, 8), x[:, :0]),
        "strides": (nn.Linear(8, 8), x.transpose(0, 1)),
    }
    for what, (layer, argument) in layers.items():
        with torch.no_grad():
            assert not by_onednn(layer, argument), what
            assert torch.equal(linear(layer, argument), layer(argument)), what
    plain = nn.Linear(8, 8)
    with torch.no_grad():
        assert by_onednn(plain, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not by_onednn(plain, x)
    linear(plain, x, gelu=True).sum().backward()
    assert plain.weight.grad is not None
