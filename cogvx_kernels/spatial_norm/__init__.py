"""Group norm modulated by latents, with SiLU; residual sum with its statistics."""

from .module import SpatialNormSiLU
from .op import residual_moments, spatial_norm_silu
from .reference import residual_moments_reference, spatial_norm_silu_reference

__all__ = [
    "SpatialNormSiLU",
    "residual_moments",
    "residual_moments_reference",
    "spatial_norm_silu",
    "spatial_norm_silu_reference",
]
