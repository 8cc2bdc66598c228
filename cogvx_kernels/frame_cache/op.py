"""Public API: argument checks, backend dispatch, custom-op registration, autograd."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _autocast, _backend, _checks
from .._custom_op import custom_op
from .._launch import dense
from .reference import frame_cache_join_reference

STARTS = (None, "replicate", "zeros")
FORMATS = (None, torch.contiguous_format, torch.channels_last_3d)

HAS_EXTENSION = importlib.util.find_spec("cogvx_kernels._C") is not None

# --- cogvx::frame_cache_join -----------------------------------------------------------------
# The in-place ops are registered by the extension: schemas in csrc/ops.cpp, fakes in kernel.py.


@custom_op("frame_cache_join")
def _frame_cache_join(
    cache: Tensor | None, frames: Tensor, kept: int, start: str | None, channels_last: bool
) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.join(cache, frames, kept, start, channels_last)


@_frame_cache_join.register_fake
def _frame_cache_join_fake(cache, frames, kept, start, channels_last):
    from . import kernel

    return kernel.join_fake(cache, frames, kept, start, channels_last)


def _frame_cache_join_setup(ctx, inputs, output):
    _, _, _, ctx.start, _ = inputs
    ctx.cache_len = output[1].shape[2]


def _frame_cache_join_backward(ctx, djoined, dnext):
    """Frames in both outputs sum both gradients; a replicated frame also sums its copies'."""
    cache_len, chunk_len = ctx.cache_len, djoined.shape[2] - ctx.cache_len
    djoined = torch.cat([djoined[:, :, :chunk_len], djoined[:, :, chunk_len:] + dnext], 2)
    dcache, dframes = djoined.split((cache_len, chunk_len), 2)
    if ctx.start == "replicate" and cache_len:
        first = dframes[:, :, :1] + dcache.sum(2, keepdim=True)
        dframes = torch.cat([first, dframes[:, :, 1:]], 2)
    return None if ctx.start else dcache, dframes, None, None, None


_frame_cache_join.register_autograd(
    _frame_cache_join_backward, setup_context=_frame_cache_join_setup
)


# --- checks ----------------------------------------------------------------------------------


def _check_video(op: str, name: str, value: Tensor, frames: str) -> None:
    dims = f"(batch, channels, {frames}, height, width)"
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {dims}; got {_checks.describe(value)}")
    if value.dim() != 5:
        raise ValueError(
            f"{op}: {name} must have 5 dimensions {dims}; got {_checks.describe(value)}"
        )


def _check_start(op: str, start: str | None, cache_len: int, chunk_len: int) -> None:
    if start not in STARTS:
        raise ValueError(
            f'{op}: start must be None, "replicate" or "zeros"; got {_checks.describe(start)}'
        )
    if start == "replicate" and cache_len and not chunk_len:
        raise ValueError(
            f'{op}: frames must have a first frame to replicate, for start="replicate"; got none'
        )


def _check_pair(op: str, cache: Tensor, frames: Tensor, start: str | None) -> None:
    _check_video(op, "cache", cache, "kept")
    _check_video(op, "frames", frames, "frames")
    if frames.dtype != cache.dtype:
        raise TypeError(
            f"{op}: frames must have the dtype of cache, {_checks.dtype_name(cache.dtype)}; "
            f"got {_checks.dtype_name(frames.dtype)}"
        )
    _checks.same_device(op, "frames", frames, "cache", cache)
    _checks.shape(
        op, "frames", frames, (*cache.shape[:2], frames.shape[2], *cache.shape[3:]),
        "(batch, channels, frames, height, width)",
        lambda: f" for cache of shape {tuple(cache.shape)}",
    )  # fmt: skip
    _check_start(op, start, cache.shape[2], frames.shape[2])


def _check_inplace(op: str, cache: Tensor, frames: Tensor, start: str | None) -> None:
    _check_pair(op, cache, frames, start)
    for name, x in (("cache", cache), ("frames", frames)):
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: overwrites cache and keeps no graph; got {name} with "
                "requires_grad=True. Use frame_cache_join, or torch.no_grad()"
            )
    shared = (
        size > 1 and step == 0 for size, step in zip(cache.shape, cache.stride(), strict=True)
    )
    if cache.numel() and any(shared):
        raise ValueError(
            f"{op}: cache is overwritten and must have each element in a place of its own; "
            f"got strides {cache.stride()} for shape {tuple(cache.shape)}"
        )


def _has_channels_last(x: Tensor) -> bool:
    """True if the channels of a video have stride 1; False for a single pixel."""
    several = x.shape[2] > 1 or x.shape[3] > 1 or x.shape[4] > 1
    return x.shape[1] > 1 and several and x.stride(1) == 1


def _unsupported(cache: Tensor | None, x: Tensor) -> str | None:
    """The reason why the extension cannot take frames `x`, or None."""
    if not HAS_EXTENSION:
        return (
            "cogvx_kernels._C is not built (pip install -v --no-build-isolation -e . in the "
            "repository builds it, or reports why it cannot)"
        )
    from . import kernel

    if x.is_cuda and not kernel.HAS_CUDA:
        return "cogvx_kernels._C was built without CUDA (there was no nvcc)"
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f"frames is on {x.device}"
    return _backend.transform_reason(frames=x, cache=cache)


# --- under autocast --------------------------------------------------------------------------


def _differ(cache: Tensor | None, other: Tensor) -> bool:
    """True if autocast is on and the two are floating-point tensors of unlike dtypes."""
    return (
        _autocast.enabled(other)
        and isinstance(cache, Tensor)
        and cache.dtype != other.dtype
        and cache.dtype in _autocast.FLOATS
        and other.dtype in _autocast.FLOATS
    )


# --- public functions ------------------------------------------------------------------------


def frame_cache_append(
    cache: Tensor,
    frames: Tensor,
    *,
    start: str | None = None,
    padding: int = 0,
    memory_format: torch.memory_format | None = None,
    backend: str = "auto",
) -> Tensor:
    """Concatenate cached frames and a chunk, zero-padded in space; update the cache.

    One pass: the cache ends up with the last `kept` frames, without padding.

    Args:
        cache: (batch, channels, kept, height, width), any dtype and strides, oldest frame first;
            overwritten. Fastest in the layout of `frames`.
        frames: (batch, channels, frames, height, width), also fewer than `kept`, or none.
        start: None: the clip continues. "replicate" or "zeros": it begins with this chunk, padded
            with copies of its first frame or zeros; the cache is not read.
        padding: rows and columns of zeros on each side.
        memory_format: of the result, torch.contiguous_format or torch.channels_last_3d; None for
            that of `frames`.
        backend: "auto", "kernel" or "reference".

    Returns:
        joined: (batch, channels, kept + frames, height + 2·padding, width + 2·padding), new and
        dense, with the bits of the inputs. Under autocast cache and frames may differ in dtype:
        joined has the one to which they promote, as torch.cat, and the cache keeps its own.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: backend="kernel" and the kernel cannot run; an argument requires a gradient.

    Source: arXiv 2408.06072, section 2.1 (temporally causal convolution).
    """
    op = "frame_cache_append"
    if _differ(cache, frames):
        copy, frames = _autocast.cast(_autocast.promoted(cache, frames), cache, frames)
        joined = frame_cache_append(
            copy, frames, start=start, padding=padding, memory_format=memory_format, backend=backend
        )
        if copy is not cache:
            cache.copy_(copy)
        return joined
    _check_inplace(op, cache, frames, start)
    _checks.integer(op, "padding", padding, 0, 2**15, "(rows and columns on each side)")
    if memory_format not in FORMATS:
        raise ValueError(
            f"{op}: memory_format must be None, torch.contiguous_format or torch.channels_last_3d; "
            f"got {_checks.describe(memory_format)}"
        )
    channels_last = memory_format is torch.channels_last_3d
    if memory_format is None:
        channels_last = _has_channels_last(frames)
    if _backend.choose(backend, op, _unsupported(cache, frames), frames):
        from . import kernel

        return kernel.append(cache, frames, start, padding, channels_last)
    joined, next_cache = frame_cache_join_reference(cache, frames, start=start)
    cache.copy_(next_cache)
    joined = F.pad(joined, (padding,) * 4)
    return dense(joined, channels_last)


def frame_cache_push(
    cache: Tensor, frames: Tensor, *, start: str | None = None, backend: str = "auto"
) -> None:
    """`frame_cache_append` without a result: update the cache only.

    Arguments and errors are those of `frame_cache_append`.
    """
    op = "frame_cache_push"
    if _differ(cache, frames):
        (frames,) = _autocast.cast(cache.dtype, frames)
    _check_inplace(op, cache, frames, start)
    if _backend.choose(backend, op, _unsupported(cache, frames), frames):
        from . import kernel

        kernel.push(cache, frames, start)
    else:
        cache.copy_(frame_cache_join_reference(cache, frames, start=start)[1])


def frame_cache_join(
    cache: Tensor | None,
    frames: Tensor,
    *,
    kept: int = 2,
    start: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Functional `frame_cache_append`: not in place, with gradients.

    Args:
        cache: as in `frame_cache_append`, not written; or None, with `start`.
        frames: as in `frame_cache_append`.
        kept: frames of the next cache if cache is None, else ignored.
        start, backend: as in `frame_cache_append`.

    Returns:
        (joined, next): (batch, channels, kept + frames, height, width) and the next cache, both
        new, in the memory format of `frames`. Gradients for cache and frames, of any order; nothing
        is saved for the backward. Under autocast cache and frames may differ in dtype, and both
        results have the one to which they promote, as torch.cat.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: backend="kernel" and the kernel cannot run.

    Source: arXiv 2408.06072, section 2.1 (temporally causal convolution).
    """
    op = "frame_cache_join"
    if _differ(cache, frames):
        cache, frames = _autocast.cast(_autocast.promoted(cache, frames), cache, frames)
    _checks.integer(op, "kept", kept, 0, 2**15, "(frames)")
    if cache is not None:
        _check_pair(op, cache, frames, start)
    else:
        _check_video(op, "frames", frames, "frames")
        _check_start(op, start, kept, frames.shape[2])
        if start is None:
            raise ValueError(f"{op}: start must be given where cache is None; got None")
    if _backend.choose(backend, op, _unsupported(cache, frames), frames):
        return _frame_cache_join(cache, frames, kept, start, _has_channels_last(frames))
    return frame_cache_join_reference(cache, frames, kept=kept, start=start)
