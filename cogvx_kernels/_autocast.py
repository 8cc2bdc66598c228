"""Casts of an op's tensors under `torch.autocast`, by the rules of torch's own layers.

Torch does not cast for the ops of this package, so each public function does, in its first lines:

products  (expert_ffn, temporal_conv) work in autocast's dtype, as F.linear and F.conv3d do;
the rest  works in the dtype to which its tensors promote, as norms, sums, products by elements and
          torch.cat do: norms keep the dtype of their input, and their parameters do not count.

Then the op runs with autocast off, because it rounds where its documentation says. Tensors of
float64 stay as they are, as in torch. Without autocast nothing is cast: the checks are strict.
"""

import functools
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def enabled(x: Any) -> bool:
    """True if autocast is on for the device of `x`; False for what is no tensor."""
    if not isinstance(x, Tensor):
        return False
    kind = x.device.type
    known = kind == "cuda" or kind == "cpu" or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def off(x: Tensor) -> torch.autocast:
    """A context in which autocast is off for the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype on the device of `x`."""
    return torch.get_autocast_dtype(x.device.type)


def promoted(*values: Any) -> torch.dtype:
    """The dtype to which those of the values that are floating-point tensors promote."""
    dtypes = [v.dtype for v in values if isinstance(v, Tensor) and v.dtype in FLOATS]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def cast(to: torch.dtype, *values: Any) -> tuple[Any, ...]:
    """The values, floating-point tensors (also of a list) in the dtype `to`; float64 stays."""
    return tuple(_cast(to, value) for value in values)


def parameters(of: torch.dtype, *values: Any) -> tuple[Any, ...]:
    """Vectors that an op takes in the dtype of its tokens, `of`, or in float32: any other is cast
    to float32, or float64 for tokens of float64."""
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
