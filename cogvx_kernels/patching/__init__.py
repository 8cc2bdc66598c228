"""Use the kernels in models of diffusers: `patch(pipe)`, and `unpatch(pipe)` to restore them."""

from ..streaming import DecodeState
from .api import UnsupportedModelError, explain, patch, patched, supported, unpatch
from .cogvideox_stream import stream_decode
from .report import Report

__all__ = [
    "DecodeState",
    "Report",
    "UnsupportedModelError",
    "explain",
    "patch",
    "patched",
    "stream_decode",
    "supported",
    "unpatch",
]
