"""Patches for Triton's interpreter: correct bfloat16, and (`interpreter_speed`) less time.

With TRITON_INTERPRET=1 Triton runs kernels on the CPU, in NumPy. Triton 3.6.0 and 3.7.1

- truncate when they store bfloat16, where GPUs round to nearest even;
- compute on bfloat16 blocks as if their bits were integers, without an error;
- warn of infinities and NaN, which are valid on a GPU;
- fail in 3.6.0 with NumPy 2.4 at a loop to a runtime bound;
- spend most time on patching `triton.language` again for every call of a device function.

`install()` fixes these; a kernel that computes on a bfloat16 block without widening it raises a
TypeError.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
)

from .. import _backend
from . import interpreter_speed


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of fp32 values rounded to bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(x))


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bfloat16 bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Patch the interpreter of this process; a second call has no effect."""
    if not hasattr(InterpreterBuilder.cast_impl, "fixed"):
        _fix_casts()
        _fix_arithmetic()
        _fix_launches()
        interpreter_speed.install()
        _backend.interprets_bfloat16 = True


def _is_bfloat16(x: TensorHandle) -> bool:
    return x.data.dtype == np.uint16 and x.dtype.scalar == tl.bfloat16


def _fix_casts() -> None:
    original = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if _is_bfloat16(src) and dst_type.scalar.is_floating():
            src = TensorHandle(widen_bfloat16(src.data), tl.float32)
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar.is_floating():
            narrow = src.data.astype(np.float32)
            return TensorHandle(round_to_bfloat16(narrow), tl.bfloat16)
        if src.dtype.scalar == dst_type.scalar and src.data.dtype != np.bool_:
            return src  # a comparison's handle has the dtype of its operands
        return original(self, src, dst_type)

    cast_impl.fixed = True  # type: ignore[attr-defined]
    InterpreterBuilder.cast_impl = cast_impl


def _fix_arithmetic() -> None:
    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        def refuse_bfloat16(self: Any, *args: Any) -> Any:
            for x in args:
                if x.__class__ is TensorHandle and _is_bfloat16(x):
                    raise TypeError("arithmetic on a bfloat16 block: widen it to tl.float32 first")
            return original(self, *args)

        return refuse_bfloat16

    for name in ("binary_op", "unary_op"):
        setattr(InterpreterBuilder, name, refusing(getattr(InterpreterBuilder, name)))

    original_dot = InterpreterBuilder.create_dot

    def dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        a, b = (
            TensorHandle(widen_bfloat16(x.data), tl.float32) if _is_bfloat16(x) else x
            for x in (a, b)
        )
        return original_dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = dot


def _fix_launches() -> None:
    """Patch `triton.language` now, not for each launch and device function; ignore NaN."""

    def patch_attribute(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = triton_interpreter.interpreter_semantic
            return member(*args, **kwargs)

        scope.set_attr(owner, name, call)

    triton_interpreter._patch_attr = patch_attribute
    everything = eval("lambda: None", {"tl": tl, "core": tl.core})
    triton_interpreter._patch_lang(everything)
    triton_interpreter._patch_lang = lambda fn: triton_interpreter._LangPatchScope()
    # Triton 3.6.0's, at a loop to a runtime bound, fails with NumPy 2.4.
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    launch = GridExecutor.__call__

    def launch_quietly(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):
            launch(self, *args, **kwargs)

    def call_device_function(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    GridExecutor.__call__ = launch_quietly
    InterpretedFunction.__call__ = call_device_function
