"""Triton kernels and launchers of temporal_conv: a matrix product for each tap, an implicit GEMM.

Dense: a program computes one tile of pixels and channels of an output frame, in one loop over taps
and input channels. The frame that a tap reads, of x or of the cache, is chosen by a scalar
(`device_utils.py`), so nothing is padded, concatenated or unfolded. On Hopper a weight of up to 128
channels stays in shared memory (`stationary.py`). Depthwise is elementwise (`depthwise.py`). The
gradient of x is the same product with the taps reversed; a replicated first frame also gets the
gradients of its copies. Gradients of weights are sums over strips of rows, then over strips
(`gradients.py`). Every sum has a fixed order; there are no atomics.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from .._backend import INTERPRETED
from .._launch import cdiv, next_power_of_2, on_device, product_options
from .depthwise import depthwise_bwd_kernel, depthwise_fwd_kernel, depthwise_weight_kernel
from .device_utils import (
    Plan,
    Sizes,
    Strips,
    add_product,
    channel_address,
    first_tap,
    frame_address,
    is_channels_last,
    pixel_offsets,
    program_tile,
    source_frame,
    store,
    strides_of,
    taps_of,
    target_frame,
    tile_pixels,
    video_of,
    with_even_strides,
)
from .gradients import dense_weight_kernel
from .stationary import stationary_weight

# Chosen to compile without spills, not measured.
BLOCK_ROWS = 128
BLOCK_COLS = 128
WIDE_COLS = 256  # on Hopper, whose tensor cores read operands from shared memory
BLOCK_INNER = 64  # 2-byte elements; half as many of 4 bytes
WARPS = 8
STAGES = 3
STATIONARY_ROWS = 64  # of a tile, with a stationary weight: one program per multiprocessor
STATIONARY_WARPS = 8
STATIONARY_TILES = 32  # of an output frame each, per load of the weight
STATIONARY_BYTES = 200 * 1024  # of 227 KB shared memory; the epilogue takes some more
FRAMES = 4  # output frames of a depthwise program
GRAD_FRAMES = 5  # frames of a program for their gradients: 8 and 2 of a cache are two runs
ELEMENTS = 1024  # of each: two 16-byte loads of bf16 for each of 64 threads
FUSED_TAPS = 3  # of a program for the gradient of the weight, on Hopper
FUSED_INNER = 16  # pixels of a step of it: 32 spill
STRIPS = 512  # programs, about, for the gradient of the weight

# --- dense -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tiles"])
def _dense_fwd_kernel(
    out, x, cache, weight_ptr, bias_ptr, sizes, tiles, STATIONARY: tl.constexpr, P: tl.constexpr
):
    """Output frames; weight (KERNEL, OUT, IN).

    Grid (batch · tiles of pixels · frames · tiles of channels,); with a stationary weight (runs of
    `tiles` tiles of pixels,).
    """
    if STATIONARY:
        stationary_weight(out, out, x, cache, weight_ptr, bias_ptr, sizes, tiles, "", P)
    else:
        _streamed_weight(out, x, cache, weight_ptr, bias_ptr, sizes, P)


@triton.jit
def _streamed_weight(out, x, cache, weight_ptr, bias_ptr, sizes, P: tl.constexpr):
    """One tile, over all taps and input channels; frames and weight are streamed in steps."""
    NCOLS: tl.constexpr = (P.OUT + P.BLOCK_COLS - 1) // P.BLOCK_COLS
    STEPS: tl.constexpr = (P.IN + P.BLOCK_INNER - 1) // P.BLOCK_INNER
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    batch, tile, frame, col_tile = program_tile(sizes.out_frames, sizes, NCOLS)
    pixel, pixel_mask = tile_pixels(tile, sizes, P)
    cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inner = tl.arange(0, P.BLOCK_INNER).to(tl.int64)
    matrix = cols[None, :] * P.IN + inner[:, None]
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE)
    for step in range(first_tap(frame, P) * STEPS, tl.cast(P.KERNEL * STEPS, tl.int64)):
        tap, first = step // STEPS, step % STEPS * P.BLOCK_INNER
        ptr, stride = source_frame(x, cache, batch, frame * P.STRIDE + tap, P)
        ptr = channel_address(ptr, first, stride, P)
        a = ptr + pixel_offsets(pixel[:, None], inner[None, :], stride, P)
        b = weight_ptr + (tap * (P.OUT * P.IN) + first) + matrix
        acc = _dot_step(acc, a, b, pixel_mask, first + inner, cols, P.IN, P.OUT, P)
    mask = pixel_mask[:, None] & (cols < P.OUT)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < P.OUT, other=0.0)
        acc += bias.to(P.COMPUTE)[None, :]
    at = pixel_offsets(pixel[:, None], cols[None, :], tl.cast(out.inner, tl.int64), P)
    store(frame_address(out, batch, frame, P) + at, acc, mask)


@triton.jit(do_not_specialize=["nframes", "tiles"])
def _dense_bwd_kernel(
    dx, dcache, dout, weight_ptr, sizes, nframes, tiles, GRAD: tl.constexpr, P: tl.constexpr
):
    """Gradients of the cache, if there is one, and of x. Grid as above.

    GRAD and a stationary weight, (KERNEL, IN, OUT) with its taps reversed, as in
    `stationary_weight`; otherwise GRAD is "" and the weight that of the forward.
    """
    if GRAD != "":
        stationary_weight(dx, dcache, dout, dout, weight_ptr, None, sizes, tiles, GRAD, P)
    else:
        _streamed_grad(dx, dcache, dout, weight_ptr, sizes, nframes, P)


@triton.jit
def _streamed_grad(dx, dcache, dout, weight_ptr, sizes, nframes, P: tl.constexpr):
    """One tile, as the forward."""
    NCOLS: tl.constexpr = (P.IN + P.BLOCK_COLS - 1) // P.BLOCK_COLS
    STEPS: tl.constexpr = (P.OUT + P.BLOCK_INNER - 1) // P.BLOCK_INNER
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    batch, tile, frame, col_tile = program_tile(nframes, sizes, NCOLS)
    pixel, pixel_mask = tile_pixels(tile, sizes, P)
    cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inner = tl.arange(0, P.BLOCK_INNER).to(tl.int64)
    last, first, ptr, stride = target_frame(dx, dcache, batch, frame, P)
    dout_inner = tl.cast(dout.inner, tl.int64)
    cells = pixel_offsets(pixel[:, None], inner[None, :], dout_inner, P)
    matrix = inner[:, None] * P.IN + cols[None, :]
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE)
    for position in range(first, last + 1):
        low, count = taps_of(position, sizes.out_frames, P)
        for step in range(0, count * STEPS):
            tap = low + step // STEPS * P.STRIDE
            begin = step % STEPS * P.BLOCK_INNER
            rows = frame_address(dout, batch, (position - tap) // P.STRIDE, P)
            a = channel_address(rows, begin, dout_inner, P) + cells
            b = weight_ptr + (tap * (P.OUT * P.IN) + begin * P.IN) + matrix
            acc = _dot_step(acc, a, b, pixel_mask, begin + inner, cols, P.OUT, P.IN, P)
    mask = pixel_mask[:, None] & (cols < P.IN)[None, :]
    store(ptr + pixel_offsets(pixel[:, None], cols[None, :], stride, P), acc, mask)


@triton.jit
def _dot_step(
    acc, a, b, pixel_mask, channel, cols, INNER: tl.constexpr, COLS: tl.constexpr, P: tl.constexpr
):
    """acc + a·b, loaded from addresses (pixels, block) and (block, cols)."""
    a_mask, b_mask = pixel_mask[:, None], (cols < COLS)[None, :]
    if INNER % P.BLOCK_INNER != 0:
        a_mask &= (channel < INNER)[None, :]
        b_mask &= (channel < INNER)[:, None]
    left = tl.load(a, mask=a_mask, other=0.0)
    if INNER % P.BLOCK_INNER == 0 and COLS % P.BLOCK_COLS == 0:
        right = tl.load(b)
    else:
        right = tl.load(b, mask=b_mask, other=0.0)
    return add_product(acc, left, right, P)


# --- launchers -------------------------------------------------------------------------------


def temporal_conv_fwd(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, stride: int,
    start: str,
) -> None:  # fmt: skip
    """Write the result to out (batch, out_channels, …).

    weight (out_channels, in_channels or 1, kernel).
    """
    if out.numel() == 0:
        return
    channels_last = is_channels_last(x)
    x, cache = (with_even_strides(t, channels_last) for t in (x, cache))
    depthwise = _depthwise(x, weight)
    bias = None if bias is None else bias.contiguous()
    channels = weight.shape[0], x.shape[1]
    plan = _plan(x, weight, cache, stride, start, channels, [x, cache, out], channels_last)
    sizes = _sizes(x, out.shape[2], plan)
    videos = [video_of(t, plan) for t in (out, x, cache)]
    cols = cdiv(weight.shape[0], plan.BLOCK_COLS)
    taps = _taps_first(weight)
    with on_device(x):
        if depthwise:
            runs = cdiv(out.shape[2], FRAMES)
            depthwise_fwd_kernel[(x.shape[0] * sizes.tiles * runs * cols,)](
                *videos, taps, bias, sizes, runs, FRAMES=FRAMES, P=plan,
                **_options(plan, depthwise),
            )  # fmt: skip
        elif _is_stationary(plan, x):
            launch = _stationary(plan, x, out.shape[2])
            _dense_fwd_kernel[(launch.programs,)](
                *videos, taps, bias, launch.sizes, launch.tiles, STATIONARY=True, P=launch.plan,
                **launch.options,
            )  # fmt: skip
        else:
            units = x.shape[0] * sizes.tiles * out.shape[2]
            _dense_fwd_kernel[(units * cols,)](
                *videos, taps, bias, sizes, 0, STATIONARY=False, P=plan,
                **_options(plan, depthwise),
            )  # fmt: skip


def temporal_conv_bwd(
    grads: tuple[Tensor, Tensor, Tensor, Tensor], dout: Tensor, x: Tensor, weight: Tensor,
    cache: Tensor | None, stride: int, start: str,
) -> None:  # fmt: skip
    """Write the gradients to grads, (dx, dweight, dbias, dcache); empty ones are not wanted."""
    dx, dweight, dbias, dcache = grads
    if x.numel() == 0 or dout.numel() == 0:
        for grad in grads:
            grad.zero_()
        return
    channels_last = is_channels_last(x)
    x, cache, dout = (with_even_strides(t, channels_last) for t in (x, cache, dout))
    assert dout is not None
    if dx.numel():
        _input_grad(dx, dcache, dout, weight, cache, stride, start, channels_last)
    if dweight.numel():
        _weight_grad(dweight, dbias, dout, x, weight, cache, stride, start, channels_last)


def _input_grad(
    dx: Tensor, dcache: Tensor, dout: Tensor, weight: Tensor, cache: Tensor | None, stride: int,
    start: str, channels_last: bool,
) -> None:  # fmt: skip
    past = dcache if dcache.numel() else None
    channels = dx.shape[1], weight.shape[0]
    plan = _plan(dx, weight, cache, stride, start, channels, [dx, past, dout], channels_last)
    sizes = _sizes(dx, dout.shape[2], plan)
    frames = dx.shape[2] + (0 if past is None else past.shape[2])
    cols = cdiv(dx.shape[1], plan.BLOCK_COLS)
    depthwise = _depthwise(dx, weight)
    videos = [video_of(t, plan) for t in (dx, past, dout)]
    swapped = plan._replace(IN=plan.OUT, OUT=plan.IN, PAST="zeros")
    with on_device(dx):
        if depthwise:
            runs = cdiv(frames, GRAD_FRAMES)
            each = cdiv(cdiv(frames, runs), stride) * stride
            depthwise_bwd_kernel[(dx.shape[0] * sizes.tiles * runs * cols,)](
                *videos, _taps_first(weight), sizes, frames, runs, FRAMES=each, P=plan,
                **_options(plan, depthwise),
            )  # fmt: skip
        elif stride == 1 and _is_stationary(swapped, dout):
            launch = _stationary(swapped, dout, dx.shape[2] + plan.KERNEL - 1)
            taps = weight.flip(2).permute(2, 1, 0).contiguous()
            _dense_bwd_kernel[(launch.programs,)](
                *videos, taps, launch.sizes, frames, launch.tiles, GRAD=plan.PAST, P=launch.plan,
                **launch.options,
            )  # fmt: skip
        else:
            _dense_bwd_kernel[(dx.shape[0] * sizes.tiles * frames * cols,)](
                *videos, _taps_first(weight), sizes, frames, 0, GRAD="", P=plan,
                **_options(plan, depthwise),
            )  # fmt: skip


class _Stationary(NamedTuple):
    """Launch of a kernel with a stationary weight."""

    programs: int
    tiles: int  # of a program
    sizes: Sizes
    plan: Plan
    options: dict[str, int]


def _stationary(plan: Plan, x: Tensor, out_frames: int) -> _Stationary:
    plan = plan._replace(
        BLOCK_ROWS=min(plan.BLOCK_ROWS, STATIONARY_ROWS), BLOCK_INNER=_block(BLOCK_COLS, plan.IN)
    )
    sizes = _sizes(x, out_frames, plan)
    tiles = max(1, STATIONARY_TILES // out_frames)
    options = {"num_warps": STATIONARY_WARPS, "num_stages": STAGES}
    return _Stationary(cdiv(x.shape[0] * sizes.tiles, tiles), tiles, sizes, plan, options)


def _weight_grad(
    dweight: Tensor, dbias: Tensor, dout: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None,
    stride: int, start: str, channels_last: bool,
) -> None:  # fmt: skip
    out, inner, taps = weight.shape
    pixels, frames = x.shape[3] * x.shape[4], dout.shape[2]
    channels = inner, pixels
    plan = _plan(x, weight, cache, stride, start, channels, [x, cache, dout], channels_last)
    depthwise = _depthwise(x, weight)
    constants = {"FRAMES": _divisor(frames, FRAMES // stride), "TAPS": taps}
    programs, rows = STRIPS, plan.BLOCK_ROWS
    if not depthwise:
        side = BLOCK_COLS // _fp32_divisor(x)
        plan = plan._replace(BLOCK_ROWS=_block(side, out), BLOCK_COLS=_block(side, inner))
        if 1 < taps <= FUSED_TAPS and x.element_size() == 2 and _on_hopper():
            plan = plan._replace(BLOCK_INNER=FUSED_INNER)
            programs //= 2  # with the registers of two
        else:
            constants = {"FRAMES": 1, "TAPS": 1}
        rows = plan.BLOCK_INNER
    tiles = cdiv(x.shape[1], plan.BLOCK_COLS) * (taps // constants["TAPS"])
    tiles *= 1 if depthwise else cdiv(out, plan.BLOCK_ROWS)
    runs, most = frames // constants["FRAMES"], max(1, programs // tiles)
    strips = _strips(x.shape[0], runs, cdiv(pixels, rows), most)
    count = cdiv(strips.groups, strips.strip_groups)
    count *= cdiv(strips.tiles, strips.strip_tiles)
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = torch.empty((count, taps, out, inner), dtype=wide, device=x.device)
    bias_sums = torch.empty((count, out), dtype=wide, device=x.device) if dbias.numel() else None
    run = depthwise_weight_kernel if depthwise else dense_weight_kernel
    options = _options(plan, depthwise)
    if depthwise:
        options["num_warps"] *= 2  # for the sums of all taps
    with on_device(x):
        run[(count * tiles,)](
            sums, bias_sums, video_of(x, plan), video_of(cache, plan), video_of(dout, plan),
            _sizes(x, frames, plan), strips, P=plan, **constants, **options,
        )  # fmt: skip
    dweight.copy_(sums.sum(0).permute(1, 2, 0))
    if bias_sums is not None:
        dbias.copy_(bias_sums.sum(0))


def _strips(batch: int, runs: int, tiles: int, most: int) -> Strips:
    """Split runs of frames and tiles of pixels into `most` strips, about."""
    groups = batch * runs
    strip_tiles = cdiv(tiles, min(tiles, max(1, most // groups)))
    return Strips(runs, groups, tiles, cdiv(groups, most), strip_tiles)


def _divisor(frames: int, most: int) -> int:
    """The largest divisor that is at most `most`: a run has no frame past the last."""
    return max(n for n in range(1, most + 1) if frames % n == 0)


def _plan(
    x: Tensor, weight: Tensor, cache: Tensor | None, stride: int, start: str,
    channels: tuple[int, int], videos: list[Tensor | None], channels_last: bool,
) -> Plan:  # fmt: skip
    """Plan a launch over videos that are all channels-last or all contiguous.

    A tensor of one pixel and one frame alone does not show which. `channels`: those of the columns
    of a tile, and those that are summed over.
    """
    out, _, taps = weight.shape
    inner = x.shape[1]
    pixels = x.shape[3] * x.shape[4]
    divisor = _fp32_divisor(x)
    rows, cols = BLOCK_ROWS // divisor, BLOCK_COLS // divisor
    if _depthwise(x, weight):
        cols = min(BLOCK_COLS, next_power_of_2(inner)) if channels_last else 1
        rows = _block(ELEMENTS // cols, pixels)
    else:
        if x.element_size() == 2 and _on_hopper():
            cols = WIDE_COLS
        rows, cols = _block(rows, pixels), _block(cols, channels[0])
    present = [t for t in videos if t is not None]
    strides = [stride for t in present for stride in strides_of(t, channels_last)]
    return Plan(
        IN=inner,
        OUT=out,
        KERNEL=taps,
        STRIDE=stride,
        PAST=start if cache is None or taps == 1 else "cache",
        CHANNELS_LAST=channels_last,
        BLOCK_ROWS=rows,
        BLOCK_COLS=cols,
        BLOCK_INNER=_block(2 * BLOCK_INNER // x.element_size(), channels[1]),
        ALIGN=math.gcd(16, *strides, 0 if channels_last else pixels),
        COMPUTE=tl.float64 if x.dtype is torch.float64 else tl.float32,
    )


def _is_stationary(plan: Plan, x: Tensor) -> bool:
    """True if a dense weight fits in shared memory beside STAGES steps of tiles, on Hopper.

    Its tensor cores read operands from shared memory. Older GPUs would hold the weight in
    registers; newer ones ran out of those.
    """
    inner = _block(BLOCK_COLS, plan.IN)
    columns = plan.KERNEL * plan.BLOCK_COLS + STAGES * plan.STRIDE * STATIONARY_ROWS
    fits = inner * columns * x.element_size() <= STATIONARY_BYTES
    narrow = max(plan.IN, plan.OUT) <= BLOCK_COLS
    return x.element_size() == 2 and fits and narrow and _on_hopper()


def _on_hopper() -> bool:
    """True on Hopper, but with Triton 3.6, which fails to pipeline several products in a loop."""
    if INTERPRETED:
        return True
    target = driver.active.get_current_target()
    recent = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
    return recent and bool(target.backend == "cuda" and target.arch == 90)


def _fp32_divisor(x: Tensor) -> int:
    """The divisor of a tile's sides: fp32 is multiplied without tensor cores."""
    return 1 if x.element_size() == 2 else 2


def _block(most: int, size: int) -> int:
    """A power of two from 16, the least of a tensor core, to `most`."""
    return max(16, min(most, next_power_of_2(size)))


def _options(plan: Plan, depthwise: bool) -> dict[str, int]:
    if depthwise:
        return {"num_warps": max(1, plan.BLOCK_ROWS * plan.BLOCK_COLS // 512)}
    warps = max(1, min(WARPS, plan.BLOCK_ROWS * plan.BLOCK_COLS // 256))
    target = None if INTERPRETED else driver.active.get_current_target()
    return product_options(target, warps, STAGES)


def _sizes(x: Tensor, out_frames: int, plan: Plan) -> Sizes:
    pixels = x.shape[3] * x.shape[4]
    units = pixels if plan.CHANNELS_LAST else pixels // plan.ALIGN
    tiles = cdiv(pixels, plan.BLOCK_ROWS)
    return Sizes(units, tiles, x.shape[2], out_frames, x.shape[0])


def _depthwise(x: Tensor, weight: Tensor) -> bool:
    return weight.shape[1] == 1 and x.shape[1] > 1


def _taps_first(weight: Tensor) -> Tensor:
    """(kernel, out_channels, in_channels): a dense matrix for each tap."""
    return weight.permute(2, 0, 1).contiguous()
