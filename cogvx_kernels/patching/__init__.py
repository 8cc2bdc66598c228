"""`patch(pipe)`: the kernels in models of diffusers, in one line, and out again in another."""

from .doors import UnsupportedModelError, explain, patch, patched, supported, unpatch
from .report import Report

__all__ = [
    "Report",
    "UnsupportedModelError",
    "explain",
    "patch",
    "patched",
    "supported",
    "unpatch",
]
