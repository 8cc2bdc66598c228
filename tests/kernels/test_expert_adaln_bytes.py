"""Bytes that each launch of `expert_adaln` requests, counted in Triton's interpreter."""

import dataclasses
import functools
import importlib

import pytest
import torch

from cogvx_kernels import _backend
from cogvx_kernels.testing import OPS, SIZES, materialize

if not (_backend.HAS_TRITON and _backend.INTERPRETED):
    pytest.skip("bytes are counted in Triton's interpreter", allow_module_level=True)

from tests.harness.observe import observe

pytestmark = pytest.mark.budget

NAMES = ("expert_adaln", "gated_residual", "gated_residual_adaln")


@functools.cache
def requested_bytes(name, size, text_len, video_len):
    """Bytes of the forward and of the backward launch, with the widths of a named size."""
    kernel = importlib.import_module("cogvx_kernels.expert_adaln.kernel")
    few = dataclasses.replace(
        SIZES[size], frames=1, height=1, batch=1, text_len=text_len, width=video_len
    )
    arguments = materialize(OPS[name].at_size(few), torch.bfloat16)
    with observe() as seen:
        OPS[name].launch(kernel, arguments)
    assert len(seen.launches) == 2 and not any(launch.atomics for launch in seen.launches)
    return [launch.bytes_read + launch.bytes_written for launch in seen.launches]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["2b-480x720-49f", "5b-480x720-49f", "card-480x720-49f"])
def test_strip_requests_each_row_once(name, size):
    """One token more in a strip adds its rows only: exactly the op's cost."""
    full = SIZES[size]
    two, four = (requested_bytes(name, size, 0, n) for n in (2, 4))
    cost = OPS[name].cost
    meta = materialize(OPS[name].at_size(full), torch.bfloat16, device="meta")
    for before, after, of_op in zip(two, four, cost(meta), strict=True):
        assert (after - before) / 2 * full.batch * full.seqlen <= of_op.bytes


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["2b-480x720-49f", "5b-480x720-49f", "card-480x720-49f"])
def test_bytes_requested_bytes_are_near_the_least_possible(name, direction, size):
    """At most 1.05 times the op's cost, including what each strip loads and stores once.

    Counted on full strips, one of text and three of video. A model has more of these strips, and
    one for each modality that is not full.
    """
    full, which = SIZES[size], ("forward", "backward").index(direction)
    strip = importlib.import_module("cogvx_kernels.expert_adaln.kernel").TOKENS
    requested = requested_bytes(name, size, strip, 3 * strip)[which] / (4 * strip)
    meta = materialize(OPS[name].at_size(full), torch.bfloat16, device="meta")
    assert requested * full.batch * full.seqlen <= 1.05 * OPS[name].cost(meta)[which].bytes
