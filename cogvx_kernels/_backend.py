"""Which of an op's two ways runs, the kernel or the reference. The only place that chooses.

=============  ==============  =========================  ============================
asked for      kernel can run  cannot, tensors on a CPU   cannot, tensors on a GPU
=============  ==============  =========================  ============================
"auto"         kernel          reference, silently        reference, and a warning
"kernel"       kernel          error with the reason      error with the reason
"reference"    reference       reference                  reference
=============  ==============  =========================  ============================

A reason is a sentence that an op returns, never an exception that somebody caught.
"""

import importlib.util
import os
import threading
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _checks

BACKENDS = ("auto", "kernel", "reference")

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton decides when a kernel is decorated, so a later change of the variable has no effect there.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

# Set by `tools.interpreter.install`.
interprets_bfloat16 = False

# Of tracers, which record a call of the kernel and run nothing.
TRACED = ("FakeTensor", "FunctionalTensor")

_last = threading.local()


class KernelFallbackWarning(UserWarning):
    """A GPU tensor takes the plain-torch reference because the kernel cannot run."""


def choose(backend: str, op: str, reason: str | None, x: Tensor) -> bool:
    """True if the kernel is to run, False for the reference.

    `reason` says why the kernel cannot take these arguments, or is None if it can; `x` is any of
    the op's tensors. Raises ValueError for an unknown backend and RuntimeError if `"kernel"` is
    asked for and cannot run.
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
    """Why the last op of this thread took the reference, or None if it took the kernel. Compiled
    calls choose when they are traced, and leave nothing here."""
    return getattr(_last, "reason", None)


def _chosen(reason: str | None) -> bool:
    if not torch.compiler.is_compiling():
        _last.reason = reason
    return reason is None


def triton_reason(name: str, x: Tensor) -> str | None:
    """Why no Triton kernel can run on `x`, an argument called `name`; None if one can."""
    if x.dtype not in KERNEL_DTYPES:
        names = ", ".join(_checks.dtype_name(dtype) for dtype in KERNEL_DTYPES)
        return f"{name} is {_checks.dtype_name(x.dtype)}; the kernel takes {names}"
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if x.is_meta:
        return None  # nothing runs: the op says what shapes would come out
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
    """Why only plain torch operations can take these arguments, given by name; None if a kernel
    can. Kernels read memory: they know nothing of `torch.func` transforms (grad, vmap, jvp, ...),
    of tangents of forward-mode differentiation, and of tensors that hold others, such as DTensor.
    """
    if _in_transform():
        return "a torch.func transform is active, and the kernel has rules for none"
    dual = forward_ad._current_level >= 0  # a compiler guards on what it reads here
    if dual and torch.compiler.is_compiling():
        return "a level of dual tensors is open, and a compiler does not see which have a tangent"
    for name, value in tensors.items():
        if value is None or (type(value) is Tensor and not dual):
            continue
        for x in (value,) if isinstance(value, Tensor) else value:
            # Without a __torch_dispatch__ of its own a subclass is a tensor with memory.
            wraps = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
            if wraps and type(x).__name__ not in TRACED:
                return f"{name} is a {type(x).__name__}, and the kernel takes plain tensors"
            if dual and forward_ad.unpack_dual(x).tangent is not None:
                return f"{name} has a tangent, and the kernel has no forward-mode derivative"
    return None


def _in_transform() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


# A compiler guards on transforms, and calls the function as it traces. This is what
# torch.compiler.assume_constant_result does after it has imported the compiler.
_in_transform.__dict__["_dynamo_marked_constant"] = True
