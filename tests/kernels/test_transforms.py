"""torch.func transforms, forward-mode derivatives and DTensor with every op."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import cogvx_kernels as ck
from cogvx_kernels._opinfo import OpInfo
from cogvx_kernels.testing import OPS, as_tuple, materialize, to_double

from .op_helpers import EVERY_OP, present, tensors

# torch scripts some of its own forward-mode rules.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

TRANSFORM = 'backend="kernel" cannot run: a torch.func transform is active'


class Call:
    """A small call of an op as a function of its differentiable arguments."""

    def __init__(self, info: OpInfo, device: str) -> None:
        self.info = info
        self.arguments = materialize(info.gradcheck or info.samples[0], torch.float32)
        self.arguments |= {n: x.to(device) for n, x in tensors(self.arguments).items()}
        self.names = present(info, self.arguments)
        self.inputs = tuple(self.arguments[name] for name in self.names)
        self.directions = tuple(torch.randn_like(x) for x in self.inputs)

    def on(self, backend: str) -> Callable[..., tuple[Tensor, ...]]:
        """The call on a backend, without the outputs that have no gradient."""
        return lambda *inputs: self._outputs(self.info.op, self.arguments, inputs, backend=backend)

    def loss(self, *inputs: Tensor) -> Tensor:
        return sum(x.sin().sum() for x in self.on("auto")(*inputs))

    def gradients(self) -> tuple[Tensor, ...]:
        """Gradients of `loss` by the kernel and autograd."""
        leaves = tuple(x.detach().requires_grad_() for x in self.inputs)
        loss = sum(x.sin().sum() for x in self.on("kernel")(*leaves))
        return torch.autograd.grad(loss, leaves)

    def derivative(self) -> tuple[Tensor, ...]:
        """Directional derivatives by central differences of the reference in fp64."""
        arguments, step = to_double(self.arguments), 1e-6
        ahead, behind = (
            self._outputs(
                self.info.reference,
                arguments,
                [
                    x.double() + sign * step * v.double()
                    for x, v in zip(self.inputs, self.directions, strict=True)
                ],
            )
            for sign in (1, -1)
        )
        return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))

    def _outputs(self, function: Any, arguments: Any, inputs: Any, **options: Any) -> Any:
        named = dict(zip(self.names, inputs, strict=True))
        outputs = as_tuple(function(**{**arguments, **named}, **options))
        return tuple(x for i, x in enumerate(outputs) if i not in self.info.constant)


def assert_near(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def call(info, device) -> Call:
    return Call(info, device)


@pytest.fixture(scope="module")
def mesh(device) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(device, (1,))
    dist.destroy_process_group()


@EVERY_OP
def test_forward_mode_derivatives(call):
    """By torch.func and by dual tensors, with a tangent for any of the arguments."""
    expected = call.derivative()
    _, ours = torch.func.jvp(call.on("auto"), call.inputs, call.directions)
    assert_near(ours, expected)
    with fw.dual_level():
        duals = [fw.make_dual(*pair) for pair in zip(call.inputs, call.directions, strict=True)]
        outputs = call.on("auto")(*duals)
        assert_near([fw.unpack_dual(x).tangent for x in outputs], expected)
        for i, dual in enumerate(duals):
            inputs = [*call.inputs[:i], dual, *call.inputs[i + 1 :]]
            found = [fw.unpack_dual(x).tangent for x in call.on("auto")(*inputs)]
            assert any(x is not None and x.any() for x in found), call.names[i]
            message = f'backend="kernel" cannot run: {call.names[i]} has a tangent'
            with pytest.raises(RuntimeError, match=message):
                call.on("kernel")(*inputs)
        call.on("kernel")(*call.inputs)  # without a tangent it runs
    with pytest.raises(RuntimeError, match=TRANSFORM):
        torch.func.jvp(call.on("kernel"), call.inputs, call.directions)


@EVERY_OP
def test_gradients_by_torch_func(call):
    """grad and vjp are the kernel's gradients; jacfwd of grad, a column of the Hessian."""
    expected, everything = call.gradients(), tuple(range(len(call.inputs)))
    assert_near(torch.func.grad(call.loss, everything)(*call.inputs), expected)
    outputs, back = torch.func.vjp(call.on("auto"), *call.inputs)
    assert_near(back(tuple(x.cos() for x in outputs)), expected)

    def along(step: Tensor) -> Tensor:
        moved = (x + step * v for x, v in zip(call.inputs, call.directions, strict=True))
        return call.loss(*moved)

    zero = torch.zeros((), device=call.inputs[0].device)
    curvature = torch.func.jacfwd(torch.func.grad(along))(zero)
    step = zero.clone().requires_grad_()
    slope = torch.autograd.grad(along_reference(call, step), step, create_graph=True)[0]
    torch.testing.assert_close(curvature, torch.autograd.grad(slope, step)[0], rtol=1e-3, atol=1e-2)
    with pytest.raises(RuntimeError, match=TRANSFORM):
        torch.func.grad(lambda *x: call.on("kernel")(*x)[0].sum())(*call.inputs)


def along_reference(call: Call, step: Tensor) -> Tensor:
    moved = [x + step * v for x, v in zip(call.inputs, call.directions, strict=True)]
    return sum(x.sin().sum() for x in call.on("reference")(*moved))


@EVERY_OP
def test_vmap(call):
    """Over all arguments, and over each alone, equals separate calls."""
    pairs = [torch.stack([x, v]) for x, v in zip(call.inputs, call.directions, strict=True)]
    together = torch.vmap(call.on("auto"))(*pairs)
    for i in (0, 1):
        assert_near([x[i] for x in together], call.on("kernel")(*(pair[i] for pair in pairs)))
    for n, pair in enumerate(pairs):
        inputs = [*call.inputs[:n], pair, *call.inputs[n + 1 :]]
        dims = tuple(0 if i == n else None for i in range(len(pairs)))
        alone = torch.vmap(call.on("auto"), dims)(*inputs)
        inputs[n] = pair[1]
        assert_near([x[1] for x in alone], call.on("kernel")(*inputs))
    with pytest.raises(RuntimeError, match=TRANSFORM):
        torch.vmap(call.on("kernel"))(*pairs)


@EVERY_OP
def test_dtensor(call, mesh):
    """In a mesh of one process, outputs and gradients are DTensors with the same values."""

    def spread(x: Tensor) -> DTensor:
        return distribute_tensor(x.detach().clone(), mesh, [Replicate()])

    whole = {name: spread(x) for name, x in tensors(call.arguments).items()}
    expected = call.on("kernel")(*call.inputs)
    for i, name in enumerate(call.names):
        inputs = [*call.inputs[:i], whole[name], *call.inputs[i + 1 :]]
        with pytest.raises(RuntimeError, match=f"cannot run: {name} is a DTensor"):
            call.on("kernel")(*inputs)
    call.arguments |= whole
    leaves = [whole[name].requires_grad_() for name in call.names]
    outputs = call.on("auto")(*leaves)
    assert_near([x.to_local() for x in outputs], expected)
    gradients = torch.autograd.grad(sum(x.sin().sum() for x in outputs), leaves)
    call.arguments |= {name: x.to_local() for name, x in whole.items()}
    assert_near([x.to_local() for x in gradients], call.gradients())


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_inside_a_compiled_function(transform, device):
    """A call traced under a transform runs the reference."""
    torch._dynamo.reset()
    call = Call(OPS["rope3d"], device)
    [x], [direction] = call.inputs, call.directions
    step = {
        "grad": torch.func.grad(call.loss),
        "vmap": torch.vmap(lambda z: call.on("auto")(z[None])[0][0]),
        "jvp": lambda z: torch.func.jvp(call.on("auto"), (z,), (direction,))[1][0],
    }[transform]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), step(x))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_dual_tensors_through_a_compiled_function(compiler, device):
    """torch.compile sees no tangents: in a level of dual tensors the reference runs, also in a
    function that was compiled before."""
    torch._dynamo.reset()
    call = Call(OPS["rope3d"], device)
    [x], [direction] = call.inputs, call.directions
    compiled = torch.compile(call.on("auto"), fullgraph=True, backend=compiler)
    forced = torch.compile(call.on("kernel"), backend=compiler)
    [expected] = call.on("kernel")(direction)  # it is linear
    torch.testing.assert_close(compiled(x), call.on("kernel")(x))
    with fw.dual_level():
        found = fw.unpack_dual(compiled(fw.make_dual(x, direction))[0]).tangent
        torch.testing.assert_close(found, expected)
        with pytest.raises(Exception, match="a level of dual tensors is open|Observed exception"):
            forced(fw.make_dual(x, direction))


def test_plain_subclasses_run_the_kernel(device):
    """A subclass without __torch_dispatch__, and a parameter."""

    class Labelled(Tensor):
        pass

    call = Call(OPS["rope3d"], device)
    [x] = call.inputs
    [expected] = call.on("kernel")(x)
    for same in (x.as_subclass(Labelled), torch.nn.Parameter(x)):
        assert torch.equal(call.on("kernel")(same)[0], expected)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("algo", ["conv3d", "conv2d"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_conv3d(pieces, algo, grad, mesh, device, monkeypatch):
    """Equals F.conv3d, with and without gradients, in one call and in pieces."""
    x, v = torch.randn(2, 3, 2, 4, 5, 5, device=device)
    x, v = (z.contiguous(memory_format=torch.channels_last_3d) for z in (x, v))
    weight, bias = torch.randn(3, 2, 3, 3, 3, device=device), torch.randn(3, device=device)
    if pieces > 1:
        module = importlib.import_module("cogvx_kernels.conv3d")
        monkeypatch.setattr(module, "LIMIT", x[:1].nbytes)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ck.conv3d(x, weight, bias, algo=algo)

    def plain(*arguments: Tensor) -> Tensor:
        return F.conv3d(*arguments, padding=(0, 1, 1))

    primals, tangents = (x, weight, bias), (v, torch.randn_like(weight), torch.randn_like(bias))
    expected = torch.func.jvp(plain, primals, tangents)[1]
    whole = [distribute_tensor(z, mesh, [Replicate()]) for z in primals]
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.func.jvp(ours, primals, tangents)[1], expected)
        each = torch.vmap(ours, (0, None, None))(torch.stack([x, v]), weight, bias)
        torch.testing.assert_close(each[1], plain(v, weight, bias))
        of_weights = torch.vmap(ours, (None, 0, None))(x, weight[None], bias)
        torch.testing.assert_close(of_weights[0], plain(x, weight, bias))
        torch.testing.assert_close(ours(*whole).to_local(), plain(x, weight, bias))


@pytest.mark.parametrize("op", ["append", "push"])
def test_frame_caches_in_forward_mode(op):
    """An op that overwrites a cache writes the tangent too, or raises."""
    frames = torch.randn(1, 2, 3, 2, 2)
    tangent = torch.randn_like(frames)
    function = getattr(ck, f"frame_cache_{op}")
    with fw.dual_level():
        cache = torch.zeros(1, 2, 1, 2, 2)
        dual = fw.make_dual(frames, tangent)
        with pytest.raises(RuntimeError, match="has a tangent"):
            function(cache, dual, backend="kernel")
        function(cache, dual, backend="auto")
        assert torch.equal(cache, frames[:, :, -1:])
        assert torch.equal(fw.unpack_dual(cache).tangent, tangent[:, :, -1:])
