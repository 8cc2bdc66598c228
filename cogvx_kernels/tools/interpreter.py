"""Patches for Triton's interpreter: correct bfloat16, and less time for each call.

With TRITON_INTERPRET=1 Triton runs kernels on the CPU, in NumPy. Triton 3.6.0 and 3.7.1

- truncate when they store bfloat16, where GPUs round to nearest even;
- compute on bfloat16 blocks as if their bits were integers, without an error;
- warn of infinities and NaN, which are valid on a GPU;
- fail in 3.6.0 with NumPy 2.4 at a loop to a runtime bound;
- spend most time on patching `triton.language` again for every call of a device function.

`install()` fixes these; a kernel that computes on a bfloat16 block without widening it raises a
TypeError.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
)

from .. import _backend


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
        _fix_indices()
        _fix_launches()
        _save_time()
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
        if src.dtype.scalar == dst_type.scalar:
            return src
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


def _fix_indices() -> None:
    patch = triton_interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    triton_interpreter._patch_lang_tensor = patch_lang_tensor


def _fix_launches() -> None:
    patched: set[int] = set()  # modules that this launch has patched
    launch = GridExecutor.__call__

    def launch_quietly(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        with np.errstate(all="ignore"):
            launch(self, *args, **kwargs)

    def call_device_function(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            triton_interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    GridExecutor.__call__ = launch_quietly
    InterpretedFunction.__call__ = call_device_function


def _save_time() -> None:
    """Leave out work that changes no result."""
    # Triton checks integer sums and products for overflow by a second one in 64 bits, whose
    # assertion is off unless kernels are debugged.
    builder = triton_interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _cache_block_shapes()
    _skip_trivial_promotion()

    numpy_dtype = triton_interpreter._get_np_dtype  # builds a table of all types for each lookup
    dtypes: dict[str, Any] = {}

    def get_numpy_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(dtype)
        return dtypes[name]

    triton_interpreter._get_np_dtype = get_numpy_dtype


def _cache_block_shapes() -> None:
    """Cache what a block type computes from its shape: numbers, their product, text, wrappers."""
    make_type, broadcast = tl.block_type.__init__, TritonSemantic.broadcast_impl_value
    shapes: dict[tuple[Any, ...], Any] = {}
    of_scalars = tl.tuple([]), tl.constexpr(1)

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple(getattr(size, "value", size) for size in getattr(shape, "values", shape))
        if key not in shapes:
            make_type(self, element_ty, shape)
            of_tensors = tl.tuple([tl.constexpr(n) for n in key]), tl.constexpr(self.numel)
            shapes[key] = self.shape, self.numel, str(self.shape), of_tensors
        self.element_ty = element_ty
        self.shape, self.numel, text, self.of_tensors = shapes[key]
        self.name = f"<{text}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else of_scalars

    def broadcast_unless_alike(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    tl.block_type.__init__ = init_type
    tl.tensor.__init__ = init_tensor
    TritonSemantic.broadcast_impl_value = broadcast_unless_alike


def _skip_trivial_promotion() -> None:
    """Skip promotion for two tensors of one dtype that promotes to itself."""
    promote = TritonSemantic.binary_op_type_checking_impl
    closed = {id(dtype) for dtype in (tl.float32, tl.float64, tl.int32, tl.int64)}

    def promote_unless_alike(self: Any, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        if lhs.__class__ is tl.tensor and rhs.__class__ is tl.tensor:
            dtype = lhs.dtype
            if dtype is rhs.dtype and id(dtype) in closed:
                return self.broadcast_impl_value(lhs, rhs)
        return promote(self, lhs, rhs, *args, **kwargs)

    TritonSemantic.binary_op_type_checking_impl = promote_unless_alike
