"""Comparison of kernels with references, for the tests, `cogvx-kernels verify` and the benchmarks.

Each kernel is compared with two runs of its reference: one in fp64, and the baseline, one in the
dtype under test. The kernel's error against fp64 must be about the baseline's (`check_close`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._opinfo import SIZES, OpInfo, Sample, Size, TensorSpec
from .expert_adaln.opinfo import EXPERT_ADALN, GATED_RESIDUAL, GATED_RESIDUAL_ADALN
from .expert_ffn.opinfo import EXPERT_FFN
from .frame_cache.opinfo import FRAME_CACHE_JOIN
from .rope3d.opinfo import QK_NORM_ROPE3D, ROPE3D
from .spatial_norm.opinfo import RESIDUAL_MOMENTS, SPATIAL_NORM_SILU
from .temporal_conv.opinfo import TEMPORAL_CONV

__all__ = [
    "LAYOUTS",
    "OPS",
    "SIZES",
    "Comparison",
    "Size",
    "check_close",
    "compare",
    "evaluate",
    "grad_outputs_like",
    "materialize",
]

OPS: Mapping[str, OpInfo] = {
    info.name: info
    for info in (
        ROPE3D,
        QK_NORM_ROPE3D,
        EXPERT_ADALN,
        GATED_RESIDUAL,
        GATED_RESIDUAL_ADALN,
        EXPERT_FFN,
        SPATIAL_NORM_SILU,
        RESIDUAL_MOMENTS,
        TEMPORAL_CONV,
        FRAME_CACHE_JOIN,
    )
}

Allocate = Callable[..., Tensor]

# Factors for the inputs of a small sample: the same computation with other roundings.
REDRAWS = tuple(1 + i / 16 for i in (-3, -2, -1, 1, 2, 3))

# Exact values drawn from few integers: the largest, and the unit they are multiples of.
FEW = {"matrix": (1, 1), "lifted": (1, 128), "few": (2, 1)}

# --- from a sample to tensors ----------------------------------------------------------------


def _packed(shape: tuple[int, ...], new: Allocate) -> Tensor:
    *outer, nheads, headdim = shape
    return new((*outer, 3, nheads, headdim)).select(-3, 1)


def _transposed(shape: tuple[int, ...], new: Allocate) -> Tensor:
    return new((shape[0], shape[2], shape[1], *shape[3:])).transpose(1, 2)


def _offset(shape: tuple[int, ...], new: Allocate) -> Tensor:
    return new((math.prod(shape) + 3,))[3:].view(shape)


def _strided(shape: tuple[int, ...], new: Allocate) -> Tensor:
    return new((*shape[:-1], 2 * shape[-1]))[..., ::2]


def _chunk(shape: tuple[int, ...], new: Allocate) -> Tensor:
    *outer, dim = shape
    return new((*outer, 3 * dim)).narrow(-1, dim, dim)


def _expanded(shape: tuple[int, ...], new: Allocate) -> Tensor:
    return new((1, *shape[1:])).expand(shape)


def _channels_last(shape: tuple[int, ...], new: Allocate) -> Tensor:
    batch, channels, *rest = shape
    return new((batch, *rest, channels)).movedim(-1, 1)


def _behind(shape: tuple[int, ...], new: Allocate) -> Tensor:
    batch, channels, frames, *rest = shape
    return _channels_last((batch, channels, frames + 2, *rest), new)[:, :, 2:]


def _inset(shape: tuple[int, ...], new: Allocate) -> Tensor:
    *outer, height, width = shape
    return new((*outer, height + 2, width + 3))[..., 1:-1, 1:-2]


# Name -> a tensor of a shape in that layout, in memory that `new(shape)` allocates.
LAYOUTS: Mapping[str, Callable[[tuple[int, ...], Allocate], Tensor]] = {
    "contiguous": lambda shape, new: new(shape),
    "packed": _packed,
    "transposed": _transposed,
    "offset": _offset,
    "strided": _strided,
    "chunk": _chunk,
    "expanded": _expanded,
    "channels_last": _channels_last,
    "behind": _behind,
    "inset": _inset,
}


def _random_values(spec: TensorSpec, shape: tuple[int, ...], seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    if spec.values in ("cos", "sin"):  # one seed for both: two columns of the same angles
        angles = 7 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
        return angles.cos() if spec.values == "cos" else angles.sin()
    if spec.values == "index":
        return torch.randint(spec.below, shape, generator=random)
    x = torch.randn(shape, generator=random)
    if spec.values == "rows":
        row = (*shape[:-1], 1)
        return x * (1 + torch.rand(row, generator=random)) + torch.randn(row, generator=random)
    if spec.values == "matrix" or (spec.values == "lifted" and len(shape) > 2):
        return x / math.sqrt(shape[-1])
    return 1 + x / 4 if spec.values == "weight" else x


def _exact_values(spec: TensorSpec, shape: tuple[int, ...], seed: int) -> Tensor:
    """Small integers that differ by position; their sums and products are exact in any order."""
    if spec.values == "index":
        return _random_values(spec, shape, seed)
    place = torch.arange(math.prod(shape)).reshape(shape) + seed
    if spec.values in ("cos", "sin"):  # quarter turns
        quarters = torch.tensor([1.0, 0.0, -1.0, 0.0])
        where = torch.arange(math.prod(shape)).reshape(shape)
        return quarters[(where + (spec.values == "sin")) % 4]
    if spec.values == "rows":  # mean 0 and mean square 1: a norm leaves it as it is
        signs = 1.0 - 2.0 * (torch.arange(shape[-1]) % 2)
        return signs * (1.0 - 2.0 * (place[..., :1] % 2))
    if spec.values == "flip":
        pairs = (place - seed) // 2 + seed
        return 2.0 * (pairs * 7919 % 251 % 2)
    if spec.values in FEW:  # drawn: a pattern of so few would come again in the next row
        most, unit = FEW[spec.values]
        random = torch.Generator().manual_seed(seed)
        return unit * torch.randint(-most, most + 1, shape, generator=random).float()
    return ((place * 7919) % 251 - 125).float()


def materialize(
    sample: Sample,
    dtype: torch.dtype,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    exact: bool = False,
    new: Allocate | None = None,
) -> dict[str, Any]:
    """The sample's arguments, tensors filled from `seed`. `new(shape, dtype, device)` allocates."""
    new = new or (lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device))
    values = _exact_values if exact else _random_values
    arguments: dict[str, Any] = {}
    for place, (name, spec) in enumerate(sample.arguments.items()):
        if not isinstance(spec, TensorSpec):
            arguments[name] = spec
            continue
        kind = spec.dtype_for(dtype)
        tensor = LAYOUTS[spec.layout](spec.shape, lambda shape, k=kind: new(shape, k, device))
        arguments[name] = tensor
        if tensor.is_meta:
            continue
        # Fill what lies in memory once: an expanded tensor has many elements in one place.
        base = tensor[:1] if spec.layout == "expanded" else tensor
        base.copy_(values(spec, tuple(base.shape), 1000 * seed + place))
    return arguments


def grad_outputs_like(
    outputs: tuple[Tensor, ...], seed: int, exact: bool = False
) -> tuple[Tensor, ...]:
    """A gradient for each output, of its shape, dtype and device."""
    values = _exact_values if exact else _random_values
    return tuple(
        values(TensorSpec(tuple(x.shape)), tuple(x.shape), 1000 * seed + 500 + i).to(x)
        for i, x in enumerate(outputs)
    )


# --- from arguments to results ---------------------------------------------------------------


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def evaluate(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    differentiable: tuple[str, ...] = (),
    grad_outputs: tuple[Tensor, ...] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs (`out0`, `out1`, …) and gradients (`dq`, …) of a call, by name.

    The `differentiable` arguments that are not None become leaves with the same strides. The
    backward runs with the `grad_outputs` of the outputs that require a gradient; without
    `grad_outputs` it does not run.
    """
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in differentiable
        if arguments.get(name) is not None
    }
    outputs = as_tuple(function(**{**arguments, **leaves}, **options))
    results = {f"out{i}": x.detach() for i, x in enumerate(outputs)}
    if leaves and grad_outputs is not None:
        pairs = [(x, g) for x, g in zip(outputs, grad_outputs, strict=True) if x.requires_grad]
        gradients = torch.autograd.grad(
            [x for x, _ in pairs], tuple(leaves.values()), [g for _, g in pairs]
        )
        results |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return results


def to_double(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in fp64, exactly; integers stay integers."""
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


# --- numerics --------------------------------------------------------------------------------


class Element(NamedTuple):
    """An element of a result, and the value that it should have."""

    place: tuple[int, ...]
    value: float
    wanted: float

    def __str__(self) -> str:
        return f"{list(self.place)} is {self.value:.6g}, wanted {self.wanted:.6g}"


@dataclass(frozen=True)
class Comparison:
    """Errors of a result and of its baseline against fp64; `ok` if the result passes."""

    name: str
    error: float  # largest absolute error
    baseline: float
    ulp: float  # at the largest value in fp64
    rms: float
    rms_baseline: float
    ok: bool
    worst: tuple[Element, ...] = ()  # those furthest off, where it is not ok

    @property
    def multiple(self) -> float:
        """The error as a multiple of the baseline's."""
        if self.error == 0:
            return 0.0
        return self.error / self.baseline if self.baseline else math.inf

    def __str__(self) -> str:
        text = (
            f"{self.name}: error {self.error:.3g} (reference {self.baseline:.3g}, ulp "
            f"{self.ulp:.3g}), rms {self.rms:.3g} (reference {self.rms_baseline:.3g})"
        )
        return f"{text}; worst: {', '.join(map(str, self.worst))}" if self.worst else text


def check_close(
    name: str,
    result: Tensor,
    baseline: Tensor,
    fp64: Tensor,
    summed: bool = False,
    redraws: Sequence[tuple[Tensor, Tensor]] = (),
    rounds_between: bool = False,
    rows: int | None = None,
) -> Comparison:
    """Compare a result's error against fp64 with that of the baseline.

    The largest error may be the baseline's plus 1 ulp, the root mean square 1.05 times the
    baseline's; twice both for a sum over rows or a matrix product (`summed`), whose order of
    summation is free. Infinities and NaN must be where the baseline has them.

    In fp32, and if the op `rounds_between`, all roundings count, and a small sample varies by
    chance. There the baseline's errors are the largest over the `redraws`, more pairs of baseline
    and fp64, and both limits grow by 4/sqrt(n), four standard deviations of a sample of n rows or
    sums. In fp16 and bf16 the last rounding dominates, unless the sums cancel and the baseline has
    no digit right: there the limits grow, too. `rows` is the number of rows that are
    normalised each by itself, by default all but the last dim.
    """
    if result.dtype != baseline.dtype or result.shape != baseline.shape:
        got, wanted = (f"{x.dtype} {tuple(x.shape)}" for x in (result, baseline))
        raise AssertionError(f"{name}: got {got}, wanted {wanted}")
    dtype, eps = result.dtype, torch.finfo(result.dtype).eps
    if summed:
        rows = result.numel()
    elif rows is None:
        rows = math.prod(result.shape[:-1])
    result, baseline, fp64 = (x.detach().double().cpu() for x in (result, baseline, fp64))
    finite = baseline.isfinite()
    specials = [x[~finite].nan_to_num() for x in (result, baseline)]
    same_specials = torch.equal(result.isfinite(), finite) and torch.equal(*specials)
    exact = fp64[finite]
    error, reference = result[finite] - exact, baseline[finite] - exact
    references = [reference, *(_redrawn(*redraw, exact) for redraw in redraws)]
    largest_error, largest_reference = _largest(error), max(map(_largest, references))
    rms, rms_reference = _rms(error), max(map(_rms, references))
    largest = _largest(exact)
    varies = rounds_between or dtype is torch.float32 or (summed and largest_reference > largest)
    chance = 1 + 4 / math.sqrt(max(1, rows)) if varies else 1.0
    ulp = eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
    if summed:
        limit = 2 * chance
        near = largest_error <= limit * largest_reference + ulp
        near = near and rms <= limit * rms_reference + ulp
    else:
        near = largest_error <= chance * largest_reference + ulp
        near = near and rms <= 1.05 * chance * rms_reference
    ok = same_specials and near
    worst = () if ok else _worst(result, torch.where(finite, fp64, baseline))
    return Comparison(name, largest_error, largest_reference, ulp, rms, rms_reference, ok, worst)


def _worst(result: Tensor, wanted: Tensor, count: int = 3) -> tuple[Element, ...]:
    """The elements that are furthest off, first those where only one side is finite."""
    same = (result == wanted) | (result.isnan() & wanted.isnan())
    distance = (result - wanted).abs().nan_to_num(math.inf, math.inf).masked_fill(same, 0)
    order = distance.flatten().topk(min(count, distance.numel())).indices
    places = [tuple(map(int, torch.unravel_index(i, result.shape))) for i in order]
    return tuple(
        Element(place, float(result[place]), float(wanted[place]))
        for place in places
        if distance[place]
    )


def compare(
    info: OpInfo,
    sample: Sample,
    dtype: torch.dtype,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    function: Callable[..., Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    ours: Mapping[str, Tensor] | None = None,
) -> list[Comparison]:
    """Check every output and gradient of the op's kernel, or of `function` in its place.

    `arguments` and `ours`, the kernel's results for them, are computed unless they are given; the
    backward starts from `grad_outputs_like(outputs, seed)`.
    """
    if arguments is None:
        arguments = materialize(sample, dtype, device=device, seed=seed)
    options: dict[str, Any] = {"backend": "kernel"} if function is None else {}
    grad_outputs = grad_outputs_like(as_tuple(info.reference(**arguments)), seed)
    if ours is None:
        ours = evaluate(
            function or info.op, arguments, info.differentiable, grad_outputs, **options
        )
    baseline, fp64 = baseline_and_fp64(info, arguments, grad_outputs)
    between = info.rounds_between
    varying = {name for name, x in baseline.items() if between or x.dtype is torch.float32}
    small = max(x.numel() for x in grad_outputs) < 2**16
    redraws = [
        baseline_and_fp64(info, *scaled(info, arguments, grad_outputs, factor))
        for factor in (REDRAWS if small and varying else ())
    ]
    summed = {f"d{name}" for name in info.summed}
    rows = info.rows(arguments) if info.rows else None
    return [
        check_close(
            name,
            ours[name],
            baseline[name],
            fp64[name],
            info.products or name in summed,
            [(y[name], t[name]) for y, t in redraws if name in varying],
            between,
            rows,
        )
        for name in fp64
    ]


def baseline_and_fp64(
    info: OpInfo, arguments: Mapping[str, Any], grad_outputs: tuple[Tensor, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's results in the arguments' dtype, and in fp64."""
    wide_grad_outputs = tuple(x.double() for x in grad_outputs)
    return (
        evaluate(info.reference, arguments, info.differentiable, grad_outputs),
        evaluate(info.reference, to_double(arguments), info.differentiable, wide_grad_outputs),
    )


def scaled(
    info: OpInfo, arguments: Mapping[str, Any], grad_outputs: tuple[Tensor, ...], factor: float
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """The same call, its differentiable arguments and its gradients times `factor`."""
    times = {
        name: x * factor if name in info.differentiable and isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }
    return times, tuple(x * factor for x in grad_outputs)


def _redrawn(baseline: Tensor, its_fp64: Tensor, fp64: Tensor) -> Tensor:
    """Errors of a redraw, scaled from its own root mean square to that of `fp64`."""
    scale = _rms(its_fp64)
    return (baseline.double().cpu() - its_fp64.cpu()) * (_rms(fp64) / scale if scale else 1.0)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
