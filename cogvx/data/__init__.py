"""Data sets of clips to train on: folders of videos with captions, and encoded latents."""

import importlib
import warnings
from typing import Any

from .folder import Clip, FolderClips, read_captions
from .latents import LatentClip, LatentClips, encode_clips

__all__ = ["Clip", "FolderClips", "LatentClip", "LatentClips", "encode_clips", "read_captions"]


MOVED = {
    "ProceduralClips", "Scene", "Score", "Thing", "describe", "parse", "score", "vocabulary",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in MOVED:
        warnings.warn(f"cogvx.data.{name} is now cogvx.shapes.{name}", DeprecationWarning, 2)
        return getattr(importlib.import_module("cogvx.shapes"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
