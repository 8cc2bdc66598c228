"""Public API: argument checks, backend dispatch, custom-op registration, autograd."""

from torch import Tensor

from .. import _autocast, _backend, _checks
from .._custom_op import custom_op
from .._launch import empty_video
from .reference import temporal_conv_reference

VIDEO = ("batch", "in_channels", "frames", "height", "width")
STARTS = ("replicate", "zeros")
MOST_TAPS = 5


# --- cogvx::temporal_conv --------------------------------------------------------------------


@custom_op("temporal_conv", constants=("stride",))
def _temporal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None,
    stride: int, start: str,
) -> Tensor:  # fmt: skip
    from . import kernel

    out = empty_video(x, weight.shape[0], (x.shape[2] - 1) // stride + 1)
    kernel.temporal_conv_fwd(out, x, weight, bias, cache, stride, start)
    return out


@_temporal_conv.register_fake
def _temporal_conv_fake(x, weight, bias, cache, stride, start):
    return empty_video(x, weight.shape[0], (x.shape[2] - 1) // stride + 1)


def _setup(ctx, inputs, output):
    x, weight, bias, cache, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, bias, cache)


def _backward(ctx, dout):
    x, weight, bias, cache = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    grads = _temporal_conv_grads(
        dout, x, weight, bias, cache, *ctx.settings, needs[0] or needs[3], needs[1] or needs[2]
    )
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


_temporal_conv.register_autograd(_backward, setup_context=_setup)


@custom_op("temporal_conv_backward", constants=("stride",))
def _temporal_conv_grads(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None,
    stride: int, start: str, frames: bool, weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and cache; empty if not wanted."""
    from . import kernel

    grads = _empty_grads(x, weight, bias, cache, frames, weights)
    kernel.temporal_conv_bwd(grads, dout, x, weight, cache, stride, start)
    return grads


@_temporal_conv_grads.register_fake
def _temporal_conv_grads_fake(dout, x, weight, bias, cache, stride, start, frames, weights):
    return _empty_grads(x, weight, bias, cache, frames, weights)


def _empty_grads(x, weight, bias, cache, frames, weights):
    def nothing():
        return x.new_empty((0,))

    def like(parameter):
        wanted = weights and parameter is not None
        return parameter.new_empty(parameter.shape) if wanted else nothing()

    dx = empty_video(x) if frames else nothing()
    past = frames and cache is not None
    dcache = empty_video(x, frames=cache.shape[2]) if past else nothing()
    return dx, like(weight), like(bias), dcache


def as_pixels(x: Tensor) -> Tensor:
    """View samples without pixels as pixels of one sample: (1, channels, frames, batch, 1)."""
    return x.permute(1, 2, 0)[None, ..., None]


# --- checks ----------------------------------------------------------------------------------


def _check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    five = isinstance(weight, Tensor) and weight.dim() == 5
    ones = ("1", "1") if five else ()
    _checks.tensor(op, "weight", weight, ("out_channels", "in_channels", "kernel", *ones))
    channels, (out, inner, taps) = x.shape[1], weight.shape[:3]
    if five:
        _checks.shape(
            op, "weight", weight, (out, inner, taps, 1, 1), "(out_channels, in_channels, kernel, 1,"
            " 1)", lambda: ": its spatial size is 1",
        )  # fmt: skip
    if not 1 <= taps <= MOST_TAPS:
        raise ValueError(
            f"{op}: weight must be of 1 to {MOST_TAPS} frames; got {taps}, {tuple(weight.shape)}"
        )
    if inner != channels and not (inner == 1 and out == channels):
        raise ValueError(
            f"{op}: weight must be (out_channels, {channels}, kernel), or depthwise ({channels}, "
            f"1, kernel), for x of shape {tuple(x.shape)}; got {tuple(weight.shape)}"
        )
    if out == 0:
        raise ValueError(f"{op}: weight must have an out_channel; got {tuple(weight.shape)}")


def _check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, stride: int,
    start: str | None,
) -> None:  # fmt: skip
    dims = VIDEO[:3] if isinstance(x, Tensor) and x.dim() == 3 else VIDEO
    _checks.tensor(op, "x", x, dims)
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(
            f"{op}: x must have a channel and a frame at least, ({', '.join(dims)}); "
            f"got {tuple(x.shape)}"
        )
    _check_weight(op, x, weight)
    kept = weight.shape[2] - 1
    if bias is not None and not _checks.fits(bias, (weight.shape[0],), (x.dtype,), x):
        _checks.tensor(op, "bias", bias, ("out_channels",))
        _checks.shape(op, "bias", bias, (weight.shape[0],), "(out_channels,)")
    if cache is not None:
        _checks.tensor(op, "cache", cache, dims)
        _checks.shape(
            op, "cache", cache, (*x.shape[:2], kept, *x.shape[3:]),
            f"({', '.join((*dims[:2], 'kernel - 1', *dims[3:]))})",
            lambda: f" for x of shape {tuple(x.shape)} and a kernel of {kept + 1}",
        )  # fmt: skip
    for name, value in (("weight", weight), ("bias", bias), ("cache", cache)):
        if value is not None and (value.dtype is not x.dtype or value.device != x.device):
            _checks.dtype(op, name, value, (x.dtype,))
            _checks.same_device(op, name, value, "x", x)
    _checks.integer(op, "stride", stride, 1, 2, "(frames for each frame of the result)")
    if cache is None or start is not None:
        _checks.choice(op, "start", start, STARTS)


# --- public function -------------------------------------------------------------------------


def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cache: Tensor | None = None,
    stride: int = 1,
    start: str | None = "replicate",
    backend: str = "auto",
) -> Tensor:
    """Causal temporal convolution, dense or depthwise, without padded copies.

    out[t] = bias + the sum over j of weight[j] · sequence[stride · t + j], where the sequence
    is the kernel - 1 frames before x and then x.

    Args:
        x: (batch, in_channels, frames, height, width), or (batch, in_channels, frames), with at
            least one frame; any strides. Channels-last is fastest; a tensor that is neither
            channels-last nor has dense, evenly spaced pixels is copied once.
        weight: (out_channels, in_channels, kernel), as nn.Conv1d's, or (…, kernel, 1, 1), as
            nn.Conv3d's; kernel 1 to 5. (channels, 1, kernel, …) for several channels is depthwise.
        bias: (out_channels,) or None.
        cache: (batch, in_channels, kernel - 1, height, width), the frames before x, oldest first,
            or (batch, in_channels, kernel - 1); not written. None: the clip begins with x. Chunks
            with a cache give the bits of the whole clip; with stride 2 all but the last must have
            an even number of frames.
        stride: 1 or 2.
        start: padding before the first frame without a cache: copies of it ("replicate") or
            "zeros". Ignored with a cache, and may then be None.
        backend: "auto", "kernel" or "reference".

    Returns:
        (batch, out_channels, (frames - 1) // stride + 1, …), new, of x's dtype; channels-last if
        x is, else contiguous. Sums in at least fp32, rounded once. Gradients for x, weight, bias
        and cache. The backward saves the arguments as they are. Under autocast all of them are cast
        to its dtype, which is the result's, as in F.conv3d.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: backend="kernel" and the kernel cannot run.

    Source: arXiv 1609.03499, section 2.1; arXiv 2408.06072, section 2.1.
    """
    op = "temporal_conv"
    if _autocast.enabled(x):
        x, weight, bias, cache = _autocast.cast(_autocast.dtype(x), x, weight, bias, cache)
        with _autocast.off(x):
            return temporal_conv(
                x, weight, bias, cache=cache, stride=stride, start=start, backend=backend
            )
    _check(op, x, weight, bias, cache, stride, start)
    reason = _backend.triton_reason("x", x) or _backend.transform_reason(
        x=x, weight=weight, bias=bias, cache=cache
    )
    if not _backend.choose(backend, op, reason, x):
        return temporal_conv_reference(x, weight, bias, cache=cache, stride=stride, start=start)
    settings = stride, "zeros" if cache is not None else start
    taps = weight if weight.dim() == 3 else weight.flatten(2)
    if x.dim() == 5:
        return _temporal_conv(x, taps, bias, cache, *settings)
    past = None if cache is None else as_pixels(cache)
    out = _temporal_conv(as_pixels(x), taps, bias, past, *settings)
    return out[0, ..., 0].permute(2, 0, 1).contiguous()
