"""What a causal convolution remembers between chunks: its input's last frames, put before the next.

The kernels are C++ and CUDA, in `csrc/`.
"""

from .module import FrameCacheJoin
from .op import frame_cache_append, frame_cache_exchange, frame_cache_join, frame_cache_push
from .reference import frame_cache_join_reference

__all__ = [
    "FrameCacheJoin",
    "frame_cache_append",
    "frame_cache_exchange",
    "frame_cache_join",
    "frame_cache_join_reference",
    "frame_cache_push",
]
