"""Argument validation with uniform error messages: op, argument, what was wanted, what came.

Public functions call it before any allocation or launch; the code below them does not check again.
A wrong type is a TypeError, a wrong value a ValueError.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def alike(x: Any, y: Tensor) -> bool:
    """True for a tensor of the shape, dtype and device of `y`."""
    return (
        isinstance(x, Tensor) and x.shape == y.shape and x.dtype is y.dtype and x.device == y.device
    )


def fits(x: Any, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], like: Tensor) -> bool:
    """True for a tensor of this shape, one of the dtypes, and the device of `like`.

    The other functions say what is wrong, and take longer to find out that nothing is.
    """
    return (
        isinstance(x, Tensor) and x.shape == shape and x.dtype in dtypes and x.device == like.device
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value: Any) -> str:
    """A short description of a value, for an error message."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return f"{text[:60]}… ({type(value).__name__})" if len(text) > 60 else text


def tensor(op: str, name: str, value: Any, dims: Sequence[str]) -> Tensor:
    """Check for a floating-point tensor with the dimensions named by `dims`; return it."""
    wanted = f"({', '.join(dims)})"
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {wanted}; got {describe(value)}")
    if not value.is_floating_point():
        raise TypeError(
            f"{op}: {name} must be a floating-point tensor {wanted}; got {describe(value)}"
        )
    if value.dim() != len(dims):
        raise ValueError(
            f"{op}: {name} must have {len(dims)} dimensions {wanted}; got {describe(value)}"
        )
    return value


def shape(
    op: str,
    name: str,
    value: Tensor,
    wanted: Sequence[int],
    dims: str,
    why: Callable[[], str] = lambda: "",
) -> None:
    """Check for the shape `wanted`; `dims` describes it and `why()` explains it in the message.

    `why` is a function because torch.compile cannot format the sizes while it traces.
    """
    if value.shape != wanted and tuple(value.shape) != tuple(wanted):
        raise ValueError(
            f"{op}: {name} must be {dims} = {tuple(wanted)}{why()}; got {tuple(value.shape)}"
        )


def dtype(op: str, name: str, value: Tensor, wanted: Sequence[torch.dtype]) -> None:
    if value.dtype not in wanted:
        names = " or ".join(dict.fromkeys(dtype_name(d) for d in wanted))
        raise TypeError(f"{op}: {name} must be {names}; got {dtype_name(value.dtype)}")


def same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name}, {other.device}; "
            f"got {value.device}"
        )


def vectors(
    op: str, like: str, x: Tensor, dim: int, dims: str, wide: torch.dtype = torch.float32,
    **values: Tensor | None,
) -> None:  # fmt: skip
    """Check vectors (`dims`,) as long as dim `dim` of x, of the dtype of x or `wide`; or None.

    `like` is the name of x.
    """
    length, dtypes = (x.shape[dim],), (x.dtype, wide)
    for name, value in values.items():
        if value is not None and not fits(value, length, dtypes, x):
            tensor(op, name, value, (dims,))
            dtype(op, name, value, dtypes)
            same_device(op, name, value, like, x)
            shape(
                op, name, value, length, f"({dims},)",
                lambda: f" for {like} of shape {tuple(x.shape)}",
            )  # fmt: skip


def no_grad(op: str, name: str, value: Tensor) -> None:
    """Refuse a non-differentiable argument that requires a gradient, instead of detaching it."""
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: {name} is not differentiable and must not require a gradient; "
            f"got requires_grad=True (pass {name}.detach())"
        )


def inplace(
    op: str, what: str, written: Mapping[str, Tensor], others: Mapping[str, Tensor | None]
) -> None:
    """Refuse inplace=True if a gradient is required, or if elements of a tensor overlap."""
    for name, x in {**written, **others}.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: inplace=True overwrites {what}; got {name} with requires_grad=True. "
                "Use inplace=False, or torch.no_grad()"
            )
    for name, x in written.items():
        if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(
                f"{op}: inplace=True needs {name} to have each element in a place of its own; "
                f"got strides {x.stride()} for shape {tuple(x.shape)}"
            )


def integer(op: str, name: str, value: Any, low: int, high: int, why: str) -> None:
    """Check for an integer in [low, high]; a torch.SymInt of a traced shape is one."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer; got {describe(value)}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in [{low}, {high}] {why}; got {value}")


def positive(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {describe(value)}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{op}: {name} must be positive and finite; got {value}")


def flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False; got {describe(value)}")


def choice(op: str, name: str, value: Any, wanted: Sequence[str]) -> None:
    if value not in wanted:
        names = ", ".join(f'"{w}"' for w in wanted)
        raise ValueError(f"{op}: {name} must be one of {names}; got {describe(value)}")
