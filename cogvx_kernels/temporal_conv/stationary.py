"""Dense convolution, and the gradient of its x, with a weight that fits in shared memory.

A program computes all frames of a few tiles of pixels. The weight is loaded once and stays on the
chip; each frame is loaded once and multiplied with every tap, for as many results as read it.
"""

import triton
import triton.language as tl

from .device_utils import (
    add_product,
    frame_address,
    pixel_offsets,
    select_frame,
    source_frame,
    store,
    tile_pixels,
)


@triton.jit
def stationary_weight(
    out, past, x, cache, weight_ptr, bias_ptr, sizes, tiles, GRAD: tl.constexpr, P: tl.constexpr
):
    """Frames of the result; weight (KERNEL, OUT, IN). `tiles`: of each program.

    GRAD is "", or for the gradient of x, which is such a result of the reversed taps, what was
    before x. Results of frames before x go to `past` ("cache"), are left out ("zeros"), or are
    added to that of the first ("replicate").
    """
    KERNEL: tl.constexpr = P.KERNEL
    STRIDE: tl.constexpr = P.STRIDE
    BLOCK_ROWS: tl.constexpr = P.BLOCK_ROWS
    BLOCK_COLS: tl.constexpr = P.BLOCK_COLS
    DEPTH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE  # results that read a frame
    # Steps that would read only zeros before the clip are left out.
    SKIPPED: tl.constexpr = (KERNEL - 1) // STRIDE if P.PAST == "zeros" else 0
    BEFORE: tl.constexpr = KERNEL - 1 if GRAD == "zeros" or GRAD == "replicate" else 0
    cols = tl.arange(0, BLOCK_COLS).to(tl.int64)
    channel = tl.arange(0, P.BLOCK_INNER).to(tl.int64)
    taps = ()
    for j in tl.static_range(KERNEL):
        matrix = weight_ptr + (j * P.OUT * P.IN + cols[None, :] * P.IN + channel[:, None])
        inside = (channel < P.IN)[:, None] & (cols < P.OUT)[None, :]
        taps += (tl.load(matrix, mask=inside, other=0.0),)
    bias = tl.zeros((BLOCK_COLS,), P.COMPUTE)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + cols, mask=cols < P.OUT, other=0.0).to(P.COMPUTE)
    accs = ()
    for _ in tl.static_range(DEPTH - 1):
        accs += (tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE),)
    steps = tl.cast(sizes.out_frames, tl.int64) + (DEPTH - 1 - SKIPPED)
    first = tl.program_id(0).to(tl.int64) * tiles
    last = tl.minimum(first + tiles, tl.cast(sizes.tiles, tl.int64) * sizes.batch)
    for step in range(first * steps, last * steps):
        unit, begin = step // steps, step % steps + SKIPPED
        batch, tile = unit // sizes.tiles, unit % sizes.tiles
        pixel, pixel_mask = tile_pixels(tile, sizes, P)
        # Result `begin - i` of tap STRIDE · i + r; that of the last i is complete after this step.
        sums = ()
        sums += (tl.zeros((BLOCK_ROWS, BLOCK_COLS), P.COMPUTE),)
        for i in tl.static_range(DEPTH - 1):
            sums += (accs[i],)
        for r in tl.static_range(STRIDE):
            position = begin * STRIDE + r
            ptr, inner = source_frame(x, cache, batch, position, P)
            valid = position < sizes.frames + (KERNEL - 1)
            if P.PAST == "zeros":
                valid &= position >= KERNEL - 1
            mask = (pixel_mask & valid)[:, None] & (channel < P.IN)[None, :]
            at = pixel_offsets(pixel[:, None], channel[None, :], inner, P)
            rows = tl.load(ptr + at, mask=mask, other=0.0)
            added = ()
            for i in tl.static_range(DEPTH):
                if STRIDE * i + r < KERNEL:
                    added += (add_product(sums[i], rows, taps[STRIDE * i + r], P),)
                else:
                    added += (sums[i],)
            sums = added
        result = begin - (DEPTH - 1)
        # Not the sums themselves: Triton would move a sum to the next's registers unawaited.
        accs = ()
        for i in tl.static_range(DEPTH - 1):
            acc = tl.where(begin == steps - 1 + SKIPPED, 0.0, sums[i])
            if GRAD == "replicate" and i == DEPTH - 2:
                copy = (result >= 0) & (result < BEFORE)
                acc += tl.where(copy, sums[DEPTH - 1], 0.0)
            accs += (acc,)
        if result >= BEFORE:
            if GRAD == "cache":
                target, along = select_frame(result < KERNEL - 1, past, out, batch, result, P)
            else:
                target = frame_address(out, batch, result - BEFORE, P)
                along = tl.cast(out.inner, tl.int64)
            target += pixel_offsets(pixel[:, None], cols[None, :], along, P)
            made = sums[DEPTH - 1] + bias[None, :]
            store(target, made, pixel_mask[:, None] & (cols < P.OUT)[None, :])
