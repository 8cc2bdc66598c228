"""Text, image or video in, video out."""

from .cogvideox import CogVideoX
from .request import default_dtype, default_size
from .saved import decode_saved

__all__ = [
    "CogVideoX",
    "decode_saved",
    "default_dtype",
    "default_size",
]
