"""Bytes that the kernels of `temporal_conv` move, counted in the interpreter."""

import importlib

import pytest
import torch

from cogvx_kernels import _backend, temporal_conv

if not (_backend.HAS_TRITON and _backend.INTERPRETED):
    pytest.skip("bytes are counted in Triton's interpreter", allow_module_level=True)

from tests.harness.observe import observe  # noqa: E402

pytestmark = pytest.mark.budget
kernel = importlib.import_module("cogvx_kernels.temporal_conv.kernel")


def traffic(x, weight):
    """(programs, bytes read, bytes written) of one forward launch in bf16, channels-last."""
    x = x.bfloat16().to(memory_format=torch.channels_last_3d)
    with observe() as seen:
        temporal_conv(x, weight.bfloat16(), backend="kernel")
    [launch] = seen.launches
    return launch.grid[0], launch.bytes_read, launch.bytes_written


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_bytes_with_a_stationary_weight(device, taps):
    """At 128 channels: each frame once, and its copies before the clip.

    The weight once per 32 tiles of 64 pixels of one of 8 frames.
    """
    frames, pixels = 8, (kernel.STATIONARY_TILES // 8 + 1) * kernel.STATIONARY_ROWS
    x, weight = torch.zeros(1, 128, frames, 1, pixels), torch.zeros(128, 128, taps)
    video, matrices = x.numel() * 2, weight.numel() * 2
    expected = video * (frames + taps - 1) // frames + 2 * matrices, video
    assert traffic(x.to(device), weight.to(device)) == (2, *expected)


def test_bytes_of_gradients_with_a_stationary_weight(device):
    """The gradient of the result is read once for that of x and once for that of the weight."""
    frames, taps = 8, 3
    x = torch.zeros(1, 128, frames, 1, kernel.STATIONARY_ROWS, device=device)
    x = x.bfloat16().to(memory_format=torch.channels_last_3d).requires_grad_()
    weight = torch.zeros(128, 128, taps, device=device, dtype=x.dtype, requires_grad=True)
    cache = x.detach()[:, :, :2].clone(memory_format=torch.channels_last_3d)
    out = temporal_conv(x, weight, cache=cache, backend="kernel")
    with observe() as seen:
        torch.autograd.grad(out, (x, weight), torch.zeros_like(out))
    [dx, dweight] = seen.launches
    video, matrices = x.numel() * 2, weight.numel() * 2
    assert (dx.bytes_read, dx.bytes_written) == (video + matrices, video * 10 // 8)
    # Two runs of 4 frames each read the 2 before them, too.
    assert dweight.bytes_read == video + video * 12 // 8


@pytest.mark.parametrize("taps", [1, 3, 5])
def test_bytes_of_dense_tiles(device, taps):
    """At 512 channels: each frame once per tap and per 256 output channels."""
    frames, tiles = 3, 2
    x = torch.zeros(1, 512, frames, 1, tiles * kernel.BLOCK_ROWS, device=device)
    weight = torch.zeros(512, 512, taps, device=device)
    video, matrices = x.numel() * 2, weight.numel() * 2
    expected = 2 * taps * video + frames * tiles * matrices, video
    assert traffic(x, weight) == (2 * frames * tiles, *expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_bytes_of_depthwise_columns(device, stride):
    """12 frames are loaded of 8 and 2 cached; with stride 2, 10 and a half."""
    x = torch.zeros(1, 128, 8, 1, 64, device=device).to(memory_format=torch.channels_last_3d)
    weight = torch.zeros(128, 1, 3, device=device)
    cache = x[:, :, :2].contiguous(memory_format=torch.channels_last_3d)
    with observe() as seen:
        out = temporal_conv(x, weight, cache=cache, stride=stride, backend="kernel")
    [launch] = seen.launches
    frame = x[:, :, 0].numel() * 4
    programs = launch.grid[0]
    runs = -(-out.shape[2] // kernel.FRAMES)
    loaded = sum(
        min(stride * (kernel.FRAMES - 1) + 3, 10 - run * stride * kernel.FRAMES)
        for run in range(runs)
    )
    assert launch.bytes_written == out.numel() * 4
    assert launch.bytes_read == loaded * frame + programs * weight.numel() * 4
    assert loaded <= 12
