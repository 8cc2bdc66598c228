"""Launch layout of the kernels of spatial_norm: constants, sizes, tiles.

A tile is (run, cells, channels) if the video is channels-last, else (cells, channels, run): `run`
neighbouring pixels for each of `cells` neighbouring latents, so that y and b are loaded once for
each latent.
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
    SHORT: bool  # fp16 or bf16: a few ulp of fp32 are lost in their rounding
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
        SHORT=x.element_size() == 2,
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
