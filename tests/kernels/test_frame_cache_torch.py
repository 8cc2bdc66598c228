"""The frame cache ops in torch: version counters, fakes, compile, gradients, argument checks.

Their values are tested in test_frame_cache.py.
"""

import itertools
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from cogvx_kernels import (
    KernelFallbackWarning,
    frame_cache_append,
    frame_cache_join,
    frame_cache_push,
)
from cogvx_kernels.frame_cache import op

from .frame_caches import BACKENDS, FORMATS, LAYOUTS, STARTS, native, same, video, wanted

# --- autograd, fakes, compile ----------------------------------------------------------------


@BACKENDS
def test_autograd_sees_what_was_written(backend, device):
    """Each op increases the version of tensors that it writes, views included, and of no others."""
    for function in (frame_cache_append, frame_cache_push):
        base = torch.zeros(3, 2, 4, 2, 3, 5, device=device)
        cache, other = base[0][:, :, :2], torch.zeros(2, 4, 3, 3, 5, device=device)
        versions = base._version, other._version
        function(cache, other, backend=backend)
        assert base._version > versions[0], function
        assert other._version == versions[1], function
    with torch.inference_mode():
        frame_cache_push(torch.zeros(2, 4, 2, 3, 5, device=device), other, backend=backend)


@native
def test_overwriting_a_cache_that_a_backward_needs_raises(device):
    cache = torch.randn(1, 2, 2, 3, 4, device=device)
    weight = torch.randn(1, 2, 2, 3, 4, device=device, requires_grad=True)
    loss = (cache * weight).sum()
    frame_cache_push(cache, torch.randn(1, 2, 1, 3, 4, device=device), backend="kernel")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@native
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "inset"])
def test_opcheck(layout, device):
    """Schemas declare mutations, fakes have the real strides, ahead-of-time tracing works."""
    frame_cache_push(*torch.zeros(2, 1, 1, 1, 1, 1), backend="kernel")  # loads the extension
    ops = torch.ops.cogvx
    cache, frames = (LAYOUTS[layout](torch.randn(2, 8, n, 3, 4, device=device)) for n in (2, 3))
    for start, padding, last in ((None, 0, False), ("zeros", 1, True), ("replicate", 1, False)):
        torch.library.opcheck(ops.frame_cache_append, (cache, frames, start, padding, last))
        torch.library.opcheck(ops.frame_cache_push, (cache, frames, start))
        past = None if start else cache.clone().requires_grad_()
        chunk = frames.clone().requires_grad_()
        torch.library.opcheck(ops.frame_cache_join, (past, chunk, 2, start, last))


@native
def test_fakes_have_the_strides_of_real_results(device):
    """Shape, strides and dtype; and nothing runs."""
    for layout, memory_format, padding in itertools.product(LAYOUTS, (None, *FORMATS), (0, 2)):
        for shape in ((2, 8, 3, 4, 5), (1, 1, 1, 1, 1), (2, 3, 0, 4, 5), (2, 3, 1, 1, 1)):
            frames = (
                LAYOUTS[layout](video(shape, torch.float16, device))
                if all(shape)
                else (video(shape, torch.float16, device))
            )
            cache = video((*shape[:2], 2, *shape[3:]), torch.float16, device)
            options: Any = {"padding": padding, "memory_format": memory_format, "backend": "kernel"}
            with FakeTensorMode() as mode:
                fakes = mode.from_tensor(cache), mode.from_tensor(frames)
                fake = [frame_cache_append(*fakes, **options)]
                fake += frame_cache_join(*fakes, backend="kernel")
            real = [*frame_cache_join(cache, frames, backend="kernel")]
            real.insert(0, frame_cache_append(cache, frames, **options))
            for a, b in zip(fake, real, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
                assert a.stride() == b.stride(), (layout, shape, memory_format)


def every_op(caches: Tensor, frames: Tensor, start: str | None) -> tuple[Tensor, ...]:
    """Caches that are views of one buffer, through all ops in turn, with arithmetic between."""
    a, b, c = caches.unbind()
    options: Any = {"start": start, "backend": "kernel"}
    joined = frame_cache_append(a, frames + 1, padding=1, **options)
    frame_cache_push(b, joined[:, :, 2:, 1:-1, 1:-1], **options)
    plain = frame_cache_append(c, frames * 2, **options)
    again = frame_cache_append(a, frames[:, :, :1], backend="kernel")
    last, following = frame_cache_join(b, frames, **options)
    return joined.sin(), plain, again, last, following


@native
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_compiles_in_one_graph(layout, device):
    """fullgraph=True with the default backend: results and every cache as in eager."""
    frames = LAYOUTS[layout](torch.randn(1, 4, 3, 5, 6, device=device))
    caches = torch.randn(3, 1, 4, 2, 5, 6, device=device)
    for start in STARTS:
        torch._dynamo.reset()
        ours, theirs = caches.clone(), caches.clone()
        compiled = torch.compile(every_op, fullgraph=True)
        version = ours._version
        for _ in range(2):  # the second runs compiled code
            for a, b in zip(
                compiled(ours, frames, start), every_op(theirs, frames, start), strict=True
            ):
                torch.testing.assert_close(a, b)  # a sine may be off by a bit
                assert a.stride() == b.stride()
        assert same(ours, theirs) and ours._version > version


@native
@pytest.mark.filterwarnings("ignore")
def test_compiles_once_for_many_lengths(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(frame_cache_append, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for batch, arriving, height in ((3, 7, 5), (5, 9, 11), (7, 3, 8), (9, 1, 13)):
        cache = torch.randn(batch, 4, 2, height, 6, device=device)
        frames = torch.randn(batch, 4, arriving, height, 6, device=device)
        joined, following = wanted(cache, frames, None)
        assert same(compiled(cache, frames, backend="kernel"), joined)
        assert same(cache, following)
        graphs.append(counter.frame_count)
    assert len(set(graphs[:-1])) == 1 and graphs[-1] <= graphs[0] + 1, graphs


@native
def test_compiles_in_a_fresh_process():
    """In a fresh process the extension is loaded while the compiler traces."""
    program = """
import sys, torch
from cogvx_kernels import frame_cache_append
assert "cogvx_kernels._C" not in sys.modules
cache, frames = torch.randn(1, 2, 2, 3, 4), torch.randn(1, 2, 3, 3, 4)
wanted = torch.cat([cache, frames], 2)
compiled = torch.compile(frame_cache_append, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(cache, frames, backend="kernel"), wanted)
assert torch.equal(cache, wanted[:, :, 3:])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# --- gradients -------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize(("kept", "arriving"), [(2, 3), (2, 1), (4, 2), (0, 2), (2, 2)])
def test_gradients_are_those_of_the_reference(kept, arriving, start, device):
    """Bit for bit, in bf16 too, of either output alone and of both, with strides of any kind."""
    douts = {
        "dense": lambda x: torch.randn_like(x),
        "expanded": lambda x: torch.ones((), dtype=x.dtype, device=device).expand(x.shape),
        "turned": lambda x: torch.randn_like(x).mT.contiguous().mT,
    }
    for dtype, dout in itertools.product((torch.float32, torch.bfloat16), douts.values()):
        cache = torch.randn(2, 3, kept, 4, 5, device=device).to(dtype)
        frames = torch.randn(2, 3, arriving, 4, 5, device=device).to(dtype)
        sent = [dout(x) for x in wanted(cache, frames, start)]
        for which in ((0, 1), (0,), (1,)):
            results = []
            for backend in ("kernel", "reference"):
                leaves = [x.clone().requires_grad_() for x in (cache, frames)]
                past = leaves[0] if start is None else None
                outs = frame_cache_join(past, leaves[1], kept=kept, start=start, backend=backend)
                results.append(
                    torch.autograd.grad(
                        [outs[i] for i in which],
                        leaves if start is None else leaves[1:],
                        [sent[i] for i in which],
                        allow_unused=True,
                        materialize_grads=True,
                    )
                )
            for ours, theirs in zip(*results, strict=True):
                assert same(ours, theirs), (dtype, which)


@native
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_finite_differences_twice(start, device):
    cache = torch.randn(2, 2, 2, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    frames = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64, device=device, requires_grad=True)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return frame_cache_join(
            leaves[0] if start is None else None, leaves[-1], start=start, backend="kernel"
        )

    leaves = (cache, frames) if start is None else (frames,)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@BACKENDS
def test_in_place_ops_refuse_gradients(backend, device):
    for function in (frame_cache_append, frame_cache_push):
        for name in ("cache", "frames"):
            x = {"cache": torch.zeros(1, 2, 2, 3, 3), "frames": torch.ones(1, 2, 3, 3, 3)}
            x[name].requires_grad_()
            with pytest.raises(
                RuntimeError, match=f"{name} with requires_grad=True.*frame_cache_join"
            ):
                function(*x.values(), backend=backend)
            with torch.no_grad():
                function(*x.values(), backend=backend)


# --- argument checks -------------------------------------------------------------------------

X = torch.zeros(2, 3, 2, 4, 5)
WRONG: tuple[tuple[str, type[Exception], str, dict[str, Any]], ...] = (
    ("cache", TypeError, r"must be a tensor \(batch, channels, kept,", {"cache": None}),
    ("cache", ValueError, r"5 dimensions .*; got float32 \(3, 2, 4, 5\)", {"cache": X[0]}),
    ("cache", TypeError, "frames must have the dtype of cache, float16; got float32",
     {"cache": X.half()}),
    ("cache", ValueError, "must be on the device of cache, meta; got cpu", {"cache": X.to("meta")}),
    ("cache", ValueError, r"cache is overwritten .*; got strides \(120, 40, 0, 5, 1\)",
     {"cache": X[:, :, :1].expand(-1, -1, 2, -1, -1)}),
    ("frames", TypeError, "must be a tensor", {"frames": [1.0]}),
    ("frames", ValueError, "must have 5 dimensions", {"frames": X[..., 0]}),
    ("frames", ValueError, r"= \(2, 3, 2, 4, 5\).*; got \(2, 3, 2, 4, 4\)", {"frames": X[..., 1:]}),
    ("frames", ValueError, r"; got \(1, 3, 2, 4, 5\)", {"frames": X[:1]}),
    ("frames", TypeError, "must have the dtype of cache, float32; got int64", {"frames": X.long()}),
    ("frames", ValueError, 'a first frame to replicate, for start="replicate"; got none',
     {"frames": X[:, :, :0], "start": "replicate"}),
    ("start", ValueError, 'must be None, "replicate" or "zeros"; got \'ones\'', {"start": "ones"}),
    ("start", ValueError, "got 0", {"start": 0}),
    ("backend", ValueError, 'one of "auto"', {"backend": "fast"}),
)  # fmt: skip
WRONG_APPEND: tuple[tuple[str, type[Exception], str, dict[str, Any]], ...] = (
    ("padding", ValueError, "got -1", {"padding": -1}),
    ("padding", TypeError, "an integer; got 1.0", {"padding": 1.0}),
    (
        "memory_format",
        ValueError,
        "got torch.channels_last",
        {"memory_format": torch.channels_last},
    ),
    ("memory_format", ValueError, "got 'NDHWC'", {"memory_format": "NDHWC"}),
)


@pytest.mark.parametrize("function", [frame_cache_append, frame_cache_push])
def test_wrong_arguments_are_named(function):
    """Before any write: op, argument, wanted and given value."""
    wrong = WRONG + (WRONG_APPEND if function is frame_cache_append else ())
    for backend in ("auto", "reference"):
        for name, error, words, changed in wrong:
            arguments = {"cache": X.clone(), "frames": X, "backend": backend, **changed}
            with pytest.raises(error, match=rf"^{function.__name__}: .*\b{name}\b.*") as refusal:
                function(**arguments)
            refusal.match(words)


def test_wrong_arguments_of_the_functional_form_are_named():
    for words, error, arguments in (
        ("start must be given where cache is None; got None", ValueError, (None, X)),
        ("frames must be a tensor", TypeError, (X, None)),
        ("frames must be a tensor", TypeError, (None, None)),
    ):
        with pytest.raises(error, match=f"^frame_cache_join: {words}"):
            frame_cache_join(*arguments)
    for kept, error in ((-1, ValueError), (10**6, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="^frame_cache_join: kept must be .*; got"):
            frame_cache_join(None, X, kept=kept, start="zeros")


# --- without the extension -------------------------------------------------------------------


def test_without_the_extension_the_reference_runs_with_a_reason(device):
    cache, frames = torch.zeros(1, 2, 2, 3, 3), torch.ones(1, 2, 3, 3, 3)
    with mock.patch.object(op, "HAS_EXTENSION", False):
        joined = frame_cache_append(cache, frames)
        assert torch.equal(joined[:, :, 2:], frames) and torch.equal(cache, frames[:, :, 1:])
        for function in (frame_cache_append, frame_cache_push, frame_cache_join):
            with pytest.raises(RuntimeError, match="cannot run: cogvx_kernels._C is not built"):
                function(cache, frames, backend="kernel")
        if device == "cuda":
            with pytest.warns(KernelFallbackWarning, match="_C is not built"):
                frame_cache_push(cache.to(device), frames.to(device))


@native
def test_an_extension_without_cuda_has_a_reason():
    from cogvx_kernels.frame_cache import kernel

    with FakeTensorMode():
        frames = torch.empty(1, 1, 1, 1, 1, device="cuda")
    for has_cuda, words in ((False, "built without CUDA"), (True, "None")):
        with mock.patch.object(kernel, "HAS_CUDA", has_cuda):
            assert words in str(op._unsupported(None, frames))
