"""Test samples, cost model and compile budgets for `rope3d` and `qk_norm_rope3d`."""

import math
import random
from collections.abc import Mapping
from typing import Any

import torch

from .._opinfo import Budget, Cost, OpInfo, Sample, Size, TensorSpec
from .op import qk_norm_rope3d, rope3d
from .reference import qk_norm_rope3d_reference, rope3d_reference

LAYOUTS = ("contiguous", "packed", "transposed", "offset", "strided", "expanded")


def _rope(
    reason: str,
    batch: int = 1,
    text_len: int = 2,
    video_len: int = 3,
    nheads: int = 2,
    headdim: int = 64,
    rotary_dim: int | None = None,
    interleaved: bool = True,
    layout: str = "contiguous",
) -> Sample:
    table = (video_len, (rotary_dim or headdim) // 2)
    return Sample(
        reason,
        {
            "x": TensorSpec((batch, text_len + video_len, nheads, headdim), layout=layout),
            "cos": TensorSpec(table, "cos", dtype="wide"),
            "sin": TensorSpec(table, "sin", dtype="wide"),
            "text_len": text_len,
            "interleaved": interleaved,
        },
    )


def _qk_norm_rope(
    reason: str,
    norm: str = "layer",
    affine: str = "wwbb",
    k_heads: int | None = None,
    k_layout: str | None = None,
    wide_affine: bool = False,
    **rope: Any,
) -> Sample:
    """A sample; `affine` has a letter for each of q_weight, k_weight, q_bias, k_bias, or "-"."""
    arguments = dict(_rope(reason, **rope).arguments)
    q = arguments.pop("x")
    batch, seqlen, nheads, headdim = q.shape
    kind = "wide" if wide_affine else None
    weight = TensorSpec((headdim,), "weight", dtype=kind)
    bias = TensorSpec((headdim,), "normal", dtype=kind)
    return Sample(
        reason,
        {
            "q": TensorSpec(q.shape, "rows", q.layout),
            "k": TensorSpec(
                (batch, seqlen, k_heads or nheads, headdim), "rows", k_layout or q.layout
            ),
            "q_weight": weight if affine[0] == "w" else None,
            "q_bias": bias if affine[2] == "b" else None,
            "k_weight": weight if affine[1] == "w" else None,
            "k_bias": bias if affine[3] == "b" else None,
            "norm": norm,
            **arguments,
        },
    )


ROPE_CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("text and video", {"batch": 2}),
    ("no text", {"text_len": 0, "video_len": 4}),
    ("no video", {"text_len": 4, "video_len": 0}),
    ("one token", {"text_len": 0, "video_len": 1}),
    ("one text token", {"text_len": 1, "video_len": 0}),
    ("no tokens", {"text_len": 0, "video_len": 0}),
    ("no batch", {"batch": 0}),
    ("no heads", {"nheads": 0}),
    ("head dim 40", {"headdim": 40, "nheads": 3}),
    ("head dim 80, 64 turn", {"headdim": 80, "rotary_dim": 64}),
    ("head dim 96", {"headdim": 96}),
    ("head dim 128, half-split", {"headdim": 128, "interleaved": False}),
    ("head dim 40, 24 turn, half-split", {"headdim": 40, "rotary_dim": 24, "interleaved": False}),
    ("small head", {"headdim": 6, "nheads": 1}),
    ("more heads than a tile", {"nheads": 21, "text_len": 1, "video_len": 1}),
    ("many rows", {"text_len": 2, "video_len": 14, "nheads": 16, "headdim": 40}),
    ("packed qkv", {"layout": "packed", "batch": 2}),
    ("packed qkv, head dim 40", {"layout": "packed", "batch": 2, "headdim": 40}),
    ("heads before tokens", {"layout": "transposed", "batch": 2}),
    ("odd storage offset", {"layout": "offset"}),
    ("every other dim", {"layout": "strided"}),
    ("expanded batch", {"layout": "expanded", "batch": 3}),
    ("half-split, every other dim", {"layout": "strided", "interleaved": False}),
)

QK_NORM_CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("RMSNorm", {"norm": "rms", "affine": "ww--"}),
    ("RMSNorm, head dim 40, half-split", {"norm": "rms", "headdim": 40, "interleaved": False}),
    ("no weights", {"affine": "----"}),
    ("weights of q alone", {"affine": "w-b-"}),
    ("biases alone", {"affine": "--bb"}),
    ("fp32 weights", {"wide_affine": True}),
    ("fewer heads in k", {"nheads": 4, "k_heads": 1}),
    ("more heads in k", {"nheads": 1, "k_heads": 5}),
    ("q packed, k transposed", {"layout": "packed", "k_layout": "transposed"}),
)


def _random_rope(rng: random.Random, smallest: int = 4) -> dict[str, Any]:
    headdim = max(smallest, rng.choice((4, 6, 16, 40, 64, 80, 96, 128)))
    return {
        "batch": rng.choice((1, 1, 1, 2)),
        "text_len": rng.choice((0, 1, 2)),
        "video_len": rng.choice((0, 1, 1, 2)),
        "nheads": rng.choice((1, 2, 3, 5)),
        "headdim": headdim,
        "rotary_dim": 2 * rng.randint(1, headdim // 2) if rng.random() < 0.5 else headdim,
        "interleaved": rng.random() < 0.6,
        "layout": rng.choice(LAYOUTS),
    }


def _random_qk_norm_rope(rng: random.Random) -> dict[str, Any]:
    # A LayerNorm of few numbers that are nearly equal is ill-conditioned in fp32.
    norm = rng.choice(("layer", "layer", "rms"))
    return _random_rope(rng, smallest=16 if norm == "layer" else 4) | {
        "norm": norm,
        "affine": "".join(rng.choice((letter, "-")) for letter in "wwbb"),
        "k_heads": rng.choice((None, 1, 2)),
        "k_layout": rng.choice(LAYOUTS),
        "wide_affine": rng.random() < 0.3,
    }


def _at_size(size: Size) -> dict[str, Any]:
    return {
        "batch": size.batch,
        "text_len": size.text_len,
        "video_len": size.video_len,
        "nheads": size.nheads,
        "headdim": size.headdim,
        "layout": "packed",
    }


def _rope_cost(arguments: Mapping[str, Any]) -> tuple[Cost, Cost]:
    """x read and written once, and the tables; 6 operations for each pair."""
    x, cos = arguments["x"], arguments["cos"]
    moved = 2 * x.nbytes + 2 * cos.nbytes
    flops = 3 * math.prod(x.shape)
    return Cost(moved, flops), Cost(moved, flops)


def _qk_norm_rope_cost(arguments: Mapping[str, Any]) -> tuple[Cost, Cost]:
    """Forward: q and k read and written. Backward: they and their gradients read, one written."""
    q, k = arguments["q"], arguments["k"]
    heads = q.nbytes + k.nbytes
    affine = [x for name, x in arguments.items() if name.endswith(("_weight", "_bias"))]
    constants = 2 * arguments["cos"].nbytes + sum(x.nbytes for x in affine if x is not None)
    elements = math.prod(q.shape) + math.prod(k.shape)
    return Cost(2 * heads + constants, 11 * elements), Cost(3 * heads + constants, 25 * elements)


def _rope_launch(kernel: Any, a: Mapping[str, Any]) -> None:
    """The forward; the backward is the same kernel with opposite angles."""
    kernel.rope3d_fwd(a["x"], a["cos"], a["sin"], a["text_len"], a["interleaved"], False)


def _qk_norm_rope_launch(kernel: Any, a: Mapping[str, Any]) -> None:
    settings = kernel.Settings(a["text_len"], a["norm"], 1e-6, a["interleaved"])
    affine = a["q_weight"], a["q_bias"], a["k_weight"], a["k_bias"]
    tables = a["cos"], a["sin"]
    q, k = kernel.qk_norm_rope3d_fwd(a["q"], a["k"], affine, *tables, settings, inplace=True)
    douts = torch.empty_like(q), torch.empty_like(k)
    kernel.qk_norm_rope3d_bwd(douts, q, k, affine[::2], *tables, settings, True)


# 64 registers let 16 programs of the forward share an SM of 65,536: 32 KiB of loads in flight. The
# narrow accesses are the norm's weights, 2 bytes a thread, and the sums of their gradients.
_SIZES = ("2b-480x720-49f", "5b-480x720-49f", "card-480x720-49f")
_ROPE_BUDGETS = tuple(Budget("_rope3d_fwd_kernel", size, registers=44, shared=0) for size in _SIZES)
_QK_NORM_ROPE_BUDGETS = tuple(
    budget
    for size in _SIZES
    for budget in (
        Budget("_rope3d_fwd_kernel", size, registers=64, shared=128, narrow=4),
        Budget("_qk_norm_rope3d_bwd_kernel", size, registers=128, shared=256, narrow=4),
    )
)

ROPE3D = OpInfo(
    name="rope3d",
    op=rope3d,
    reference=rope3d_reference,
    samples=tuple(_rope(reason, **case) for reason, case in ROPE_CASES),
    random_sample=lambda rng: _rope("fuzz", **_random_rope(rng)),
    at_size=lambda size: _rope("a model's size", **_at_size(size)),
    tokens=("x",),
    differentiable=("x",),
    cost=_rope_cost,
    torch_ops=("rope3d",),
    launch=_rope_launch,
    budgets=_ROPE_BUDGETS,
)

QK_NORM_ROPE3D = OpInfo(
    name="qk_norm_rope3d",
    op=qk_norm_rope3d,
    reference=qk_norm_rope3d_reference,
    samples=tuple(_qk_norm_rope(reason, **case) for reason, case in ROPE_CASES + QK_NORM_CASES),
    random_sample=lambda rng: _qk_norm_rope("fuzz", **_random_qk_norm_rope(rng)),
    at_size=lambda size: _qk_norm_rope("a model's size", **_at_size(size)),
    tokens=("q", "k"),
    differentiable=("q", "k", "q_weight", "q_bias", "k_weight", "k_bias"),
    summed=("q_weight", "q_bias", "k_weight", "k_bias"),
    cost=_qk_norm_rope_cost,
    variants=({"inplace": True},),
    torch_ops=("qk_norm_rope3d", "qk_norm_rope3d_", "qk_norm_rope3d_backward"),
    launch=_qk_norm_rope_launch,
    budgets=_QK_NORM_ROPE_BUDGETS,
)
