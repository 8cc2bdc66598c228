"""Contract tests of every op, driven by `OpInfo`.

`check_contract` is all checks of one case; the samples, and `--fuzz` random cases, run it in forked
workers. The other tests need more than one case.
"""

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.gradcheck import GradcheckError

from cogvx_kernels import _backend, testing
from cogvx_kernels._opinfo import OpInfo, Sample, TensorSpec
from cogvx_kernels.testing import compare, evaluate, materialize
from tests.harness.selection import rest

from .op_helpers import (
    DTYPES,
    EVERY_OP,
    RUNNABLE,
    assert_same_bits,
    call,
    grad_outputs_of,
    interpreted,
    narrowed,
    present,
    resized,
    tensors,
)

if _backend.INTERPRETED:
    from triton.runtime.interpreter import GridExecutor

    from tests.harness.fence import Fence, untouched
    from tests.harness.observe import observe
    from tests.harness.virtual import wide_strides
    from tests.harness.workers import run_cases

FUZZ_CHUNKS = 40


# --- all checks of one case ------------------------------------------------------------------


def check_contract(
    info: OpInfo, sample: Sample, dtype: torch.dtype, seed: int, again: bool = True
) -> None:
    """Raise AssertionError unless the op fulfils its contract on this sample.

    Programs run in a random order; with `again` also in the usual one, with the same bits.
    """
    side = ("right", "left")[seed % 2]
    with Fence(side) as fence:
        arguments = materialize(sample, dtype, seed=seed, new=fence.new)
        before = {name: x.clone() for name, x in tensors(arguments).items()}
        grad_outputs = grad_outputs_of(info, arguments, seed)
        with fence.allocations(), observe(shuffle=seed) as seen:
            ours = evaluate(info.op, arguments, info.differentiable, grad_outputs, backend="kernel")
        assert not seen.faults(), seen.faults()
        nothing = not any(x.numel() for name, x in ours.items() if name.startswith("out"))
        launches = not nothing and info.launch is not None
        assert bool(seen.launches) == launches, f"{len(seen.launches)} launches"
        assert_same_bits(tensors(arguments), before, "an input changed")
        for name, x in ours.items():
            assert not untouched(x).any(), f"{name} has elements that were not written"
        fake = fake_metadata(info, arguments)
        real = [(x.shape, x.stride(), x.dtype) for n, x in ours.items() if n.startswith("out")]
        assert fake == real, f"fake tensors are {fake}, real ones {real}"
        if again:
            rerun = evaluate(
                info.op, arguments, info.differentiable, grad_outputs, backend="kernel"
            )
            assert_same_bits(rerun, ours, "programs in another order")
        comparisons = compare(info, sample, dtype, seed=seed, arguments=arguments, ours=ours)
    wrong = [str(comparison) for comparison in comparisons if not comparison.ok]
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


def check_all(cases: list[tuple[Any, ...]]) -> None:
    """Check cases (name, arguments of `check_contract`) in forked workers; a crash fails one."""
    by_name = {name: case for name, *case in cases}
    outcomes = run_cases(lambda name: check_contract(*by_name[name]), by_name, timeout=120)
    failed = [str(outcome) for outcome in outcomes if not outcome.ok]
    assert not failed, f"{len(failed)} of {len(cases)} cases failed\n" + "\n\n".join(failed[:5])


@interpreted
@pytest.mark.parametrize(
    ("info", "dtype", "run"),
    [
        # The default: a dtype for each op, each sample once. All else includes that.
        *((info, [*DTYPES][i % len(DTYPES)], "once") for i, info in enumerate(RUNNABLE)),
        *(rest(info, dtype, "again") for info in RUNNABLE for dtype in DTYPES),
    ],
    ids=str,
)
def test_samples(info, dtype, run, seed):
    kind, again = DTYPES[dtype], run == "again"
    check_all(
        [(s.reason, info, s, kind, seed % 1000 + i, again) for i, s in enumerate(info.samples)]
    )


@interpreted
@pytest.mark.parametrize(
    "chunk",
    [0, *(rest(chunk) for chunk in range(1, FUZZ_CHUNKS))],
)
def test_random_cases(chunk, fuzz, seed):
    """`--fuzz N` cases in all; to repeat one, case i of seed S is case 0 of seed S + i."""
    cases = []
    for i in range(chunk, fuzz, FUZZ_CHUNKS):
        rng = random.Random(seed + i)
        info = rng.choice(RUNNABLE)
        sample, dtype = info.random_sample(rng), rng.choice(info.dtypes)
        name = f"repeat with --seed {seed + i} --fuzz 1: {info} {dtype} {dict(sample.arguments)}"
        cases.append((name, info, sample, dtype, rng.randrange(1000), i % 4 == 0))
    check_all(cases)


# --- values that must match bit for bit ------------------------------------------------------


@EVERY_OP
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(info, dtype, device):
    """Sums and products are exact in any order, so only a wrong index or sign changes a bit.

    eps is too small to count, and a row of ones and minus ones has mean square 1.
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
@pytest.mark.parametrize("number", ["one", rest("more")])
def test_every_subset_of_gradients(info, number, device):
    """Gradients of a subset of arguments have the bits they have with all, and are the only ones.

    With more than six arguments: one, two, all but one and all but two of them.
    """
    arguments = materialize(info.samples[0], torch.float32, device=device)
    grad_outputs = grad_outputs_of(info, arguments)
    everything = evaluate(info.op, arguments, info.differentiable, grad_outputs, backend="kernel")
    names = present(info, arguments)
    n = len(names)
    sizes = {*range(1, n)} if n <= 6 else {1, 2, n - 2, n - 1}
    for size in sizes & {1} if number == "one" else sizes - {1}:
        for subset in itertools.combinations(names, size):
            some = evaluate(info.op, arguments, subset, grad_outputs, backend="kernel")
            assert {n for n in some if n.startswith("d")} == {f"d{name}" for name in subset}
            assert_same_bits(some, {name: everything[name] for name in some}, f"only {subset}")


@EVERY_OP
def test_grad_outputs_with_odd_strides(info, device):
    """From `.sum()` (stride 0), transposed, sliced: the same bits as from a contiguous one."""
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
        grad_outputs = tuple(layout(x) for x in grad_outputs_of(info, arguments))
        plain = tuple(x.contiguous() for x in grad_outputs)
        ours = evaluate(info.op, arguments, info.differentiable, grad_outputs, backend="kernel")
        expected = evaluate(info.op, arguments, info.differentiable, plain, backend="kernel")
        assert_same_bits(ours, expected, name)


@EVERY_OP
def test_unused_output(info, device):
    """A gradient for one output only equals zeros for the others."""
    arguments = materialize(info.samples[0], torch.float32, device=device)
    grad_outputs = grad_outputs_of(info, arguments)
    for kept in set(range(len(grad_outputs))) - set(info.constant):
        zeros = tuple(x if i == kept else torch.zeros_like(x) for i, x in enumerate(grad_outputs))
        expected = evaluate(info.op, arguments, info.differentiable, zeros, backend="kernel")

        def only(**kw: Any) -> Tensor:
            return call(info, kw)[kept]  # noqa: B023

        ours = evaluate(only, arguments, info.differentiable, (grad_outputs[kept],))
        expected = {n: x for n, x in expected.items() if n.startswith("d")}
        assert_same_bits({n: ours[n] for n in expected}, expected, f"output {kept}")


@EVERY_OP
def test_backward_twice_has_the_same_bits_and_keeps_its_inputs(info, device):
    arguments = materialize(info.samples[0], torch.float32, device=device)
    leaves = {n: arguments[n].requires_grad_() for n in present(info, arguments)}
    grad_outputs = grad_outputs_of(
        info, {n: x.detach() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    )
    before = {f"dout{i}": x.clone() for i, x in enumerate(grad_outputs)}
    pairs = list(zip(call(info, arguments), grad_outputs, strict=True))
    outputs, back = zip(*(p for i, p in enumerate(pairs) if i not in info.constant), strict=True)
    first, second = (
        dict(
            enumerate(torch.autograd.grad(outputs, tuple(leaves.values()), back, retain_graph=True))
        )
        for _ in range(2)
    )
    assert_same_bits(first, second, "a second backward")
    assert_same_bits(
        {f"dout{i}": x for i, x in enumerate(grad_outputs)}, before, "a gradient changed"
    )


@EVERY_OP
def test_saved_tensors_are_arguments_or_results(info, device):
    """No copies: each saved tensor has the memory of an argument or a result, except statistics,
    which are small."""
    arguments = materialize(info.samples[0], torch.bfloat16, device=device)
    known = tensors(arguments).values()
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = evaluate(info.op, arguments, info.differentiable, None, backend="kernel")
    places = {memory(x) for x in (*known, *results.values())}
    assert saved or info.launch is None  # a copy saves nothing
    statistics = sum(x.nbytes for x in saved if memory(x) not in places)
    assert 16 * statistics <= max(x.nbytes for x in known)


def memory(x: Tensor) -> int:
    """Address of a tensor's storage, which one expert's weights share with all experts'."""
    return x.untyped_storage().data_ptr()


@EVERY_OP
def test_variants_refuse_to_cut_a_gradient(info, device):
    for variant in info.variants:
        for name in present(info, info.samples[0].arguments):
            arguments = materialize(info.samples[0], torch.float32, device=device)
            arguments[name].requires_grad_()
            with pytest.raises(RuntimeError, match=f"{info.name}: .*{name} with requires_grad"):
                call(info, arguments, **variant)


@contextlib.contextmanager
def kernels_in_double() -> Iterator[None]:
    """Run kernels in fp64, which the public API refuses, for finite differences."""
    with mock.patch.object(_backend, "choose", return_value=True):
        yield


@interpreted
@EVERY_OP
def test_finite_differences(info):
    """gradcheck in fp64 of the kernels, along random directions."""
    sample = info.gradcheck or dataclasses.replace(
        info.samples[0],
        arguments={
            name: narrowed(info, name, spec, 6) if isinstance(spec, TensorSpec) else spec
            for name, spec in info.samples[0].arguments.items()
        },
    )
    arguments = materialize(sample, torch.float64)
    names = present(info, arguments)
    leaves = tuple(arguments[name].requires_grad_() for name in names)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = call(info, {**arguments, **dict(zip(names, leaves, strict=True))})
        return tuple(x for i, x in enumerate(outputs) if i not in info.constant)

    with kernels_in_double():
        assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0, fast_mode=True)
        try:
            torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
        except GradcheckError:
            raise
        except RuntimeError as error:  # not differentiable twice, and says so
            assert "autograd" in str(error)


# --- size ------------------------------------------------------------------------------------


@interpreted
@EVERY_OP
@pytest.mark.parametrize("direction", ["inputs", "gradients"])
@pytest.mark.parametrize("dim", [0, 1], ids=["samples", "tokens or frames"])
def test_offsets_of_more_than_32_bits(info, direction, dim):
    """Strides past 2**31 elements, over memory that is never touched, equal a contiguous tensor.

    Strides of samples (of tables and weights: rows, experts) are aligned; those of tokens, or of
    the frames of a video, are odd.
    """

    def spread(x: Tensor) -> Tensor:
        axis = 2 * dim if info.videos else dim
        rows = x.transpose(0, axis)
        stride = 2**31 + 16 if dim == 0 else (2**31 // (len(rows) - 1) + 1) | 1
        return wide_strides(rows.shape, x.dtype, stride).copy_(rows).transpose(0, axis)

    def case(_: object) -> None:
        arguments = materialize(info.samples[0], torch.float16)
        grad_outputs = grad_outputs_of(info, arguments)
        expected = evaluate(info.op, arguments, info.differentiable, grad_outputs, backend="kernel")
        if direction == "inputs":
            arguments |= {
                name: spread(x)
                for name, x in tensors(arguments).items()
                if name in info.tokens + info.videos or (dim == 0 and x.dim() > 1 and len(x) > 1)
            }
        else:
            grad_outputs = tuple(
                x if i in info.constant else spread(x) for i, x in enumerate(grad_outputs)
            )
        ours = evaluate(info.op, arguments, info.differentiable, grad_outputs, backend="kernel")
        assert_same_bits(ours, expected, direction)

    [outcome] = run_cases(case, [info.name], timeout=120)
    assert outcome.ok, str(outcome)


@interpreted
@pytest.mark.parametrize("info", [info for info in RUNNABLE if info.launch is not None], ids=str)
@pytest.mark.parametrize(("batch", "length"), [(70_000, 1), (1, 70_000)])
def test_grids_are_within_launch_limits(info, batch, length):
    """With more than 65,535 samples or tokens; only the grid is checked, no program runs."""
    if info.resized is not None:
        sample = info.resized(batch, length)
    else:
        sample = resized(info, info.samples[0], 0, length)
        specs = {name: smallest(info, name, spec, batch) for name, spec in sample.specs().items()}
        sample = dataclasses.replace(sample, arguments={**sample.arguments, **specs})
    arguments = materialize(sample, torch.float16)
    grids = []
    with mock.patch.object(GridExecutor, "__call__", lambda self, *a, **k: grids.append(self.grid)):
        evaluate(
            info.op,
            arguments,
            info.differentiable,
            grad_outputs_of(info, arguments),
            backend="kernel",
        )
    assert grids
    for grid in grids:
        x, y, z = (*grid, 1, 1)[:3]
        assert x < 2**31 and y <= 65535 and z <= 65535, grid


def smallest(info: OpInfo, name: str, spec: TensorSpec, batch: int) -> TensorSpec:
    """The same tensor for a batch of one head, or row, of two dims."""
    *outer, last = narrowed(info, name, spec, 2).shape
    if name in info.tokens:
        outer = [batch, outer[1], *(1 for _ in outer[2:])]
    elif name in info.batched:
        outer = [batch, *outer[1:]]
    return dataclasses.replace(spec, shape=(*outer, last))
