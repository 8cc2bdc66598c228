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

from .._launch import LAST, contiguous
from .validation import Parameters, Settings

# Estimated, not measured: two 16-byte loads for each thread of four warps, which is 16 elements of
# fp16 or bf16, and where there are sums, two fp32 accumulators for each element.
TILE = 4096  # bytes
WARPS = 4
LANES = 128  # most channels of a tile, channels-last
RUN = 256  # most pixels of a tile, contiguous
PROGRAMS = 528  # of a sample that has enough tiles: four for each multiprocessor of an H200
SPAN = 4  # fewest tiles of a program


class Video(NamedTuple):
    """A tensor (batch, channels, frames, height, width) and its strides.

    In units of ALIGN elements, except that of the innermost dim, channels or columns. The product
    with a constant shows every compiler how far the strides are aligned.
    """

    ptr: Tensor | None
    batch: int
    channel: int
    frame: int
    row: int
    col: int


class Sizes(NamedTuple):
    """Runtime sizes of a launch.

    frames, height, width   of x
    latents, rows, cols     frames, height and width of y and b
    rows_per_latent         rows of pixels for a row of latents
    parts                   programs for a row of latents
    span                    rows of pixels of a program, or its steps over tiles of pixels
    down, across            programs for the height of a frame, and for its width
    cache_len               cached frames
    """

    frames: int
    height: int
    width: int
    latents: int
    rows: int
    cols: int
    rows_per_latent: int
    parts: int
    span: int
    down: int
    across: int
    cache_len: int


class Plan(NamedTuple):
    """Compile-time constants of a launch."""

    CHANNELS: int
    GROUPS: int
    GROUP_SIZE: int  # channels
    CELLS: int
    RUN: int
    LANES: int  # channels of a tile
    TILES: int  # of channels
    RATIO: int  # columns of pixels for a column of latents; 0: no latents, pixels in strips
    FLAT: bool  # without latents: no gaps between the rows of a frame
    CHANNELS_LAST: bool
    ALIGN: int  # elements; strides of videos are multiples of it
    LATENT_ALIGN: int
    PER_FRAME: bool
    LEADS: bool
    SILU: bool
    EPS: float
    CACHE: str  # "none", "continue", "replicate" or "zeros"
    COMPUTE: tl.dtype


def _stride_alignment(channels_last: bool, *tensors: Tensor | None) -> int:
    """The greatest common divisor of all strides but the innermost dim's and 16."""
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


class Modulation(NamedTuple):
    """`validation.Parameters` for a kernel."""

    weight: Tensor | None
    bias: Tensor | None
    y: Video
    b: Video
    offset: Tensor | None
    last: None = LAST


def latent_video(x: Tensor | None, plan: Plan) -> Video:
    return video_of(x, plan.LATENT_ALIGN, plan.CHANNELS_LAST)


def modulation_of(of: Parameters, plan: Plan) -> Modulation:
    weight, bias, offset = (contiguous(v) for v in (of.weight, of.bias, of.offset))
    return Modulation(weight, bias, latent_video(of.y, plan), latent_video(of.b, plan), offset)


def _rows_are_dense(*tensors: Tensor | None) -> bool:
    """True if no frame has gaps between its rows: a frame is one run of pixels."""
    return all(
        x is None or x.shape[3] == 1 or x.stride(3) == x.shape[4] * x.stride(4) for x in tensors
    )


def _tile_shape(x: Tensor, across: int, channels_last: bool) -> tuple[int, int]:
    """Pixels and channels of a tile, powers of two; as many as possible along the inner dim."""
    elements, channels = TILE // x.element_size(), triton.next_power_of_2(x.shape[1])
    if channels_last:
        lanes = min(channels, LANES)
        return elements // lanes, lanes
    run = min(triton.next_power_of_2(across), RUN)
    lanes = min(channels, elements // run)
    return run, lanes


def plan_of(
    x: Tensor, settings: Settings, like: tuple[Tensor | None, ...],
    latents: tuple[Tensor | None, ...] = (), cache: str = "none",
) -> Plan:  # fmt: skip
    """Plan a launch over x, `like` (videos of its height and width) and `latents` (y and b)."""
    channels, width = x.shape[1], x.shape[4]
    channels_last = channels > 1 and x.stride(1) == 1
    modulation = next((z for z in latents if z is not None), None)
    ratio = 0 if modulation is None else width // modulation.shape[4]
    run, lanes = _tile_shape(x, width if ratio else x.shape[3] * width, channels_last)
    cells = 1
    if ratio:
        pixels, run = run, min(run, triton.next_power_of_2(ratio))
        cells = pixels // run
    return Plan(
        CHANNELS=channels,
        GROUPS=settings.num_groups,
        GROUP_SIZE=channels // settings.num_groups,
        CELLS=cells,
        RUN=run,
        LANES=lanes,
        TILES=triton.cdiv(channels, lanes),
        RATIO=ratio,
        FLAT=_rows_are_dense(x, *like),
        CHANNELS_LAST=channels_last,
        ALIGN=_stride_alignment(channels_last, x, *like),
        LATENT_ALIGN=_stride_alignment(channels_last, *latents),
        PER_FRAME=settings.per_frame,
        LEADS=settings.leads and x.shape[2] > 1,
        SILU=settings.silu,
        EPS=settings.eps,
        CACHE=cache,
        COMPUTE=tl.float64 if x.dtype is torch.float64 else tl.float32,
    )


def sizes_of(
    x: Tensor, modulation: Tensor | None, plan: Plan, span: int, cache_len: int = 0
) -> Sizes:
    """Sizes of a launch in which a program takes `span` rows of pixels, or steps of a strip.

    modulation: y or b, or None without latents.
    """
    frames, height, width = x.shape[2:]
    if modulation is None:
        down = triton.cdiv(height * width, plan.RUN * span)
        return Sizes(frames, height, width, 1, 1, 1, 1, 1, span, down, 1, cache_len)
    latents, rows, cols = modulation.shape[2:]
    rows_per_latent = height // rows
    parts = triton.cdiv(rows_per_latent, span)
    across = triton.cdiv(cols, plan.CELLS) * triton.cdiv(plan.RATIO, plan.RUN)
    return Sizes(
        frames, height, width, latents, rows, cols, rows_per_latent, parts, span, rows * parts,
        across, cache_len,
    )  # fmt: skip


def span_of(x: Tensor, plan: Plan, most: int) -> int:
    """Tiles of a program: `most`, or fewer if a sample would give too few programs.

    The batch does not count, so that a sample has the same bits in any batch.
    """
    frames, height, width = x.shape[2:]
    tiles = frames * triton.cdiv(height * width, plan.RUN * plan.CELLS) * plan.TILES
    return min(most, max(SPAN, tiles // PROGRAMS))


# --- axes of a tile --------------------------------------------------------------------------


@triton.jit
def expand_pixels(x, P: tl.constexpr):
    """Broadcast a value of each pixel over channels."""
    return x[:, :, None] if P.CHANNELS_LAST else x[:, None, :]


@triton.jit
def expand_channels(x, P: tl.constexpr):
    """Broadcast (channels,) over pixels."""
    return x[None, None, :] if P.CHANNELS_LAST else x[None, :, None]


@triton.jit
def expand_cells(x, P: tl.constexpr):
    """Broadcast (cells, channels) over a run."""
    return x[None, :, :] if P.CHANNELS_LAST else x[:, :, None]


@triton.jit
def sum_run(x, P: tl.constexpr):
    """Sum a tile over its run: (cells, channels)."""
    return tl.sum(x, axis=0) if P.CHANNELS_LAST else tl.sum(x, axis=2)


@triton.jit
def zeros_tile(P: tl.constexpr):
    """A tile of zeros."""
    CELLS: tl.constexpr = P.CELLS
    RUN: tl.constexpr = P.RUN
    LANES: tl.constexpr = P.LANES
    if P.CHANNELS_LAST:
        tile = tl.zeros((RUN, CELLS, LANES), P.COMPUTE)
    else:
        tile = tl.zeros((CELLS, LANES, RUN), P.COMPUTE)
    return tile


@triton.jit
def sum_pixels(x, P: tl.constexpr):
    """Sum a tile over its pixels: (channels,)."""
    return tl.sum(sum_run(x, P), axis=0)


@triton.jit
def tile_mask(mask, channel_mask, P: tl.constexpr):
    """The mask of a tile from those of its pixels and of its channels."""
    if P.CHANNELS % P.LANES == 0:
        both = expand_pixels(mask, P)
    else:
        both = expand_pixels(mask, P) & expand_channels(channel_mask, P)
    return both


# --- addresses -------------------------------------------------------------------------------


@triton.jit
def address(video, at, P: tl.constexpr):
    """Addresses of a tile at (batch, frame, row, col, channel).

    `row` and `col` are of its pixels, in 64 bits.
    """
    batch, frame, row, col, channel = at
    start = (batch * video.batch + frame * video.frame) * P.ALIGN
    if P.CHANNELS_LAST:
        pixels = (row * video.row + col * video.col) * P.ALIGN
        offset = expand_pixels(pixels, P) + expand_channels(channel * video.channel, P)
    else:
        pixels = row * video.row * P.ALIGN + col * video.col
        offset = expand_pixels(pixels, P) + expand_channels(channel * video.channel * P.ALIGN, P)
    return video.ptr + (start + offset)


@triton.jit
def load(video, at, mask, P: tl.constexpr):
    return tl.load(address(video, at, P), mask=mask, other=0.0).to(P.COMPUTE)


@triton.jit
def store(video, at, mask, x, P: tl.constexpr):
    """Round to the tensor's dtype and store; returns the rounded tile."""
    rounded = x.to(video.ptr.dtype.element_ty)
    tl.store(address(video, at, P), rounded, mask=mask)
    return rounded


@triton.jit
def load_vector(ptr, channel, channel_mask, default: tl.constexpr, P: tl.constexpr):
    """Load (channels,); the constant `default` without a pointer."""
    LANES: tl.constexpr = P.LANES
    if ptr is None:
        values = tl.full((LANES,), default, P.COMPUTE)
    else:
        values = tl.load(ptr + channel, mask=channel_mask, other=0.0).to(P.COMPUTE)
    return values


@triton.jit
def load_latent(video, at, mask, default: tl.constexpr, P: tl.constexpr):
    """Load y or b for a row of cells, (cells, channels); the constant `default` without them."""
    CELLS: tl.constexpr = P.CELLS
    LANES: tl.constexpr = P.LANES
    if video.ptr is None:
        values = tl.full((CELLS, LANES), default, P.COMPUTE)
    else:
        values = tl.load(latent_address(video, at, P), mask=mask, other=0.0).to(P.COMPUTE)
    return values


@triton.jit
def latent_address(video, at, P: tl.constexpr):
    """Addresses of a row of cells at (batch, frame, row, cell, channel)."""
    batch, frame, row, cell, channel = at
    start = (batch * video.batch + frame * video.frame + row * video.row) * P.LATENT_ALIGN
    if P.CHANNELS_LAST:
        cells, channels = cell * video.col * P.LATENT_ALIGN, channel * video.channel
    else:
        cells, channels = cell * video.col, channel * video.channel * P.LATENT_ALIGN
    return video.ptr + (start + cells[:, None] + channels[None, :])


# --- indices of a program --------------------------------------------------------------------


@triton.jit
def tile_channels(tile, P: tl.constexpr):
    """Channels of a tile and their mask."""
    LANES: tl.constexpr = P.LANES
    channel = tl.cast(tile, tl.int64) * LANES + tl.arange(0, LANES)
    return channel, channel < P.CHANNELS


@triton.jit
def tile_pixels(strip, step, sizes, P: tl.constexpr):
    """Rows, columns and mask of a step of a strip, without latents."""
    RUN: tl.constexpr = P.RUN
    first = (tl.cast(strip, tl.int64) * sizes.span + step) * RUN
    run = tl.arange(0, RUN)
    pixel = first + (run[:, None] if P.CHANNELS_LAST else run[None, :])
    mask = pixel < tl.cast(sizes.height, tl.int64) * sizes.width
    if P.FLAT:
        row, col = tl.zeros_like(pixel), pixel
    else:
        row, col = pixel // sizes.width, pixel % sizes.width
    return row, col, mask


@triton.jit
def tile_columns(block, sizes, P: tl.constexpr):
    """Cells of a block of the width, their columns and mask, with latents."""
    CELLS: tl.constexpr = P.CELLS
    RUN: tl.constexpr = P.RUN
    RUNS: tl.constexpr = (P.RATIO + RUN - 1) // RUN
    cell = tl.cast(block // RUNS, tl.int64) * CELLS + tl.arange(0, CELLS)
    run = tl.cast(block % RUNS, tl.int64) * RUN + tl.arange(0, RUN)
    if P.CHANNELS_LAST:
        col = cell[None, :] * P.RATIO + run[:, None]
        mask = (cell < sizes.cols)[None, :] & (run < P.RATIO)[:, None]
    else:
        col = cell[:, None] * P.RATIO + run[None, :]
        mask = (cell < sizes.cols)[:, None] & (run < P.RATIO)[None, :]
    return cell, col, mask


@triton.jit
def latent_frame_of(frame, sizes, P: tl.constexpr):
    """The nearest latent frame; with LEADS the first frame has one to itself."""
    if P.LEADS:
        rest = tl.maximum(frame - 1, 0) * (sizes.latents - 1)
        index = tl.where(frame == 0, 0, 1 + rest // tl.maximum(sizes.frames - 1, 1))
    else:
        index = frame * sizes.latents // sizes.frames
    return index


@triton.jit
def load_group_pair(pairs_ptr, batch, frame, sizes, channel, channel_mask, P: tl.constexpr):
    """Load both numbers of each channel's group; pairs_ptr: (batch, frames or 1, groups, 2)."""
    unit = batch
    if P.PER_FRAME:
        unit = batch * sizes.frames + frame
    at = (unit * P.GROUPS + channel // P.GROUP_SIZE) * 2
    first = tl.load(pairs_ptr + at, mask=channel_mask, other=0.0)
    second = tl.load(pairs_ptr + (at + 1), mask=channel_mask, other=0.0)
    return first, second


@triton.jit
def mean_rstd(moments_ptr, batch, frame, sizes, channel, channel_mask, P: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of each channel's group."""
    mean, var = load_group_pair(moments_ptr, batch, frame, sizes, channel, channel_mask, P)
    return mean, tl.rsqrt(var + P.EPS)


# --- SiLU ------------------------------------------------------------------------------------


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu_grad(x, P: tl.constexpr):
    """The derivative of SiLU, or 1 without it.

    1 - sigmoid(x) is computed as sigmoid(-x), which does not cancel for large x.
    """
    grad = tl.full(x.shape, 1.0, P.COMPUTE)
    if P.SILU:
        s = sigmoid(x)
        grad = s + x * s * sigmoid(-x)
    return grad
