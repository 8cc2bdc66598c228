"""Launch layout and device functions shared by the kernels of spatial_norm.

A tile is (run, cells, channels) if the video is channels-last, else (cells, channels, run): `run`
neighbouring pixels for each of `cells` neighbouring latents, so that y and b are loaded once for
each latent. A mask or an address of pixels alone is (run, cells) or (cells, run).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Reasoned, not yet measured: two 16-byte loads for each thread of four warps; of fp16 and bf16 that
# is 16 elements, and where there are sums two of them in fp32 for each.
TILE = 4096  # bytes
WARPS = 4
LANES = 128  # channels of a tile, at most, where channels are neighbours
RUN = 256  # pixels of a tile, at most, where pixels are
PROGRAMS = 528  # of a sample, where it has tiles enough: four for each multiprocessor of an H200
SPAN = 4  # tiles for a program, at least


class Video(NamedTuple):
    """A tensor (batch, channels, frames, height, width) and its strides.

    In units of ALIGN elements, but for the one of the dim whose elements are neighbours: channels,
    or columns. The product with a constant shows every compiler how far the others are aligned.
    """

    ptr: Tensor | None
    batch: int
    channel: int
    frame: int
    row: int
    col: int


class Sizes(NamedTuple):
    """Of a launch, in programs and their loops.

    frames, height, width   of x
    latents, rows, cols     frames, height and width of y and b
    each                    rows of pixels for a row of latents
    parts                   programs for a row of latents
    span                    rows of pixels for a program, or its steps over tiles of pixels
    down, across            programs for the height of a frame, and for its width
    kept                    cached frames
    """

    frames: int
    height: int
    width: int
    latents: int
    rows: int
    cols: int
    each: int
    parts: int
    span: int
    down: int
    across: int
    kept: int


class Plan(NamedTuple):
    """What is constant in a launch, and compiled into the kernel."""

    CHANNELS: int
    GROUPS: int
    EACH: int  # channels of a group
    CELLS: int
    RUN: int
    LANES: int  # channels of a tile
    TILES: int  # of channels
    RATIO: int  # columns of pixels for a column of latents; 0: no latents, pixels in strips
    FLAT: bool  # without latents: the rows of a frame follow upon one another
    CHANNELS_LAST: bool
    ALIGN: int  # elements that strides of videos are multiples of
    LATENT_ALIGN: int
    PER_FRAME: bool
    LEADS: bool
    SILU: bool
    EPS: float
    CACHE: str  # "none", "continue", "replicate" or "zeros"
    COMPUTE: tl.dtype


def _aligned(channels_last: bool, *tensors: Tensor | None) -> int:
    """What divides all strides but those of the dim whose elements are neighbours; at most 16."""
    inner = 1 if channels_last else 4
    strides = (
        stride
        for x in tensors
        if x is not None
        for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True))
        if dim != inner and size > 1
    )
    return math.gcd(16, *strides)


def video_of(x: Tensor | None, align: int, channels_last: bool) -> Video:
    if x is None:
        return Video(None, 0, 0, 0, 0, 1)
    inner = 1 if channels_last else 4
    batch, channel, frame, row, col = (
        stride if dim == inner else stride // align for dim, stride in enumerate(x.stride())
    )
    return Video(x, batch, channel, frame, row, col)


def _flat(*tensors: Tensor | None) -> bool:
    """Whether the rows of every frame follow upon one another: a frame is one run of pixels."""
    return all(
        x is None or x.shape[3] == 1 or x.stride(3) == x.shape[4] * x.stride(4) for x in tensors
    )


def _tiles(x: Tensor, across: int, channels_last: bool) -> tuple[int, int]:
    """Pixels and channels of a tile, powers of two, of which the inner dim takes what it can."""
    elements, channels = TILE // x.element_size(), triton.next_power_of_2(x.shape[1])
    if channels_last:
        lanes = min(channels, LANES)
        return elements // lanes, lanes
    run = min(triton.next_power_of_2(across), RUN)
    lanes = min(channels, elements // run)
    return run, lanes


def plan_of(
    x: Tensor, num_groups: int, like: tuple[Tensor | None, ...],
    latents: tuple[Tensor | None, ...] = (), per_frame: bool = False, leads: bool = False,
    silu: bool = False, eps: float = 0.0, cache: str = "none",
) -> Plan:  # fmt: skip
    """For a launch over x and `like`, videos of its height and width, and over `latents`."""
    channels, width = x.shape[1], x.shape[4]
    channels_last = channels > 1 and x.stride(1) == 1
    there = next((z for z in latents if z is not None), None)
    ratio = 0 if there is None else width // there.shape[4]
    run, lanes = _tiles(x, width if ratio else x.shape[3] * width, channels_last)
    cells = 1
    if ratio:
        pixels, run = run, min(run, triton.next_power_of_2(ratio))
        cells = pixels // run
    return Plan(
        CHANNELS=channels,
        GROUPS=num_groups,
        EACH=channels // num_groups,
        CELLS=cells,
        RUN=run,
        LANES=lanes,
        TILES=triton.cdiv(channels, lanes),
        RATIO=ratio,
        FLAT=_flat(x, *like),
        CHANNELS_LAST=channels_last,
        ALIGN=_aligned(channels_last, x, *like),
        LATENT_ALIGN=_aligned(channels_last, *latents),
        PER_FRAME=per_frame,
        LEADS=leads and x.shape[2] > 1,
        SILU=silu,
        EPS=eps,
        CACHE=cache,
        COMPUTE=tl.float64 if x.dtype is torch.float64 else tl.float32,
    )


def sizes_of(x: Tensor, there: Tensor | None, plan: Plan, span: int, kept: int = 0) -> Sizes:
    """Of a launch that walks `span` rows of pixels, or steps of a strip, for a program."""
    frames, height, width = x.shape[2:]
    if there is None:
        down = triton.cdiv(height * width, plan.RUN * span)
        return Sizes(frames, height, width, 1, 1, 1, 1, 1, span, down, 1, kept)
    latents, rows, cols = there.shape[2:]
    each = height // rows
    parts = triton.cdiv(each, span)
    across = triton.cdiv(cols, plan.CELLS) * triton.cdiv(plan.RATIO, plan.RUN)
    return Sizes(
        frames, height, width, latents, rows, cols, each, parts, span, rows * parts, across, kept
    )


def span_of(x: Tensor, plan: Plan, most: int) -> int:
    """How many tiles a program walks: `most`, or fewer if a sample would give too few programs.

    Of a sample and not of the batch: so a sample has the same bits in any batch.
    """
    frames, height, width = x.shape[2:]
    tiles = frames * triton.cdiv(height * width, plan.RUN * plan.CELLS) * plan.TILES
    return min(most, max(SPAN, tiles // PROGRAMS))


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# --- the axes of a tile ----------------------------------------------------------------------


@triton.jit
def of_pixels(x, P: tl.constexpr):
    """What is of the pixels alone, for all channels."""
    return x[:, :, None] if P.CHANNELS_LAST else x[:, None, :]


@triton.jit
def of_channels(x, P: tl.constexpr):
    """(channels,) for all pixels."""
    return x[None, None, :] if P.CHANNELS_LAST else x[None, :, None]


@triton.jit
def of_cells(x, P: tl.constexpr):
    """(cells, channels) for all of a run."""
    return x[None, :, :] if P.CHANNELS_LAST else x[:, :, None]


@triton.jit
def over_run(x, P: tl.constexpr):
    """The sums of a tile for each cell: (cells, channels)."""
    return tl.sum(x, axis=0) if P.CHANNELS_LAST else tl.sum(x, axis=2)


@triton.jit
def zeros(P: tl.constexpr):
    """A tile of them."""
    CELLS: tl.constexpr = P.CELLS
    RUN: tl.constexpr = P.RUN
    LANES: tl.constexpr = P.LANES
    if P.CHANNELS_LAST:
        tile = tl.zeros((RUN, CELLS, LANES), P.COMPUTE)
    else:
        tile = tl.zeros((CELLS, LANES, RUN), P.COMPUTE)
    return tile


@triton.jit
def over_pixels(x, P: tl.constexpr):
    """The sums of a tile for each channel."""
    return tl.sum(over_run(x, P), axis=0)


@triton.jit
def whole(mask, there, P: tl.constexpr):
    """The mask of a tile: pixels that are there, and channels."""
    if P.CHANNELS % P.LANES == 0:
        both = of_pixels(mask, P)
    else:
        both = of_pixels(mask, P) & of_channels(there, P)
    return both


# --- addresses -------------------------------------------------------------------------------


@triton.jit
def at(video, batch, frame, row, col, channel, ALIGN: tl.constexpr, P: tl.constexpr):
    """Of a tile's elements; `row` and `col` are of the pixels alone, in 64 bits."""
    start = (batch * video.batch + frame * video.frame) * ALIGN
    if P.CHANNELS_LAST:
        pixels = (row * video.row + col * video.col) * ALIGN
        offset = of_pixels(pixels, P) + of_channels(channel * video.channel, P)
    else:
        pixels = row * video.row * ALIGN + col * video.col
        offset = of_pixels(pixels, P) + of_channels(channel * video.channel * ALIGN, P)
    return video.ptr + (start + offset)


@triton.jit
def load(video, batch, frame, row, col, channel, mask, P: tl.constexpr):
    where = at(video, batch, frame, row, col, channel, P.ALIGN, P)
    return tl.load(where, mask=mask, other=0.0).to(P.COMPUTE)


@triton.jit
def store(video, batch, frame, row, col, channel, mask, x, P: tl.constexpr):
    """Rounds to the tensor's dtype, once; returns what was stored."""
    rounded = x.to(video.ptr.dtype.element_ty)
    tl.store(at(video, batch, frame, row, col, channel, P.ALIGN, P), rounded, mask=mask)
    return rounded


@triton.jit
def vector(ptr, channel, there, otherwise: tl.constexpr, P: tl.constexpr):
    """A vector (channels,), or a constant where there is none."""
    LANES: tl.constexpr = P.LANES
    if ptr is None:
        values = tl.full((LANES,), otherwise, P.COMPUTE)
    else:
        values = tl.load(ptr + channel, mask=there, other=0.0).to(P.COMPUTE)
    return values


@triton.jit
def latent(video, batch, frame, row, cell, channel, mask, otherwise: tl.constexpr, P: tl.constexpr):
    """y or b of a row of cells, (cells, channels); a constant where there is none."""
    CELLS: tl.constexpr = P.CELLS
    LANES: tl.constexpr = P.LANES
    if video.ptr is None:
        values = tl.full((CELLS, LANES), otherwise, P.COMPUTE)
    else:
        where = latent_at(video, batch, frame, row, cell, channel, P)
        values = tl.load(where, mask=mask, other=0.0).to(P.COMPUTE)
    return values


@triton.jit
def latent_at(video, batch, frame, row, cell, channel, P: tl.constexpr):
    start = (batch * video.batch + frame * video.frame + row * video.row) * P.LATENT_ALIGN
    if P.CHANNELS_LAST:
        cells, channels = cell * video.col * P.LATENT_ALIGN, channel * video.channel
    else:
        cells, channels = cell * video.col, channel * video.channel * P.LATENT_ALIGN
    return video.ptr + (start + cells[:, None] + channels[None, :])


# --- where a program is ----------------------------------------------------------------------


@triton.jit
def channels_of(tile, P: tl.constexpr):
    """The channels of a tile, and which of them there are."""
    LANES: tl.constexpr = P.LANES
    channel = tl.cast(tile, tl.int64) * LANES + tl.arange(0, LANES)
    return channel, channel < P.CHANNELS


@triton.jit
def pixels_of(place, step, sizes, P: tl.constexpr):
    """Without latents: row, column and mask of a strip's step."""
    RUN: tl.constexpr = P.RUN
    first = (tl.cast(place, tl.int64) * sizes.span + step) * RUN
    run = tl.arange(0, RUN)
    pixel = first + (run[:, None] if P.CHANNELS_LAST else run[None, :])
    mask = pixel < tl.cast(sizes.height, tl.int64) * sizes.width
    if P.FLAT:
        row, col = tl.zeros_like(pixel), pixel
    else:
        row, col = pixel // sizes.width, pixel % sizes.width
    return row, col, mask


@triton.jit
def columns_of(place, sizes, P: tl.constexpr):
    """With latents: the cells of a place along the width, its columns and their mask."""
    CELLS: tl.constexpr = P.CELLS
    RUN: tl.constexpr = P.RUN
    RUNS: tl.constexpr = (P.RATIO + RUN - 1) // RUN
    cell = tl.cast(place // RUNS, tl.int64) * CELLS + tl.arange(0, CELLS)
    run = tl.cast(place % RUNS, tl.int64) * RUN + tl.arange(0, RUN)
    if P.CHANNELS_LAST:
        col = cell[None, :] * P.RATIO + run[:, None]
        mask = (cell < sizes.cols)[None, :] & (run < P.RATIO)[:, None]
    else:
        col = cell[:, None] * P.RATIO + run[None, :]
        mask = (cell < sizes.cols)[:, None] & (run < P.RATIO)[None, :]
    return cell, col, mask


@triton.jit
def latent_frame(frame, sizes, P: tl.constexpr):
    """Of a frame, by the nearest-neighbour rule; `LEADS`: the first is alone."""
    if P.LEADS:
        rest = tl.maximum(frame - 1, 0) * (sizes.latents - 1)
        found = tl.where(frame == 0, 0, 1 + rest // tl.maximum(sizes.frames - 1, 1))
    else:
        found = frame * sizes.latents // sizes.frames
    return found


@triton.jit
def of_groups(pairs_ptr, batch, frame, sizes, channel, there, P: tl.constexpr):
    """For each channel two numbers of its group; pairs_ptr: (batch, frames or 1, groups, 2)."""
    unit = batch
    if P.PER_FRAME:
        unit = batch * sizes.frames + frame
    place = (unit * P.GROUPS + channel // P.EACH) * 2
    first = tl.load(pairs_ptr + place, mask=there, other=0.0)
    second = tl.load(pairs_ptr + (place + 1), mask=there, other=0.0)
    return first, second


@triton.jit
def statistics(moments_ptr, batch, frame, sizes, channel, there, P: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of each channel's group."""
    mean, var = of_groups(moments_ptr, batch, frame, sizes, channel, there, P)
    return mean, tl.rsqrt(var + P.EPS)


# --- SiLU ------------------------------------------------------------------------------------


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def slope(x, P: tl.constexpr):
    """The derivative of SiLU, or 1 without it.

    1 - sigmoid(x) is taken as sigmoid(-x), which has all its digits where the other has few.
    """
    along = tl.full(x.shape, 1.0, P.COMPUTE)
    if P.SILU:
        s = sigmoid(x)
        along = s + x * s * sigmoid(-x)
    return along
