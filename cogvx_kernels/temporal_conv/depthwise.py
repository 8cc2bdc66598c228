"""Triton kernels of the depthwise convolution: elementwise over pixels and channels.

Memory-bound: a program computes several output frames of the same pixels, and loads the frames that
they share once.
"""

import triton
import triton.language as tl

from .device_utils import (
    first_tap,
    frame_address,
    pixel_count,
    pixel_offsets,
    program_tile,
    source_frame,
    store,
    taps_of,
    target_frame,
    tile_pixels,
    unit_tile,
)


@triton.jit(do_not_specialize=["nframes"])
def depthwise_fwd_kernel(
    out, x, cache, weight_ptr, bias_ptr, sizes, nframes, FRAMES: tl.constexpr, P: tl.constexpr
):
    """FRAMES output frames, each frame that they read loaded once; else as the dense kernel.

    weight (channels, KERNEL). Grid (batch · tiles of pixels · nframes runs · tiles of channels,).
    """
    NCOLS: tl.constexpr = (P.IN + P.BLOCK_COLS - 1) // P.BLOCK_COLS
    POSITIONS: tl.constexpr = P.STRIDE * (FRAMES - 1) + P.KERNEL
    KERNEL: tl.constexpr = P.KERNEL
    batch, tile, run, col_tile = program_tile(nframes, sizes, NCOLS)
    pixel, pixel_mask = tile_pixels(tile, sizes, P)
    cols = (col_tile * P.BLOCK_COLS + tl.arange(0, P.BLOCK_COLS)).to(tl.int64)
    mask = pixel_mask[:, None] & (cols < P.IN)[None, :]
    begin = run * FRAMES
    sequence = ()
    for i in tl.static_range(POSITIONS):
        position = begin * P.STRIDE + i
        ptr, stride = source_frame(x, cache, batch, position, P)
        valid = position < sizes.frames + (P.KERNEL - 1)
        if P.PAST == "zeros":
            valid &= position >= P.KERNEL - 1
        at = pixel_offsets(pixel[:, None], cols[None, :], stride, P)
        sequence += (tl.load(ptr + at, mask=mask & valid, other=0.0),)
    taps = ()
    for j in tl.static_range(KERNEL):
        tap = tl.load(weight_ptr + (cols * KERNEL + j), mask=cols < P.IN, other=0.0)
        taps += (tap.to(P.COMPUTE)[None, :],)
    for i in tl.static_range(FRAMES):
        acc = taps[0] * sequence[i * P.STRIDE].to(P.COMPUTE)
        for j in tl.static_range(1, KERNEL):
            acc += taps[j] * sequence[i * P.STRIDE + j].to(P.COMPUTE)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=cols < P.OUT, other=0.0)
            acc += bias.to(P.COMPUTE)[None, :]
        frame = begin + i
        at = pixel_offsets(pixel[:, None], cols[None, :], tl.cast(out.inner, tl.int64), P)
        if frame < sizes.out_frames:
            store(frame_address(out, batch, frame, P) + at, acc, mask)


@triton.jit(do_not_specialize=["nframes"])
def depthwise_bwd_kernel(dx, dcache, dout, weight_ptr, sizes, nframes, P: tl.constexpr):
    """As the dense kernel."""
    NCOLS: tl.constexpr = (P.IN + P.BLOCK_COLS - 1) // P.BLOCK_COLS
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    batch, tile, frame, col_tile = program_tile(nframes, sizes, NCOLS)
    pixel, pixel_mask = tile_pixels(tile, sizes, P)
    cols = (col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)).to(tl.int64)
    mask = pixel_mask[:, None] & (cols < P.IN)[None, :]
    last, first, ptr, stride = target_frame(dx, dcache, batch, frame, P)
    cell = pixel_offsets(pixel[:, None], cols[None, :], tl.cast(dout.inner, tl.int64), P)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE)
    for position in range(first, last + 1):
        low, count = taps_of(position, sizes.out_frames, P)
        for step in range(0, count):
            tap = low + step * P.STRIDE
            weight = tl.load(weight_ptr + (cols * P.KERNEL + tap), mask=cols < P.IN, other=0.0)
            rows = frame_address(dout, batch, (position - tap) // P.STRIDE, P)
            grad = tl.load(rows + cell, mask=mask, other=0.0)
            acc += weight.to(P.COMPUTE)[None, :] * grad.to(P.COMPUTE)
    store(ptr + pixel_offsets(pixel[:, None], cols[None, :], stride, P), acc, mask)


@triton.jit(do_not_specialize=["units", "strip_units"])
def depthwise_weight_kernel(
    sums_ptr, bias_sums_ptr, x, cache, dout, sizes, units, strip_units, P: tl.constexpr
):
    """As the dense kernel: sums (strips, KERNEL, channels). Grid (strips · tiles · KERNEL,)."""
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    NCOLS: tl.constexpr = (P.IN + BLOCK_COLS - 1) // BLOCK_COLS
    program = tl.program_id(0).to(tl.int64)
    tap = program % P.KERNEL
    program //= P.KERNEL
    col_tile, strip = program % NCOLS, program // NCOLS
    cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE)
    first = strip * strip_units
    for unit in range(first, tl.minimum(first + strip_units, tl.cast(units, tl.int64))):
        batch, tile, frame = unit_tile(unit, sizes)
        pixel = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (pixel < pixel_count(sizes, P))[:, None] & (cols < P.IN)[None, :]
        at = pixel_offsets(pixel[:, None], cols[None, :], tl.cast(dout.inner, tl.int64), P)
        grad = tl.load(frame_address(dout, batch, frame, P) + at, mask=mask, other=0.0)
        grad = grad.to(P.COMPUTE)
        ptr, stride = source_frame(x, cache, batch, frame * P.STRIDE + tap, P)
        at = pixel_offsets(pixel[:, None], cols[None, :], stride, P)
        value = tl.load(ptr + at, mask=mask & (tap >= first_tap(frame, P)), other=0.0)
        acc += grad * value.to(P.COMPUTE)
        total += grad
    at = (strip * P.KERNEL + tap) * P.IN + cols
    tl.store(sums_ptr + at, tl.sum(acc, 0), mask=cols < P.IN)
    if bias_sums_ptr is not None:
        if tap == 0:
            tl.store(bias_sums_ptr + strip * P.IN + cols, tl.sum(total, 0), mask=cols < P.IN)
