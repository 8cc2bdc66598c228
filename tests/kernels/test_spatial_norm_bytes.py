"""Bytes and programs of `spatial_norm_silu`, counted in the interpreter."""

import dataclasses
import importlib
from unittest import mock

import pytest
import torch

import cogvx_kernels as ck
from cogvx_kernels import _backend
from cogvx_kernels.spatial_norm.opinfo import RESIDUAL_MOMENTS, SPATIAL_NORM_SILU
from cogvx_kernels.testing import SIZES, materialize

if not (_backend.HAS_TRITON and _backend.INTERPRETED):
    pytest.skip("bytes are counted in Triton's interpreter", allow_module_level=True)

from triton.runtime.interpreter import GridExecutor

from tests.harness.observe import observe

pytestmark = pytest.mark.budget


@pytest.mark.parametrize("info", [SPATIAL_NORM_SILU, RESIDUAL_MOMENTS], ids=str)
def test_bytes_are_near_the_minimum(info, monkeypatch):
    """Each pass moves at most 1.05 times the minimum, at 128 channels in bf16.

    Counted on a small part of the last block's video, in strips of the same length.
    """
    kernel = importlib.import_module("cogvx_kernels.spatial_norm.kernel")
    layout = importlib.import_module("cogvx_kernels.spatial_norm.launch")
    monkeypatch.setattr(layout, "PROGRAMS", 1)
    part = dataclasses.replace(SIZES["2b-480x720-49f"], height=1, width=4)
    arguments = materialize(info.at_size(part), torch.bfloat16)
    x = arguments["x"]
    with observe() as seen:
        info.launch(kernel, arguments)
    assert not seen.faults(), seen.faults()
    moved = [(launch.kernel, launch.bytes_read + launch.bytes_written) for launch in seen.launches]
    small = sum(
        z.numel() * z.element_size()
        for name, z in arguments.items()
        if name not in ("x", "h") and isinstance(z, torch.Tensor)
    )
    once, kept = x.numel() * x.element_size(), 4 / x.shape[2]  # two cached frames read and written
    if info is RESIDUAL_MOMENTS:
        passes = {"_moments_kernel": [3], "_merge_kernel": [0.05]}
    else:
        applied = [2, 2 + kept + 2 / x.shape[2], 2 + kept, 3]  # plain, cached, first of a clip, dx
        passes = {
            "_moments_kernel": [1], "_merge_kernel": [0.05], "_apply_kernel": applied,
            "sums_kernel": [2],
        }  # fmt: skip
    for name, least in passes.items():
        got = [count for kernel_name, count in moved if kernel_name == name]
        assert len(got) == len(least), (name, got)
        for count, times in zip(got, least, strict=True):
            assert count <= 1.05 * (times * once + small), f"{name}: {count / once:.3f}, {times}"


@pytest.mark.parametrize("num_groups", [1, 32])
def test_enough_programs_whatever_the_number_of_groups(num_groups):
    """Four for each of 132 multiprocessors, even at the decoder's smallest size."""
    shapes = ((1, 512, 2, 60, 90), (1, 256, 4, 120, 180))
    for shape in shapes:
        x = torch.empty(shape, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        grids = {}

        def launched(self, *args, _grids=grids, **kwargs):
            _grids.setdefault(self.fn.__name__, self.grid[0])

        with mock.patch.object(GridExecutor, "__call__", launched):
            ck.spatial_norm_silu(x, None, None, num_groups=num_groups, backend="kernel")
        assert min(grids["_moments_kernel"], grids["_apply_kernel"]) >= 4 * 132, grids
