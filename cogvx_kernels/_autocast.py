"""Casts of an op's tensors under `torch.autocast`, by the rules of torch's own layers.

Torch does not cast for custom ops, so each public function does, in its first lines:

matrix products  (expert_ffn, temporal_conv) run in autocast's dtype, as F.linear and F.conv3d do;
other ops        run in the dtype to which their tensors promote, as norms, elementwise ops and
                 torch.cat do: a norm keeps the dtype of its input, whatever its parameters' is.

The op then runs with autocast off, because it rounds where its documentation says. float64 stays
float64, as in torch. Without autocast nothing is cast and the checks are strict.
"""

import functools
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def enabled(x: Any) -> bool:
    """True if autocast is on for the device of `x`; False if `x` is not a tensor."""
    if not isinstance(x, Tensor):
        return False
    if x.is_cuda:
        return torch.is_autocast_enabled("cuda")
    kind = x.device.type
    known = kind == "cpu" or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def off(x: Tensor) -> torch.autocast:
    """A context with autocast off for the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype for the device of `x`."""
    return torch.get_autocast_dtype(x.device.type)


def promoted(*values: Any) -> torch.dtype:
    """The dtype to which the floating-point tensors among the values promote."""
    dtypes = [v.dtype for v in values if isinstance(v, Tensor) and v.dtype in FLOATS]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def cast(to: torch.dtype, *values: Any) -> tuple[Any, ...]:
    """The values, with floating-point tensors, also those in lists, cast to `to`; float64 stays."""
    return tuple(_cast(to, value) for value in values)


def parameters(of: torch.dtype, *values: Any) -> tuple[Any, ...]:
    """Parameters of an op, which takes them in the dtype `of` of its tokens or in float32.

    Other dtypes are cast to float32, or to float64 for tokens in float64.
    """
    wide = torch.promote_types(of, torch.float32)
    return tuple(
        value if isinstance(value, Tensor) and value.dtype is of else _cast(wide, value)
        for value in values
    )


def _cast(to: torch.dtype, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_cast(to, each) for each in value]
    if isinstance(value, Tensor) and value.dtype in FLOATS and value.dtype is not torch.float64:
        return value.to(to)
    return value
