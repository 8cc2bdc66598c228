"""Helpers shared by the adapters: op calls, checks of modules, joint sequences."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _backend
from .._backend import transform_reason
from ..module_utils import has_hooks
from .state import Patch

T = TypeVar("T")

# Reason for the reference: ops that `patch` does in plain torch.
NO_KERNEL = "it is plain torch, and has no kernel"


class Calls:
    """Calls of ops in one forward, with the backend of the patch.

    Attributes:
        reason: why one of them took the reference; None if all took the kernel.
    """

    def __init__(self, patch: Patch) -> None:
        self.backend = patch.backend
        self.reason: str | None = None

    def __call__(self, op: Callable[..., T], *args: Any, **options: Any) -> T:
        out = op(*args, backend=self.backend, **options)
        if not torch.compiler.is_compiling():
            self.reason = self.reason or _backend.last_reason()
        return out


# --- checks: a reason for the model's own forward, or None -----------------------------------


def modified(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Reason why the weights of a module may not be read without calling it, or None.

    Adapters and quantization put their own modules in the place of plain ones, or add hooks that
    load the weights only for the call.
    """
    if type(module) is not kind:
        return f"a {kind.__name__} is a {type(module).__name__}"
    if has_hooks(module):
        return f"a {kind.__name__} has hooks"
    return None


def unknown_norm(norm: Any, *names: str) -> str | None:
    """Reason why a norm, and the one within it, are not of these classes, unmodified; or None."""
    for name in names:
        cls = type(norm)
        if cls.__name__ != name or not cls.__module__.startswith(("diffusers.", "torch.nn.")):
            return f"a {name} is a {cls.__name__}"
        reason = modified(norm, cls)
        if reason:
            return reason
        norm = getattr(norm, "norm", None)
    return None


def unfit(emb: Tensor, *streams: Tensor) -> str | None:
    """Reason why an embedding (batch, dim) does not modulate these streams (batch, seqlen, dim) in
    their dtype, or one of them is no plain tensor; or None."""
    for x in streams:
        if emb.ndim != 2 or x.ndim != 3 or emb.shape[0] != x.shape[0]:
            return f"temb is {tuple(emb.shape)} and tokens are {tuple(x.shape)}"
        if torch.promote_types(emb.dtype, x.dtype) != x.dtype:
            return f"temb is {emb.dtype} and tokens are {x.dtype}"
    return transform_reason(temb=emb, tokens=streams)


# --- tensors ---------------------------------------------------------------------------------


def affine(norm: nn.LayerNorm) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias."""
    return norm.weight, norm.bias


def joint(first: Tensor, second: Tensor) -> Tensor:
    """torch.cat([first, second], dim=1) of (batch, seqlen, dim): without a copy if both are views
    of one tensor and no gradient is recorded."""
    recorded = torch.is_grad_enabled() and (first.requires_grad or second.requires_grad)
    if recorded or torch.compiler.is_compiling() or not _adjacent(first, second):
        return torch.cat([first, second], dim=1)
    shape = (first.shape[0], first.shape[1] + second.shape[1], first.shape[2])
    return first.as_strided(shape, first.stride(), first.storage_offset())


def _adjacent(first: Tensor, second: Tensor) -> bool:
    return (
        transform_reason(first=first, second=second) is None  # else there is no storage to compare
        and first.dtype == second.dtype
        and first.shape[0] == second.shape[0]
        and first.shape[2] == second.shape[2]
        and first.stride() == second.stride()
        and first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.storage_offset() + first.shape[1] * first.stride(1) == second.storage_offset()
    )
