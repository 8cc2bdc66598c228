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
    """SiLU of n · y + b: n is the group norm of f = x + offset, and y, b are those of the nearest
    latent.

    n = (f - mean) / sqrt(var + eps) · weight + bias    mean and variance over the channels of a
                                                        group, height, width, and all frames

    x             (batch, channels, frames, height, width)
    weight, bias  (channels,) of the norm, or None
    y, b          (batch, channels, latent frames, latent height, latent width), each or both None:
                  height and width are whole multiples of the latents'
    offset        (channels,), added first, or None: the bias of a convolution before
    per_frame     mean and variance within each frame
    leads         the first frame has the first latent frame to itself
    silu          False for n · y + b
    moments       (batch, frames if per_frame else 1, groups, 2): mean and variance from before
    cache         (batch, channels, kept, height, width): the result goes behind these frames, and
                  they become the last `kept` of the result, in place
    start         of a clip that begins here: what lies before it is not the cache but, "replicate",
                  copies of the first frame of the result, or "zeros"
    returns       the shape and dtype of x, behind the cached frames if there is a cache

    Source: MoVQ (arXiv 2209.09002), section 3.2, whose spatial norm multiplies by y as it is, as
    the decoder of CogVideoX (arXiv 2408.06072) does; group norm: arXiv 1803.08494.
    """
    f = x.to(torch.promote_types(x.dtype, torch.float32))
    f = f if offset is None else f + _of_channels(offset, f)
    mean, var = (_moments(f, num_groups, per_frame) if moments is None else moments).unbind(-1)
    n = (f - _of_groups(mean, f)) * torch.rsqrt(_of_groups(var, f) + eps)
    n = n if weight is None else n * _of_channels(weight, f)
    n = n if bias is None else n + _of_channels(bias, f)
    n = n if y is None else n * _nearest(y, f, leads)
    n = n if b is None else n + _nearest(b, f, leads)
    out = (F.silu(n) if silu else n).to(x.dtype)
    return out if cache is None else _behind(cache, out, start)


def residual_moments_reference(
    x: Tensor,
    h: Tensor,
    offset: Tensor | None = None,
    *,
    num_groups: int = 32,
    per_frame: bool = False,
) -> tuple[Tensor, Tensor]:
    """x + h + offset, and the statistics that a group norm of it needs.

    x, h     (batch, channels, frames, height, width)
    offset   (channels,), or None
    returns  the sum, of x's dtype; and (batch, frames if per_frame else 1, groups, 2) in at least
             fp32: mean and variance (of all elements, not one less) of the sum as it was rounded
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) + h.to(wide)
    total = total if offset is None else total + _of_channels(offset, total)
    rounded = total.to(x.dtype)
    return rounded, _moments(rounded.to(wide), num_groups, per_frame)


def latent_of_frame(frames: int, latents: int, leads: bool) -> list[int]:
    """Which latent frame each of a chunk's frames belongs to; `leads`: the first is alone.

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


def _of_groups(moment: Tensor, f: Tensor) -> Tensor:
    """(batch, frames or 1, groups) for all elements: (batch, channels, frames or 1, 1, 1)."""
    each = f.shape[1] // moment.shape[2]
    return moment.transpose(1, 2).repeat_interleave(each, 1)[..., None, None].to(f.dtype)


def _of_channels(vector: Tensor, f: Tensor) -> Tensor:
    return vector[:, None, None, None].to(f.dtype)


def _nearest(latents: Tensor, f: Tensor, leads: bool) -> Tensor:
    """Latents at f's frames, height and width, by the nearest-neighbour rule."""
    wide = latents.to(f.dtype)
    # Not by an index tensor, which would have to be a DTensor where the latents are.
    runs = groupby(latent_of_frame(f.shape[2], latents.shape[2], leads))
    frames = [wide[:, :, i : i + 1].expand(-1, -1, len(list(run)), -1, -1) for i, run in runs]
    wide = torch.cat(frames, 2) if frames else wide[:, :, :0]
    for dim in (3, 4):
        wide = wide.repeat_interleave(f.shape[dim] // max(latents.shape[dim], 1), dim)
    return wide


def _behind(cache: Tensor, out: Tensor, start: str | None) -> Tensor:
    """What was cached, then `out`; the cache becomes the last of its frames."""
    kept = cache.shape[2]
    past = {None: cache, "zeros": torch.zeros_like(cache)}.get(start)
    past = out[:, :, :1].expand_as(cache) if past is None else past
    joined = torch.cat([past, out], 2)
    cache.copy_(joined[:, :, joined.shape[2] - kept :])
    return joined
