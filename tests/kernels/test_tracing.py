"""opcheck, torch.compile, and the dispatcher of torch, for every op."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx_kernels import testing
from cogvx_kernels._custom_op import CustomOp
from cogvx_kernels._opinfo import OpInfo
from cogvx_kernels.testing import OPS, evaluate, materialize
from tests.harness.selection import rest

from .op_helpers import EVERY_OP, assert_same_bits, call, grad_outputs_of, present, resized


class Recorder(TorchDispatchMode):
    """Record the calls of this project's torch ops, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cogvx":
            self.calls.append((func, tuple(args)))
        return func(*args, **(kwargs or {}))


@EVERY_OP
@pytest.mark.parametrize("samples", ["the first", rest("every third")])
def test_opcheck(info, samples, device):
    """Schema, autograd registration, fake tensors and ahead-of-time tracing of every torch op."""
    seen = set()
    for sample in info.samples[:1] if samples == "the first" else info.samples[::3]:
        arguments = materialize(sample, torch.float32, device=device)
        recorder = Recorder()
        with recorder:
            evaluate(
                info.op,
                arguments,
                info.differentiable,
                grad_outputs_of(info, arguments),
                backend="kernel",
            )
            for variant in info.variants:
                if not any(spec.layout == "expanded" for spec in sample.specs().values()):
                    with torch.no_grad():
                        call(info, arguments, **variant)
        for func, args in recorder.calls:
            named = zip(func._schema.arguments, args, strict=True)
            differentiable = func.name() == f"cogvx::{info.name}"
            args = tuple(
                copied(x, differentiable and a.name in info.differentiable) for a, x in named
            )
            torch.library.opcheck(func, args)
            seen.add(func.name().removeprefix("cogvx::"))
    assert seen == set(info.torch_ops)


def copied(x: Any, requires_grad: bool) -> Any:
    """Copy a tensor, or a list; an empty one without its strides, which opcheck cannot copy."""
    if isinstance(x, list):
        return [copied(each, requires_grad) for each in x]
    if not isinstance(x, Tensor):
        return x
    copy = x.detach().clone() if x.numel() else x.new_empty(x.shape)
    return copy.requires_grad_(requires_grad)


@EVERY_OP
def test_eager_calls_run_around_the_dispatcher(info, device, monkeypatch):
    """With the bits that they have through it, forward and backward."""
    arguments = materialize(info.samples[0], torch.float32, device=device)
    settings = info.op, arguments, info.differentiable, grad_outputs_of(info, arguments)
    right, seen = CustomOp._needs_dispatcher, []

    def spied(self, flat):
        seen.append(right(self, flat))
        return seen[-1]

    monkeypatch.setattr(CustomOp, "_needs_dispatcher", spied)
    ours = evaluate(*settings, backend="kernel")
    assert seen and not any(seen)
    monkeypatch.setattr(CustomOp, "_needs_dispatcher", lambda self, flat: True)
    assert_same_bits(evaluate(*settings, backend="kernel"), ours, "through the dispatcher")


@pytest.fixture
def rotate(device):
    """rope3d of x, and an x."""
    arguments = materialize(OPS["rope3d"].samples[0], torch.float32, device=device)
    x = arguments.pop("x")
    return lambda x, **tables: call(OPS["rope3d"], {"x": x, **arguments, **tables})[0], x


def test_tensors_without_memory_go_through_the_dispatcher(rotate):
    """On the meta device, and fake ones also outside of their mode."""
    function, x = rotate
    arguments = materialize(OPS["rope3d"].samples[0], torch.float32, device=x.device)
    tables = {name: arguments[name] for name in ("cos", "sin")}
    assert function(x.to("meta"), **{k: v.to("meta") for k, v in tables.items()}).is_meta
    fake = FakeTensorMode().from_tensor
    assert isinstance(function(fake(x), **{k: fake(v) for k, v in tables.items()}), FakeTensor)


def test_profiler_sees_the_ops(rotate):
    function, x = rotate
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(x)
    assert "cogvx::rope3d" in {event.key for event in profile.key_averages()}


def test_gradients_in_a_batch(rotate):
    function, x = rotate
    x.requires_grad_()
    out = function(x)
    several = torch.randn(3, *out.shape, device=x.device)
    (ours,) = torch.autograd.grad(out, x, several, retain_graph=True, is_grads_batched=True)
    for grad, one in zip(ours, several, strict=True):
        assert torch.equal(grad, *torch.autograd.grad(out, x, one, retain_graph=True))


def training_step(info: OpInfo, names: tuple[str, ...], **constants: Any):
    def step(*leaves: Tensor) -> Tensor:
        outputs = call(info, {**constants, **dict(zip(names, leaves, strict=True))})
        return sum(((i + 1) * x.float().sin()).sum() for i, x in enumerate(outputs))

    return step


@EVERY_OP
@pytest.mark.parametrize("compiler", ["aot_eager", rest("inductor")])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiles_in_one_graph(info, compiler, device):
    """torch.compile(fullgraph=True) has the loss and gradients of eager."""
    arguments = materialize(info.samples[0], torch.float32, device=device)
    names = present(info, arguments)
    constants = {n: x for n, x in arguments.items() if n not in names}
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend=compiler)):
        torch._dynamo.reset()
        leaves = tuple(arguments[name].detach().requires_grad_() for name in names)
        loss = wrap(training_step(info, names, **constants))(*leaves)
        gradients = torch.autograd.grad(loss, leaves)
        results.append([loss.detach(), *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@EVERY_OP
@pytest.mark.filterwarnings("ignore")
def test_compiles_once_for_many_lengths(info, device):
    """dynamic=True makes one graph for all lengths of text and video, and one for length 1."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(info.op, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for text_len, video_len in ((2, 3), (5, 2), (3, 7), (0, 4), (6, 1)):
        sample = resized(info, info.samples[0], text_len, video_len)
        arguments = materialize(sample, torch.float32, device=device)
        with torch.no_grad():
            ours = testing.as_tuple(compiled(**arguments, backend="kernel"))
            expected = call(info, arguments)
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b), (text_len, video_len)
        graphs.append(counter.frame_count)
    assert len(set(graphs[:-1])) == 1 and graphs[-1] <= graphs[0] + 1, f"{graphs} graphs"
