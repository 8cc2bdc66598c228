"""Public API: argument checks, backend dispatch, custom-op registration, autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import _autocast, _backend, _checks
from .._custom_op import custom_op
from .._launch import empty_video
from .cpu import residual_moments_cpu, spatial_norm_silu_cpu
from .reference import residual_moments_reference, spatial_norm_silu_reference
from .validation import (
    VIDEO,
    Parameters,
    Settings,
    check_cache,
    check_latents,
    check_moments,
    check_video,
    empty_grad,
    match_memory_format,
    new_moments,
    refuse_grad,
    statistics_dtype,
    unsupported_reason,
    update_cache,
    wants_grad,
)

# No number in the schemas below depends on the number of frames, so that one compiled graph serves
# chunks of any length.


# --- cogvx::spatial_norm_silu ----------------------------------------------------------------


@custom_op("spatial_norm_silu", constants=("num_groups",))
def _spatial_norm_silu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, b: Tensor | None,
    offset: Tensor | None, moments: Tensor | None,
    num_groups: int, eps: float, per_frame: bool, leads: bool, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, and the statistics for the backward, empty if they were given."""
    from . import kernel

    out, computed = _outputs(x, moments, num_groups, per_frame)
    if moments is None:
        kernel.moments_fwd(computed, None, x, None, offset, num_groups, per_frame)
    kernel.spatial_norm_fwd(
        out, None, x, computed if moments is None else moments.contiguous(),
        Parameters(weight, bias, y, b, offset), Settings(num_groups, eps, per_frame, leads, silu),
    )  # fmt: skip
    return out, computed


@_spatial_norm_silu.register_fake
def _spatial_norm_silu_fake(
    x, weight, bias, y, b, offset, moments, num_groups, eps, per_frame, leads, silu
):
    return _outputs(x, moments, num_groups, per_frame)


def _outputs(x, moments, num_groups, per_frame):
    if moments is not None:
        return empty_video(x), moments.new_empty((0,))
    return empty_video(x), new_moments(x, num_groups, per_frame)


def _spatial_norm_silu_setup(ctx, inputs, output):
    x, weight, bias, y, b, offset, moments, *ctx.settings = inputs
    ctx.given = moments is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    statistics = moments if ctx.given else output[1]
    ctx.save_for_backward(x, weight, bias, y, b, offset, statistics)


def _spatial_norm_silu_backward(ctx, dout, _):
    x, weight, bias, y, b, offset, moments = ctx.saved_tensors
    if dout is None:
        return (None,) * 12
    dx, dweight, dbias, dy, db, doffset, dmoments = _spatial_norm_silu_grads(
        dout, x, weight, bias, y, b, offset, moments, ctx.given, ctx.needs_input_grad[0],
        *ctx.settings,
    )  # fmt: skip
    inputs = (x, weight, bias, y, b, offset, moments if ctx.given else None)
    grads = (dx, dweight, dbias, dy, db, doffset, dmoments)
    wanted = zip(inputs, grads, ctx.needs_input_grad, strict=False)
    return *(g if z is not None and wants else None for z, g, wants in wanted), *(None,) * 5


_spatial_norm_silu.register_autograd(
    _spatial_norm_silu_backward, setup_context=_spatial_norm_silu_setup
)


@custom_op("spatial_norm_silu_backward", constants=("num_groups",))
def _spatial_norm_silu_grads(
    dout: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    b: Tensor | None, offset: Tensor | None, moments: Tensor, given: bool, to_x: bool,
    num_groups: int, eps: float, per_frame: bool, leads: bool, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias, y, b, offset and moments; empty if not wanted."""
    from . import kernel

    grads = _empty_grads(x, weight, bias, y, b, offset, moments, given, to_x)
    dx, dweight, dbias, dy, db, doffset, dmoments = grads
    sums = kernel.spatial_norm_bwd(
        (dx if to_x else None, None if y is None else dy, None if b is None else db),
        dout, x, moments.contiguous(), given, Parameters(weight, bias, y, b, offset),
        Settings(num_groups, eps, per_frame, leads, silu),
    )  # fmt: skip
    for grad, total in zip((dweight, dbias, doffset, dmoments), sums, strict=True):
        if grad.numel():
            grad.copy_(total)
    return grads


@_spatial_norm_silu_grads.register_fake
def _spatial_norm_silu_grads_fake(
    dout, x, weight, bias, y, b, offset, moments, given, to_x, num_groups, eps, per_frame, leads,
    silu,
):  # fmt: skip
    return _empty_grads(x, weight, bias, y, b, offset, moments, given, to_x)


def _empty_grads(x, weight, bias, y, b, offset, moments, given, to_x):
    return (
        empty_video(x) if to_x else x.new_empty((0,)),
        empty_grad(weight, x),
        empty_grad(bias, x),
        x.new_empty((0,)) if y is None else empty_video(y),
        x.new_empty((0,)) if b is None else empty_video(b),
        empty_grad(offset, x),
        empty_grad(moments if given else None, moments),
    )


# --- cogvx::spatial_norm_silu_, after cached frames ------------------------------------------


@custom_op("spatial_norm_silu_", mutates_args=("cache",), constants=("num_groups",))
def _spatial_norm_silu_cached(
    cache: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None,
    b: Tensor | None, offset: Tensor | None, moments: Tensor | None,
    num_groups: int, eps: float, per_frame: bool, leads: bool, silu: bool, start: str,
) -> Tensor:  # fmt: skip
    """`start` is "" if the clip continues."""
    from . import kernel

    cache_len, frames = cache.shape[2], x.shape[2]
    joined = empty_video(x, frames=cache_len + frames)
    if moments is None:
        moments = new_moments(x, num_groups, per_frame)
        kernel.moments_fwd(moments, None, x, None, offset, num_groups, per_frame)
    settings = Settings(num_groups, eps, per_frame, leads, silu)
    arguments = x, moments.contiguous(), Parameters(weight, bias, y, b, offset), settings
    if frames >= cache_len:
        kernel.spatial_norm_fwd(joined, cache, *arguments, start)
    else:
        # Some cached frames stay cached: they are copied after the result is written.
        kernel.spatial_norm_fwd(joined[:, :, cache_len:], None, *arguments)
        update_cache(joined, cache, start)
    return joined


@_spatial_norm_silu_cached.register_fake
def _spatial_norm_silu_cached_fake(cache, x, *_):
    return empty_video(x, frames=cache.shape[2] + x.shape[2])


# --- cogvx::residual_moments -----------------------------------------------------------------


@custom_op("residual_moments", constants=("num_groups",))
def _residual_moments(
    x: Tensor, h: Tensor, offset: Tensor | None, num_groups: int, per_frame: bool
) -> tuple[Tensor, Tensor]:
    from . import kernel

    total, moments = empty_video(x), new_moments(x, num_groups, per_frame)
    kernel.moments_fwd(moments, total, x, h, offset, num_groups, per_frame)
    return total, moments


@_residual_moments.register_fake
def _residual_moments_fake(x, h, offset, num_groups, per_frame):
    return empty_video(x), new_moments(x, num_groups, per_frame)


def _residual_moments_setup(ctx, inputs, output):
    _, _, offset, ctx.num_groups, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, offset)


def _residual_moments_backward(ctx, dtotal, dmoments):
    """In torch ops; without a gradient of the moments that of the sum is passed through."""
    total, moments, offset = ctx.saved_tensors
    if dmoments is not None and total.numel():
        each = total.shape[1] // ctx.num_groups
        elements = total.numel() // moments[..., 0].numel()

        def expand(z):  # (batch, frames or 1, groups) to (batch, channels, frames or 1, 1, 1)
            return z.transpose(1, 2).repeat_interleave(each, 1)[..., None, None]

        mean, _ = moments.unbind(-1)
        dmean, dvar = (dmoments / elements).unbind(-1)
        grad = (total.to(mean.dtype) - expand(mean)) * expand(2 * dvar)
        grad = grad + expand(dmean)
        dtotal = (grad if dtotal is None else grad + dtotal).to(total.dtype)
    if dtotal is None:
        return (None,) * 5
    wants_x, wants_h, wants_offset, *_ = ctx.needs_input_grad
    doffset = None
    if wants_offset:
        dtotal_dense = match_memory_format(total, dtotal)  # one order of sums for any strides
        doffset = dtotal_dense.sum((0, 2, 3, 4), dtype=moments.dtype).to(offset.dtype)
    return dtotal if wants_x else None, dtotal if wants_h else None, doffset, None, None


_residual_moments.register_autograd(
    _residual_moments_backward, setup_context=_residual_moments_setup
)


def _use_cpu_path(*tensors: Tensor | None) -> bool:
    """True on a CPU or the meta device, without gradients, outside the compiler."""
    on_cpu = all(x is None or x.device.type in ("cpu", "meta") for x in tensors)
    return on_cpu and not wants_grad(*tensors) and not torch.compiler.is_compiling()


def _spatial_norm_silu_under_autocast(
    x: Tensor, weight: Any, bias: Any, y: Any, b: Any, offset: Any, moments: Any, cache: Any,
    **settings: Any,
) -> Tensor:  # fmt: skip
    """A cache of another dtype than the result is updated through a copy."""
    dtype = _autocast.promoted(x, y, b, cache)
    wide, y, b, copy = _autocast.cast(dtype, x, y, b, cache)
    weight, bias, offset = _autocast.parameters(dtype, weight, bias, offset)
    (moments,) = _autocast.cast(statistics_dtype(wide), moments)
    with _autocast.off(x):
        out = spatial_norm_silu(
            wide, weight, bias, y, b, offset, moments=moments, cache=copy, **settings
        )
    if copy is not cache:
        cache.copy_(copy)
    return out


# --- public functions ------------------------------------------------------------------------


def spatial_norm_silu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    y: Tensor | None = None,
    b: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    num_groups: int = 32,
    eps: float = 1e-6,
    per_frame: bool = False,
    leads: bool = False,
    silu: bool = True,
    moments: Tensor | None = None,
    cache: Tensor | None = None,
    start: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """SiLU of a group norm modulated by latents, n · y + b, with y and b at latent resolution.

    Args:
        x: (batch, channels, frames, height, width), any strides; channels_last_3d is fastest.
        weight, bias: (channels,) of the norm, or None; as y, b and offset in x's dtype or fp32.
        y, b: (batch, channels, latent frames, latent height, latent width), any strides, each or
            both None. Upsampled by nearest neighbour: height and width are whole multiples of the
            latents', and frame f reads latent frame f · latents // frames.
        offset: (channels,), added to x first, or None: the bias of the preceding convolution.
        num_groups: divides the channels.
        eps: added to the variance: 1e-6 in the VAEs of CogVideoX and HunyuanVideo.
        per_frame: statistics within each frame; else over all frames of x.
        leads: the first of several frames has the first latent frame to itself.
        silu: False for n · y + b.
        moments: (batch, frames if per_frame else 1, num_groups, 2) of `residual_moments`, at least
            fp32: mean and variance of x + offset, in place of computing them.
        cache: (batch, channels, kept, height, width) of x's dtype, any strides: frames to put
            before the result, the input of a causal convolution. Overwritten with the last `kept`
            frames of that. Not allowed with gradients.
        start: padding before a clip that begins with x, with a cache: copies of the result's first
            frame ("replicate") or zeros ("zeros"); the cache is not read. None: the clip continues.
        backend: "auto", "kernel" or "reference".

    Returns:
        A new tensor of x's shape and dtype, or of kept + frames frames; channels_last_3d if x is,
        else contiguous. Computed in at least fp32, rounded once. Gradients for every tensor; the
        backward saves the inputs as they are, and statistics. Under autocast dtypes may be mixed:
        the result has the one to which x, y, b and a cache promote, as norm(x) * y + b; weight,
        bias and offset do not count. The norm counts with x's dtype, while torch's on CUDA gives
        fp32.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: backend="kernel" and the kernel cannot run; a cache under grad.

    Source: arXiv 2209.09002, section 3.2 (spatial norm); arXiv 2408.06072 (CogVideoX).
    """
    op = "spatial_norm_silu"
    if _autocast.enabled(x):
        return _spatial_norm_silu_under_autocast(
            x, weight, bias, y, b, offset, moments, cache, num_groups=num_groups, eps=eps,
            per_frame=per_frame, leads=leads, silu=silu, start=start, backend=backend,
        )  # fmt: skip
    check_video(op, x, num_groups, per_frame)
    wide = statistics_dtype(x)
    _checks.vectors(op, "x", x, 1, "channels", wide, weight=weight, bias=bias, offset=offset)
    check_latents(op, x, leads, y=y, b=b)
    _checks.positive(op, "eps", eps)
    _checks.flag(op, "silu", silu)
    if moments is not None:
        check_moments(op, x, moments, num_groups, per_frame)
    check_cache(op, x, cache, start)
    parameters = Parameters(weight, bias, y, b, offset)
    tensors = (x, *parameters, moments)
    settings = Settings(num_groups, float(eps), per_frame, leads, silu)
    if cache is not None:
        refuse_grad(op, cache=cache, x=x, **parameters._asdict(), moments=moments)
    transform = _backend.transform_reason(x=x, **parameters._asdict(), moments=moments, cache=cache)
    if _backend.choose(backend, op, unsupported_reason(x) or transform, x):
        if cache is None:
            return _spatial_norm_silu(*tensors, *settings)[0]
        return _spatial_norm_silu_cached(cache, *tensors, *settings, start or "")
    if transform is None and _use_cpu_path(*tensors):
        return spatial_norm_silu_cpu(x, parameters, moments, settings, cache, start)
    out = spatial_norm_silu_reference(
        x, *parameters, **settings._asdict(), moments=moments, cache=cache, start=start
    )  # fmt: skip
    return match_memory_format(x, out)


def residual_moments(
    x: Tensor,
    h: Tensor,
    offset: Tensor | None = None,
    *,
    num_groups: int = 32,
    per_frame: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual sum x + h + offset and, in the same pass, its statistics for the next norm.

    Args:
        x, h: (batch, channels, frames, height, width), any strides.
        offset: (channels,), in x's dtype or fp32, or None: the bias of the convolution before h.
        num_groups, per_frame, backend: as in `spatial_norm_silu`.

    Returns:
        (sum, moments): the sum rounded once to x's dtype, in the memory format of
        `spatial_norm_silu` of x; mean and variance of the rounded sum, (batch, frames if per_frame
        else 1, num_groups, 2), in at least fp32. Gradients for every tensor, through both; the
        backward saves what is returned. Under autocast the sum has the dtype to which x and h
        promote; that of the offset does not count.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: backend="kernel" and the kernel cannot run.

    Source: group norm, arXiv 1803.08494; the residual blocks of arXiv 2408.06072's VAE.
    """
    op = "residual_moments"
    if _autocast.enabled(x):
        dtype = _autocast.promoted(x, h)
        x, h = _autocast.cast(dtype, x, h)
        (offset,) = _autocast.parameters(dtype, offset)
        with _autocast.off(x):
            return residual_moments(
                x, h, offset, num_groups=num_groups, per_frame=per_frame, backend=backend
            )
    check_video(op, x, num_groups, per_frame)
    _checks.tensor(op, "h", h, VIDEO)
    _checks.dtype(op, "h", h, (x.dtype,))
    _checks.same_device(op, "h", h, "x", x)
    _checks.shape(op, "h", h, x.shape, "the shape of x")
    _checks.vectors(op, "x", x, 1, "channels", statistics_dtype(x), offset=offset)
    transform = _backend.transform_reason(x=x, h=h, offset=offset)
    if _backend.choose(backend, op, unsupported_reason(x) or transform, x):
        return _residual_moments(x, h, offset, num_groups, per_frame)
    if transform is None and _use_cpu_path(x, h, offset):
        return residual_moments_cpu(x, h, offset, num_groups, per_frame)
    total, moments = residual_moments_reference(
        x, h, offset, num_groups=num_groups, per_frame=per_frame
    )
    return match_memory_format(x, total), moments
