"""Reference of the group norm of a video, modulated by latents, and of its statistics.

Plain PyTorch. It computes in at least fp32 and rounds once, to the dtype of its input;
gradients come from autograd.
"""

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


def spatial_norm_silu_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    y: Tensor | None = None,
    b: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    num_groups: int = 32,
    eps: float = 1e-6,
    per_frame: bool = False,
    leads: bool = False,
    silu: bool = True,
    moments: Tensor | None = None,
    cache: Tensor | None = None,
    start: str | None = None,
) -> Tensor:
    """SiLU of n · y + b: n is the group norm of f = x + offset; y and b of the nearest latent.

    n = (f - mean) / sqrt(var + eps) · weight + bias    mean and variance over the channels of a
                                                        group, height, width, and all frames

    x             (batch, channels, frames, height, width)
    weight, bias  (channels,) of the norm, or None
    y, b          (batch, channels, latent frames, latent height, latent width), each or both None:
                  height and width are whole multiples of the latents'
    offset        (channels,), added first, or None: the bias of the preceding convolution
    per_frame     mean and variance within each frame
    leads         the first frame has the first latent frame to itself
    silu          False for n · y + b
    moments       (batch, frames if per_frame else 1, groups, 2): mean and variance, or None
    cache         (batch, channels, kept, height, width): frames to put before the result;
                  overwritten with the last `kept` of the concatenation
    start         padding in place of the cache where a clip begins: "replicate" (copies of the
                  result's first frame) or "zeros"
    returns       the shape and dtype of x; with a cache of kept + frames frames

    Source: MoVQ (arXiv 2209.09002), section 3.2, which multiplies by y, not 1 + y, as does the
    decoder of CogVideoX (arXiv 2408.06072); group norm: arXiv 1803.08494.
    """
    f = x.to(torch.promote_types(x.dtype, torch.float32))
    f = f if offset is None else f + _expand_channels(offset, f)
    mean, var = (_moments(f, num_groups, per_frame) if moments is None else moments).unbind(-1)
    n = (f - _expand_groups(mean, f)) * torch.rsqrt(_expand_groups(var, f) + eps)
    n = n if weight is None else n * _expand_channels(weight, f)
    n = n if bias is None else n + _expand_channels(bias, f)
    n = n if y is None else n * _nearest(y, f, leads)
    n = n if b is None else n + _nearest(b, f, leads)
    out = (F.silu(n) if silu else n).to(x.dtype)
    return out if cache is None else _after_cache(cache, out, start)


def residual_moments_reference(
    x: Tensor,
    h: Tensor,
    offset: Tensor | None = None,
    *,
    num_groups: int = 32,
    per_frame: bool = False,
) -> tuple[Tensor, Tensor]:
    """x + h + offset, and its statistics for a group norm.

    x, h     (batch, channels, frames, height, width)
    offset   (channels,), or None
    returns  the sum, of x's dtype; and (batch, frames if per_frame else 1, groups, 2) in at least
             fp32: mean and (biased) variance of the rounded sum
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) + h.to(wide)
    total = total if offset is None else total + _expand_channels(offset, total)
    rounded = total.to(x.dtype)
    return rounded, _moments(rounded.to(wide), num_groups, per_frame)


def latent_of_frame(frames: int, latents: int, leads: bool) -> list[int]:
    """The latent frame of each frame of a chunk; `leads`: the first has one to itself.

    >>> latent_of_frame(5, 3, leads=True), latent_of_frame(4, 2, leads=False)
    ([0, 1, 1, 2, 2], [0, 0, 1, 1])
    """
    if leads and frames > 1:
        return [0, *(1 + i for i in latent_of_frame(frames - 1, latents - 1, False))]
    return [frame * latents // frames for frame in range(frames)]


def _moments(f: Tensor, num_groups: int, per_frame: bool) -> Tensor:
    """Mean and variance (batch, frames or 1, groups, 2) of f (batch, channels, frames, ...)."""
    groups = f.unflatten(1, (num_groups, f.shape[1] // num_groups))
    over = (2, 4, 5) if per_frame else (2, 3, 4, 5)
    mean = groups.mean(over, keepdim=True)
    var = (groups - mean).square().mean(over, keepdim=True)
    return torch.stack((mean, var), -1)[:, :, 0, :, 0, 0].transpose(1, 2)


def _expand_groups(moment: Tensor, f: Tensor) -> Tensor:
    """(batch, frames or 1, groups) to (batch, channels, frames or 1, 1, 1)."""
    group_size = f.shape[1] // moment.shape[2]
    return moment.transpose(1, 2).repeat_interleave(group_size, 1)[..., None, None].to(f.dtype)


def _expand_channels(vector: Tensor, f: Tensor) -> Tensor:
    return vector[:, None, None, None].to(f.dtype)


def _nearest(latents: Tensor, f: Tensor, leads: bool) -> Tensor:
    """Upsample latents to f's frames, height and width by nearest neighbour."""
    wide = latents.to(f.dtype)
    # No index tensor: for latents that are DTensors it would have to be one too.
    runs = groupby(latent_of_frame(f.shape[2], latents.shape[2], leads))
    frames = [wide[:, :, i : i + 1].expand(-1, -1, len(list(run)), -1, -1) for i, run in runs]
    wide = torch.cat(frames, 2) if frames else wide[:, :, :0]
    for dim in (3, 4):
        wide = wide.repeat_interleave(f.shape[dim] // max(latents.shape[dim], 1), dim)
    return wide


def _after_cache(cache: Tensor, out: Tensor, start: str | None) -> Tensor:
    """Put the cached frames before `out`, and its last frames into the cache."""
    cache_len = cache.shape[2]
    past = {None: cache, "zeros": torch.zeros_like(cache)}.get(start)
    past = out[:, :, :1].expand_as(cache) if past is None else past
    joined = torch.cat([past, out], 2)
    cache.copy_(joined[:, :, joined.shape[2] - cache_len :])
    return joined
