"""Device functions shared by the kernels of spatial_norm; `launch.py` describes a tile.

A mask or an address of pixels alone is (run, cells) or (cells, run).
"""

import triton
import triton.language as tl

# --- axes of a tile --------------------------------------------------------------------------


@triton.jit
def expand_pixels(x, P: tl.constexpr):
    """Broadcast a value of each pixel over channels."""
    return x[:, :, None] if P.CHANNELS_LAST else x[:, None, :]


@triton.jit
def expand_channels(x, P: tl.constexpr):
    """Broadcast (channels,) over pixels."""
    return x[None, None, :] if P.CHANNELS_LAST else x[None, :, None]


@triton.jit
def expand_cells(x, P: tl.constexpr):
    """Broadcast (cells, channels) over a run."""
    return x[None, :, :] if P.CHANNELS_LAST else x[:, :, None]


@triton.jit
def sum_run(x, P: tl.constexpr):
    """Sum a tile over its run: (cells, channels)."""
    return tl.sum(x, axis=0) if P.CHANNELS_LAST else tl.sum(x, axis=2)


@triton.jit
def zeros_tile(P: tl.constexpr):
    """A tile of zeros."""
    CELLS: tl.constexpr = P.CELLS
    RUN: tl.constexpr = P.RUN
    LANES: tl.constexpr = P.LANES
    if P.CHANNELS_LAST:
        tile = tl.zeros((RUN, CELLS, LANES), P.COMPUTE)
    else:
        tile = tl.zeros((CELLS, LANES, RUN), P.COMPUTE)
    return tile


@triton.jit
def sum_pixels(x, P: tl.constexpr):
    """Sum a tile over its pixels: (channels,)."""
    return tl.sum(sum_run(x, P), axis=0)


@triton.jit
def tile_mask(mask, channel_mask, P: tl.constexpr):
    """The mask of a tile from those of its pixels and of its channels."""
    if P.CHANNELS % P.LANES == 0:
        both = expand_pixels(mask, P)
    else:
        both = expand_pixels(mask, P) & expand_channels(channel_mask, P)
    return both


# --- addresses -------------------------------------------------------------------------------


@triton.jit
def address(video, at, P: tl.constexpr):
    """Addresses of a tile at (batch, frame, row, col, channel).

    `row` and `col` are of its pixels, in 64 bits.
    """
    batch, frame, row, col, channel = at
    start = (batch * video.batch + frame * video.frame) * P.ALIGN
    if P.CHANNELS_LAST:
        pixels = (row * video.row + col * video.col) * P.ALIGN
        offset = expand_pixels(pixels, P) + expand_channels(channel * video.channel, P)
    else:
        pixels = row * video.row * P.ALIGN + col * video.col
        offset = expand_pixels(pixels, P) + expand_channels(channel * video.channel * P.ALIGN, P)
    return video.ptr + (start + offset)


@triton.jit
def load(video, at, mask, P: tl.constexpr):
    return tl.load(address(video, at, P), mask=mask, other=0.0).to(P.COMPUTE)


@triton.jit
def store(video, at, mask, x, P: tl.constexpr):
    """Round to the tensor's dtype and store; returns the rounded tile."""
    rounded = x.to(video.ptr.dtype.element_ty)
    tl.store(address(video, at, P), rounded, mask=mask)
    return rounded


@triton.jit
def load_vector(ptr, channel, channel_mask, default: tl.constexpr, P: tl.constexpr):
    """Load (channels,); the constant `default` without a pointer."""
    LANES: tl.constexpr = P.LANES
    if ptr is None:
        values = tl.full((LANES,), default, P.COMPUTE)
    else:
        values = tl.load(ptr + channel, mask=channel_mask, other=0.0).to(P.COMPUTE)
    return values


@triton.jit
def load_latent(video, at, mask, default: tl.constexpr, P: tl.constexpr):
    """Load y or b for a row of cells, (cells, channels); the constant `default` without them."""
    CELLS: tl.constexpr = P.CELLS
    LANES: tl.constexpr = P.LANES
    if video.ptr is None:
        values = tl.full((CELLS, LANES), default, P.COMPUTE)
    else:
        values = tl.load(latent_address(video, at, P), mask=mask, other=0.0).to(P.COMPUTE)
    return values


@triton.jit
def latent_address(video, at, P: tl.constexpr):
    """Addresses of a row of cells at (batch, frame, row, cell, channel)."""
    batch, frame, row, cell, channel = at
    start = (batch * video.batch + frame * video.frame + row * video.row) * P.LATENT_ALIGN
    if P.CHANNELS_LAST:
        cells, channels = cell * video.col * P.LATENT_ALIGN, channel * video.channel
    else:
        cells, channels = cell * video.col, channel * video.channel * P.LATENT_ALIGN
    return video.ptr + (start + cells[:, None] + channels[None, :])


# --- indices of a program --------------------------------------------------------------------


@triton.jit
def tile_channels(tile, P: tl.constexpr):
    """Channels of a tile and their mask."""
    LANES: tl.constexpr = P.LANES
    channel = tl.cast(tile, tl.int64) * LANES + tl.arange(0, LANES)
    return channel, channel < P.CHANNELS


@triton.jit
def tile_pixels(strip, step, sizes, P: tl.constexpr):
    """Rows, columns and mask of a step of a strip, without latents."""
    RUN: tl.constexpr = P.RUN
    first = (tl.cast(strip, tl.int64) * sizes.span + step) * RUN
    run = tl.arange(0, RUN)
    pixel = first + (run[:, None] if P.CHANNELS_LAST else run[None, :])
    mask = pixel < tl.cast(sizes.height, tl.int64) * sizes.width
    if P.FLAT:
        row, col = tl.zeros_like(pixel), pixel
    else:
        row, col = pixel // sizes.width, pixel % sizes.width
    return row, col, mask


@triton.jit
def tile_columns(block, sizes, P: tl.constexpr):
    """Cells of a block of the width, their columns and mask, with latents."""
    CELLS: tl.constexpr = P.CELLS
    RUN: tl.constexpr = P.RUN
    RUNS: tl.constexpr = (P.RATIO + RUN - 1) // RUN
    cell = tl.cast(block // RUNS, tl.int64) * CELLS + tl.arange(0, CELLS)
    run = tl.cast(block % RUNS, tl.int64) * RUN + tl.arange(0, RUN)
    if P.CHANNELS_LAST:
        col = cell[None, :] * P.RATIO + run[:, None]
        mask = (cell < sizes.cols)[None, :] & (run < P.RATIO)[:, None]
    else:
        col = cell[:, None] * P.RATIO + run[None, :]
        mask = (cell < sizes.cols)[:, None] & (run < P.RATIO)[None, :]
    return cell, col, mask


@triton.jit
def latent_frame_of(frame, sizes, P: tl.constexpr):
    """The nearest latent frame; with LEADS the first frame has one to itself."""
    if P.LEADS:
        rest = tl.maximum(frame - 1, 0) * (sizes.latents - 1)
        index = tl.where(frame == 0, 0, 1 + rest // tl.maximum(sizes.frames - 1, 1))
    else:
        index = frame * sizes.latents // sizes.frames
    return index


@triton.jit
def load_group_pair(pairs_ptr, batch, frame, sizes, channel, channel_mask, P: tl.constexpr):
    """Load both numbers of each channel's group; pairs_ptr: (batch, frames or 1, groups, 2)."""
    unit = batch
    if P.PER_FRAME:
        unit = batch * sizes.frames + frame
    at = (unit * P.GROUPS + channel // P.GROUP_SIZE) * 2
    first = tl.load(pairs_ptr + at, mask=channel_mask, other=0.0)
    second = tl.load(pairs_ptr + (at + 1), mask=channel_mask, other=0.0)
    return first, second


@triton.jit
def mean_rstd(moments_ptr, batch, frame, sizes, channel, channel_mask, P: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of each channel's group."""
    mean, var = load_group_pair(moments_ptr, batch, frame, sizes, channel, channel_mask, P)
    return mean, tl.rsqrt(var + P.EPS)


# --- SiLU ------------------------------------------------------------------------------------


@triton.jit
def short_sigmoid(x):
    """A sigmoid off by some ulp, without a division, which takes as long as the rest of a tile.

    exp2 and rsqrt are one instruction each on NVIDIA.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def silu(x, P: tl.constexpr):
    """SiLU, or x without it."""
    if P.SILU:
        if P.SHORT:
            x *= short_sigmoid(x)
        else:
            x /= 1.0 + tl.exp(-x)
    return x


@triton.jit
def silu_grad(x, P: tl.constexpr):
    """The derivative of SiLU, or 1 without it.

    1 - sigmoid(x) is computed without cancellation for large x, except where that does not show.
    """
    grad = tl.full(x.shape, 1.0, P.COMPUTE)
    if P.SILU:
        if P.SHORT:
            s = short_sigmoid(x)
            rest = 1.0 - s
        else:
            power = tl.exp(-tl.maximum(x, -87.0))  # finite
            s = 1.0 / (1.0 + power)
            rest = power * s
        grad = s * (1.0 + x * rest)
    return grad
