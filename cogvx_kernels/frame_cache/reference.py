"""Reference of the frame cache: what lies before a chunk, and what the next chunk finds.

Plain PyTorch. Nothing is computed: every element keeps its bits, in any dtype. The in-place
ops are this and a copy; gradients come from autograd.
"""

import torch
from torch import Tensor


def frame_cache_join_reference(
    cache: Tensor | None, frames: Tensor, *, kept: int = 2, start: str | None = None
) -> tuple[Tensor, Tensor]:
    """The chunk behind the frames before it, and the last `kept` frames of that.

    start=None         the clip goes on: before the chunk lies `cache`
    start="replicate"  the clip begins: before it lie copies of its first frame
    start="zeros"      the clip begins: before it lie zeros

    cache    (batch, channels, kept, height, width), oldest first; None for `kept` frames to come
    frames   (batch, channels, frames, height, width), of the same dtype
    returns  joined, (batch, channels, kept + frames, height, width), and the next cache

    Source: CogVideoX (arXiv 2408.06072), section 2.1: temporally causal convolutions, padded at
    the beginning alone; the released models replicate the first frame.
    """
    kept = kept if cache is None else cache.shape[2]
    if start == "replicate":
        past = frames[:, :, :1].expand(-1, -1, kept, -1, -1)
    elif start == "zeros":
        past = frames.new_zeros((*frames.shape[:2], kept, *frames.shape[3:]))
    else:
        assert cache is not None
        past = cache
    joined = torch.cat([past, frames], 2)
    return joined, joined[:, :, joined.shape[2] - kept :].clone()
