"""Test samples, cost model and compile budgets for `expert_adaln` and `gated_residual`."""

import math
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._opinfo import Budget, Cost, OpInfo, Sample, Size, TensorSpec
from .op import expert_adaln, gated_residual, gated_residual_adaln
from .reference import (
    expert_adaln_reference,
    gated_residual_adaln_reference,
    gated_residual_reference,
)

LAYOUTS = ("contiguous", "packed", "transposed", "offset", "strided", "expanded")
MODULATIONS = ("contiguous", "chunk", "offset", "strided", "expanded")


def _sample(
    reason: str,
    names: tuple[str, ...],
    batch: int = 1,
    text_len: int = 2,
    video_len: int = 4,
    dim: int = 64,
    groups: int = 0,
    text_groups: int = 0,
    norm: str = "layer",
    affine: str = "wb",
    layout: str = "contiguous",
    y_layout: str | None = None,
    modulation: str = "chunk",
    wide: bool = False,
) -> Sample:
    """A sample with the arguments in `names`; with 0 groups a modulation is (batch, dim)."""
    kind = "wide" if wide else None
    shape = (batch, text_len + video_len, dim)
    arguments: dict[str, Any] = {"x": TensorSpec(shape, "rows", layout)}
    if "y" in names:
        arguments["y"] = TensorSpec(shape, "rows", y_layout or layout)
    for name in ("gate", "text_gate", "shift", "scale", "text_shift", "text_scale"):
        if name in names:
            count, tokens = (
                (text_groups, text_len) if name.startswith("text") else (groups, video_len)
            )
            rows = (batch, count, dim) if count else (batch, dim)
            values = "flip" if name.endswith("gate") else "normal"
            spec = TensorSpec(rows, values, modulation, dtype=kind)
            arguments[name] = spec if tokens else None
    if "norm" in names:
        arguments["weight"] = TensorSpec((dim,), "weight", dtype=kind) if "w" in affine else None
        arguments["bias"] = TensorSpec((dim,), dtype=kind) if "b" in affine else None
        arguments["norm"] = norm
    # An odd number of 1 and -1 does not have mean 0.
    return Sample(
        reason, arguments | {"text_len": text_len}, exact="norm" not in names or not dim % 2
    )


_GATES = ("gate", "text_gate")
_SHIFTS = ("shift", "scale", "text_shift", "text_scale")
ADALN = (*_SHIFTS, "norm")
RESIDUAL = ("y", *_GATES)
BOTH = ("y", *_GATES, *_SHIFTS, "norm")

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("text and video", {"batch": 2}),
    ("no text", {"text_len": 0}),
    ("no video", {"text_len": 4, "video_len": 0}),
    ("one token", {"text_len": 0, "video_len": 1}),
    ("one text token", {"text_len": 1, "video_len": 0}),
    ("no tokens", {"text_len": 0, "video_len": 0}),
    ("no batch", {"batch": 0}),
    ("a modulation for each frame", {"batch": 2, "video_len": 12, "groups": 3}),
    ("a modulation for each token", {"video_len": 5, "groups": 5, "text_groups": 2}),
    ("frames longer than a strip", {"video_len": 92, "groups": 2, "dim": 32}),
    ("more tokens than a strip", {"text_len": 43, "video_len": 85, "dim": 32}),
    ("dim 40", {"dim": 40}),
    ("dim 17", {"dim": 17}),
    ("dim 1000", {"dim": 1000, "text_len": 1, "video_len": 2}),
    ("dim 768, three parts", {"dim": 768, "text_len": 1, "video_len": 2}),
    ("as wide as the 2B model", {"dim": 1920, "text_len": 1, "video_len": 2}),
    ("fp32 modulation", {"wide": True}),
    ("rows of a packed tensor", {"layout": "packed", "batch": 2}),
    ("dims before tokens", {"layout": "transposed", "batch": 2}),
    ("odd storage offset", {"layout": "offset", "modulation": "offset"}),
    ("every other dim", {"layout": "strided", "modulation": "strided"}),
    ("expanded batch", {"layout": "expanded", "modulation": "expanded", "batch": 3}),
)
NORM_CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("no weight, no bias", {"affine": ""}),
    ("weight alone", {"affine": "w"}),
    ("bias alone", {"affine": "b"}),
    ("RMSNorm", {"norm": "rms", "affine": "w"}),
    ("RMSNorm, dim 40, no weight", {"norm": "rms", "affine": "", "dim": 40}),
)
RESIDUAL_CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("x packed, y transposed", {"layout": "packed", "y_layout": "transposed"}),
)


def _random(rng: random.Random, norm: bool, residual: bool) -> dict[str, Any]:
    groups, run = rng.choice(((0, 3), (0, 1), (1, 2), (2, 2), (3, 1), (0, 9)))
    text_groups, text_run = rng.choice(((0, 0), (0, 1), (0, 2), (2, 1)))
    drawn: dict[str, Any] = {
        "batch": rng.choice((1, 1, 2)),
        "text_len": max(text_groups, 1) * text_run,
        "video_len": max(groups, 1) * run,
        "groups": groups,
        "text_groups": text_groups,
        "dim": rng.choice((16, 17, 40, 64, 100, 160)),
        "layout": rng.choice(LAYOUTS),
        "modulation": rng.choice(MODULATIONS),
        "wide": rng.random() < 0.3,
    }
    if norm:
        drawn |= {"norm": rng.choice(("layer", "layer", "rms"))}
        drawn |= {"affine": "".join(letter for letter in "wb" if rng.random() < 0.6)}
    if residual:
        drawn |= {"y_layout": rng.choice(LAYOUTS)}
    return drawn


def _at_size(size: Size, names: tuple[str, ...]) -> Sample:
    """As in a transformer block: a modulation for each sample, all six chunks of one projection."""
    return _sample(
        "a model's size",
        names,
        batch=size.batch,
        text_len=size.text_len,
        video_len=size.video_len,
        dim=size.nheads * size.headdim,
    )


def _cost(passes: tuple[int, int], flops: tuple[int, int]) -> Any:
    """Cost from (forward, backward) numbers of tensors of x's size, and of flops an element."""

    def cost(arguments: Mapping[str, Any]) -> tuple[Cost, Cost]:
        x = arguments["x"]
        small = sum(
            value.nbytes
            for name, value in arguments.items()
            if name not in ("x", "y") and isinstance(value, Tensor)
        )
        elements = math.prod(x.shape)
        forward, backward = (
            Cost(n * x.nbytes + small, each * elements)
            for n, each in zip(passes, flops, strict=True)
        )
        return forward, backward

    return cost


def _launch(kernel: Any, a: Mapping[str, Any]) -> None:
    """Launch forward and backward."""
    video, text = (
        kernel.Modulation(*(a.get(of + name) for name in ("shift", "scale", "gate")))
        for of in ("", "text_")
    )
    weight, bias = a.get("weight"), a.get("bias")
    settings = kernel.Settings(a["text_len"], a.get("norm", "none"), 1e-5)
    x, y = a["x"], a.get("y")
    kernel.expert_adaln_fwd(x, y, video, text, weight, bias, settings)
    dstream = None if y is None else torch.empty_like(x)
    dout = torch.empty_like(x) if "norm" in a else None
    video, text = (of._replace(shift=None) for of in (video, text))
    kernel.expert_adaln_bwd(dstream, dout, x, y, video, text, weight, settings)


# A thread holds up to 24 lanes of each vector that is kept for a strip: forward factor, term and
# gate, backward two or three sums more. Shared memory is that of AMD's reductions; NVIDIA's need
# less. Four wavefronts of AMD load a part of 1024, a third of 3072, 64 bits a thread.
_SIZES = ("2b-480x720-49f", "5b-480x720-49f", "1.5-5b-768x1360-81f", "card-480x720-49f")


def _budgets(forward: int, backward: int) -> tuple[Budget, ...]:
    return tuple(
        Budget(kernel, size, registers, 16384, 64 if "5b" in size else 128)
        for size in _SIZES
        for kernel, registers in (
            ("_expert_adaln_fwd_kernel", forward), ("_expert_adaln_bwd_kernel", backward)
        )
    )  # fmt: skip


EXPERT_ADALN = OpInfo(
    name="expert_adaln",
    op=expert_adaln,
    reference=expert_adaln_reference,
    samples=tuple(_sample(reason, ADALN, **case) for reason, case in CASES + NORM_CASES),
    random_sample=lambda rng: _sample("fuzz", ADALN, **_random(rng, True, False)),
    at_size=lambda size: _at_size(size, ADALN),
    tokens=("x",),
    batched=_SHIFTS,
    differentiable=("x", *_SHIFTS, "weight", "bias"),
    summed=(*_SHIFTS, "weight", "bias"),
    cost=_cost((2, 3), (8, 16)),
    torch_ops=("expert_adaln", "expert_adaln_backward"),
    launch=_launch,
    budgets=_budgets(96, 168),
)

GATED_RESIDUAL = OpInfo(
    name="gated_residual",
    op=gated_residual,
    reference=gated_residual_reference,
    samples=tuple(_sample(reason, RESIDUAL, **case) for reason, case in CASES + RESIDUAL_CASES),
    random_sample=lambda rng: _sample("fuzz", RESIDUAL, **_random(rng, False, True)),
    at_size=lambda size: _at_size(size, RESIDUAL),
    tokens=("x", "y"),
    batched=_GATES,
    differentiable=("x", *RESIDUAL),
    summed=_GATES,
    cost=_cost((3, 3), (2, 3)),
    variants=({"inplace": True},),
    torch_ops=("gated_residual", "gated_residual_", "expert_adaln_backward"),
    launch=_launch,
    budgets=_budgets(72, 96),
)

GATED_RESIDUAL_ADALN = OpInfo(
    name="gated_residual_adaln",
    op=gated_residual_adaln,
    reference=gated_residual_adaln_reference,
    samples=tuple(
        _sample(reason, BOTH, **case) for reason, case in CASES + NORM_CASES + RESIDUAL_CASES
    ),
    random_sample=lambda rng: _sample("fuzz", BOTH, **_random(rng, True, True)),
    at_size=lambda size: _at_size(size, BOTH),
    tokens=("x", "y"),
    batched=(*_GATES, *_SHIFTS),
    differentiable=("x", *RESIDUAL, *_SHIFTS, "weight", "bias"),
    summed=(*_GATES, *_SHIFTS, "weight", "bias"),
    rounds_between=True,  # the stream, before its norm
    cost=_cost((4, 6), (10, 19)),
    torch_ops=("gated_residual_adaln", "expert_adaln_backward"),
    launch=_launch,
    budgets=_budgets(144, 255),
)
