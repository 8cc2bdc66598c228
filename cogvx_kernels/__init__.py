"""Fast modules for video diffusion in torch, each proved against a plain-torch reference.

Importing this package imports no Triton, asks for no GPU and builds nothing.
"""

from ._backend import BACKENDS, KernelFallbackWarning
from .expert_adaln import (
    ExpertAdaLayerNorm,
    expert_adaln,
    expert_adaln_reference,
    gated_residual,
    gated_residual_adaln,
    gated_residual_adaln_reference,
    gated_residual_reference,
)
from .expert_ffn import ExpertFFN, expert_ffn, expert_ffn_reference
from .rope3d import (
    QKNormRoPE3D,
    RoPE3D,
    crop_positions,
    qk_norm_rope3d,
    qk_norm_rope3d_reference,
    rope3d,
    rope3d_reference,
    rope3d_tables,
    slice_positions,
    split_headdim,
)

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "ExpertAdaLayerNorm",
    "ExpertFFN",
    "KernelFallbackWarning",
    "QKNormRoPE3D",
    "RoPE3D",
    "__version__",
    "crop_positions",
    "expert_adaln",
    "expert_adaln_reference",
    "expert_ffn",
    "expert_ffn_reference",
    "gated_residual",
    "gated_residual_adaln",
    "gated_residual_adaln_reference",
    "gated_residual_reference",
    "qk_norm_rope3d",
    "qk_norm_rope3d_reference",
    "rope3d",
    "rope3d_reference",
    "rope3d_tables",
    "slice_positions",
    "split_headdim",
]
