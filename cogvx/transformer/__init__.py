"""The expert transformer: noisy latents, text and time to v."""

from .attention import ATTENTION_BACKENDS
from .experts import load_balancing_loss
from .positions import rope_tables
from .transformer import ExpertTransformer
from .upcycle import upcycle

__all__ = [
    "ATTENTION_BACKENDS",
    "ExpertTransformer",
    "load_balancing_loss",
    "rope_tables",
    "upcycle",
]
