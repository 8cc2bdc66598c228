"""What a program holds, and where it lies: tiles of pixels and channels, of frames and of latents.

The device functions of the kernels. A tile is (run, cells, channels) where channels are neighbours
in memory, and (cells, channels, run) where pixels are: `run` pixels side by side for each of
`cells` latents side by side, so that y and b are loaded once for each latent. Of the pixels alone
it is (run, cells), or (cells, run).
"""

import triton
import triton.language as tl

# --- the axes of a tile ----------------------------------------------------------------------


@triton.jit
def of_pixels(x, P: tl.constexpr):
    """What is of the pixels alone, for all channels."""
    return x[:, :, None] if P.CHANNELS_LAST else x[:, None, :]


@triton.jit
def of_channels(x, P: tl.constexpr):
    """(channels,) for all pixels."""
    return x[None, None, :] if P.CHANNELS_LAST else x[None, :, None]


@triton.jit
def of_cells(x, P: tl.constexpr):
    """(cells, channels) for all of a run."""
    return x[None, :, :] if P.CHANNELS_LAST else x[:, :, None]


@triton.jit
def over_run(x, P: tl.constexpr):
    """The sums of a tile for each cell: (cells, channels)."""
    return tl.sum(x, axis=0) if P.CHANNELS_LAST else tl.sum(x, axis=2)


@triton.jit
def zeros(P: tl.constexpr):
    """A tile of them."""
    CELLS: tl.constexpr = P.CELLS
    RUN: tl.constexpr = P.RUN
    LANES: tl.constexpr = P.LANES
    if P.CHANNELS_LAST:
        tile = tl.zeros((RUN, CELLS, LANES), P.COMPUTE)
    else:
        tile = tl.zeros((CELLS, LANES, RUN), P.COMPUTE)
    return tile


@triton.jit
def over_pixels(x, P: tl.constexpr):
    """The sums of a tile for each channel."""
    return tl.sum(over_run(x, P), axis=0)


@triton.jit
def whole(mask, there, P: tl.constexpr):
    """The mask of a tile: pixels that are there, and channels."""
    if P.CHANNELS % P.LANES == 0:
        both = of_pixels(mask, P)
    else:
        both = of_pixels(mask, P) & of_channels(there, P)
    return both


# --- addresses -------------------------------------------------------------------------------


@triton.jit
def at(video, batch, frame, row, col, channel, ALIGN: tl.constexpr, P: tl.constexpr):
    """Of a tile's elements; `row` and `col` are of the pixels alone, in 64 bits."""
    start = (batch * video.batch + frame * video.frame) * ALIGN
    if P.CHANNELS_LAST:
        pixels = (row * video.row + col * video.col) * ALIGN
        offset = of_pixels(pixels, P) + of_channels(channel * video.channel, P)
    else:
        pixels = row * video.row * ALIGN + col * video.col
        offset = of_pixels(pixels, P) + of_channels(channel * video.channel * ALIGN, P)
    return video.ptr + (start + offset)


@triton.jit
def load(video, batch, frame, row, col, channel, mask, P: tl.constexpr):
    where = at(video, batch, frame, row, col, channel, P.ALIGN, P)
    return tl.load(where, mask=mask, other=0.0).to(P.COMPUTE)


@triton.jit
def store(video, batch, frame, row, col, channel, mask, x, P: tl.constexpr):
    """Rounds to the tensor's dtype, once; returns what was stored."""
    rounded = x.to(video.ptr.dtype.element_ty)
    tl.store(at(video, batch, frame, row, col, channel, P.ALIGN, P), rounded, mask=mask)
    return rounded


@triton.jit
def vector(ptr, channel, there, otherwise: tl.constexpr, P: tl.constexpr):
    """A vector (channels,), or a constant where there is none."""
    LANES: tl.constexpr = P.LANES
    if ptr is None:
        values = tl.full((LANES,), otherwise, P.COMPUTE)
    else:
        values = tl.load(ptr + channel, mask=there, other=0.0).to(P.COMPUTE)
    return values


@triton.jit
def latent(video, batch, frame, row, cell, channel, mask, otherwise: tl.constexpr, P: tl.constexpr):
    """y or b of a row of cells, (cells, channels); a constant where there is none."""
    CELLS: tl.constexpr = P.CELLS
    LANES: tl.constexpr = P.LANES
    if video.ptr is None:
        values = tl.full((CELLS, LANES), otherwise, P.COMPUTE)
    else:
        where = latent_at(video, batch, frame, row, cell, channel, P)
        values = tl.load(where, mask=mask, other=0.0).to(P.COMPUTE)
    return values


@triton.jit
def latent_at(video, batch, frame, row, cell, channel, P: tl.constexpr):
    start = (batch * video.batch + frame * video.frame + row * video.row) * P.LATENT_ALIGN
    if P.CHANNELS_LAST:
        cells, channels = cell * video.col * P.LATENT_ALIGN, channel * video.channel
    else:
        cells, channels = cell * video.col, channel * video.channel * P.LATENT_ALIGN
    return video.ptr + (start + cells[:, None] + channels[None, :])


# --- where a program is ----------------------------------------------------------------------


@triton.jit
def channels_of(tile, P: tl.constexpr):
    """The channels of a tile, and which of them there are."""
    LANES: tl.constexpr = P.LANES
    channel = tl.cast(tile, tl.int64) * LANES + tl.arange(0, LANES)
    return channel, channel < P.CHANNELS


@triton.jit
def pixels_of(place, step, sizes, P: tl.constexpr):
    """Without latents: row, column and mask of a strip's step."""
    RUN: tl.constexpr = P.RUN
    first = (tl.cast(place, tl.int64) * sizes.span + step) * RUN
    run = tl.arange(0, RUN)
    pixel = first + (run[:, None] if P.CHANNELS_LAST else run[None, :])
    mask = pixel < tl.cast(sizes.height, tl.int64) * sizes.width
    if P.FLAT:
        row, col = tl.zeros_like(pixel), pixel
    else:
        row, col = pixel // sizes.width, pixel % sizes.width
    return row, col, mask


@triton.jit
def columns_of(place, sizes, P: tl.constexpr):
    """With latents: the cells of a place along the width, its columns and their mask."""
    CELLS: tl.constexpr = P.CELLS
    RUN: tl.constexpr = P.RUN
    RUNS: tl.constexpr = (P.RATIO + RUN - 1) // RUN
    cell = tl.cast(place // RUNS, tl.int64) * CELLS + tl.arange(0, CELLS)
    run = tl.cast(place % RUNS, tl.int64) * RUN + tl.arange(0, RUN)
    if P.CHANNELS_LAST:
        col = cell[None, :] * P.RATIO + run[:, None]
        mask = (cell < sizes.cols)[None, :] & (run < P.RATIO)[:, None]
    else:
        col = cell[:, None] * P.RATIO + run[None, :]
        mask = (cell < sizes.cols)[:, None] & (run < P.RATIO)[None, :]
    return cell, col, mask


@triton.jit
def latent_frame(frame, sizes, P: tl.constexpr):
    """Of a frame, by the nearest-neighbour rule; `LEADS`: the first is alone."""
    if P.LEADS:
        rest = tl.maximum(frame - 1, 0) * (sizes.latents - 1)
        found = tl.where(frame == 0, 0, 1 + rest // tl.maximum(sizes.frames - 1, 1))
    else:
        found = frame * sizes.latents // sizes.frames
    return found


@triton.jit
def of_groups(pairs_ptr, batch, frame, sizes, channel, there, P: tl.constexpr):
    """For each channel two numbers of its group; pairs_ptr: (batch, frames or 1, groups, 2)."""
    unit = batch
    if P.PER_FRAME:
        unit = batch * sizes.frames + frame
    place = (unit * P.GROUPS + channel // P.EACH) * 2
    first = tl.load(pairs_ptr + place, mask=there, other=0.0)
    second = tl.load(pairs_ptr + (place + 1), mask=there, other=0.0)
    return first, second


@triton.jit
def statistics(moments_ptr, batch, frame, sizes, channel, there, P: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of each channel's group."""
    mean, var = of_groups(moments_ptr, batch, frame, sizes, channel, there, P)
    return mean, tl.rsqrt(var + P.EPS)


# --- SiLU ------------------------------------------------------------------------------------


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def slope(x, P: tl.constexpr):
    """The derivative of SiLU, or 1 without it.

    1 - sigmoid(x) is taken as sigmoid(-x), which has all its digits where the other has few.
    """
    along = tl.full(x.shape, 1.0, P.COMPUTE)
    if P.SILU:
        s = sigmoid(x)
        along = s + x * s * sigmoid(-x)
    return along
