"""Weights of experts, and the (token, choice) pairs of an index sorted by expert.

The sort is on the device and without a host sync.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Weights = tuple[Tensor, ...]  # one for each expert, or none


class ExpertWeights(NamedTuple):
    """Weights and biases of the two products, for each expert; without biases their tuple is empty.

    up, down  (ffn_dim, dim), for "swiglu" twice as many rows; (dim, ffn_dim)
    """

    up: Weights
    up_bias: Weights
    down: Weights
    down_bias: Weights


class Routing(NamedTuple):
    """Pairs sorted by expert; a pair is numbered through batch, sequence and choices.

    order  (pairs,) int64: pairs of expert 0, of expert 1, …, then those without an expert; within
           an expert by token, so that sums have a fixed order
    ends   (num_experts + 1,) int64: end of each expert's pairs in `order`, then of the others
    share  weights of the pairs, (batch, seqlen, top_k); None for 1
    """

    order: Tensor
    ends: Tensor
    share: Tensor | None
    top_k: int


def sort_by_expert(index: Tensor, num_experts: int, share: Tensor | None = None) -> Routing:
    """Sort the pairs of an index (batch, seqlen, top_k) by expert, stably."""
    flat = index.flatten()
    known = (flat >= 0) & (flat < num_experts)
    # One-byte keys are sorted in one pass.
    key = torch.where(known, flat, num_experts).to(
        torch.uint8 if num_experts < 255 else torch.int64
    )
    order = key.argsort(stable=True)
    counts = (key[:, None] == torch.arange(num_experts + 1, device=index.device)).sum(0)
    return Routing(order, counts.cumsum(0), share, index.shape[2])
