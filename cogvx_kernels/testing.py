"""Kernels against references: shared by the tests, `cogvx-kernels verify` and the benchmarks.

Truth is the reference in fp64; the yardstick is the reference in the dtype under test; a kernel
must be about as near to the truth as its yardstick is (`judge`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    "Size",
    "Verdict",
    "compare",
    "cotangents",
    "evaluate",
    "judge",
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

# The inputs of a small sample times these: what it says is the same, its roundings fall anew.
REDRAWS = tuple(1 + i / 16 for i in (-3, -2, -1, 1, 2, 3))

# Of which integers there are few: the largest, and what they are multiples of.
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


# How a tensor of a shape lies in memory that `new` hands out by shape.
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
    """Small integers that tell where they stand; every sum and product of theirs is exact."""
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


def cotangents(outputs: tuple[Tensor, ...], seed: int, exact: bool = False) -> tuple[Tensor, ...]:
    """A gradient to send back into each output."""
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
    douts: tuple[Tensor, ...] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs (`out0`, `out1`, …) and gradients (`dq`, …) of a call, by name.

    `differentiable` arguments that are there require a gradient; each is a leaf of its own with
    the same strides. `douts` are sent back into the outputs that depend on one, or nothing is if
    there are none.
    """
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in differentiable
        if arguments.get(name) is not None
    }
    outputs = as_tuple(function(**{**arguments, **leaves}, **options))
    results = {f"out{i}": x.detach() for i, x in enumerate(outputs)}
    if leaves and douts is not None:
        back = [(x, dout) for x, dout in zip(outputs, douts, strict=True) if x.requires_grad]
        gradients = torch.autograd.grad(
            [x for x, _ in back], tuple(leaves.values()), [dout for _, dout in back]
        )
        results |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return results


def to_double(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in fp64, exactly; integers stay integers."""
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


# --- the rule --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How far a result and its yardstick are from the truth, and whether that is near enough."""

    name: str
    error: float  # largest absolute error
    yardstick: float
    ulp: float  # at the truth's largest value
    rms: float
    rms_yardstick: float
    ok: bool

    @property
    def multiple(self) -> float:
        """The error as a multiple of the yardstick's."""
        if self.error == 0:
            return 0.0
        return self.error / self.yardstick if self.yardstick else math.inf

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.error:.3g} (reference {self.yardstick:.3g}, ulp "
            f"{self.ulp:.3g}), rms {self.rms:.3g} (reference {self.rms_yardstick:.3g})"
        )


def judge(
    name: str,
    result: Tensor,
    yardstick: Tensor,
    truth: Tensor,
    summed: bool = False,
    redraws: Sequence[tuple[Tensor, Tensor]] = (),
    between: bool = False,
    rows: int | None = None,
) -> Verdict:
    """The rule of numerics.

    A row's result may be off by at most what the yardstick is off, plus 1 ulp, and in the root
    mean square by 1.05 times as much; a sum over rows, or a matrix product, by twice as much,
    because the order of the sum is free. Where the truth is infinite or not a number, the result
    must be so too.

    In fp32 the roundings of every step show, and how they fall is luck: a small sample says little
    of what the reference may be off. Its yardstick is therefore the worst of several draws, the
    `redraws` being more pairs of yardstick and truth, and two samples of n rows, or of n sums,
    differ by chance with a standard deviation of about 1/sqrt(n): four of those are allowed. At a
    model's size both are next to nothing. A row is what is normalised by itself, the last dim
    unless `rows` says how many there are. In fp16 and bf16 the last rounding outweighs all luck,
    unless the op rounds `between` too: how that rounding falls is handed on to all that follows.
    """
    if result.dtype != yardstick.dtype or result.shape != yardstick.shape:
        got, wanted = (f"{x.dtype} {tuple(x.shape)}" for x in (result, yardstick))
        raise AssertionError(f"{name}: got {got}, wanted {wanted}")
    eps = torch.finfo(result.dtype).eps
    if summed:
        rows = result.numel()
    elif rows is None:
        rows = math.prod(result.shape[:-1])
    lucky = between or result.dtype is torch.float32
    chance = 1 + 4 / math.sqrt(max(1, rows)) if lucky else 1.0
    result, yardstick, truth = (x.detach().double().cpu() for x in (result, yardstick, truth))
    finite = yardstick.isfinite()
    specials = [x[~finite].nan_to_num() for x in (result, yardstick)]
    same_specials = torch.equal(result.isfinite(), finite) and torch.equal(*specials)
    truth = truth[finite]
    error, reference = result[finite] - truth, yardstick[finite] - truth
    references = [reference, *(_redrawn(*redraw, truth) for redraw in redraws)]
    worst, worst_reference = _largest(error), max(map(_largest, references))
    rms, rms_reference = _rms(error), max(map(_rms, references))
    largest = _largest(truth)
    ulp = eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
    if summed:
        limit = 2 * chance
        near = worst <= limit * worst_reference + ulp and rms <= limit * rms_reference + ulp
    else:
        near = worst <= chance * worst_reference + ulp and rms <= 1.05 * chance * rms_reference
    ok = same_specials and near
    return Verdict(name, worst, worst_reference, ulp, rms, rms_reference, ok)


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
) -> list[Verdict]:
    """A verdict on each output and gradient of the op's kernel, or of `function` in its place.

    `arguments` and what the kernel made of them, `ours`, may be given if they are there already;
    the gradients sent back are `cotangents(outputs, seed)`.
    """
    if arguments is None:
        arguments = materialize(sample, dtype, device=device, seed=seed)
    options: dict[str, Any] = {"backend": "kernel"} if function is None else {}
    douts = cotangents(as_tuple(info.reference(**arguments)), seed)
    if ours is None:
        ours = evaluate(function or info.op, arguments, info.differentiable, douts, **options)
    yardstick, truth = yardstick_and_truth(info, arguments, douts)
    between = info.rounds_between
    lucky = {name for name, x in yardstick.items() if between or x.dtype is torch.float32}
    small = max(x.numel() for x in douts) < 2**16
    redraws = [
        yardstick_and_truth(info, *scaled(info, arguments, douts, factor))
        for factor in (REDRAWS if small and lucky else ())
    ]
    summed = {f"d{name}" for name in info.summed}
    rows = info.rows(arguments) if info.rows else None
    return [
        judge(
            name,
            ours[name],
            yardstick[name],
            truth[name],
            info.products or name in summed,
            [(y[name], t[name]) for y, t in redraws if name in lucky],
            between,
            rows,
        )
        for name in truth
    ]


def yardstick_and_truth(
    info: OpInfo, arguments: Mapping[str, Any], douts: tuple[Tensor, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's results in the arguments' dtype, and in fp64."""
    wide_douts = tuple(x.double() for x in douts)
    return (
        evaluate(info.reference, arguments, info.differentiable, douts),
        evaluate(info.reference, to_double(arguments), info.differentiable, wide_douts),
    )


def scaled(
    info: OpInfo, arguments: Mapping[str, Any], douts: tuple[Tensor, ...], factor: float
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """The same call, its differentiable arguments and its gradients times `factor`."""
    times = {
        name: x * factor if name in info.differentiable and isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }
    return times, tuple(x * factor for x in douts)


def _redrawn(yardstick: Tensor, its_truth: Tensor, truth: Tensor) -> Tensor:
    """A redraw's errors, at the scale of the truth: its numbers are larger, or smaller."""
    scale = _rms(its_truth)
    return (yardstick.double().cpu() - its_truth.cpu()) * (_rms(truth) / scale if scale else 1.0)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
