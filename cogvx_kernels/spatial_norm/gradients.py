"""The backward's first pass: what is summed over pixels, from which all gradients but x's follow.

For a channel of a cell the sums of g and of g · x̂, where g is the gradient before SiLU, are all
that y, b, weight, bias and the statistics need. A program takes all pixels of a few cells, over all
frames that read them, so that the gradients of y and b come out finished, without atomics.
"""

import triton
import triton.language as tl

from .device_utils import (
    channels_of,
    columns_of,
    latent,
    latent_at,
    load,
    of_cells,
    of_channels,
    over_run,
    pixels_of,
    slope,
    statistics,
    vector,
    whole,
    zeros,
)


@triton.jit
def _first_frame(source, sizes, P: tl.constexpr):
    """The first frame that reads a latent frame, or one after it: its inverse, rounded up."""
    if P.LEADS:
        rest = tl.maximum(sizes.latents - 1, 1)
        frames = (tl.maximum(source - 1, 0) * (sizes.frames - 1) + (rest - 1)) // rest
        found = tl.where(source == 0, 0, 1 + frames)
    else:
        found = (source * sizes.frames + (sizes.latents - 1)) // sizes.latents
    return found


@triton.jit
def _add(
    g, along, normal, x, dout, batch, frame, row, col, channel, there, mask, offset, mean, scale,
    shift, P: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The sums of g, of g · (f - mean) and of f - mean, with what one more tile adds to them."""
    mask = whole(mask, there, P)
    f = load(x, batch, frame, row, col, channel, mask, P) + of_channels(offset, P)
    centred = f - of_channels(mean, P)
    z = centred * of_cells(scale, P) + of_cells(shift, P)
    grad = load(dout, batch, frame, row, col, channel, mask, P) * slope(z, P)
    g += grad  # zero where there is no pixel, as dout is
    along += grad * centred
    if OFFSET:
        normal += tl.where(mask, centred, 0.0)
    return g, along, normal


@triton.jit
def _keep(sums_ptr, unit, place, places, channel, there, y, g, along, normal, P: tl.constexpr):
    """A unit's sums over the program's cells, those of the gradient times y."""
    sums_ptr += (unit * places + place) * (3 * P.CHANNELS) + channel
    tl.store(sums_ptr, tl.sum(y * g, axis=0), mask=there)
    tl.store(sums_ptr + P.CHANNELS, tl.sum(y * along, axis=0), mask=there)
    tl.store(sums_ptr + 2 * P.CHANNELS, tl.sum(normal, axis=0), mask=there)


@triton.jit(do_not_specialize=["places"])
def sums_kernel(
    sums_ptr, dy, db, x, dout, y, b, weight_ptr, bias_ptr, offset_ptr, moments_ptr, places, sizes,
    P: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Grid (batch · latent frames · places · tiles of channels,); without latents, of frames.

    A place is a row of latents and a few of its columns, or a strip of pixels.
    sums_ptr: (batch, units, places, 3, channels): of y · g, of y · g · x̂, and of x̂ if OFFSET. A
    unit is a latent frame; where statistics are within a frame, or without latents, a frame.
    """
    channel, there = channels_of(tl.program_id(0) % P.TILES, P)
    at = tl.cast(tl.program_id(0) // P.TILES, tl.int64)
    place = at % places
    at = at // places
    offset = vector(offset_ptr, channel, there, 0.0, P)
    weight = vector(weight_ptr, channel, there, 1.0, P)
    bias = vector(bias_ptr, channel, there, 0.0, P)
    g = zeros(P)
    along = zeros(P)
    normal = zeros(P)
    if P.RATIO == 0:
        frame = at % sizes.frames
        batch = at // sizes.frames
        mean, rstd = statistics(moments_ptr, batch, frame, sizes, channel, there, P)
        for step in range(0, sizes.span):
            row, col, mask = pixels_of(place, step, sizes, P)
            g, along, normal = _add(
                g, along, normal, x, dout, batch, frame, row, col, channel, there, mask,
                offset, mean, (weight * rstd)[None, :], bias[None, :], P, OFFSET,
            )  # fmt: skip
        _keep(
            sums_ptr, at, place, places, channel, there, 1.0, over_run(g, P),
            over_run(along, P) * rstd[None, :], over_run(normal, P) * rstd[None, :], P,
        )  # fmt: skip
    else:
        RUN: tl.constexpr = P.RUN
        RUNS: tl.constexpr = (P.RATIO + RUN - 1) // RUN
        source = at % sizes.latents
        batch = at // sizes.latents
        of = place // sizes.across
        tile = place % sizes.across
        cell, col, mask = columns_of(tile * RUNS, sizes, P)
        latents = (cell < sizes.cols)[:, None] & there[None, :]
        factor = latent(y, batch, source, of, cell, channel, latents, 1.0, P)
        shift = latent(b, batch, source, of, cell, channel, latents, 0.0, P)
        shift += factor * bias[None, :]
        mean, rstd = statistics(moments_ptr, batch, 0, sizes, channel, there, P)
        scale = factor * (weight * rstd)[None, :]
        b_grad = tl.zeros_like(factor)
        along_grad = tl.zeros_like(factor)
        last = tl.minimum(_first_frame(source + 1, sizes, P), sizes.frames)
        for index in range(_first_frame(source, sizes, P), last):
            frame = tl.cast(index, tl.int64)  # the interpreter counts in Python's numbers
            if P.PER_FRAME:
                mean, rstd = statistics(moments_ptr, batch, frame, sizes, channel, there, P)
                scale = factor * (weight * rstd)[None, :]
                g = zeros(P)
                along = zeros(P)
                normal = zeros(P)
            for step in range(0, sizes.span):
                if RUNS > 1:
                    cell, col, mask = columns_of(tile * RUNS + step % RUNS, sizes, P)
                g, along, normal = _add(
                    g, along, normal, x, dout, batch, frame, of * sizes.each + step // RUNS, col,
                    channel, there, mask, offset, mean, scale, shift, P, OFFSET,
                )  # fmt: skip
            if P.PER_FRAME:
                b_grad += over_run(g, P)
                along_grad += over_run(along, P) * rstd[None, :]
                _keep(
                    sums_ptr, batch * sizes.frames + frame, place, places, channel, there, factor,
                    over_run(g, P), over_run(along, P) * rstd[None, :],
                    over_run(normal, P) * rstd[None, :], P,
                )  # fmt: skip
        if not P.PER_FRAME:
            # Loaded again, because there are no registers to keep them in through the loops.
            factor = latent(y, batch, source, of, cell, channel, latents, 1.0, P)
            mean, rstd = statistics(moments_ptr, batch, 0, sizes, channel, there, P)
            b_grad = over_run(g, P)
            along_grad = over_run(along, P) * rstd[None, :]
            _keep(
                sums_ptr, at, place, places, channel, there, factor, b_grad, along_grad,
                over_run(normal, P) * rstd[None, :], P,
            )  # fmt: skip
        weight = vector(weight_ptr, channel, there, 1.0, P)
        bias = vector(bias_ptr, channel, there, 0.0, P)
        if dy.ptr is not None:
            y_grad = along_grad * weight[None, :] + b_grad * bias[None, :]
            where = latent_at(dy, batch, source, of, cell, channel, P)
            tl.store(where, y_grad.to(dy.ptr.dtype.element_ty), mask=latents)
        if db.ptr is not None:
            where = latent_at(db, batch, source, of, cell, channel, P)
            tl.store(where, b_grad.to(db.ptr.dtype.element_ty), mask=latents)
