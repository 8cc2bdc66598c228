"""Generation pipeline: text, image or video to video."""

from .cogvideox import CogVideoX
from .params import default_dtype, default_size
from .resume import decode_saved

__all__ = [
    "CogVideoX",
    "decode_saved",
    "default_dtype",
    "default_size",
]
