"""Test samples, cost model and compile budgets for `expert_ffn`."""

import math
import random
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._opinfo import Budget, Cost, OpInfo, Sample, Size, TensorSpec
from .op import expert_ffn
from .reference import expert_ffn_reference
from .routing import ExpertWeights, sort_by_expert

LAYOUTS = ("contiguous", "packed", "transposed", "offset", "strided", "expanded")
WEIGHTS = ("contiguous", "transposed", "chunk", "offset", "strided")


def _sample(
    reason: str,
    batch: int = 1,
    text_len: int = 2,
    video_len: int = 4,
    dim: int = 64,
    ffn_dim: int = 32,
    experts: int = 2,
    top_k: int = 0,
    below: int = 0,
    share: bool = True,
    shares: str = "few",
    biases: str = "ud",
    activation: str = "gelu_tanh",
    layout: str = "contiguous",
    weights: str = "contiguous",
    wide: bool = False,
) -> Sample:
    """A sample; without an index if top_k is 0.

    below   upper bound of the index, by default the number of experts
    share   pass the weights of the choices, filled with the values `shares`, in fp32 if `wide`
    biases  letters: "u" for up, "d" for down
    """
    seqlen = text_len + video_len
    rows = 2 * ffn_dim if activation == "swiglu" else ffn_dim
    chosen = (batch, seqlen, top_k)
    index = TensorSpec(chosen, "index", below=below or experts) if top_k else None
    much = TensorSpec(chosen, shares, dtype="wide" if wide else None) if top_k and share else None
    arguments: dict[str, Any] = {
        "x": TensorSpec((batch, seqlen, dim), "few", layout),
        "up": TensorSpec((experts, rows, dim), "lifted", weights),
        "up_bias": TensorSpec((experts, rows), "lifted") if "u" in biases else None,
        "down": TensorSpec((experts, dim, ffn_dim), "matrix", weights),
        "down_bias": TensorSpec((experts, dim), "few") if "d" in biases else None,
        "index": index,
        "weight": much,
        "text_len": text_len,
        "activation": activation,
    }
    # Only the tanh-GELU is exactly a ReLU on these values.
    return Sample(reason, arguments, exact=activation == "gelu_tanh")


CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("two of four experts for each token", {"experts": 4, "top_k": 2, "batch": 2}),
    ("an expert of text and one of video", {"batch": 2}),
    ("one expert for all", {"experts": 1}),
    ("one of three experts", {"experts": 3, "top_k": 1}),
    ("no text", {"text_len": 0}),
    ("no video", {"text_len": 4, "video_len": 0}),
    ("one token", {"text_len": 0, "video_len": 1}),
    (
        "one token of two samples",
        {"text_len": 0, "video_len": 1, "batch": 2, "layout": "transposed"},
    ),
    ("no tokens", {"text_len": 0, "video_len": 0}),
    ("no batch", {"batch": 0}),
    ("no tokens to choose", {"text_len": 0, "video_len": 0, "top_k": 2}),
    ("experts without a token", {"experts": 5, "top_k": 2, "below": 2}),
    ("numbers that are no expert", {"experts": 2, "top_k": 2, "below": 4}),
    ("no expert at all, now and then", {"experts": 2, "top_k": 1, "below": 3, "biases": ""}),
    ("as much of each expert", {"experts": 3, "top_k": 2, "share": False}),
    ("fp32 weights", {"experts": 3, "top_k": 1, "wide": True}),
    ("no biases", {"biases": ""}),
    ("bias up", {"biases": "u"}),
    ("bias down", {"biases": "d", "experts": 2, "top_k": 1}),
    ("exact GELU", {"activation": "gelu"}),
    ("SwiGLU", {"activation": "swiglu", "batch": 2}),
    ("SwiGLU, two experts of each token", {"activation": "swiglu", "experts": 3, "top_k": 2}),
    ("more tokens than a tile", {"text_len": 5, "video_len": 150, "dim": 32}),
    ("more rows of an expert than a tile", {"text_len": 0, "video_len": 150, "top_k": 2}),
    ("wider than a tile", {"dim": 160, "ffn_dim": 200}),
    ("wider than a tile, SwiGLU", {"dim": 40, "ffn_dim": 144, "activation": "swiglu"}),
    ("odd widths", {"dim": 17, "ffn_dim": 33, "experts": 2, "top_k": 1}),
    ("rows of a packed tensor", {"layout": "packed", "batch": 2}),
    ("dims before tokens", {"layout": "transposed", "batch": 2}),
    ("odd storage offset", {"layout": "offset", "weights": "offset"}),
    ("every other dim", {"layout": "strided", "weights": "strided", "experts": 2, "top_k": 1}),
    ("expanded batch", {"layout": "expanded", "batch": 3}),
    ("transposed weights", {"weights": "transposed"}),
    ("weights packed", {"weights": "chunk", "experts": 3, "top_k": 2}),
)


def _random(rng: random.Random) -> dict[str, Any]:
    top_k = rng.choice((0, 0, 1, 2, 3))
    experts = rng.choice((1, 2, 2)) if not top_k else rng.choice((1, 2, 3, 5))
    return {
        "batch": rng.choice((1, 1, 2)),
        "text_len": rng.choice((0, 1, 2, 7)),
        "video_len": rng.choice((0, 1, 3, 18)),
        "dim": rng.choice((16, 17, 40, 64, 100)),
        "ffn_dim": rng.choice((16, 33, 64, 144)),
        "experts": experts,
        "top_k": top_k,
        "below": rng.choice((0, 0, 1, experts + 2)),
        "share": rng.random() < 0.7,
        # Positive, as a router's: the parts of an expert chosen twice do not cancel.
        "shares": "weight",
        "biases": "".join(letter for letter in "ud" if rng.random() < 0.7),
        "activation": rng.choice(("gelu_tanh", "gelu_tanh", "gelu", "swiglu")),
        "layout": rng.choice(LAYOUTS),
        "weights": rng.choice(WEIGHTS),
        "wide": rng.random() < 0.5,
    }


def _at_size(size: Size, experts: int = 1, top_k: int = 0) -> Sample:
    """As in a transformer block: the hidden width is four times dim."""
    dim = size.nheads * size.headdim
    return _sample(
        "a model's size",
        batch=size.batch,
        text_len=size.text_len,
        video_len=size.video_len,
        dim=dim,
        ffn_dim=4 * dim,
        experts=experts,
        top_k=top_k,
        wide=True,
    )


def _cost(arguments: Mapping[str, Any]) -> tuple[Cost, Cost]:
    """Forward: all arguments and the result, and two products. Backward: four products more.

    Everything is moved once, and the hidden activation not at all.
    """
    x, down, index = arguments["x"], arguments["down"], arguments["index"]
    tokens = math.prod(x.shape[:2]) * (1 if index is None else index.shape[2])
    products = math.prod(arguments["up"].shape[1:]) + math.prod(down.shape[1:])
    tensors = [v for v in arguments.values() if isinstance(v, Tensor)]
    moved = sum(v.nbytes for v in tensors)
    flops = 2 * tokens * products
    return Cost(moved + x.nbytes, flops), Cost(2 * moved, 2 * flops)


def _launch(kernel: Any, a: Mapping[str, Any]) -> None:
    """Launch forward and backward, with the pre-activation kept and without.

    A small call launches one of the two.
    """

    def listed(name: str) -> tuple[Any, ...]:
        return () if a[name] is None else a[name].unbind(0)

    x, index = a["x"], a["index"]
    experts = ExpertWeights(listed("up"), listed("up_bias"), listed("down"), listed("down_bias"))
    routing = None if index is None else sort_by_expert(index, len(a["up"]), a["weight"])
    settings = a["text_len"], a["activation"]
    large = x.numel() > 2**20
    for keep in (True, False):
        if large or (index is not None) == keep:
            _, pre = kernel.expert_ffn_fwd(x, experts, routing, *settings, keep)
            kernel.expert_ffn_bwd(
                x, x, experts, routing, pre if keep else None, *settings, (True, True)
            )


_SIZES = ("2b-480x720-49f", "5b-480x720-49f", "1.5-5b-768x1360-81f", "card-480x720-49f")


# On Hopper a tile of 128 x 256 in fp32 is 128 registers of each of 256 threads, and three stages of
# its operands 144 KB; elsewhere half of both. AMD's matrix units leave four numbers of a row to a
# thread: 64 bits of bf16.
_REGISTERS = {
    "_up_kernel": 255,
    "_down_kernel": 240,
    "hidden_grad_kernel": 255,
    "weight_grad_kernel": 252,
}
_BOTH = "text and video experts"
_SORTED = "4 experts, top-2"
_HELD = (*((size, "") for size in _SIZES), (_SIZES[1], _BOTH), (_SIZES[-1], _SORTED))
_BUDGETS = tuple(
    Budget(kernel, size, registers, 144 * 1024, access=64, narrow=160, convention=convention)
    for size, convention in _HELD
    for kernel, registers in _REGISTERS.items()
)


EXPERT_FFN = OpInfo(
    name="expert_ffn",
    op=expert_ffn,
    reference=expert_ffn_reference,
    samples=tuple(_sample(reason, **case) for reason, case in CASES),
    random_sample=lambda rng: _sample("fuzz", **_random(rng)),
    at_size=_at_size,
    conventions={
        _BOTH: lambda size: _at_size(size, 2),
        "4 experts, top-1": lambda size: _at_size(size, 4, 1),
        _SORTED: lambda size: _at_size(size, 4, 2),
    },
    tokens=("x", "index", "weight"),
    differentiable=("x", "up", "up_bias", "down", "down_bias", "weight"),
    summed=("up", "up_bias", "down", "down_bias"),
    products=True,
    rounds_between=True,
    cost=_cost,
    torch_ops=("expert_ffn", "expert_ffn_backward"),
    launch=_launch,
    budgets=_BUDGETS,
)
