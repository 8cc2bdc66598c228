"""A procedural world of moving shapes, to train and test small models on.

Captioned clips (`ProceduralClips`), recognition of generated ones (`score`) and a text encoder
without weights (`WordTextEncoder`).
"""

from .procedural import DrawnClip, ProceduralClips
from .reading import Score, score
from .scenes import Scene, Thing, describe, parse, vocabulary
from .word_encoder import WordTextEncoder

__all__ = [
    "DrawnClip",
    "ProceduralClips",
    "Scene",
    "Score",
    "Thing",
    "WordTextEncoder",
    "describe",
    "parse",
    "score",
    "vocabulary",
]
