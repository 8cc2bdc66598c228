"""Arguments of timed calls: random, made on the device, at a model's size and layout."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogvx_kernels.testing import LAYOUTS, OpInfo, Sample, Size, TensorSpec

from .registry import MODEL

HALF_SPLIT = "half-split, no text"
CONTIGUOUS = "contiguous"


def conventions(info: OpInfo, size: Size) -> dict[str, Sample]:
    """The call as the model makes it, and as other libraries could make it too, by name.

    Ratios are formed inside a convention, never across: each is another function.
    """
    model = info.at_size(size)
    if info.name != "rope3d":
        further = {name: at_size(size) for name, at_size in info.conventions.items()}
        if info.videos:
            further.setdefault(CONTIGUOUS, _contiguous(model))
        return {MODEL: model, **further}
    batch, _, *head = model.arguments["x"].shape
    x = replace(model.arguments["x"], shape=(batch, size.video_len, *head), layout="contiguous")
    changed = {"x": x, "text_len": 0, "interleaved": False}
    return {MODEL: model, HALF_SPLIT: Sample(HALF_SPLIT, {**model.arguments, **changed})}


def _contiguous(sample: Sample) -> Sample:
    """The same call on contiguous videos, torch's default layout."""
    arguments = {
        name: replace(spec, layout="contiguous")
        for name, spec in sample.specs().items()
        if spec.layout in ("channels_last", "behind")
    }
    return Sample(CONTIGUOUS, {**sample.arguments, **arguments}, sample.exact)


def make(
    sample: Sample, dtype: torch.dtype, device: str | torch.device, seed: int
) -> dict[str, Any]:
    """Random arguments of a call, the same for the same seed.

    `cogvx_kernels.testing.materialize` draws on the CPU, so that a test gives the same numbers
    everywhere; that would take longer than all the timing. And here, as in a model, the "packed"
    tensors are views of one projection.
    """
    random = torch.Generator(device).manual_seed(seed)
    packed: dict[tuple[int, ...], list[Tensor]] = {}
    arguments: dict[str, Any] = {}
    for name, spec in sample.arguments.items():
        if not isinstance(spec, TensorSpec):
            arguments[name] = spec
            continue
        kind = spec.dtype_for(dtype)
        if spec.layout == "packed" and packed.get(spec.shape):
            tensor = packed[spec.shape].pop(0)
        elif spec.layout == "packed":
            *outer, nheads, headdim = spec.shape
            qkv = torch.empty((*outer, 3, nheads, headdim), dtype=kind, device=device)
            tensor, *packed[spec.shape] = qkv.normal_(generator=random).unbind(-3)
        else:
            tensor = LAYOUTS[spec.layout](
                spec.shape, lambda shape, k=kind: torch.empty(shape, dtype=k, device=device)
            )
        arguments[name] = _fill(tensor, spec, random)
    return arguments


def _fill(x: Tensor, spec: TensorSpec, random: torch.Generator) -> Tensor:
    values = spec.values
    if values == "index":
        return x.random_(0, spec.below, generator=random)
    if values in ("cos", "sin"):  # of the same angles, in every set
        x.normal_(0, 7, generator=torch.Generator(x.device).manual_seed(0))
        return x.cos_() if values == "cos" else x.sin_()
    x.normal_(generator=random)
    if values == "rows":
        row = x.new_empty((*x.shape[:-1], 1))
        x.mul_(row.uniform_(1, 2, generator=random)).add_(row.normal_(generator=random))
    elif values == "weight":
        x.div_(4).add_(1)
    elif values == "matrix" or (values == "lifted" and x.dim() > 2):
        x.div_(math.sqrt(x.shape[-1]))
    return x


def grad_outputs_like(outputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """A random gradient for each output, with the output's strides."""
    random = torch.Generator(outputs[0].device).manual_seed(seed)
    return tuple(
        torch.empty_like(x, requires_grad=False).normal_(generator=random) for x in outputs
    )


def nbytes(arguments: Mapping[str, Any]) -> int:
    return sum(x.numel() * x.element_size() for x in arguments.values() if isinstance(x, Tensor))
