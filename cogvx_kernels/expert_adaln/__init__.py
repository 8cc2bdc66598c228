"""Adaptive LayerNorm and gated residual, text and video each with a modulation of their own."""

from .module import ExpertAdaLayerNorm
from .op import expert_adaln, gated_residual, gated_residual_adaln
from .reference import (
    expert_adaln_reference,
    gated_residual_adaln_reference,
    gated_residual_reference,
)

__all__ = [
    "ExpertAdaLayerNorm",
    "expert_adaln",
    "expert_adaln_reference",
    "gated_residual",
    "gated_residual_adaln",
    "gated_residual_adaln_reference",
    "gated_residual_reference",
]
