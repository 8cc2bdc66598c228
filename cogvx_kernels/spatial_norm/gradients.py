"""Triton kernel for the backward's first pass: sums over pixels.

All gradients but that of x follow from the sums of g and of g · x̂ for each channel of a cell, g
being the gradient before SiLU. A program sums all pixels of a few cells over all frames that read
them, so that the gradients of y and b are complete without atomics.
"""

import triton
import triton.language as tl

from .device_utils import (
    expand_cells,
    expand_channels,
    latent_address,
    load,
    load_latent,
    load_vector,
    mean_rstd,
    silu_grad,
    sum_run,
    tile_channels,
    tile_columns,
    tile_mask,
    tile_pixels,
    zeros_tile,
)


@triton.jit
def _first_frame(latent_frame, sizes, P: tl.constexpr):
    """The first frame that reads a latent frame or a later one: `latent_frame_of` inverted."""
    if P.LEADS:
        rest = tl.maximum(sizes.latents - 1, 1)
        frames = (tl.maximum(latent_frame - 1, 0) * (sizes.frames - 1) + (rest - 1)) // rest
        frame = tl.where(latent_frame == 0, 0, 1 + frames)
    else:
        frame = (latent_frame * sizes.frames + (sizes.latents - 1)) // sizes.latents
    return frame


@triton.jit
def _accumulate(sums, x, dout, at, mask, stats, affine, m, P: tl.constexpr):
    """Add a tile to the sums of g, of g · (f - mean) and of f - mean."""
    g, dot, xhat = sums
    pre_bias, mean = stats
    scale, shift = affine
    tile = load(x, at, mask, P)
    if P.SHORT:
        centered = tile - expand_channels(mean - pre_bias, P)
    else:
        centered = (tile + expand_channels(pre_bias, P)) - expand_channels(mean, P)
    z = centered * expand_cells(scale, P) + expand_cells(shift, P)
    grad = load(dout, at, mask, P) * silu_grad(z, P)
    g += grad  # zero outside the mask, as dout is
    dot += grad * centered
    if m.offset is not None:
        xhat += tl.where(mask, centered, 0.0)
    return g, dot, xhat


@triton.jit
def _store_sums(sums_ptr, slot, lanes, y, sums, rstd, P: tl.constexpr):
    """Store a slot's sums over the program's cells, those of g times y.

    Returns the sums of g and of g · x̂ for each cell.
    """
    channel, channel_mask = lanes
    g, dot, xhat = sums
    g, dot = sum_run(g, P), sum_run(dot, P) * rstd[None, :]
    xhat = tl.fma(sum_run(xhat, P), rstd[None, :], 0.0)
    sums_ptr += slot * (3 * P.CHANNELS) + channel
    # By fma, or the product is contracted with the sum's first exchange between threads, and those
    # that hold copies of a channel's sum differ by an ulp.
    tl.store(sums_ptr, tl.sum(tl.fma(y, g, 0.0), axis=0), mask=channel_mask)
    tl.store(sums_ptr + P.CHANNELS, tl.sum(tl.fma(y, dot, 0.0), axis=0), mask=channel_mask)
    tl.store(sums_ptr + 2 * P.CHANNELS, tl.sum(xhat, axis=0), mask=channel_mask)
    return g, dot


@triton.jit(do_not_specialize=["blocks"])
def sums_kernel(sums_ptr, dy, db, x, dout, m, moments_ptr, blocks, sizes, P: tl.constexpr):
    """Grid (batch · latent frames · blocks · tiles of channels,); without latents, of frames.

    A block is a row of latents and a few of its columns, or a strip of pixels.
    sums_ptr: (batch, units, blocks, 3, channels): of y · g, of y · g · x̂, and, with an offset, of
    x̂. A unit is a latent frame; with statistics within a frame, or without latents, a frame.
    """
    lanes = tile_channels(tl.program_id(0) % P.TILES, P)
    channel, channel_mask = lanes
    unit = tl.cast(tl.program_id(0) // P.TILES, tl.int64)
    block = unit % blocks
    unit = unit // blocks
    pre_bias = load_vector(m.offset, channel, channel_mask, 0.0, P)
    weight = load_vector(m.weight, channel, channel_mask, 1.0, P)
    bias = load_vector(m.bias, channel, channel_mask, 0.0, P)
    g = zeros_tile(P)
    dot = zeros_tile(P)
    xhat = zeros_tile(P)
    if P.RATIO == 0:
        frame = unit % sizes.frames
        batch = unit // sizes.frames
        mean, rstd = mean_rstd(moments_ptr, batch, frame, sizes, channel, channel_mask, P)
        affine = (weight * rstd)[None, :], bias[None, :]
        for step in range(0, sizes.span):
            row, col, mask = tile_pixels(block, step, sizes, P)
            at = batch, frame, row, col, channel
            mask = tile_mask(mask, channel_mask, P)
            g, dot, xhat = _accumulate(
                (g, dot, xhat), x, dout, at, mask, (pre_bias, mean), affine, m, P
            )
        _store_sums(sums_ptr, unit * blocks + block, lanes, 1.0, (g, dot, xhat), rstd, P)
    else:
        RUN: tl.constexpr = P.RUN
        RUNS: tl.constexpr = (P.RATIO + RUN - 1) // RUN
        latent_frame = unit % sizes.latents
        batch = unit // sizes.latents
        latent_row = block // sizes.across
        tile = block % sizes.across
        cell, col, mask = tile_columns(tile * RUNS, sizes, P)
        latent_at = batch, latent_frame, latent_row, cell, channel
        latents = (cell < sizes.cols)[:, None] & channel_mask[None, :]
        factor = load_latent(m.y, latent_at, latents, 1.0, P)
        shift = load_latent(m.b, latent_at, latents, 0.0, P)
        shift += factor * bias[None, :]
        mean, rstd = mean_rstd(moments_ptr, batch, 0, sizes, channel, channel_mask, P)
        scale = factor * (weight * rstd)[None, :]
        b_grad = tl.zeros_like(factor)
        dot_grad = tl.zeros_like(factor)
        last = tl.minimum(_first_frame(latent_frame + 1, sizes, P), sizes.frames)
        for index in range(_first_frame(latent_frame, sizes, P), last):
            frame = tl.cast(index, tl.int64)  # in the interpreter a Python int
            if P.PER_FRAME:
                mean, rstd = mean_rstd(moments_ptr, batch, frame, sizes, channel, channel_mask, P)
                scale = factor * (weight * rstd)[None, :]
                g = zeros_tile(P)
                dot = zeros_tile(P)
                xhat = zeros_tile(P)
            for step in range(0, sizes.span):
                if RUNS > 1:
                    cell, col, mask = tile_columns(tile * RUNS + step % RUNS, sizes, P)
                row = latent_row * sizes.rows_per_latent + step // RUNS
                at = batch, frame, row, col, channel
                g, dot, xhat = _accumulate(
                    (g, dot, xhat), x, dout, at, tile_mask(mask, channel_mask, P),
                    (pre_bias, mean), (scale, shift), m, P,
                )  # fmt: skip
            if P.PER_FRAME:
                slot = (batch * sizes.frames + frame) * blocks + block
                cell_g, cell_dot = _store_sums(
                    sums_ptr, slot, lanes, factor, (g, dot, xhat), rstd, P
                )
                b_grad += cell_g
                dot_grad += cell_dot
        if not P.PER_FRAME:
            # Loaded again: keeping them through the loops takes too many registers.
            factor = load_latent(m.y, latent_at, latents, 1.0, P)
            mean, rstd = mean_rstd(moments_ptr, batch, 0, sizes, channel, channel_mask, P)
            b_grad, dot_grad = _store_sums(
                sums_ptr, unit * blocks + block, lanes, factor, (g, dot, xhat), rstd, P
            )
        weight = load_vector(m.weight, channel, channel_mask, 1.0, P)
        bias = load_vector(m.bias, channel, channel_mask, 0.0, P)
        if dy.ptr is not None:
            y_grad = dot_grad * weight[None, :] + b_grad * bias[None, :]
            addr = latent_address(dy, latent_at, P)
            tl.store(addr, y_grad.to(dy.ptr.dtype.element_ty), mask=latents)
        if db.ptr is not None:
            addr = latent_address(db, latent_at, P)
            tl.store(addr, b_grad.to(db.ptr.dtype.element_ty), mask=latents)
