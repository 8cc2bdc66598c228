"""Sparse upcycling: a model with more experts and the same outputs at initialisation."""

import dataclasses
import re

import torch
from torch import Tensor

from cogvx_kernels import module_backend

from .experts import ExpertFeedForward
from .transformer import ExpertTransformer


def upcycle(
    model: ExpertTransformer, *, num_text_experts: int, num_video_experts: int, top_k: int = 1
) -> ExpertTransformer:
    """Copy a model, its feed-forward replicated to several experts.

    Nothing is shared with `model`. The experts are equal, so the outputs do not depend on the
    routers: exactly those of `model` with top_k 1 (if the bits of a matrix product's row do not
    depend on the number of rows), and up to rounding if several experts are averaged.

    model              has at most one expert of each modality
    num_text_experts   at least 1, each a copy of the text expert or of the shared feed-forward
    num_video_experts  likewise, of the video expert
    top_k              experts of each token, if a modality has several

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
    with torch.device("meta"), module_backend(model.backend):
        result = ExpertTransformer(grown, model.attention)
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
    """Tensor of the new model: a copy, or uninitialised for a router."""
    if key in state:
        return state[key].clone()
    if key.endswith("_router.weight"):
        return torch.empty(like.shape, dtype=weight.dtype, device=weight.device)
    first = re.sub(r"\.ff\.(text|video)\.\d+\.", r".ff.\1.0.", key)
    shared = re.sub(r"\.ff\.(text|video)\.\d+\.", ".ff.", key)
    return state[first if first in state else shared].clone()
