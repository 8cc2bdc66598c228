"""`patch` and `torch.compile`: each before the other, and no graph more than needed."""

import pytest
import torch

import cogvx_kernels as ck
from tests.harness.selection import rest
from tests.patching.small import NEAR, inputs, latents, predicted, relative, small_vae, transformer


@pytest.fixture
def recompiles():
    """Count of compilations since."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, arguments):
        seen.append(graph)
        return graph.forward

    yield backend, seen
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["patch", "compile"])
def test_a_compiled_transformer(first, recompiles):
    backend, seen = recompiles
    model = transformer()
    wanted = predicted(model)
    if first == "patch":
        ck.patch(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    if first == "compile":
        ck.patch(compiled)
    for _ in range(3):
        with torch.no_grad():
            found = compiled(**inputs(model)).sample
    assert relative(found, wanted.double()) < NEAR
    assert len(seen) == 1
    report = ck.explain(model)
    assert all(row.compiled and not row.calls and not row.fallbacks for row in report.rows)
    assert "compiled: calls in compiled code are not counted" in str(report)
    assert "not called" not in str(report)


def test_repeated_blocks_compile_once(recompiles):
    """`compile_repeated_blocks`, which diffusers refuses for this model."""
    backend, seen = recompiles
    model = transformer()
    wanted = predicted(model)
    with pytest.raises(ValueError, match="_repeated_blocks"):
        model.compile_repeated_blocks()
    ck.patch(model)
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    for _ in range(2):
        assert relative(predicted(model), wanted.double()) < NEAR
    assert len(seen) == 1
    assert all(row.compiled for row in ck.explain(model).rows)


def test_patched_after_it_was_compiled_and_has_run(recompiles):
    """The graph of before is not used, and after unpatching that of the patch is not."""
    backend, seen = recompiles
    model = transformer()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    graphs = []
    for change in (lambda: None, lambda: ck.patch(model), lambda: ck.unpatch(model)):
        change()
        before = len(seen)
        with torch.no_grad():
            found = compiled(**inputs(model)).sample
        graphs.append(len(seen) - before)
    assert graphs[1] == 1
    assert torch.equal(found, predicted(model))


@pytest.mark.parametrize("mode", ["exact", rest("fast")])
def test_a_compiled_decoder(mode, recompiles):
    backend, seen = recompiles
    model = small_vae()
    with torch.no_grad():
        wanted = model.decode(latents(7)).sample
        ck.patch(model, mode=mode)
        model.decoder = torch.compile(model.decoder, backend=backend, fullgraph=True)
        for _ in range(2):
            assert relative(model.decode(latents(7)).sample, wanted.double()) < NEAR
    stock = 2  # a first chunk, and a later one
    assert len(seen) == stock
