"""Reference of the frame cache: prepend cached frames, and update the cache.

Plain PyTorch. Elements are only copied: bits are preserved, in any dtype. The in-place ops are
this and a copy; gradients come from autograd.
"""

import torch
from torch import Tensor


def frame_cache_join_reference(
    cache: Tensor | None, frames: Tensor, *, kept: int = 2, start: str | None = None
) -> tuple[Tensor, Tensor]:
    """Concatenate past frames and the chunk; the next cache is the last `kept` frames of that.

    start=None         the clip continues: past frames are `cache`
    start="replicate"  the clip begins: they are copies of its first frame
    start="zeros"      the clip begins: they are zeros

    cache    (batch, channels, kept, height, width), oldest first; None for a new one of `kept`
    frames   (batch, channels, frames, height, width), of the same dtype
    returns  joined, (batch, channels, kept + frames, height, width), and the next cache

    Source: CogVideoX (arXiv 2408.06072), section 2.1: temporally causal convolutions, padded
    before the clip only; the released models replicate the first frame.
    """
    cache_len = kept if cache is None else cache.shape[2]
    if start == "replicate":
        past = frames[:, :, :1].expand(-1, -1, cache_len, -1, -1)
    elif start == "zeros":
        past = frames.new_zeros((*frames.shape[:2], cache_len, *frames.shape[3:]))
    else:
        assert cache is not None
        past = cache
    joined = torch.cat([past, frames], 2)
    return joined, joined[:, :, joined.shape[2] - cache_len :].clone()
