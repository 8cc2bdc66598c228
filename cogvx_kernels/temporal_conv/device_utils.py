"""What a program holds, and where it lies: pixels of a frame, and the frames before it.

A tile lies within one frame of the result, so that each tap of a kernel reads one frame: of the
cache, of x, or what stands for frames before the clip. Which one is a scalar, and nothing is padded
or joined.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Video(NamedTuple):
    """A tensor (batch, channels, frames, pixels); strides are in units of ALIGN elements.

    Either its channels lie side by side or its pixels; `inner` is the stride of the other.
    """

    ptr: Tensor | None
    batch: int
    frame: int
    inner: int


class Sizes(NamedTuple):
    """What a launch is over; `pixels` of a frame in units of ALIGN if they lie side by side."""

    pixels: int
    tiles: int  # of pixels in a frame
    frames: int  # of x
    results: int  # frames of the result


class Plan(NamedTuple):
    """What is constant in a launch, and compiled into the kernel."""

    IN: int
    OUT: int
    KERNEL: int
    STRIDE: int
    PAST: str  # "cache", "replicate" or "zeros"
    SILU: bool
    CHANNELS_LAST: bool
    BLOCK_ROWS: int  # pixels
    BLOCK_COLS: int  # channels
    BLOCK_INNER: int
    ALIGN: int  # elements that strides are multiples of
    COMPUTE: tl.dtype


# --- layouts, for launchers ------------------------------------------------------------------


def channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1


def _pixel_stride(x: Tensor) -> int:
    *_, height, width = x.shape
    return x.stride(4) if width > 1 else x.stride(3) if height > 1 else 0


def evenly_laid(x: Tensor | None, last: bool) -> Tensor | None:
    """With pixels evenly spaced, and channels side by side (`last`) or pixels: else a copy."""
    if x is None:
        return None
    *_, height, width = x.shape
    even = height == 1 or width == 1 or x.stride(3) == width * x.stride(4)
    of_one = (x.shape[1] if last else height * width) == 1
    beside = of_one or (x.stride(1) if last else _pixel_stride(x)) == 1
    return x if even and beside else new_like(x, last).copy_(x)


def new_like(x: Tensor, last: bool, dtype: torch.dtype | None = None) -> Tensor:
    form = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device, memory_format=form)


def strides_of(x: Tensor, last: bool) -> tuple[int, int, int]:
    """Of batch, frames, and pixels (`last`) or channels; 0 where there is but one."""
    batch, channels, frames = (
        stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    )
    return batch, frames, _pixel_stride(x) if last else channels


def video_of(x: Tensor | None, plan: Plan) -> Video:
    if x is None:
        return Video(None, 0, 0, 0)
    return Video(x, *(stride // plan.ALIGN for stride in strides_of(x, plan.CHANNELS_LAST)))


# --- where things lie ------------------------------------------------------------------------


@triton.jit
def start_of(video, batch, frame, P: tl.constexpr):
    """Offset of a frame; 64 bits from the first product on."""
    start = tl.cast(batch, tl.int64) * video.batch + tl.cast(frame, tl.int64) * video.frame
    return start * P.ALIGN


@triton.jit
def frame_at(video, batch, frame, P: tl.constexpr):
    """Address of a frame."""
    return video.ptr + start_of(video, batch, frame, P)


@triton.jit
def either_at(past, then, now, batch, place, P: tl.constexpr):
    """(address, inner stride) of a frame of the sequence: of `then` if it is past, else of `now`.

    A choice between scalars, and between tensors as they came: one between blocks of addresses, or
    between addresses within tensors, is beyond some compilers.
    """
    start = tl.where(
        past, start_of(then, batch, place, P), start_of(now, batch, place - (P.KERNEL - 1), P)
    )
    inner = tl.where(past, tl.cast(then.inner, tl.int64), tl.cast(now.inner, tl.int64))
    return tl.where(past, then.ptr, now.ptr) + start, inner


@triton.jit
def cells(pixel, channel, inner, P: tl.constexpr):
    """Offsets within a frame of pixels and channels, each a block that broadcasts, of 64 bits."""
    if P.CHANNELS_LAST:
        at = pixel * (inner * P.ALIGN) + channel
    else:
        at = channel * (inner * P.ALIGN) + pixel
    return at


@triton.jit
def source_of(x, cache, batch, place, P: tl.constexpr):
    """(address, inner stride) of a frame of the sequence that a kernel runs over.

    `place` counts from the first of the KERNEL - 1 frames before x. Where these are zeros, the one
    that stands for them must not be counted.
    """
    if P.PAST == "cache":
        ptr, inner = either_at(place < P.KERNEL - 1, cache, x, batch, place, P)
    else:
        ptr = frame_at(x, batch, tl.maximum(place - (P.KERNEL - 1), 0), P)
        inner = tl.cast(x.inner, tl.int64)
    return ptr, inner


@triton.jit
def first_tap(result, P: tl.constexpr):
    """The first tap of a frame of the result that is not over zeros before the clip."""
    tap = tl.cast(result, tl.int64) * 0
    if P.PAST == "zeros":
        tap = tl.maximum(P.KERNEL - 1 - tl.cast(result, tl.int64) * P.STRIDE, 0)
    return tap


@triton.jit
def results_of(place, results, P: tl.constexpr):
    """(first tap, how many) that read a frame of the sequence for some frame of the result.

    They are STRIDE apart, and tap j reads it for the result (place - j) / STRIDE.
    """
    low = tl.maximum(place - (tl.cast(results, tl.int64) - 1) * P.STRIDE, 0)
    low += (place - low) % P.STRIDE
    high = tl.minimum(place, P.KERNEL - 1)
    return low, tl.maximum(high - low + P.STRIDE, 0) // P.STRIDE


@triton.jit
def target_of(dx, dcache, batch, frame, P: tl.constexpr):
    """(place in the sequence, its first place, address, inner stride) of a frame with a gradient.

    Frames count from the cache's first, if there is one. The first frame of a clip stands for those
    before it, and gets their gradients: its places are several.
    """
    place = tl.cast(frame, tl.int64)
    if P.PAST == "cache":
        first = place
        ptr, inner = either_at(place < P.KERNEL - 1, dcache, dx, batch, place, P)
    else:
        ptr = frame_at(dx, batch, place, P)
        inner = tl.cast(dx.inner, tl.int64)
        place += P.KERNEL - 1
        first = place
        if P.PAST == "replicate":
            first = tl.where(place == P.KERNEL - 1, 0, place)
    return place, first, ptr, inner


@triton.jit
def tile_of(frames, sizes, NCOLS: tl.constexpr):
    """(batch, tile of pixels, frame, tile of channels) of this program.

    The frames of the same pixels are neighbours, so that what they share is read from memory once.
    """
    program = tl.program_id(0).to(tl.int64)
    col_tile = program % NCOLS
    program //= NCOLS
    frame = program % frames
    program //= frames
    return program // sizes.tiles, program % sizes.tiles, frame, col_tile


@triton.jit
def pixels_of(tile, sizes, P: tl.constexpr):
    """The pixels of a tile, and which of them there are."""
    pixel = tile * P.BLOCK_ROWS + tl.arange(0, P.BLOCK_ROWS)
    return pixel, pixel < count_of(sizes, P)


@triton.jit
def count_of(sizes, P: tl.constexpr):
    """Pixels of a frame; the product with a constant shows every compiler their alignment."""
    count = tl.cast(sizes.pixels, tl.int64)
    if not P.CHANNELS_LAST:
        count *= P.ALIGN
    return count


@triton.jit
def unit_of(unit, sizes):
    """(batch, tile of pixels, frame of the result); frames of the same pixels are neighbours."""
    frame = unit % sizes.results
    unit //= sizes.results
    return unit // sizes.tiles, unit % sizes.tiles, frame


# --- values ----------------------------------------------------------------------------------


@triton.jit
def plus_product(acc, left, right, P: tl.constexpr):
    """acc + left · right. A left that is wider is two: what right's dtype holds, and the rest.

    So do tensor cores multiply the gradient of a pre-activation as if it were not rounded.
    """
    high = left.to(right.dtype)
    acc = tl.dot(high, right, acc, input_precision="ieee", out_dtype=P.COMPUTE)
    if left.dtype != right.dtype:
        rest = left - high.to(left.dtype)
        rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)  # of an infinity there is none
        acc = tl.dot(rest.to(right.dtype), right, acc, out_dtype=P.COMPUTE)
    return acc


@triton.jit
def store(ptr, x, mask):
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish(pre, ptr, dout, batch, frame, pixel, channel, mask, at, P: tl.constexpr):
    """Stores the activation of a pre-activation; or, given dout, the pre-activation's gradient."""
    if dout.ptr is not None:
        inner = tl.cast(dout.inner, tl.int64)
        grad_at = frame_at(dout, batch, frame, P) + cells(pixel, channel, inner, P)
        grad = tl.load(grad_at, mask=mask, other=0.0).to(P.COMPUTE)
        gate = 1.0 / (1.0 + tl.exp(-pre))
        # 1 - sigmoid(z) is taken as sigmoid(-z), which has all its digits where the other has few
        pre = grad * gate * (1.0 + pre * (1.0 / (1.0 + tl.exp(pre))))
    elif P.SILU:
        pre = pre * (1.0 / (1.0 + tl.exp(-pre)))
    store(ptr + at, pre, mask)
