"""Backend dispatch: the kernel or the reference of an op.

=============  ==============  =========================  ============================
backend=       kernel can run  cannot, tensors on a CPU   cannot, tensors on a GPU
=============  ==============  =========================  ============================
"auto"         kernel          reference, silently        reference, and a warning
"kernel"       kernel          error with the reason      error with the reason
"reference"    reference       reference                  reference
=============  ==============  =========================  ============================

An op returns the reason as text; no exception is caught to find out. A module has its backend from
`module_backend`, not from an argument.
"""

import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _checks

BACKENDS = ("auto", "kernel", "reference")

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is decorated; a later change has no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

# Set by `tools.interpreter.install`.
interprets_bfloat16 = False

# Tensor subclasses of tracers, which record the kernel's op and do not run it.
TRACED = ("FakeTensor", "FunctionalTensor")

# Of a thread: `reason`, why its last op ran the reference, and `backend` of its new modules.
_thread = threading.local()


class KernelFallbackWarning(UserWarning):
    """Warning that a GPU tensor runs the plain-torch reference because the kernel cannot run."""


def module_backend(backend: str | None) -> AbstractContextManager[None]:
    """Context in which new modules get this backend for their ops: "auto", "kernel", "reference".

        >>> with cogvx_kernels.module_backend("reference"):
        ...     model = cogvx.ExpertTransformer(config)

    Like `with torch.device(...)` it holds for this thread and for construction alone: a module
    keeps its backend, so that models of different backends run side by side, and a block that is
    recomputed in the backward pass computes the same. Ops called directly take an argument.

    backend  None changes nothing

    Raises ValueError for an unknown backend.
    """
    if backend is not None:
        _checks.choice("module_backend", "backend", backend, BACKENDS)
    return _constructing(backend)


@contextmanager
def _constructing(backend: str | None) -> Iterator[None]:
    before = _module_backend()
    _thread.backend = backend or before
    try:
        yield
    finally:
        _thread.backend = before


def _module_backend() -> str:
    return getattr(_thread, "backend", "auto")


class OpModule(nn.Module):
    """Base of modules that call ops. `backend` is an attribute, that of `module_backend` when the
    module was constructed; "auto" outside."""

    def __init__(self) -> None:
        super().__init__()
        self.backend = _module_backend()

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


def choose(backend: str, op: str, reason: str | None, x: Tensor) -> bool:
    """Return True to run the kernel, False for the reference.

    `reason` is why the kernel cannot take these arguments, None if it can; `x` is any of the op's
    tensors. Raises ValueError for an unknown backend, RuntimeError if `backend="kernel"` cannot
    run.
    """
    _checks.choice(op, "backend", backend, BACKENDS)
    if backend == "reference":
        return _chosen('backend="reference" was requested')
    if reason is None:
        return _chosen(None)
    if backend == "kernel":
        raise RuntimeError(
            f'{op}: backend="kernel" cannot run: {reason}. Use backend="auto" or "reference".'
        )
    if x.is_cuda and not torch.compiler.is_compiling():
        warnings.warn(
            f"{op}: the plain-torch reference runs, because {reason}.",
            KernelFallbackWarning,
            stacklevel=3,
        )
    return _chosen(reason)


def last_reason() -> str | None:
    """Return why the last op of this thread ran the reference; None if it ran the kernel.

    Compiled calls choose when they are traced, and are not recorded.
    """
    return getattr(_thread, "reason", None)


def _chosen(reason: str | None) -> bool:
    if not torch.compiler.is_compiling():
        _thread.reason = reason
    return reason is None


def triton_reason(name: str, x: Tensor) -> str | None:
    """Return why no Triton kernel can run on `x`, the argument `name`; None if one can."""
    if x.dtype not in KERNEL_DTYPES:
        names = ", ".join(_checks.dtype_name(dtype) for dtype in KERNEL_DTYPES)
        return f"{name} is {_checks.dtype_name(x.dtype)}; the kernel takes {names}"
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if x.is_meta:
        return None  # nothing runs: the op's fake gives the shapes
    if INTERPRETED:
        if x.dtype is torch.bfloat16 and not interprets_bfloat16:
            return (
                f"{name} is bfloat16, which Triton's interpreter computes wrongly; "
                "cogvx_kernels.tools.interpreter.install() corrects it"
            )
        return None if x.device.type in ("cpu", "cuda") else f"{name} is on {x.device}"
    if not x.is_cuda:
        return (
            f"{name} is on {x.device}; the kernel needs a GPU, or Triton's interpreter "
            "(TRITON_INTERPRET=1, set before Python starts)"
        )
    if x.dtype is torch.bfloat16 and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 0):
            return f"{name} is bfloat16 and this GPU (sm_{capability[0]}{capability[1]}) has none"
    return None


def transform_reason(**tensors: Tensor | Sequence[Tensor] | None) -> str | None:
    """Return why only plain torch operations can take these arguments; None if a kernel can.

    Kernels read memory: they have no rules for `torch.func` transforms (grad, vmap, jvp, ...),
    forward-mode tangents, and tensors that wrap others, such as DTensor.
    """
    if _in_transform():
        return "a torch.func transform is active, and the kernel has rules for none"
    dual = forward_ad._current_level >= 0  # torch.compile guards on this read
    if dual and torch.compiler.is_compiling():
        return "a level of dual tensors is open, and a compiler does not see which have a tangent"
    for name, value in tensors.items():
        if value is None or (type(value) is Tensor and not dual):
            continue
        for x in (value,) if isinstance(value, Tensor) else value:
            # A subclass without its own __torch_dispatch__ has memory, as a plain tensor has.
            wraps = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
            if wraps and type(x).__name__ not in TRACED:
                return f"{name} is a {type(x).__name__}, and the kernel takes plain tensors"
            if dual and forward_ad.unpack_dual(x).tangent is not None:
                return f"{name} has a tangent, and the kernel has no forward-mode derivative"
    return None


def _in_transform() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


# torch.compile guards on transforms and calls the function while it traces. This is what
# torch.compiler.assume_constant_result does, without its import of the compiler.
_in_transform.__dict__["_dynamo_marked_constant"] = True
