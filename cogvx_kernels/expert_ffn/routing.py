"""Who goes to whom: the (token, choice) pairs of an index, brought together by expert."""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Pairs, counted through batch, sequence and choices, sorted by expert.

    order  (pairs,) int64: those of expert 0, of expert 1, …, and then those of nobody; the ones of
           an expert in the order of their tokens, so that every sum has one order
    ends   (num_experts + 1,) int64: where the pairs of each expert, and nobody's, end in `order`
    """

    order: Tensor
    ends: Tensor


def sort_by_expert(index: Tensor, num_experts: int) -> Routing:
    """By a stable sort, on the device: nobody waits to hear how many tokens an expert got."""
    flat = index.flatten()
    known = (flat >= 0) & (flat < num_experts)
    # Keys of one byte are sorted in one pass over them.
    key = torch.where(known, flat, num_experts).to(
        torch.uint8 if num_experts < 255 else torch.int64
    )
    order = key.argsort(stable=True)
    counts = (key[:, None] == torch.arange(num_experts + 1, device=index.device)).sum(0)
    return Routing(order, counts.cumsum(0))
