"""Launch layout of the kernels of spatial_norm: constants, sizes, tiles.

A tile is (run, cells, channels) if the video is channels-last, else (cells, channels, run): `run`
neighbouring pixels for each of `cells` neighbouring latents, so that y and b are loaded once for
each latent.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .._launch import LAST, alignment, cdiv, contiguous, next_power_of_2
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


def video_of(x: Tensor | None, align: int, channels_last: bool) -> Video:
    if x is None:
        return Video(None, 0, 0, 0, 0, 1)
    batch, channel, frame, row, col = x.stride()
    if channels_last:
        col //= align
    else:
        channel //= align
    return Video(x, batch // align, channel, frame // align, row // align, col)


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
    elements, channels = TILE // x.element_size(), next_power_of_2(x.shape[1])
    if channels_last:
        lanes = min(channels, LANES)
        return elements // lanes, lanes
    run = min(next_power_of_2(across), RUN)
    lanes = min(channels, elements // run)
    return run, lanes


def plan_of(
    x: Tensor, settings: Settings, like: tuple[Tensor | None, ...],
    latents: tuple[Tensor | None, ...] = (), cache: str = "none",
) -> Plan:  # fmt: skip
    """Plan a launch over x, `like` (videos of its height and width) and `latents` (y and b)."""
    channels, width = x.shape[1], x.shape[4]
    channels_last = channels > 1 and x.stride(1) == 1
    inner = 1 if channels_last else 4
    modulation = next((z for z in latents if z is not None), None)
    ratio = 0 if modulation is None else width // modulation.shape[4]
    run, lanes = _tile_shape(x, width if ratio else x.shape[3] * width, channels_last)
    cells = 1
    if ratio:
        pixels, run = run, min(run, next_power_of_2(ratio))
        cells = pixels // run
    return Plan(
        CHANNELS=channels,
        GROUPS=settings.num_groups,
        GROUP_SIZE=channels // settings.num_groups,
        CELLS=cells,
        RUN=run,
        LANES=lanes,
        TILES=cdiv(channels, lanes),
        RATIO=ratio,
        FLAT=_rows_are_dense(x, *like),
        CHANNELS_LAST=channels_last,
        ALIGN=alignment(x, *like, inner=inner),
        LATENT_ALIGN=alignment(*latents, inner=inner),
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
        down = cdiv(height * width, plan.RUN * span)
        return Sizes(frames, height, width, 1, 1, 1, 1, 1, span, down, 1, cache_len)
    latents, rows, cols = modulation.shape[2:]
    rows_per_latent = height // rows
    parts = cdiv(rows_per_latent, span)
    across = cdiv(cols, plan.CELLS) * cdiv(plan.RATIO, plan.RUN)
    return Sizes(
        frames, height, width, latents, rows, cols, rows_per_latent, parts, span, rows * parts,
        across, cache_len,
    )  # fmt: skip


def span_of(x: Tensor, plan: Plan, most: int) -> int:
    """Tiles of a program: `most`, or fewer if a sample would give too few programs.

    The batch does not count, so that a sample has the same bits in any batch.
    """
    frames, height, width = x.shape[2:]
    tiles = frames * cdiv(height * width, plan.RUN * plan.CELLS) * plan.TILES
    return min(most, max(SPAN, tiles // PROGRAMS))
