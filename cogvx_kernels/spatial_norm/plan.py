"""How a launch is laid out: the strides of its tensors, its tiles, its programs and their loops."""

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
