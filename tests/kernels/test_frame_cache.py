"""Values and memory accesses of the frame cache ops, bit for bit against torch.cat.

Both backends are tested; the extension is skipped if it is not built.
"""

import itertools
import math
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvx_kernels import (
    FrameCacheJoin,
    frame_cache_append,
    frame_cache_join,
    frame_cache_push,
    module_backend,
)
from tests.harness.fence import Fence
from tests.harness.pages import PAGE, forbid, map_pages
from tests.harness.virtual import wide_strides
from tests.harness.workers import run_cases

from .frame_caches import (
    BACKENDS,
    FORMATS,
    LAYOUTS,
    STARTS,
    check,
    native,
    same,
    video,
    wanted,
)

DTYPES = (torch.bool, torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex128)
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="protects CPU pages")

# --- values ----------------------------------------------------------------------------------


def test_by_hand():
    """One pixel: cache, chunk, joined, next cache."""

    def clip(*frames: float) -> Tensor:
        return torch.tensor(frames).float().view(1, 1, -1, 1, 1)

    for cache, frames, start, joined, following in (
        (clip(1, 2), clip(3, 4, 5), None, clip(1, 2, 3, 4, 5), clip(4, 5)),
        (clip(1, 2), clip(3), None, clip(1, 2, 3), clip(2, 3)),
        (clip(1, 2, 3, 4), clip(5), None, clip(1, 2, 3, 4, 5), clip(2, 3, 4, 5)),
        (clip(1, 2), clip(), None, clip(1, 2), clip(1, 2)),
        (clip(), clip(3, 4), None, clip(3, 4), clip()),
        (None, clip(3, 4), "replicate", clip(3, 3, 3, 4), clip(3, 4)),
        (None, clip(3), "replicate", clip(3, 3, 3), clip(3, 3)),
        (None, clip(3), "zeros", clip(0, 0, 3), clip(0, 3)),
        (None, clip(), "zeros", clip(0, 0), clip(0, 0)),
    ):
        for backend in ("auto", "reference"):
            ours = frame_cache_join(cache, frames, start=start, backend=backend)
            assert torch.equal(ours[0], joined) and torch.equal(ours[1], following), (cache, start)


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cache_layout", LAYOUTS)
def test_every_pair_of_layouts(cache_layout, layout, backend, device):
    """Units of 16 bytes and of one element, squares of vectors and the remainder."""
    dtypes = torch.int8, torch.bfloat16, torch.float32, torch.float64
    for (channels, height, width), dtype in (
        *itertools.product(((16, 3, 8), (5, 2, 7)), dtypes[1:3]),
        *(((19, 18, 17), dtype) for dtype in dtypes),
    ):
        cache = video((2, channels, 2, height, width), dtype, device)
        frames = video((2, channels, 3, height, width), dtype, device, 1)
        for memory_format in (*FORMATS, None):
            held = LAYOUTS[cache_layout](cache)
            check(held, LAYOUTS[layout](frames), None, backend, memory_format=memory_format)


@BACKENDS
@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize("kept", [0, 1, 2, 5])
def test_every_length_start_and_padding(kept, start, backend, device):
    """Chunks shorter than the cache, as long, longer, empty; more frames than copied at once."""
    for layout, arriving in itertools.product(("contiguous", "channels last"), (0, 1, 2, 3, 11)):
        if start == "replicate" and not arriving:
            continue
        for padding, memory_format in itertools.product((0, 1, 3), FORMATS):
            cache = LAYOUTS[layout](video((2, 8, kept, 3, 5), torch.float32, device))
            frames = LAYOUTS[layout](video((2, 8, arriving, 3, 5), torch.float32, device, 1))
            check(cache, frames, start, backend, padding, memory_format)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_size(dtype, device):
    """Any bits; one column and none, with and without a border."""
    shapes = (1, 1, 1, 1), (2, 8, 2, 16), (2, 0, 3, 3), (0, 2, 3, 3), (1, 3, 0, 4), (3, 5, 1, 9)
    for shape, start, padding in itertools.product(shapes, STARTS, (0, 1)):
        for layout in ("contiguous", "channels last"):
            cache = LAYOUTS[layout](video((*shape[:2], 2, *shape[2:]), dtype, device))
            frames = LAYOUTS[layout](video((*shape[:2], 3, *shape[2:]), dtype, device, 1))
            check(cache, frames, start, "kernel", padding)


@BACKENDS
def test_a_clip_that_begins_reads_no_cache(backend, device):
    """Its content may be uninitialized memory."""
    frames = video((1, 4, 3, 5, 6), torch.float32, device)
    for start in ("replicate", "zeros"):
        results = []
        for filling in (float("nan"), 7.0):
            cache = torch.full((1, 4, 4, 5, 6), filling, device=device)
            results.append((frame_cache_append(cache, frames, start=start, backend=backend), cache))
        for ours, theirs in zip(*results, strict=True):
            assert same(ours, theirs)


@BACKENDS
def test_the_memory_format_is_that_of_the_frames(backend, device):
    """Channels-last if channels have stride 1; a tensor of one pixel is contiguous."""
    frames = video((2, 8, 3, 4, 5), torch.float32, device)
    for layout in LAYOUTS:
        x = LAYOUTS[layout](frames)
        joined = frame_cache_append(frames[:, :, :2].clone(), x, padding=1, backend=backend)
        last = layout in ("channels last", "behind", "channels last, inset")
        assert joined.is_contiguous(memory_format=FORMATS[last]), layout
    pixel = frames[:, :, :1, :1, :1].contiguous()
    assert frame_cache_append(pixel.clone(), pixel, backend=backend).is_contiguous()


@BACKENDS
def test_chunks_equal_the_whole(backend, device):
    """For any cuts and ops, every joined tensor is a window of the clip."""
    clip = video((2, 4, 17, 3, 5), torch.float16, device)
    window = torch.cat([clip[:, :, :1]] * 2 + [clip], 2)
    held = {name: torch.empty(2, 4, 2, 3, 5, dtype=torch.float16, device=device) for name in "ab"}
    begin, start = 0, "replicate"
    for length in (1, 4, 1, 1, 2, 8, 0):
        chunk = clip[:, :, begin : begin + length]
        arguments: Any = {"start": start, "backend": backend}
        joined = frame_cache_append(held["a"], chunk, **arguments)
        frame_cache_push(held["b"], chunk, **arguments)
        begin, start = begin + length, None
        assert same(joined, window[:, :, begin - length : begin + 2])
        for cache in held.values():
            assert same(cache, window[:, :, begin : begin + 2])
    assert begin == 17


@native
def test_random_cases(device, seed, fuzz):
    """Shapes, strides, storage offsets; repeat with --seed."""
    chance = random.Random(seed)

    def laid_out(shape: tuple[int, ...], dtype: torch.dtype, number: int) -> Tensor:
        order = chance.choice((chance.sample(range(5), 5), [0, 1, 2, 3, 4], [0, 2, 3, 4, 1]))
        steps = [chance.choice((1, 1, 1, 2)) for _ in range(5)]
        extent = [shape[dim] * steps[dim] for dim in order]
        offset = chance.choice((0, 0, 1, 3))
        flat = video((math.prod(extent) + offset,), dtype, device, number)
        held = flat[offset:].view(extent).permute([order.index(dim) for dim in range(5)])
        return held[tuple(slice(None, None, step) for step in steps)]

    for case in range(max(20, fuzz // 8)):
        shape = [chance.choice((1, 2, 3, 8, 9, 17)) for _ in range(4)]
        kept, arriving = chance.choice((0, 1, 2, 2, 4)), chance.choice((0, 1, 1, 2, 3, 6))
        start = chance.choice((None, None, "zeros", "replicate")[: 4 if arriving else 3])
        dtype = chance.choice(DTYPES)
        cache = laid_out((*shape[:2], kept, *shape[2:]), dtype, 2 * case)
        frames = laid_out((*shape[:2], arriving, *shape[2:]), dtype, 2 * case + 1)
        memory_format = chance.choice((None, *FORMATS))
        check(cache, frames, start, "kernel", chance.choice((0, 0, 1, 2)), memory_format)


# --- memory ----------------------------------------------------------------------------------


@native
def test_no_access_out_of_bounds(device):
    """Tensors between protected pages."""

    def case(name: str) -> None:
        layout, side, start = name.split(", ")
        for channels, width in ((8, 16), (3, 7)):
            with Fence(side) as fence:

                def new(length: int, channels=channels, width=width, fence=fence) -> Tensor:
                    if layout == "channels last":
                        x = fence.new((1, length, 3, width, channels), torch.float16, device)
                        return x.permute(0, 4, 1, 2, 3)
                    return fence.new((1, channels, length, 3, width), torch.float16, device)

                cache, frames = new(2), new(3)
                frames.copy_(video(tuple(frames.shape), torch.float16, device))
                cache.copy_(video(tuple(cache.shape), torch.float16, device, 1))
                check(cache, frames, None if start == "cached" else start, "kernel", 1)

    names = map(
        ", ".join,
        itertools.product(
            ("contiguous", "channels last"), ("left", "right"), ("cached", "replicate", "zeros")
        ),
    )
    outcomes = run_cases(case, names) if device == "cpu" else [case(name) for name in names]
    assert all(outcome is None or outcome.ok for outcome in outcomes), "\n".join(map(str, outcomes))


@native
@pytest.mark.parametrize("layout", ["channels last", "inset", "behind"])
def test_memory_around_a_view_is_not_written(layout, device):
    held = torch.full((2, 12, 6, 7, 12), 7.0, device=device)
    if layout == "channels last":
        held = held.contiguous(memory_format=torch.channels_last_3d)
    places = {
        "channels last": (slice(None), slice(4, 8)),
        "inset": (slice(None), slice(None), slice(0, 2), slice(1, -1), slice(1, -1)),
        "behind": (slice(None), slice(None), slice(1, 3)),
    }
    cache = held[places[layout]][:, :, :2]
    frames = video((2, cache.shape[1], 3, *cache.shape[3:]), torch.float32, device)
    for start in STARTS:
        check(cache, frames, start, "kernel", 1)
    cache.fill_(7.0)
    assert torch.equal(held, torch.full_like(held, 7.0))


@BACKENDS
@pytest.mark.parametrize("place", range(5))
def test_frames_may_be_a_view_of_the_cache_s_storage(place, backend, device):
    """Before, across or after the cache: frames are read before they are overwritten."""
    for function in (frame_cache_append, frame_cache_push):
        for start in STARTS:
            held = video((2, 3, 8, 4, 5), torch.float32, device)
            cache, frames = held[:, :, 2:4], held[:, :, place : place + 3]
            joined, following = wanted(cache, frames, start)
            rest = held[:, :, 4:].clone()
            ours = function(cache, frames, start=start, backend=backend)
            assert ours is None or same(ours, joined)
            assert same(cache, following) and same(held[:, :, 4:], rest)


@BACKENDS
def test_frames_across_the_cache_s_columns(backend, device):
    """Shifted by a pixel: each thread writes elements that others read."""
    held = video((1, 2, 2, 64, 66), torch.float32, device)
    cache, frames = held[..., :-1], held[..., 1:]
    joined, following = wanted(cache, frames, None)
    assert same(frame_cache_append(cache, frames, backend=backend), joined)
    assert same(cache, following)


@native
@on_cpu
def test_only_needed_frames_are_read():
    """A push reads `kept` frames: the pages of the others are protected."""

    def case(_: str) -> None:
        pages = map_pages(16 * PAGE)
        clip = torch.frombuffer(pages, dtype=torch.uint8).view(16, 1, 1, 1, PAGE)
        clip[:] = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1, 1)
        clip = clip.permute(1, 2, 0, 3, 4)
        cache = torch.full((1, 1, 2, 1, PAGE), 99, dtype=torch.uint8)
        forbid(pages, 0, 14 * PAGE)
        frame_cache_push(cache, clip, backend="kernel")
        assert cache[0, 0, :, 0, 0].tolist() == [14, 15]

    outcomes = run_cases(case, ["push"])
    assert all(outcome.ok for outcome in outcomes), "\n".join(map(str, outcomes))


@native
@on_cpu
@pytest.mark.parametrize("dim", [0, 1, 2, 3, 4], ids=["batch", "channel", "frame", "row", "col"])
def test_offsets_of_more_than_32_bits(dim):
    """Strides past 2**31 elements, in memory that is never touched."""

    def spread(x: Tensor) -> Tensor:
        rows = x.transpose(0, dim)
        stride = 2**31 // max(1, len(rows) - 1) + 16
        return wide_strides(tuple(rows.shape), x.dtype, stride).copy_(rows).transpose(0, dim)

    def case(start: str) -> None:
        for layout in ("contiguous", "channels last"):
            cache = LAYOUTS[layout](video((2, 16, 2, 2, 16), torch.uint8, "cpu"))
            frames = LAYOUTS[layout](video((2, 16, 3, 2, 16), torch.uint8, "cpu", 1))
            joined, following = wanted(cache, frames, None if start == "cached" else start)
            arguments: Any = {"start": None if start == "cached" else start, "backend": "kernel"}
            held = spread(cache)
            assert same(frame_cache_append(held, spread(frames), **arguments), joined)
            assert same(held, following)
            held = spread(cache)
            frame_cache_push(held, spread(frames), **arguments)
            assert same(held, following)

    outcomes = run_cases(case, ["cached", "replicate", "zeros"], timeout=120)
    assert all(outcome.ok for outcome in outcomes), "\n".join(map(str, outcomes))


@native
def test_threads_give_the_same_bits():
    """One, two and seven threads, in a process of their own: the suite runs on one."""
    program = """
import itertools, torch
from cogvx_kernels import frame_cache_append, frame_cache_push
clip = torch.randint(0, 256, (1, 24, 5, 101, 123), dtype=torch.uint8)
last = clip.contiguous(memory_format=torch.channels_last_3d)
formats = (torch.contiguous_format, torch.channels_last_3d)
for x, memory_format, padding in itertools.product((clip, last), formats, (0, 1)):
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        cache = x[:, :, :2].clone()
        joined = frame_cache_append(
            cache, x, padding=padding, memory_format=memory_format, backend="kernel"
        )
        frame_cache_push(cache, x[:, :, :1], backend="kernel")
        results.append((joined, cache))
    for others in results[1:]:
        for one, several in zip(results[0], others):
            assert torch.equal(one, several)
    inner = joined[:, :, :, padding : 101 + padding, padding : 123 + padding]
    assert torch.equal(inner, torch.cat([x[:, :, :2], x], 2))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# --- the module ------------------------------------------------------------------------------


@BACKENDS
def test_a_convolution_in_chunks_is_the_convolution_of_the_clip(backend, device):
    """Small integers, so every sum is exact; and the future does not reach the past."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(-4, 5, (1, 3, 9, 5, 6), generator=generator).float().to(device)
    weight = torch.randint(-4, 5, (2, 3, 3, 3, 3), generator=generator).float().to(device)
    with module_backend(backend):
        pad = FrameCacheJoin(kept=2)
    assert list(pad.state_dict()) == [] and repr(pad).startswith("FrameCacheJoin(kept=2, start=")

    def convolved(clip: Tensor, lengths: tuple[int, ...]) -> Tensor:
        cache, parts = None, []
        for chunk in clip.split(lengths, 2):
            joined, cache = pad(chunk, cache)
            parts.append(F.conv3d(joined, weight, padding=(0, 1, 1)))
        return torch.cat(parts, 2)

    whole = convolved(clip, (9,))
    for lengths in ((1, 8), (3, 1, 1, 4), (1,) * 9):
        assert torch.equal(convolved(clip, lengths), whole)
    later = clip.clone()
    later[:, :, 6] += 1
    assert torch.equal(convolved(later, (4, 5))[:, :, :6], whole[:, :, :6])
    assert not torch.equal(convolved(later, (4, 5))[:, :, 6:], whole[:, :, 6:])


def test_a_module_can_begin_with_zeros(device):
    joined, cache = FrameCacheJoin(kept=1, start="zeros")(torch.ones(1, 1, 1, 1, 1, device=device))
    assert joined.flatten().tolist() == [0, 1] and cache.flatten().tolist() == [1]
