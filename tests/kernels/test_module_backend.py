"""`module_backend`: the backend of modules, fixed when they are constructed."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cogvx_kernels as ck
from cogvx_kernels import _backend


@pytest.fixture
def used(monkeypatch):
    """The backends that ops were called with, in order; on a CPU each runs the reference."""
    seen = []

    def choose(backend, op, reason, x):
        seen.append(backend)
        return False

    monkeypatch.setattr(_backend, "choose", choose)
    return seen


def norm(backend):
    with ck.module_backend(backend):
        return ck.ExpertAdaLayerNorm(8)


def run(module, x):
    shift = x.mean(1)
    return module(x, shift, shift)


def test_a_module_keeps_the_backend_of_its_construction(used):
    with ck.module_backend("reference"):
        first = ck.RoPE3D()
        with ck.module_backend("kernel"):
            second = nn.Sequential(ck.ExpertFFN(8, 16), ck.TemporalConv(4, 4, 3))
        with ck.module_backend(None):
            third = ck.FrameCacheJoin()
        with pytest.raises(KeyError), ck.module_backend("kernel"):
            raise KeyError
        run(norm("kernel"), torch.randn(1, 3, 8))
        fourth = ck.SpatialNormSiLU(2, 4)
    modules = (first, *second, third, fourth, ck.QKNormRoPE3D(8))
    assert [module.backend for module in modules] == [
        "reference", "kernel", "kernel", "reference", "reference", "auto"
    ]  # fmt: skip
    assert used == ["kernel"]
    assert repr(first) == "RoPE3D(interleaved=True, backend='reference')"


def test_an_unknown_backend_is_refused():
    wanted = 'module_backend: backend must be one of "auto", "kernel", "reference"; got'
    with pytest.raises(ValueError, match=wanted), ck.module_backend("triton"):
        pass
    assert ck.RoPE3D().backend == "auto"


def test_other_threads_have_their_own():
    with ThreadPoolExecutor(1) as thread, ck.module_backend("reference"):
        assert thread.submit(lambda: ck.RoPE3D().backend).result() == "auto"
        assert thread.submit(lambda: norm("kernel").backend).result() == "kernel"
        assert ck.RoPE3D().backend == "reference"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_the_backend_of_the_original(duplicate):
    module = norm("reference")
    with ck.module_backend("kernel"):
        assert duplicate(module).backend == "reference"
        module.load_state_dict(norm("auto").state_dict())
    assert module.backend == "reference"


def test_modules_of_two_backends_compile_as_one_graph(used):
    """And a module that the compiled function itself constructs."""
    first, second = norm("reference"), norm("kernel")

    def both(x):
        with ck.module_backend("reference"):
            third = ck.RoPE3D()
        x = run(second, run(first, x))
        return third(x[:, :, None], *torch.ones(2, x.shape[1], 4))

    x = torch.randn(2, 3, 8)
    expected = both(x)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="eager")(x), expected)
    assert used == ["reference", "kernel", "reference"] * 2
    torch.compiler.reset()


def test_the_backward_pass_recomputes_on_the_backend_of_the_forward(used):
    x = torch.randn(2, 3, 8, requires_grad=True)
    with ck.module_backend("reference"):
        out = checkpoint(run, norm("kernel"), x, use_reentrant=False)
    out.sum().backward()
    assert used == ["kernel"] * 2
