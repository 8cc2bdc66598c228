"""Launch layout and device functions shared by the kernels of temporal_conv.

A tile lies within one output frame, so that each tap reads one frame: of the cache, of x, or the
padding before the clip. A scalar selects it, so nothing is padded or concatenated.

The sequence is the KERNEL - 1 frames before x and then x; a position counts from its first frame.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Video(NamedTuple):
    """A tensor (batch, channels, frames, pixels); strides are in units of ALIGN elements.

    Either its channels or its pixels have stride 1; `inner` is the stride of the other.
    """

    ptr: Tensor | None
    batch: int
    frame: int
    inner: int


class Sizes(NamedTuple):
    """Runtime sizes of a launch; `pixels` of a frame in units of ALIGN if their stride is 1."""

    pixels: int
    tiles: int  # of pixels in a frame
    frames: int  # of x
    out_frames: int
    batch: int


class Strips(NamedTuple):
    """Ranges that programs sum for the gradient of a weight: of groups, and of tiles of pixels.

    A group is a run of output frames of one sample.
    """

    runs: int  # of a sample
    groups: int
    tiles: int
    strip_groups: int
    strip_tiles: int


class Plan(NamedTuple):
    """Compile-time constants of a launch."""

    IN: int
    OUT: int
    KERNEL: int
    STRIDE: int
    PAST: str  # "cache", "replicate" or "zeros"
    CHANNELS_LAST: bool
    BLOCK_ROWS: int  # pixels
    BLOCK_COLS: int  # channels
    BLOCK_INNER: int
    ALIGN: int  # elements; strides are multiples of it
    COMPUTE: tl.dtype


# --- layouts ---------------------------------------------------------------------------------


def is_channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1


def _pixel_stride(x: Tensor) -> int:
    *_, height, width = x.shape
    return x.stride(4) if width > 1 else x.stride(3) if height > 1 else 0


def with_even_strides(x: Tensor | None, last: bool) -> Tensor | None:
    """x if its pixels are evenly spaced and its channels (`last`) or pixels dense, else a copy."""
    if x is None:
        return None
    *_, height, width = x.shape
    even = height == 1 or width == 1 or x.stride(3) == width * x.stride(4)
    single = (x.shape[1] if last else height * width) == 1
    dense = single or (x.stride(1) if last else _pixel_stride(x)) == 1
    if even and dense:
        return x
    form = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty_like(x, memory_format=form).copy_(x)


def strides_of(x: Tensor, last: bool) -> tuple[int, int, int]:
    """Strides of batch, frames, and pixels (`last`) or channels; 0 for a dim of size 1."""
    samples, channels, length, height, width = x.shape
    batch, channel, frame, row, col = x.stride()
    if last:
        inner = col if width > 1 else row if height > 1 else 0
    else:
        inner = channel if channels > 1 else 0
    return batch if samples > 1 else 0, frame if length > 1 else 0, inner


def video_of(x: Tensor | None, plan: Plan) -> Video:
    if x is None:
        return Video(None, 0, 0, 0)
    batch, frame, inner = strides_of(x, plan.CHANNELS_LAST)
    return Video(x, batch // plan.ALIGN, frame // plan.ALIGN, inner // plan.ALIGN)


# --- addresses -------------------------------------------------------------------------------


@triton.jit
def frame_offset(video, batch, frame, P: tl.constexpr):
    """Offset of a frame, in 64 bits."""
    start = tl.cast(batch, tl.int64) * video.batch + tl.cast(frame, tl.int64) * video.frame
    return start * P.ALIGN


@triton.jit
def frame_address(video, batch, frame, P: tl.constexpr):
    """Address of a frame."""
    return video.ptr + frame_offset(video, batch, frame, P)


@triton.jit
def select_frame(cached, cache, x, batch, position, P: tl.constexpr):
    """(address, inner stride) of a frame of the sequence: of the cache if `cached`, else of x.

    Selects scalars and base pointers: some compilers fail on a select of blocks of addresses, or of
    addresses within tensors.
    """
    start = tl.where(
        cached,
        frame_offset(cache, batch, position, P),
        frame_offset(x, batch, position - (P.KERNEL - 1), P),
    )
    inner = tl.where(cached, tl.cast(cache.inner, tl.int64), tl.cast(x.inner, tl.int64))
    return tl.where(cached, cache.ptr, x.ptr) + start, inner


@triton.jit
def pixel_offsets(pixel, channel, inner, P: tl.constexpr):
    """Offsets within a frame of broadcast blocks of pixels and channels, in 64 bits."""
    if P.CHANNELS_LAST:
        offset = pixel * (inner * P.ALIGN) + channel
    else:
        offset = channel * (inner * P.ALIGN) + pixel
    return offset


@triton.jit
def source_frame(x, cache, batch, position, P: tl.constexpr):
    """(address, inner stride) of the frame at a position of the sequence.

    Zeros before the clip have the address of the first frame: the caller must mask them.
    """
    if P.PAST == "cache":
        ptr, inner = select_frame(position < P.KERNEL - 1, cache, x, batch, position, P)
    else:
        ptr = frame_address(x, batch, tl.maximum(position - (P.KERNEL - 1), 0), P)
        inner = tl.cast(x.inner, tl.int64)
    return ptr, inner


@triton.jit
def first_tap(frame, P: tl.constexpr):
    """The first tap of an output frame that does not read zeros before the clip."""
    tap = tl.cast(frame, tl.int64) * 0
    if P.PAST == "zeros":
        tap = tl.maximum(P.KERNEL - 1 - tl.cast(frame, tl.int64) * P.STRIDE, 0)
    return tap


@triton.jit
def taps_of(position, out_frames, P: tl.constexpr):
    """(first tap, number of taps) that read the frame at a position of the sequence.

    They are STRIDE apart; tap j reads it for output frame (position - j) / STRIDE.
    """
    low = tl.maximum(position - (tl.cast(out_frames, tl.int64) - 1) * P.STRIDE, 0)
    low += (position - low) % P.STRIDE
    high = tl.minimum(position, P.KERNEL - 1)
    return low, tl.maximum(high - low + P.STRIDE, 0) // P.STRIDE


@triton.jit
def target_frame(dx, dcache, batch, frame, P: tl.constexpr):
    """(last position, first position, address, inner stride) of a frame that gets a gradient.

    Frames count from the cache's first, if there is one. A replicated first frame has several
    positions: it gets the gradients of its copies too.
    """
    position = tl.cast(frame, tl.int64)
    if P.PAST == "cache":
        first = position
        ptr, inner = select_frame(position < P.KERNEL - 1, dcache, dx, batch, position, P)
    else:
        ptr = frame_address(dx, batch, position, P)
        inner = tl.cast(dx.inner, tl.int64)
        position += P.KERNEL - 1
        first = position
        if P.PAST == "replicate":
            first = tl.where(position == P.KERNEL - 1, 0, position)
    return position, first, ptr, inner


@triton.jit
def program_tile(frames, sizes, NCOLS: tl.constexpr):
    """(batch, tile of pixels, frame, tile of channels) of this program.

    Frames of the same pixels are neighbouring programs: frames that they share are read from the L2
    cache.
    """
    program = tl.program_id(0).to(tl.int64)
    col_tile = program % NCOLS
    program //= NCOLS
    frame = program % frames
    program //= frames
    return program // sizes.tiles, program % sizes.tiles, frame, col_tile


@triton.jit
def tile_pixels(tile, sizes, P: tl.constexpr):
    """The pixels of a tile and their mask."""
    pixel = tile * P.BLOCK_ROWS + tl.arange(0, P.BLOCK_ROWS)
    return pixel, pixel < pixel_count(sizes, P)


@triton.jit
def pixel_count(sizes, P: tl.constexpr):
    """Pixels of a frame; the product with a constant shows compilers their alignment."""
    count = tl.cast(sizes.pixels, tl.int64)
    if not P.CHANNELS_LAST:
        count *= P.ALIGN
    return count


@triton.jit
def strip_tiles(strip, strips):
    """(first group, last, first tile, last) of a strip; each last is not in it."""
    parts = (strips.tiles + strips.strip_tiles - 1) // strips.strip_tiles
    group = strip // parts * strips.strip_groups
    tile = strip % parts * strips.strip_tiles
    last_group = tl.minimum(group + strips.strip_groups, tl.cast(strips.groups, tl.int64))
    last_tile = tl.minimum(tile + strips.strip_tiles, tl.cast(strips.tiles, tl.int64))
    return group, last_group, tile, last_tile


@triton.jit
def channel_address(ptr, channel, inner, P: tl.constexpr):
    """Address of the first pixel of a channel, from that of its frame."""
    start = channel
    if not P.CHANNELS_LAST:
        start *= inner * P.ALIGN
    return ptr + start


@triton.jit
def tile_address(ptr, tile, ROWS: tl.constexpr, inner, P: tl.constexpr):
    """Address of the first pixel of a tile of ROWS, from that of its frame."""
    start = tile * ROWS
    if P.CHANNELS_LAST:
        start *= inner * P.ALIGN
    return ptr + start


@triton.jit
def tile_mask(pixel, tile, ROWS: tl.constexpr, sizes, P: tl.constexpr):
    """Mask of the pixels of a tile of ROWS, which count from its first."""
    return pixel < pixel_count(sizes, P) - tile * ROWS


@triton.jit
def add_product(acc, a, b, P: tl.constexpr):
    """acc + a·b.

    fp32 is summed step by step: fma over all steps in one chain errs more, the longer it is. Triton
    makes that chain of the addition, too, unless max_num_imprecise_acc is set.
    """
    if a.dtype == P.COMPUTE:
        acc += tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1, out_dtype=P.COMPUTE)
    else:
        acc = tl.dot(a, b, acc, out_dtype=P.COMPUTE)
    return acc


@triton.jit
def store(ptr, x, mask):
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)
