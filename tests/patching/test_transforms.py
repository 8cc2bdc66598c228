"""`patch` and tensors that hold more than their storage: transforms of `torch.func`, forward-mode
derivatives and tensor subclasses go through the model's own forward, bit for bit."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.two_tensor import TwoTensor

import cogvx_kernels as ck
from tests.patching.every import EVERY
from tests.patching.small import inputs, transformer

pytestmark = [
    # Mochi turns autocast to fp32, which a CPU does not have and the angles do not need.
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    # Torch's own, where forward-mode derivatives decompose an operation.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    # Torch batches the upsampling of Wan's decoder one by one, with a warning.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


def jvp(f, x):
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def vmap(f, x):
    return torch.vmap(f)(torch.stack([x, 2 * x]))


def grad(f, x):
    return torch.func.grad(lambda x: f(x).square().sum())(x)


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def functionalize(f, x):
    return torch.func.functionalize(f)(x)


def subclass(f, x):
    out = f(TwoTensor(x, 2 * x))
    return torch.stack([out.a, out.b])


# Their own forward writes masks in place, which `functionalize` does not allow.
IN_PLACE = ["HunyuanVideo", "HunyuanVideo I2V", "FramePack"]


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("transform", [jvp, vmap, grad, dual, functionalize, subclass])
@pytest.mark.parametrize("name", EVERY)
def test_transforms_of_a_patched_model(name, transform, mode):
    model, x, f = EVERY[name]()
    if transform is functionalize and name in IN_PLACE:
        with pytest.raises(RuntimeError, match="mutating a non-functional tensor"):
            transform(f, x)
        return
    # Flash attention has no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(transform is grad):
        wanted = transform(f, x)
        with ck.patched(model, mode=mode) as report:
            found = transform(f, x)
    assert wanted.any() and torch.equal(found, wanted)
    assert not any(row.calls for row in report.rows)
    assert any(row.fallbacks for row in report.rows)


@pytest.mark.parametrize("transform", [jvp, vmap])
def test_transforms_of_one_weight(transform):
    """A norm in the second block: all before it is computed with plain tensors."""
    model = transformer()
    arguments, weight = inputs(model, batch=1), model.transformer_blocks[1].norm1.norm.weight

    def f(weight):
        weights = {"transformer_blocks.1.norm1.norm.weight": weight}
        return functional_call(model, weights, (), arguments).sample

    with sdpa_kernel(SDPBackend.MATH):
        wanted = transform(f, weight.detach())
        ck.patch(model)
        assert torch.equal(transform(f, weight.detach()), wanted)


def test_calls_after_a_transform_run_the_ops():
    model, x, f = EVERY["CogVideoX 5B"]()
    report = ck.patch(model)
    with sdpa_kernel(SDPBackend.MATH):
        vmap(f, x)
    f(x)
    assert [(row.calls, row.hit) for row in report.rows] == [(4, 4), (2, 2)]
    assert all(
        next(iter(row.fallbacks)).startswith("a torch.func transform") for row in report.rows
    )
