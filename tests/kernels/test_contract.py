"""The contract that every op keeps, whatever its room: driven by `OpInfo`.

`hold` is one case with everything that is checked of it; the samples, and as many random cases as
`--fuzz` says, go through it in forked workers. The other tests take up what one case cannot show.
"""

import contextlib
import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx_kernels import _backend, testing
from cogvx_kernels._opinfo import OpInfo, Sample, TensorSpec
from cogvx_kernels.testing import OPS, compare, cotangents, evaluate, materialize

if not _backend.HAS_TRITON:
    pytest.skip("the contract is about Triton kernels: Triton is missing", allow_module_level=True)
if _backend.INTERPRETED:
    from triton.runtime.interpreter import GridExecutor

    from tests.harness.fence import Fence, untouched
    from tests.harness.observe import observe
    from tests.harness.virtual import wide_strides
    from tests.harness.workers import run_cases

interpreted = pytest.mark.skipif(not _backend.INTERPRETED, reason="looks into the interpreter")

EVERY_OP = pytest.mark.parametrize("info", OPS.values(), ids=str)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FUZZ_CHUNKS = 20


def call(info: OpInfo, arguments: Mapping[str, Any], **options: Any) -> tuple[Tensor, ...]:
    return testing.as_tuple(info.op(**arguments, backend="kernel", **options))


def douts_of(info: OpInfo, arguments: Mapping[str, Any], seed: int = 0) -> tuple[Tensor, ...]:
    return cotangents(testing.as_tuple(info.reference(**arguments)), seed)


def tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor)}


def assert_same_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys(), what
    for name in ours:
        a, b = ours[name].detach(), theirs[name].detach()
        assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: {name}"
        bits = [x.flatten().contiguous().view(torch.uint8) for x in (a, b) if x.numel()]
        assert not bits or torch.equal(*bits), f"{what}: {name} differs"


def sample_with(info: OpInfo, **wanted: Any) -> Sample:
    """The op's first sample, with other values of some arguments."""
    sample = info.samples[0]
    return dataclasses.replace(sample, arguments={**sample.arguments, **wanted})


# --- one case, and everything that is checked of it ------------------------------------------


def hold(info: OpInfo, sample: Sample, dtype: torch.dtype, seed: int, again: bool = True) -> None:
    """Raise AssertionError unless the op keeps its contract on this sample.

    Programs run in a random order; and `again`, in their own, which must give the same bits.
    """
    side = ("right", "left")[seed % 2]
    with Fence(side) as fence:
        arguments = materialize(sample, dtype, seed=seed, new=fence.new)
        before = {name: x.clone() for name, x in tensors(arguments).items()}
        douts = douts_of(info, arguments, seed)
        with fence.allocations(), observe(shuffle=seed) as seen:
            ours = evaluate(info.op, arguments, info.differentiable, douts, backend="kernel")
        assert not seen.faults(), seen.faults()
        nothing = not any(x.numel() for name, x in ours.items() if name.startswith("out"))
        assert bool(seen.launches) != nothing, f"{len(seen.launches)} launches"
        assert_same_bits(tensors(arguments), before, "an input changed")
        for name, x in ours.items():
            assert not untouched(x).any(), f"{name} has elements that nobody wrote"
        fake = fake_metadata(info, arguments)
        real = [(x.shape, x.stride(), x.dtype) for n, x in ours.items() if n.startswith("out")]
        assert fake == real, f"fake tensors are {fake}, real ones {real}"
        if again:
            rerun = evaluate(info.op, arguments, info.differentiable, douts, backend="kernel")
            assert_same_bits(rerun, ours, "programs in another order")
        verdicts = compare(info, sample, dtype, seed=seed, arguments=arguments, ours=ours)
    wrong = [str(verdict) for verdict in verdicts if not verdict.ok]
    assert not wrong, "; ".join(wrong)


def fake_metadata(info: OpInfo, arguments: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    with FakeTensorMode() as mode, observe() as seen:
        fakes = {
            name: mode.from_tensor(x) if isinstance(x, Tensor) else x
            for name, x in arguments.items()
        }
        outputs = call(info, fakes)
    assert not seen.launches, "a fake tensor launched a kernel"
    return [(x.shape, x.stride(), x.dtype) for x in outputs]


def hold_all(cases: list[tuple[Any, ...]]) -> None:
    """Cases, each a name and the arguments of `hold`, in forked workers; a crash is one red."""
    by_name = {name: case for name, *case in cases}
    outcomes = run_cases(lambda name: hold(*by_name[name]), by_name, timeout=120)
    failed = [str(outcome) for outcome in outcomes if not outcome.ok]
    assert not failed, f"{len(failed)} of {len(cases)} cases failed\n" + "\n\n".join(failed[:5])


@interpreted
@EVERY_OP
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(info, dtype, seed):
    hold_all(
        [(s.reason, info, s, DTYPES[dtype], seed % 1000 + i) for i, s in enumerate(info.samples)]
    )


@interpreted
@pytest.mark.parametrize("chunk", range(FUZZ_CHUNKS))
def test_random_cases(chunk, fuzz, seed):
    """`--fuzz N` cases in all. Case i of seed S is case 0 of seed S + i: so can one be repeated."""
    cases = []
    for i in range(chunk, fuzz, FUZZ_CHUNKS):
        rng = random.Random(seed + i)
        info = rng.choice(list(OPS.values()))
        sample, dtype = info.random_sample(rng), rng.choice(info.dtypes)
        name = f"repeat with --seed {seed + i} --fuzz 1: {info} {dtype} {dict(sample.arguments)}"
        cases.append((name, info, sample, dtype, rng.randrange(1000), i % 4 == 0))
    hold_all(cases)


# --- values that must match bit for bit ------------------------------------------------------


@EVERY_OP
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(info, dtype, device):
    """Every sum and product is exact, so any order gives the same bits: indices and signs, proved.

    eps is too small to count, and a row of ones and minus ones has the mean square 1.
    """
    for sample in (sample for sample in info.samples if sample.exact):
        arguments = materialize(sample, DTYPES[dtype], device=device, exact=True)
        if "eps" in info.reference.__kwdefaults__:
            arguments["eps"] = 1e-30
        with torch.no_grad():
            ours = evaluate(info.op, arguments, backend="kernel")
            theirs = evaluate(info.reference, arguments)
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"{sample.reason}: {name}"


@EVERY_OP
def test_special_values_are_where_the_reference_has_them(info, device):
    """NaN and infinities in the first, a middle and the last lane of a row."""
    sample, where = info.samples[0], info.differentiable[0]
    for value, lane in itertools.product((float("nan"), float("inf"), -float("inf")), (0, 13, -1)):
        arguments = materialize(sample, torch.float32, device=device)
        arguments[where][0, -1, ..., lane] = value
        with torch.no_grad():
            ours, theirs = call(info, arguments), testing.as_tuple(info.reference(**arguments))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.isnan(), b.isnan()), (value, lane)
            assert torch.equal(a.isinf(), b.isinf()), (value, lane)


@EVERY_OP
def test_variants_change_no_value(info, device):
    for sample, variant in itertools.product(info.samples, info.variants):
        if any(spec.layout == "expanded" for spec in sample.specs().values()):
            continue
        plain = materialize(sample, torch.float32, device=device)
        with torch.no_grad():
            expected = call(info, plain)
            ours = call(info, materialize(sample, torch.float32, device=device), **variant)
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b), f"{sample.reason}, {variant}"


# --- gradients -------------------------------------------------------------------------------


@EVERY_OP
def test_every_subset_of_gradients(info, device):
    """The ones asked for have the bits they have when all are; nothing else gets one."""
    arguments = materialize(info.samples[0], torch.float32, device=device)
    douts = douts_of(info, arguments)
    everything = evaluate(info.op, arguments, info.differentiable, douts, backend="kernel")
    present = [name for name in info.differentiable if arguments[name] is not None]
    for size in range(1, len(present)):
        for subset in itertools.combinations(present, size):
            some = evaluate(info.op, arguments, subset, douts, backend="kernel")
            assert {n for n in some if n.startswith("d")} == {f"d{name}" for name in subset}
            assert_same_bits(some, {name: everything[name] for name in some}, f"only {subset}")


@EVERY_OP
def test_gradients_that_arrive_with_odd_strides(info, device):
    """Of `.sum()` (stride 0), transposed, sliced: the same bits as from a contiguous one."""
    sample = info.samples[0]
    arguments = materialize(sample, torch.float32, device=device)

    def wider(x: Tensor) -> Tensor:
        return torch.cat([x, x], -1).unflatten(-1, (2, -1)).transpose(-1, -2)[..., 0]

    odd = {
        "expanded": lambda x: torch.ones((), device=device).expand(x.shape),
        "one row": lambda x: x[:, :1].expand(x.shape),
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every other": wider,
        "last dim first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    }
    for name, layout in odd.items():
        douts = tuple(layout(x) for x in douts_of(info, arguments))
        plain = tuple(x.contiguous() for x in douts)
        ours = evaluate(info.op, arguments, info.differentiable, douts, backend="kernel")
        expected = evaluate(info.op, arguments, info.differentiable, plain, backend="kernel")
        assert_same_bits(ours, expected, name)


@EVERY_OP
def test_an_output_that_is_not_used(info, device):
    """A gradient for some outputs only: as if the others' were zero."""
    arguments = materialize(info.samples[0], torch.float32, device=device)
    douts = douts_of(info, arguments)
    for kept in range(len(douts)):
        zeros = tuple(x if i == kept else torch.zeros_like(x) for i, x in enumerate(douts))
        expected = evaluate(info.op, arguments, info.differentiable, zeros, backend="kernel")

        def only(**kw: Any) -> Tensor:
            return call(info, kw)[kept]  # noqa: B023

        ours = evaluate(only, arguments, info.differentiable, (douts[kept],))
        expected = {n: x for n, x in expected.items() if n.startswith("d")}
        assert_same_bits({n: ours[n] for n in expected}, expected, f"output {kept}")


@EVERY_OP
def test_backward_twice_gives_the_same_bits_and_leaves_its_inputs_alone(info, device):
    arguments = materialize(info.samples[0], torch.float32, device=device)
    leaves = {n: arguments[n].requires_grad_() for n in info.differentiable}
    douts = douts_of(
        info, {n: x.detach() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    )
    before = {f"dout{i}": x.clone() for i, x in enumerate(douts)}
    outputs = call(info, arguments)
    first, second = (
        dict(
            enumerate(
                torch.autograd.grad(outputs, tuple(leaves.values()), douts, retain_graph=True)
            )
        )
        for _ in range(2)
    )
    assert_same_bits(first, second, "a second backward")
    assert_same_bits({f"dout{i}": x for i, x in enumerate(douts)}, before, "a gradient changed")


@EVERY_OP
def test_what_is_saved_for_backward_is_there_anyway(info, device):
    """No copy in fp32, none at all: each tensor kept has the memory of an argument or a result."""
    arguments = materialize(info.samples[0], torch.bfloat16, device=device)
    places = {x.data_ptr() for x in tensors(arguments).values()}
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = evaluate(info.op, arguments, info.differentiable, None, backend="kernel")
    places |= {x.data_ptr() for x in results.values()}
    assert saved
    assert {x.data_ptr() for x in saved} <= places


@EVERY_OP
def test_variants_refuse_to_cut_a_gradient(info, device):
    for variant in info.variants:
        for name in info.differentiable:
            arguments = materialize(info.samples[0], torch.float32, device=device)
            arguments[name].requires_grad_()
            with pytest.raises(RuntimeError, match=f"{info.name}: .*{name} with requires_grad"):
                call(info, arguments, **variant)


@contextlib.contextmanager
def kernels_in_double() -> Iterator[None]:
    """fp64 is refused at the door; behind it the kernels can do it, for finite differences."""
    with mock.patch.object(_backend, "choose", return_value=True):
        yield


@interpreted
@EVERY_OP
def test_finite_differences(info):
    """gradcheck in fp64, of the kernels themselves, along random directions."""
    sample = dataclasses.replace(
        info.samples[0],
        arguments={
            name: shrunk(spec) if isinstance(spec, TensorSpec) else spec
            for name, spec in info.samples[0].arguments.items()
        },
    )
    arguments = materialize(sample, torch.float64)
    names = info.differentiable
    leaves = tuple(arguments[name].requires_grad_() for name in names)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return call(info, {**arguments, **dict(zip(names, leaves, strict=True))})

    with kernels_in_double():
        assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0, fast_mode=True)
        try:
            torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
        except GradcheckError:
            raise
        except RuntimeError as error:  # not differentiable twice, and says so
            assert "autograd" in str(error)


def shrunk(spec: TensorSpec) -> TensorSpec:
    """The same tensor with heads of 6 dims, for what takes a call for each element."""
    *outer, last = spec.shape
    narrow = {64: 6, 32: 3}[last]
    outer = [1 if len(outer) == 3 and i == 0 else n for i, n in enumerate(outer)]
    return dataclasses.replace(spec, shape=(*outer, narrow))


# --- torch's own checks ----------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The calls of this project's torch ops, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cogvx":
            self.calls.append((func, tuple(args)))
        return func(*args, **(kwargs or {}))


@EVERY_OP
def test_opcheck(info, device):
    """Schema, autograd registration, fake tensors, ahead-of-time tracing: of every torch op."""
    seen = set()
    for sample in info.samples[::3]:
        arguments = materialize(sample, torch.float32, device=device)
        recorder = Recorder()
        with recorder:
            evaluate(
                info.op, arguments, info.differentiable, douts_of(info, arguments), backend="kernel"
            )
            for variant in info.variants:
                if not any(spec.layout == "expanded" for spec in sample.specs().values()):
                    with torch.no_grad():
                        call(info, arguments, **variant)
        for func, args in recorder.calls:
            named = zip(func._schema.arguments, args, strict=True)
            differentiable = func.name() == f"cogvx::{info.name}"
            args = tuple(
                copied(x).requires_grad_(differentiable and a.name in info.differentiable)
                if isinstance(x, Tensor)
                else x
                for a, x in named
            )
            torch.library.opcheck(func, args)
            seen.add(func.name().removeprefix("cogvx::"))
    assert seen == set(info.torch_ops)


def copied(x: Tensor) -> Tensor:
    """With x's strides; an empty one without, because opcheck cannot copy it."""
    return x.detach().clone() if x.numel() else x.new_empty(x.shape)


def training_step(info: OpInfo, names: tuple[str, ...], **constants: Any):
    def step(*leaves: Tensor) -> Tensor:
        outputs = call(info, {**constants, **dict(zip(names, leaves, strict=True))})
        return sum(((i + 1) * x.float().sin()).sum() for i, x in enumerate(outputs))

    return step


@EVERY_OP
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiles_in_one_graph(info, device):
    """torch.compile(fullgraph=True) with its default backend: loss and gradients as in eager."""
    arguments = materialize(info.samples[0], torch.float32, device=device)
    names = info.differentiable
    constants = {n: x for n, x in arguments.items() if n not in names}
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True)):
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
    """dynamic=True: lengths of text and video change; one graph more, for a length of 1."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(info.op, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for text_len, video_len in ((2, 3), (5, 2), (3, 7), (0, 4), (6, 1)):
        sample = resized(info.samples[0], text_len, video_len)
        arguments = materialize(sample, torch.float32, device=device)
        with torch.no_grad():
            ours = testing.as_tuple(compiled(**arguments, backend="kernel"))
            expected = call(info, arguments)
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b), (text_len, video_len)
        graphs.append(counter.frame_count)
    assert len(set(graphs[:-1])) == 1 and graphs[-1] <= graphs[0] + 1, f"{graphs} graphs"


def resized(sample: Sample, text_len: int, video_len: int) -> Sample:
    """The sample at other lengths: seqlen is dim 1 of tokens, video_len dim 0 of tables."""
    arguments = dict(sample.arguments)
    for name, spec in sample.specs().items():
        if spec.values in ("cos", "sin"):
            shape = (video_len, *spec.shape[1:])
        elif len(spec.shape) > 2:
            shape = (spec.shape[0], text_len + video_len, *spec.shape[2:])
        else:
            shape = spec.shape
        arguments[name] = dataclasses.replace(spec, shape=shape)
    return dataclasses.replace(sample, arguments={**arguments, "text_len": text_len})


# --- size ------------------------------------------------------------------------------------


@interpreted
@EVERY_OP
@pytest.mark.parametrize("direction", ["inputs", "gradients"])
def test_offsets_of_more_than_32_bits(info, direction):
    """Strides past 2**31 elements, in memory that is never touched: as with a contiguous tensor."""

    def spread(x: Tensor) -> Tensor:
        return wide_strides(x.shape, x.dtype, 2**31 + 16).copy_(x)

    def case(_: object) -> None:
        arguments = materialize(info.samples[0], torch.float16)
        douts = douts_of(info, arguments)
        expected = evaluate(info.op, arguments, info.differentiable, douts, backend="kernel")
        if direction == "inputs":
            wide = {n: spread(x) for n, x in tensors(arguments).items() if x.dim() == 4}
            arguments |= wide
        else:
            douts = tuple(spread(x) for x in douts)
        ours = evaluate(info.op, arguments, info.differentiable, douts, backend="kernel")
        assert_same_bits(ours, expected, direction)

    [outcome] = run_cases(case, [info.name], timeout=120)
    assert outcome.ok, str(outcome)


@interpreted
@EVERY_OP
@pytest.mark.parametrize(("batch", "length"), [(70_000, 1), (1, 70_000)])
def test_grids_are_within_the_limits_of_a_launch(info, batch, length):
    """More than 65,535 of anything: the grid is looked at, the programs are not run."""
    sample = resized(info.samples[0], 0, length)
    specs = {name: smallest(spec, batch) for name, spec in sample.specs().items()}
    sample = dataclasses.replace(sample, arguments={**sample.arguments, **specs})
    arguments = materialize(sample, torch.float16)
    grids = []
    with mock.patch.object(GridExecutor, "__call__", lambda self, *a, **k: grids.append(self.grid)):
        evaluate(
            info.op, arguments, info.differentiable, douts_of(info, arguments), backend="kernel"
        )
    assert grids
    for grid in grids:
        x, y, z = (*grid, 1, 1)[:3]
        assert x < 2**31 and y <= 65535 and z <= 65535, grid


def smallest(spec: TensorSpec, batch: int) -> TensorSpec:
    """The same tensor for a batch of one head, or row, of two dims; a table has 32 and no batch."""
    *outer, last = spec.shape
    if outer and last == 64:
        outer = [batch, *outer[1:2], *(1 for _ in outer[2:])]
    return dataclasses.replace(spec, shape=(*outer, {64: 2, 32: 1}[last]))


# --- wrong arguments -------------------------------------------------------------------------


def wrong_tensors(x: Tensor) -> dict[str, Any]:
    """What a tensor argument must not be."""
    wider = torch.cat([x, x[..., :1]], -1)
    return {
        "a list": x.tolist() if x.numel() < 100 else [1.0],
        "a number": 1.0,
        "integers": x.int(),
        "complex": x.to(torch.complex64),
        "one dim more": x[None],
        "one dim less": x[0],
        "last dim longer": wider,
        "on another device": x.to("meta"),
        "of bits": x > 0,
    }


WRONG_VALUES: Mapping[type, tuple[Any, ...]] = {
    int: (-1, 10**6, 2.5, "2", True, None),
    bool: (1, "yes", None),
    str: ("nonsense", 3, None),
    float: (0.0, -1.0, float("nan"), float("inf"), "1e-6", None),
}


def cases_of_wrong_arguments(info: OpInfo) -> Iterator[tuple[str, str, dict[str, Any]]]:
    arguments = materialize(info.samples[0], torch.float32)
    defaults = dict(info.op.__kwdefaults__)
    for name, value in {**defaults, **arguments}.items():
        if isinstance(value, Tensor):
            wrongs = wrong_tensors(value)
            if name != info.differentiable[0]:  # whose dtype sets the others'
                wrongs |= {"fp16": value.half(), "fp64": value.double()}
            for what, wrong in wrongs.items():
                yield name, what, {**arguments, name: wrong}
        else:
            for wrong in WRONG_VALUES[type(value)]:
                yield name, repr(wrong), {**arguments, name: wrong}


@EVERY_OP
def test_wrong_arguments_are_named(info):
    """Before anything is allocated or launched: op, argument, what was wanted, what came."""
    lenient = set()
    count = 0
    for name, what, arguments in cases_of_wrong_arguments(info):
        count += 1
        allocated = mock.Mock(side_effect=AssertionError(f"{name}, {what}: allocated first"))
        try:
            with mock.patch.object(torch, "empty", allocated):
                info.op(**{"backend": "kernel", **arguments})
        except (TypeError, ValueError, RuntimeError) as error:
            said = str(error)
            assert said.startswith(f"{info.name}: "), (name, what, said)
            assert re.search(rf"\b{name}\b", said), (name, what, said)
            assert re.search(r"; got |takes float32|cannot run", said), (name, what, said)
        else:
            lenient.add((name, what))
    assert not lenient, f"accepted: {sorted(lenient)}"
    assert count >= 40


@EVERY_OP
def test_a_missing_argument_is_python_s_own_error(info):
    with pytest.raises(TypeError, match="missing .* required positional argument"):
        info.op()
