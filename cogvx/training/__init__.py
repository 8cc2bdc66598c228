"""Training of a VAE and of a transformer, from a recipe to a model's folder."""

from .recipe import Recipe
from .trainer import STAGES, train

__all__ = ["Recipe", "STAGES", "train"]
