"""Clips to train on, drawn or from a folder, and what drawn ones show, read back."""

from .folder import FolderClips, read_captions
from .latents import LatentClip, LatentClips, encode_clips
from .procedural import Clip, ProceduralClips
from .reading import Score, score
from .scenes import Scene, Thing, describe, parse, vocabulary

__all__ = [
    "Clip",
    "FolderClips",
    "LatentClip",
    "LatentClips",
    "ProceduralClips",
    "Scene",
    "Score",
    "Thing",
    "describe",
    "encode_clips",
    "parse",
    "read_captions",
    "score",
    "vocabulary",
]
