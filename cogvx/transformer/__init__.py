"""The expert transformer (DiT): predicts v from noisy latents, text and timestep."""

from .attention import ATTENTION_BACKENDS
from .embedding import ProjectedText
from .experts import load_balancing_loss
from .modulation import STEPS_AHEAD, Modulations
from .positions import rope_tables
from .transformer import ExpertTransformer
from .upcycle import upcycle

__all__ = [
    "ATTENTION_BACKENDS",
    "ExpertTransformer",
    "Modulations",
    "ProjectedText",
    "STEPS_AHEAD",
    "load_balancing_loss",
    "rope_tables",
    "upcycle",
]
