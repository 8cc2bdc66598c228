"""Reference of causal temporal convolution, pixel by pixel.

Plain PyTorch. It computes in at least fp32 and rounds once, to the dtype of its input;
gradients come from autograd.
"""

import torch
from torch import Tensor

from .._launch import dense


def temporal_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cache: Tensor | None = None,
    stride: int = 1,
    start: str | None = "replicate",
) -> Tensor:
    """out[t] = bias + the sum over j of weight[j] · sequence[stride · t + j].

    The sequence is kernel - 1 frames and then x. These are the cache, or, if the clip begins with
    x, copies of its first frame (start="replicate") or zeros ("zeros").

    x        (batch, in_channels, frames, height, width) or (batch, in_channels, frames)
    weight   (out_channels, in_channels, kernel) or (…, kernel, 1, 1); (channels, 1, kernel, …) for
             more than one channel is depthwise
    bias     (out_channels,) or None
    cache    (batch, in_channels, kernel - 1, height, width) or, as x, without pixels; or None
    returns  (batch, out_channels, (frames - 1) // stride + 1, …), in the dtype of x

    Source: WaveNet (arXiv 1609.03499), section 2.1, for causal convolutions; CogVideoX (arXiv
    2408.06072), section 2.1, for causal padding in time, and its released VAE, which replicates.
    """
    if x.dim() == 3:
        past = None if cache is None else cache[..., None, None]
        return temporal_conv_reference(
            x[..., None, None], weight, bias, cache=past, stride=stride, start=start
        )[..., 0, 0]
    wide = torch.promote_types(x.dtype, torch.float32)
    taps = weight.flatten(2).to(wide)  # (out_channels, in_channels or 1, kernel)
    cache_len = taps.shape[2] - 1
    if cache is not None:
        past = cache
    elif start == "zeros":
        past = torch.zeros_like(x[:, :, :1]).expand(-1, -1, cache_len, -1, -1)
    else:
        past = x[:, :, :1].expand(-1, -1, cache_len, -1, -1)
    sequence = torch.cat([past, x], 2).to(wide)
    depthwise = taps.shape[1] == 1 and x.shape[1] > 1

    def tap(j: int) -> Tensor:
        frames = sequence[:, :, j : j + x.shape[2] : stride]
        if depthwise:
            return frames * taps[:, :, j, None, None]
        # Frame by frame, so that the bits of one do not depend on the number of frames.
        matrices = taps[:, :, j].expand(len(x), frames.shape[2], -1, -1)
        y = matrices @ frames.movedim(2, 1).flatten(3)  # (batch, frames, out_channels, pixels)
        return y.movedim(1, 2).unflatten(3, x.shape[3:])

    y = tap(0)
    for j in range(1, cache_len + 1):
        y = y + tap(j)
    if bias is not None:
        y = y + bias.to(wide)[:, None, None, None]
    return dense(y.to(x.dtype), x.shape[1] > 1 and x.stride(1) == 1)
