"""A model with more experts out of one with fewer, that computes the same on the day."""

import dataclasses
import re

import torch
from torch import Tensor

from .experts import ExpertFeedForward
from .transformer import ExpertTransformer


def upcycle(
    model: ExpertTransformer, *, num_text_experts: int, num_video_experts: int, top_k: int = 1
) -> ExpertTransformer:
    """A new model whose experts are copies of the feed-forward of `model`.

    Everything else is copied as it is; nothing is shared with `model`. Since the experts agree, it
    matters not which of them a router chooses, and the outputs are those of `model`: exactly with
    top_k 1 wherever a product of matrices gives a row the same bits among few rows as among many,
    and within rounding where the outputs of several experts are averaged.

    model              has at most one expert of each modality
    num_text_experts   at least 1, each a copy of the text expert or of the shared feed-forward
    num_video_experts  likewise of video
    top_k              experts of each token, where a modality has several

    Raises ValueError if a number is out of range. Source: sparse upcycling (arXiv 2212.05055).
    """
    config = model.config
    if max(config.num_text_experts, config.num_video_experts) > 1:
        raise ValueError(
            "upcycle: model must have at most one expert of each modality; got "
            f"{config.num_text_experts} and {config.num_video_experts}"
        )
    for name, count in (
        ("num_text_experts", num_text_experts),
        ("num_video_experts", num_video_experts),
    ):
        if count < 1:
            raise ValueError(f"upcycle: {name} must be at least 1; got {count}")
    grown = dataclasses.replace(
        config,
        num_text_experts=num_text_experts,
        num_video_experts=num_video_experts,
        expert_top_k=top_k,
    )
    with torch.device("meta"):
        result = ExpertTransformer(grown, model.backend, model.attention)
    state = model.state_dict()
    weight = model.norm_final.weight
    result.load_state_dict(
        {key: _value(key, like, state, weight) for key, like in result.state_dict().items()},
        assign=True,
    )
    for module in result.modules():
        if isinstance(module, ExpertFeedForward):
            module.reset_routers()
    result.gradient_checkpointing = model.gradient_checkpointing
    return result.train(model.training)


def _value(key: str, like: Tensor, state: dict[str, Tensor], weight: Tensor) -> Tensor:
    """The tensor of the new model under `key`: a copy, or room for a router."""
    if key in state:
        return state[key].clone()
    if key.endswith("_router.weight"):
        return torch.empty(like.shape, dtype=weight.dtype, device=weight.device)
    first = re.sub(r"\.ff\.(text|video)\.\d+\.", r".ff.\1.0.", key)
    shared = re.sub(r"\.ff\.(text|video)\.\d+\.", ".ff.", key)
    return state[first if first in state else shared].clone()
