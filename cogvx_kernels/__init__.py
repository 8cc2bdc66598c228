"""Fast modules for video diffusion in torch, each proved against a plain-torch reference.

Importing this package imports no Triton, asks for no GPU and builds nothing.
"""

from ._backend import BACKENDS, KernelFallbackWarning
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
    "KernelFallbackWarning",
    "QKNormRoPE3D",
    "RoPE3D",
    "__version__",
    "crop_positions",
    "qk_norm_rope3d",
    "qk_norm_rope3d_reference",
    "rope3d",
    "rope3d_reference",
    "rope3d_tables",
    "slice_positions",
    "split_headdim",
]
