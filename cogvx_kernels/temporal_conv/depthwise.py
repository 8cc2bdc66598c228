"""Triton kernels of the depthwise convolution: elementwise over pixels and channels.

Memory-bound: a program computes several output frames of the same pixels, and loads the frames that
they share once.
"""

import triton
import triton.language as tl

from .device_utils import (
    frame_address,
    pixel_offsets,
    program_tile,
    source_frame,
    store,
    strip_tiles,
    target_frame,
    tile_address,
    tile_mask,
    tile_pixels,
)


@triton.jit(do_not_specialize=["nframes"])
def depthwise_fwd_kernel(
    out, x, cache, weight_ptr, bias_ptr, sizes, nframes, FRAMES: tl.constexpr, P: tl.constexpr
):
    """FRAMES output frames, each frame that they read loaded once; else as the dense kernel.

    weight (KERNEL, channels). Grid (batch · tiles of pixels · nframes runs · tiles of channels,).
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
        tap = tl.load(weight_ptr + (j * P.IN + cols), mask=cols < P.IN, other=0.0)
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


@triton.jit(do_not_specialize=["nframes", "runs"])
def depthwise_bwd_kernel(
    dx, dcache, dout, weight_ptr, sizes, nframes, runs, FRAMES: tl.constexpr, P: tl.constexpr
):
    """Gradients of FRAMES frames, of the cache and then of x, from gradients loaded once.

    FRAMES is a multiple of STRIDE, so that the taps of a frame are known. Grid (batch · tiles of
    pixels · runs · tiles of channels,).
    """
    NCOLS: tl.constexpr = (P.IN + P.BLOCK_COLS - 1) // P.BLOCK_COLS
    KERNEL: tl.constexpr = P.KERNEL
    STRIDE: tl.constexpr = P.STRIDE
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    BEFORE: tl.constexpr = 0 if P.PAST == "cache" else KERNEL - 1  # positions before the frames
    LOW: tl.constexpr = -((KERNEL - 1 - BEFORE) // STRIDE)
    LOADED: tl.constexpr = (FRAMES - 1 + BEFORE) // STRIDE - LOW + 1
    batch, tile, run, col_tile = program_tile(runs, sizes, NCOLS)
    pixel, pixel_mask = tile_pixels(tile, sizes, P)
    cols = (col_tile * P.BLOCK_COLS + tl.arange(0, P.BLOCK_COLS)).to(tl.int64)
    mask = pixel_mask[:, None] & (cols < P.IN)[None, :]
    begin = run * FRAMES
    at = pixel_offsets(pixel[:, None], cols[None, :], tl.cast(dout.inner, tl.int64), P)
    grads = ()
    for n in tl.static_range(LOADED):
        result = begin // STRIDE + (LOW + n)
        valid = (result >= 0) & (result < sizes.out_frames)
        ptr = frame_address(dout, batch, result, P)
        grads += (tl.load(ptr + at, mask=mask & valid, other=0.0),)
    taps = ()
    for j in tl.static_range(KERNEL):
        tap = tl.load(weight_ptr + (j * P.IN + cols), mask=cols < P.IN, other=0.0)
        taps += (tap.to(P.COMPUTE)[None, :],)
    for i in tl.static_range(FRAMES):
        acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE)
        for j in tl.static_range(KERNEL):
            if (i + BEFORE - j) % STRIDE == 0:
                acc += taps[j] * grads[(i + BEFORE - j) // STRIDE - LOW].to(P.COMPUTE)
        if P.PAST == "replicate" and i == 0:
            if begin == 0:  # what copies of the first frame get
                for j in tl.static_range(KERNEL - 1):
                    for q in tl.static_range((KERNEL - 2 - j) // STRIDE + 1):
                        acc += taps[j] * grads[q].to(P.COMPUTE)
        frame = begin + i
        if frame < nframes:
            _, _, ptr, inner = target_frame(dx, dcache, batch, frame, P)
            store(ptr + pixel_offsets(pixel[:, None], cols[None, :], inner, P), acc, mask)


@triton.jit
def depthwise_weight_kernel(
    sums_ptr, bias_sums_ptr, x, cache, dout, sizes, strips, TAPS: tl.constexpr,
    FRAMES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """As the dense kernel, of all taps: sums (strips, KERNEL, channels). Grid (strips · tiles,)."""
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    NCOLS: tl.constexpr = (P.IN + BLOCK_COLS - 1) // BLOCK_COLS
    LOADED: tl.constexpr = P.STRIDE * (FRAMES - 1) + TAPS
    program = tl.program_id(0).to(tl.int64)
    col_tile, strip = program % NCOLS, program // NCOLS
    cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    pixel = tl.arange(0, BLOCK_ROWS).to(tl.int64)
    grad_inner = tl.cast(dout.inner, tl.int64)
    grad_at = pixel_offsets(pixel[:, None], cols[None, :], grad_inner, P)
    accs = ()
    for _ in tl.static_range(TAPS):
        accs += (tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE),)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE)
    first_group, last_group, first_tile, last_tile = strip_tiles(strip, strips)
    for group in range(first_group, last_group):
        batch, frame = group // strips.runs, group % strips.runs * FRAMES
        for tile in range(first_tile, last_tile):
            mask = tile_mask(pixel, tile, BLOCK_ROWS, sizes, P)[:, None] & (cols < P.IN)[None, :]
            values = ()
            for i in tl.static_range(LOADED):
                position = frame * P.STRIDE + i
                ptr, inner = source_frame(x, cache, batch, position, P)
                ptr = tile_address(ptr, tile, BLOCK_ROWS, inner, P)
                at = pixel_offsets(pixel[:, None], cols[None, :], inner, P)
                valid = position >= (P.KERNEL - 1 if P.PAST == "zeros" else 0)
                values += (tl.load(ptr + at, mask=mask & valid, other=0.0),)
            for i in tl.static_range(FRAMES):
                ptr = frame_address(dout, batch, frame + i, P)
                ptr = tile_address(ptr, tile, BLOCK_ROWS, grad_inner, P)
                grad = tl.load(ptr + grad_at, mask=mask, other=0.0).to(P.COMPUTE)
                total += grad
                sums = ()
                for j in tl.static_range(TAPS):
                    sums += (accs[j] + grad * values[i * P.STRIDE + j].to(P.COMPUTE),)
                accs = sums
    for j in tl.static_range(TAPS):
        at = (strip * TAPS + j) * P.IN + cols
        tl.store(sums_ptr + at, tl.sum(accs[j], 0), mask=cols < P.IN)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + strip * P.IN + cols, tl.sum(total, 0), mask=cols < P.IN)
