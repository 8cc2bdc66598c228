"""3-D rotary position embedding over frames, height and width, with the norms of q and k."""

from .frequencies import crop_positions, rope3d_tables, slice_positions, split_headdim
from .module import QKNormRoPE3D, RoPE3D
from .op import qk_norm_rope3d, rope3d
from .reference import qk_norm_rope3d_reference, rope3d_reference

__all__ = [
    "QKNormRoPE3D",
    "RoPE3D",
    "crop_positions",
    "qk_norm_rope3d",
    "qk_norm_rope3d_reference",
    "rope3d",
    "rope3d_reference",
    "rope3d_tables",
    "slice_positions",
    "split_headdim",
]
