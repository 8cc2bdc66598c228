"""Arguments of expert_adaln: checks, limits of the kernels."""

import torch
from torch import Tensor

from .. import _backend, _checks

ROWS = ("batch", "seqlen", "dim")
KERNEL_DIM = 16384  # largest row that a program holds in registers


def check_rows(op: str, x: Tensor, text_len: int, y: Tensor | None = None) -> None:
    _checks.tensor(op, "x", x, ROWS)
    _checks.integer(op, "text_len", text_len, 0, x.shape[1], "(the seqlen of x)")
    if y is not None and not _checks.alike(y, x):
        _checks.tensor(op, "y", y, ROWS)
        _checks.dtype(op, "y", y, (x.dtype,))
        _checks.same_device(op, "y", y, "x", x)
        _checks.shape(op, "y", y, x.shape, "the shape of x")


def check_modulation(op: str, x: Tensor, tokens: int, **modulation: Tensor | None) -> None:
    """Check the modulation of one modality: equal shapes and dtypes that fit its tokens."""
    first = None
    for name, value in modulation.items():
        if first is not None and _checks.alike(value, first[1]):
            continue
        if value is None:
            if tokens:
                raise ValueError(
                    f"{op}: {name} must be (batch, dim) or (batch, groups, dim) for the {tokens} "
                    f"tokens of its modality; got None"
                )
            continue
        if not isinstance(value, Tensor) or value.dim() not in (2, 3):
            raise TypeError(
                f"{op}: {name} must be a tensor (batch, dim) or (batch, groups, dim); "
                f"got {_checks.describe(value)}"
            )
        dtypes = x.dtype, torch.float32
        wanted = (x.shape[0], *value.shape[1:-1], x.shape[2])
        if not _checks.fits(value, wanted, dtypes, x):
            _checks.dtype(op, name, value, dtypes)
            _checks.same_device(op, name, value, "x", x)
            _checks.shape(
                op, name, value, wanted, "(batch, dim) or (batch, groups, dim)",
                lambda: f" for x of shape {tuple(x.shape)}",
            )  # fmt: skip
        groups = 1 if value.dim() == 2 else value.shape[1]
        if groups != 1 and (groups == 0 or tokens % groups):
            raise ValueError(
                f"{op}: {name} must have a number of groups that divides the {tokens} tokens of "
                f"its modality; got {tuple(value.shape)}"
            )
        if first is None:
            first = name, value
            continue
        _checks.shape(op, name, value, first[1].shape, f"the shape of {first[0]}")
        _checks.dtype(op, name, value, (first[1].dtype,))


def check_norm(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float
) -> None:
    _checks.vectors(op, "x", x, 2, "dim", weight=weight, bias=bias)
    _checks.choice(op, "norm", norm, ("layer", "rms"))
    _checks.positive(op, "eps", eps)


def check_inplace(op: str, x: Tensor, **others: Tensor | None) -> None:
    _checks.inplace(op, "x and keeps no graph", {"x": x}, others)


def unsupported_reason(x: Tensor, **others: Tensor | None) -> str | None:
    """Return why the kernels cannot take `x` and the others, or None."""
    if x.shape[2] > KERNEL_DIM:
        return f"x has dim {x.shape[2]}; the kernel takes at most {KERNEL_DIM}"
    return _backend.triton_reason("x", x) or _backend.transform_reason(x=x, **others)
