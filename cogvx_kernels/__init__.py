"""Fast modules for video diffusion in torch, each proved against a plain-torch reference.

Importing this package imports no Triton, asks for no GPU and builds nothing.
"""

from ._backend import BACKENDS, KernelFallbackWarning
from .conv3d import conv3d
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
from .frame_cache import (
    FrameCacheJoin,
    frame_cache_append,
    frame_cache_exchange,
    frame_cache_join,
    frame_cache_join_reference,
    frame_cache_push,
)
from .patching import (
    DecodeState,
    UnsupportedModelError,
    explain,
    patch,
    patched,
    stream_decode,
    supported,
    unpatch,
)
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
from .spatial_norm import (
    SpatialNormSiLU,
    residual_moments,
    residual_moments_reference,
    spatial_norm_silu,
    spatial_norm_silu_reference,
)
from .temporal_conv import TemporalConv, temporal_conv, temporal_conv_reference

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "DecodeState",
    "ExpertAdaLayerNorm",
    "ExpertFFN",
    "FrameCacheJoin",
    "KernelFallbackWarning",
    "QKNormRoPE3D",
    "RoPE3D",
    "SpatialNormSiLU",
    "TemporalConv",
    "UnsupportedModelError",
    "__version__",
    "conv3d",
    "crop_positions",
    "expert_adaln",
    "expert_adaln_reference",
    "expert_ffn",
    "expert_ffn_reference",
    "explain",
    "frame_cache_append",
    "frame_cache_exchange",
    "frame_cache_join",
    "frame_cache_join_reference",
    "frame_cache_push",
    "gated_residual",
    "gated_residual_adaln",
    "gated_residual_adaln_reference",
    "gated_residual_reference",
    "patch",
    "patched",
    "qk_norm_rope3d",
    "qk_norm_rope3d_reference",
    "residual_moments",
    "residual_moments_reference",
    "rope3d",
    "rope3d_reference",
    "rope3d_tables",
    "slice_positions",
    "spatial_norm_silu",
    "spatial_norm_silu_reference",
    "split_headdim",
    "stream_decode",
    "supported",
    "temporal_conv",
    "temporal_conv_reference",
    "unpatch",
]
