"""Frame cache of a causal convolution: the last input frames of a chunk, put before the next.

The kernels are C++ and CUDA, in `csrc/`.
"""

from .module import FrameCacheJoin
from .op import frame_cache_append, frame_cache_join, frame_cache_push
from .reference import frame_cache_join_reference

__all__ = [
    "FrameCacheJoin",
    "frame_cache_append",
    "frame_cache_join",
    "frame_cache_join_reference",
    "frame_cache_push",
]
