"""`patch(pipe)`: the kernels in models of diffusers, in one line, and out again in another."""

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
