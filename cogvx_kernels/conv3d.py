"""`F.conv3d` with workarounds for known cuDNN and MIOpen issues, and for tensors over 2 GiB.

Sources: pytorch #163539 (bfloat16, cuDNN 9.8 to 9.14: wrong), #166643 and #163581 (torch 2.9: cuDNN
is not used, and the input expanded up to 17 times), and MIOpen, which expands it too; diffusers'
CogVideoXSafeConv3d for the size, which cuts by frames alone, and into pieces shorter than a kernel.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend, _checks
from ._launch import dense

ALGOS = ("auto", "conv3d", "conv2d")

# Most bytes of x, or of the result, in one call. 32-bit offsets reach 2^31 - 1 elements, of
# which 2 GiB hold at most half; and cuDNN has failed above 2 GiB, where diffusers cuts as well.
LIMIT = 1 << 31

CUDNN_WITH_GOOD_CONV3D = 91500
CUDNN_WITH_BAD_CONV3D = 90800

Convolve = Callable[[Tensor, tuple[int, int, int]], Tensor]


class Versions(NamedTuple):
    """Versions of the libraries; cudnn as 91501 or None; hip None except on AMD."""

    torch: str
    cudnn: int | None
    hip: str | None


class Cuts(NamedTuple):
    """Slices of a result along samples, frames and rows; every combination is a piece."""

    samples: list[slice]
    frames: list[slice]
    rows: list[slice]


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: tuple[int, int, int] = (0, 1, 1),
    *,
    algo: str = "auto",
) -> Tensor:
    """F.conv3d with a stride of 1, for any size of x and any installed version.

    x: (batch, in, frames, height, width), floating point, contiguous or channels_last_3d; other
        strides work and cost a copy. `frames` are at least the kernel's: those before the chunk are
        the caller's to put in front.
    weight: (out, in, k, rows, columns), bias: (out,) or None, dtype and device of x.
    padding: zeros before and after frames, rows and columns: none over frames, and of the others
        fewer than the kernel has.
    algo: "conv3d", torch's own 3-D convolution; "conv2d", k 2-D convolutions of all frames, summed
        in at least fp32; "auto", "conv2d" where there is a `known_issue`, else "conv3d".

    Returns (batch, out, frames - k + 1, ...), channels_last_3d if x is. Differentiable in x, weight
    and bias. A call of more than `LIMIT` bytes is cut by samples, then frames, then rows, and each
    piece is written to its place in the result; while gradients are recorded pieces are joined.

    Numerics: "conv2d" has the errors of torch's 2-D convolutions, added up. In fp32 on a CPU those
    are larger than the 3-D one's: of 64 channels 1.6 times in the mean and up to 3.2 times in the
    worst element. In 16 bits each term is rounded before it is added: within the bound of a matrix
    product, twice the error of a result that is rounded once.

    Pieces have the bits of one call wherever torch takes the same algorithm for both, on a CPU for
    samples and frames in fp32 and bf16, but for pieces so small, while gradients are recorded, that
    batch * in * frames * height is at most 20480; else they too are within the bound.

    Raises TypeError or ValueError, naming the argument, for all that is not as above.
    """
    _check(x, weight, bias, padding)
    _checks.choice("conv3d", "algo", algo, ALGOS)
    if algo == "auto":
        algo = "conv3d" if known_issue(x.device, x.dtype) is None else "conv2d"
    algo = algo if len(x) else "conv3d"  # of no samples there is nothing to add up
    convolve = partial(_conv3d if algo == "conv3d" else _conv2d_sum, weight=weight, bias=bias)
    # Samples apart are views of frames in a row, which 2-D convolutions take as they are.
    cuts = _cuts(x, weight, padding, apart=algo == "conv2d")
    if all(len(slices) == 1 for slices in cuts):
        return convolve(x, padding)
    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    wanted = wanted or _backend.transform_reason(x=x, weight=weight, bias=bias) is not None
    join = _joined if wanted else _written
    return join(x, cuts, partial(_piece, x, weight.shape[2:4], padding, convolve))


def known_issue(
    device: torch.device, dtype: torch.dtype, versions: Versions | None = None
) -> str | None:
    """Reason not to use torch's 3-D convolution on this device and dtype, or None.

    versions: the installed ones by default.
    """
    if device.type != "cuda":
        return None
    release, cudnn, hip = versions or library_versions()
    if hip is not None:
        return "MIOpen expands the input of a 3-D convolution (im2col), which is slow and large"
    if dtype not in (torch.float16, torch.bfloat16) or cudnn is None:
        return None
    name = f"in 16 bits torch {release} with cuDNN {cudnn}"
    unused = _release(release) >= (2, 9) and cudnn < CUDNN_WITH_GOOD_CONV3D
    if unused or release.startswith("2.9.0"):
        return f"{name} expands the input of a 3-D convolution, up to 17 times (pytorch #166643)"
    if CUDNN_WITH_BAD_CONV3D <= cudnn < CUDNN_WITH_GOOD_CONV3D:
        return f"{name} gives wrong results of a 3-D convolution (pytorch #163539)"
    return None


def library_versions() -> Versions:
    """Installed versions."""
    return Versions(str(torch.__version__), torch.backends.cudnn.version(), torch.version.hip)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


# --- algorithms ------------------------------------------------------------------------------


def _conv3d(
    x: Tensor, padding: tuple[int, int, int], *, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if x.is_meta and not torch.is_grad_enabled():  # a convolution there forgets the layout
        shape = (len(x), len(weight), *_sizes(x, weight, padding))
        return torch.empty(
            shape, dtype=x.dtype, device="meta", memory_format=_format(_channels_last(x))
        )
    if takes_onednn(x, weight, bias):
        return torch.mkldnn_convolution(x, weight, bias, padding, (1, 1, 1), (1, 1, 1), 1)
    out = F.conv3d(x, weight, bias, padding=padding)
    if _channels_last(x):  # torch's slow algorithm, that of small calls on a CPU, forgets it
        return dense(out, channels_last=True)
    return out


def takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """True if oneDNN can be called by name: torch runs small convolutions without it, 10 times
    slower."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # it cannot be traced
        return False
    plain = x.device.type == "cpu" and x.dtype is torch.float32 and type(x) is Tensor
    if not plain or torch.is_autocast_enabled("cpu"):
        return False
    if _backend.transform_reason(x=x, weight=weight, bias=bias) is not None:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _conv2d_sum(
    x: Tensor, padding: tuple[int, int, int], *, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """One sample as 2-D convolutions: all frames with each kernel frame, summed in fp32."""
    channels_last = _channels_last(x) or _channels_last(weight)
    images = dense(x.transpose(1, 2).flatten(0, 1), channels_last)
    count = x.shape[2] - weight.shape[2] + 1
    first = F.conv2d(images[:count], weight[:, :, 0], bias, padding=padding[1:])
    total = first.to(torch.promote_types(first.dtype, torch.float32))
    for k in range(1, weight.shape[2]):
        part = images[k : k + count]
        total = total.add_(F.conv2d(part, weight[:, :, k], padding=padding[1:]))
    out = total.unflatten(0, (1, count)).transpose(1, 2)
    return dense(out.to(first.dtype), channels_last)


# --- pieces ----------------------------------------------------------------------------------


def _cuts(x: Tensor, weight: Tensor, padding: tuple[int, int, int], apart: bool) -> Cuts:
    """Pieces of at most `LIMIT` bytes; only a single row of a single frame may have more."""
    batch, channels, frames, height, width = x.shape
    out_channels, _, *kernel = weight.shape
    count, rows, columns = _sizes(x, weight, padding)
    row, out_row = (x.element_size() * n for n in (channels * width, out_channels * columns))
    sample = max(row * height * frames, out_row * rows * count)
    if batch * sample <= LIMIT and not apart:
        return Cuts([slice(0, batch)], [slice(0, count)], [slice(0, rows)])
    most = min(LIMIT // (row * height) - (kernel[0] - 1), LIMIT // (out_row * rows))
    # A piece at an edge of x is padded on both sides, and the rows of the inner side are dropped.
    dropped = max(2 * padding[1] - 1, 0)
    lines = min(LIMIT // (row * kernel[0]) - (kernel[1] - 1), LIMIT // out_row - dropped)
    return Cuts(
        _slices(batch, 1),
        _slices(count, max(most, 1)),
        [slice(0, rows)] if most >= 1 else _slices(rows, max(lines, 1)),
    )


def _slices(size: int, most: int) -> list[slice]:
    """`size` in as few slices of at most `most` as possible, of about equal length."""
    pieces = -(-size // most)
    return [slice(i * size // pieces, (i + 1) * size // pieces) for i in range(pieces)]


def _piece(
    x: Tensor,
    kernel: Sequence[int],
    padding: tuple[int, int, int],
    convolve: Convolve,
    samples: slice,
    frames: slice,
    rows: slice,
) -> Tensor:
    """These samples, frames and rows of the result.

    A piece at an edge of x is padded with zeros on both sides, because torch has no other padding
    without a copy; rows of the result that read the zeros of the inner side are dropped.
    """
    start, stop = rows.start - padding[1], rows.stop - padding[1] + kernel[1] - 1
    inside = slice(max(start, 0), min(stop, x.shape[3]))
    pad = 0 if (inside.start, inside.stop) == (start, stop) else padding[1]
    part = x[samples, :, frames.start : frames.stop + kernel[0] - 1, inside]
    out = convolve(part, (0, pad, padding[2]))
    return out.narrow(3, rows.start - inside.start + pad - padding[1], rows.stop - rows.start)


def _written(x: Tensor, cuts: Cuts, piece: Callable[..., Tensor]) -> Tensor:
    """Pieces written to one tensor, in the layout of the first."""
    out = None
    for samples in cuts.samples:
        for frames in cuts.frames:
            for rows in cuts.rows:
                part = piece(samples, frames, rows)
                if out is None:
                    out = torch.empty(
                        (x.shape[0], part.shape[1], cuts.frames[-1].stop, cuts.rows[-1].stop)
                        + part.shape[4:],
                        dtype=part.dtype,
                        device=part.device,
                        memory_format=_format(_channels_last(part)),
                    )
                out[samples, :, frames, rows] = part
                del part  # before the next is made
    assert out is not None
    return out


def _joined(x: Tensor, cuts: Cuts, piece: Callable[..., Tensor]) -> Tensor:
    """Pieces concatenated, where gradients are recorded."""
    return torch.cat([
        torch.cat([
            torch.cat([piece(samples, frames, rows) for rows in cuts.rows], 3)
            for frames in cuts.frames
        ], 2)
        for samples in cuts.samples
    ])  # fmt: skip


# --- sizes and checks ------------------------------------------------------------------------


def _sizes(x: Tensor, weight: Tensor, padding: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, rows and columns of the result."""
    frames, rows, columns = (
        size + 2 * pad - kernel + 1
        for size, pad, kernel in zip(x.shape[2:], padding, weight.shape[2:], strict=True)
    )
    return frames, rows, columns


def _channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int, int]) -> None:
    op = "conv3d"
    _checks.tensor(op, "x", x, ("batch", "in", "frames", "height", "width"))
    _checks.tensor(op, "weight", weight, ("out", "in", "k", "rows", "columns"))
    _checks.shape(
        op,
        "weight",
        weight,
        (weight.shape[0], x.shape[1], *weight.shape[2:]),
        "(out, in, k, rows, columns)",
        lambda: f" for x of shape {tuple(x.shape)}",
    )
    given = {"weight": weight}
    if bias is not None:
        _checks.tensor(op, "bias", bias, ("out",))
        _checks.shape(op, "bias", bias, weight.shape[:1], "(out,)")
        given["bias"] = bias
    for name, value in given.items():
        _checks.same_device(op, name, value, "x", x)
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # which makes them alike
            _checks.dtype(op, name, value, (x.dtype,))
    _check_sizes(op, x, weight, padding)


def _check_sizes(op: str, x: Tensor, weight: Tensor, padding: tuple[int, int, int]) -> None:
    if len(padding) != 3:
        raise ValueError(
            f"{op}: padding must be (frames, rows, columns); got {_checks.describe(padding)}"
        )
    kernel = tuple(weight.shape[2:])
    _checks.integer(op, "padding[0]", padding[0], 0, 0, "(frames before the chunk are put in x)")
    for axis in (1, 2):
        why = f"(fewer than the kernel's {kernel[axis]})"
        _checks.integer(op, f"padding[{axis}]", padding[axis], 0, kernel[axis] - 1, why)
    if min(*_sizes(x, weight, padding), *x.shape[1:], weight.shape[0]) < 1:
        raise ValueError(
            f"{op}: x must have channels, and at least the frames, height and width of the kernel "
            f"{kernel}, less the padding {tuple(padding)} on both sides; got {tuple(x.shape)}"
        )
