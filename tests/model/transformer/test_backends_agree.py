"""A tiny model, its kernels against their references: forward, every gradient, and compiled."""

import dataclasses

import pytest
import torch

from cogvx.config import TransformerConfig
from cogvx.transformer import ExpertTransformer, load_balancing_loss
from cogvx_kernels import _backend, module_backend
from tests.harness.selection import rest

from .tiny import EXPERTS, ROPE, shaken

MODELS = {
    "shared": ROPE,
    "experts": dataclasses.replace(ROPE, num_text_experts=1, num_video_experts=1),
    "routed": EXPERTS,
}
models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="needs Triton")


def inputs(device, dtype=torch.float32, batch=2):
    latents = torch.randn(batch, 2, 4, 4, 6, device=device, dtype=dtype)
    text = torch.randn(batch, 5, 10, device=device, dtype=dtype)
    return latents, text, torch.tensor([999, 37][:batch], device=device)


def results(model, arguments):
    """The output, and the gradient of each parameter of a loss in which routers take part."""
    routing = []
    output = model(*arguments, routing=routing)
    loss = output.double().square().mean()
    if routing:
        loss = loss + load_balancing_loss(routing)
    loss.backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def copied(model, backend, dtype=None):
    """The model with another backend, in another dtype, with the same numbers."""
    weight = model.proj_out.weight
    with module_backend(backend):
        other = ExpertTransformer(model.config).to(weight.device, dtype or weight.dtype)
    other.load_state_dict(model.state_dict())
    return other


def error(got, fp64):
    return (got.double() - fp64.double()).norm()


@models
def test_kernels_err_as_references_do(config: TransformerConfig, device):
    """Against fp64, for the output and every gradient: the rule, twice the reference's error and,
    below what that has of its own, an ulp of fp32 through the layers.
    """
    model = shaken(ExpertTransformer(config)).to(device)
    arguments = inputs(device)
    reference, kernel = (results(copied(model, b), arguments) for b in ("reference", "kernel"))
    exact = arguments[0].double(), arguments[1].double(), arguments[2]
    fp64 = results(copied(model, "reference", torch.float64), exact)

    def holds(got, wanted, true):
        return error(got, true) <= 2 * error(wanted, true) + 1e-6 * true.norm()

    assert holds(kernel[0], reference[0], fp64[0])
    for name, true in fp64[1].items():
        # The text that leaves the last block is not looked at.
        assert true.any() or ".1.ff.text." in name
        assert holds(kernel[1][name], reference[1][name], true), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["shared", "experts"])
def test_kernels_in_half_err_as_references_do(name, dtype, device):
    """Likewise; where a router wavers a rounding changes its choice, so there is none here."""
    model = shaken(ExpertTransformer(MODELS[name])).to(device, dtype)
    arguments = inputs(device, dtype)
    reference, kernel = (results(copied(model, b), arguments) for b in ("reference", "kernel"))
    exact = arguments[0].double(), arguments[1].double(), arguments[2]
    fp64 = results(copied(model, "reference", torch.float64), exact)
    assert error(kernel[0], fp64[0]) <= 2 * error(reference[0], fp64[0])
    for name, true in fp64[1].items():
        # A few numbers have an error by luck: half an ulp of the dtype is no disagreement.
        ulp = torch.finfo(dtype).eps / 2 * true.norm()
        assert error(kernel[1][name], true) <= 2 * error(reference[1][name], true) + ulp, name


@pytest.mark.slow
@pytest.mark.parametrize("name", [rest("shared"), "routed"])
def test_compiles_to_one_graph(name, device):
    """With gradients, and with modulations made ahead and a projected text."""
    torch._dynamo.reset()
    with module_backend("kernel"):
        model = shaken(ExpertTransformer(MODELS[name], "math")).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    arguments = inputs(device, batch=1)
    wanted, got = model(*arguments), compiled(*arguments)
    assert torch.equal(got, wanted)
    of_wanted, of_got = (
        torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (wanted, got)
    )
    for one, other in zip(of_wanted, of_got, strict=True):
        # The compiler sums in an order of its own.
        assert (one - other).norm() <= 1e-5 * one.norm()
    with torch.no_grad():
        ahead = model.modulations(torch.tensor([999, 37], device=device))
        projected = model.project_text(arguments[1])
        for step in (0, 1):
            options = {"modulations": ahead.at(step)}
            wanted = model(arguments[0], projected, **options)
            assert torch.equal(compiled(arguments[0], projected, **options), wanted)
    torch._dynamo.reset()


@pytest.mark.gpu
@models
def test_a_cuda_graph_holds_a_step(config):
    """Captured once, replayed with other latents, text and time."""
    with module_backend("kernel"):
        model = shaken(ExpertTransformer(config)).cuda()
    with torch.no_grad():
        ahead = model.modulations(torch.tensor([999, 37], device="cuda"))
        latents, text, _ = inputs("cuda")
        modulations = dataclasses.replace(ahead, values=ahead.at(0).values.clone())
        projected = model.project_text(text)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and tables made before the capture
            for _ in range(3):
                model(latents, projected, modulations=modulations)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(latents, projected, modulations=modulations)
        latents.copy_(torch.randn_like(latents))
        projected.tokens.copy_(torch.randn_like(projected.tokens))
        modulations.values.copy_(ahead.at(1).values)
        graph.replay()
        assert torch.equal(out, model(latents, projected, modulations=modulations))
