"""Downsampling and upsampling of a video by 2, in plain torch.

Frames that are repeated are convolved once, with the same bits. A frame upsampled by nearest
neighbour has equal pixels two by two, so a 3x3 kernel covers four different ones: each of the four
phases of the result is a convolution of the small frame with a 2x2 kernel, of sums of the taps over
the same pixel. That is 16 products instead of 36 for every four pixels, and the large frame is
never in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Most elements in or out of one 2-D convolution: more than 2**31 are not safe in every library.
SAFE = 2**31 - 1


def upsample2x_conv(
    x: Tensor, weight: Tensor, bias: Tensor, single: int, *, fold: bool = True
) -> Tensor:
    """Upsample height and width by nearest neighbour, convolve by 3x3 with zero padding, and repeat
    every frame but the first `single`.

    x: (batch, in, frames, height, width); weight: (out, in, 3, 3); bias: (out,).
    fold: by phases. In fp16 and bf16 the summed kernels are rounded to the dtype, as weights are.

    Returns (batch, out, 2 · frames - single, 2 · height, 2 · width), channels_last_3d.
    """
    batch, channels, frames, height, width = x.shape
    shape = (batch, len(weight), 2 * frames - single, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    kernels = phase_weights(weight) if fold else None
    most = max(channels, len(weight))
    step = max(1, SAFE // max(1, 4 * batch * most * (height + 1) * (width + 1)))
    for start in (*range(0, single, step), *range(single, frames, step)):
        end = min(start + step, single if start < single else frames)
        to = slice(max(start, 2 * start - single), max(end, 2 * end - single))
        _convolve(x[:, :, start:end], weight, kernels, bias, out[:, :, to])
    return out


def _convolve(x: Tensor, weight: Tensor, kernels: Tensor | None, bias: Tensor, out: Tensor) -> None:
    """Write the frames x to `out`, once or twice each."""
    small, out = fold_frames(x), out.unflatten(2, (x.shape[2], -1))
    if kernels is None:
        _put(F.conv2d(F.interpolate(small, scale_factor=2.0), weight, padding=1), bias, out)
    else:
        whole = F.conv2d(small, kernels, padding=1)
        # (batch, channels, images, 1 or 2, height, row, width, column)
        _put(pixel_phases(whole), bias, out.unflatten(5, (-1, 2)).unflatten(4, (-1, 2)))


def _put(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """Write images plus bias to (batch, channels, images, 1 or 2, ...)."""
    x = unfold_frames(x, len(out)).unsqueeze(3).expand_as(out)
    bias = bias.view(-1, *(1 for _ in x.shape[2:]))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        out.copy_(x + bias)
    else:
        torch.add(x, bias, out=out)


def phase_weights(weight: Tensor) -> Tensor:
    """Kernels of the four phases, (4 · out, in, 2, 2), from (out, in, 3, 3).

    Of a row of taps a, b, c even pixels use a and b + c, odd ones a + b and c: with a zero on
    either side these are the sums of neighbours, every other one.
    """
    sums = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)  # (out, in, 4, 4)
    of_phases = sums.unflatten(3, (2, 2)).unflatten(2, (2, 2))  # (out, in, tap, row, tap, column)
    channels_last = of_phases.permute(3, 5, 0, 2, 4, 1).flatten(0, 2)
    return channels_last.movedim(-1, 1)


def pixel_phases(x: Tensor) -> Tensor:
    """View of the four phases in the output of one convolution with all their kernels.

    x        (images, 4 · channels, height + 1, width + 1)
    returns  (images, channels, height, 2, width, 2): the pixel (2h + row, 2w + column) of a result
             is at (h + row, w + column) of the phase (row, column)
    """
    images, channels, height, width = x.shape
    each, (by_image, by_channel, by_row, by_column) = channels // 4, x.stride()
    return x.as_strided(
        (images, each, height - 1, 2, width - 1, 2),
        (by_image, by_channel, by_row, 2 * each * by_channel + by_row,
         by_column, each * by_channel + by_column),
    )  # fmt: skip


def temporal_avg_pool(x: Tensor, leads: int) -> Tensor:
    """Average frames in pairs; a leading first one stays as it is.

    x: (batch, channels, frames, height, width), after `leads`, 0 or 1, an even number of frames.
    """
    first, rest = x[:, :, :leads], x[:, :, leads:]
    means = (rest[:, :, ::2] + rest[:, :, 1::2]) * 0.5
    return torch.cat([first, means], dim=2) if leads else means


def fold_frames(x: Tensor) -> Tensor:
    """Frames of a video as a batch of images, (batch · frames, channels, height, width)."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold_frames(x: Tensor, batch: int) -> Tensor:
    """A batch of images as the frames of a video; undoes `fold_frames`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
