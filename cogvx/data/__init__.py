"""Clips to train on, and what they show, read back."""

from .procedural import Clip, ProceduralClips
from .reading import Score, score
from .scenes import Scene, Thing, describe, parse, vocabulary

__all__ = [
    "Clip",
    "ProceduralClips",
    "Scene",
    "Score",
    "Thing",
    "describe",
    "parse",
    "score",
    "vocabulary",
]
