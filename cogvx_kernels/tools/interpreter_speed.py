"""Less time for each call of Triton's interpreter, in whose kernels a call takes most of the time.

`install()` changes no result: an operator on operands of like dtypes calls NumPy's function, and
all else goes through Triton's own code. `tests/test_interpreter.py` compares both.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import TensorHandle

NUMPY = {
    tl.float16: np.float16,
    tl.float32: np.float32,
    tl.float64: np.float64,
    tl.int32: np.int32,
    tl.int64: np.int64,
}
FLOATS = tl.float32, tl.float64
INTEGERS = tl.int32, tl.int64

Function = Callable[[Any, Any], Any]


def _integer_divide(a: Any, b: Any) -> Any:
    return (a - np.fmod(a, b)) // b  # rounds to zero


ARITHMETIC: Mapping[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
}
COMPARISONS: Mapping[str, Function] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
DIVISIONS: Mapping[str, Function] = {"floordiv": _integer_divide, "mod": np.fmod}
LOGIC: Mapping[str, Function] = {"and": np.bitwise_and, "or": np.bitwise_or}

# Dtypes by identity, because the hash of one takes longer than the rest of an operator.
_LIMITS = {id(tl.int32): 2**31, **dict.fromkeys(map(id, (tl.int64, *FLOATS)), 2**63)}
_MAKERS = {id(dtype): make for dtype, make in NUMPY.items()}
# (dtype, shape) -> type of a block, its tensors' shape and number of elements
_blocks: dict[tuple[int, tuple[int, ...]], tuple[tl.block_type, Any, Any]] = {}
_SCALAR = tl.tuple([]), tl.constexpr(1)


def install() -> None:
    """Patch `triton.language`, after `interpreter` has, and its semantics."""
    # Triton checks integer sums and products for overflow by a second one in 64 bits, whose
    # assertion is off unless kernels are debugged.
    builder = triton_interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    tl.str_to_ty = functools.cache(tl.str_to_ty)  # one object for each type of pointers
    _skip_checks_of_handles()
    _cache_block_shapes()
    _cache_numpy_dtypes()
    _shorten_operators()
    _shorten_indexing()
    TritonSemantic.cast = _shortened_cast(TritonSemantic.cast)
    TritonSemantic.broadcast_impl_value = _shortened_broadcast(TritonSemantic.broadcast_impl_value)


def _tensor(data: np.ndarray, dtype: Any, is_block: bool) -> tl.tensor:
    """A tensor of these elements; a scalar has an array of one."""
    result = tl.tensor.__new__(tl.tensor)
    result.handle, result.dtype = TensorHandle(data, dtype), dtype
    if not is_block:
        result.type = dtype
        result.shape, result.numel = _SCALAR
        return result
    known = _blocks.get((id(dtype), data.shape))
    if known is None:
        block = tl.block_type(dtype, list(data.shape))  # which keeps the dtype
        known = _blocks[id(dtype), data.shape] = block, *block.of_tensors
    result.type, result.shape, result.numel = known
    return result


def _skip_checks_of_handles() -> None:
    def init(self: Any, data: np.ndarray, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr

    TensorHandle.__init__ = init


def _cache_block_shapes() -> None:
    """Cache what a block type computes from its shape: numbers, their product, text, wrappers."""
    make_type = tl.block_type.__init__
    shapes: dict[tuple[Any, ...], Any] = {}

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
        self.shape, self.numel = type.of_tensors if type.is_block() else _SCALAR

    tl.block_type.__init__ = init_type
    tl.tensor.__init__ = init_tensor


def _cache_numpy_dtypes() -> None:
    numpy_dtype = triton_interpreter._get_np_dtype  # builds a table of all types for each lookup
    dtypes: dict[str, Any] = {}

    def get_numpy_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(dtype)
        return dtypes[name]

    triton_interpreter._get_np_dtype = get_numpy_dtype


# --- operators -------------------------------------------------------------------------------


def _shorten_operators() -> None:
    numbers = _results(FLOATS) | _results(INTEGERS)
    for functions, results in (
        (ARITHMETIC, numbers),
        (COMPARISONS, numbers),
        (DIVISIONS, _results(INTEGERS)),
        (LOGIC, {(id(tl.int1), id(tl.int1)): tl.int1}),
    ):
        for name, function in functions.items():
            compares = functions is COMPARISONS
            for attribute, swaps in ((f"__{name}__", False), (f"__r{name}__", True)):
                original = getattr(tl.tensor, attribute)
                short = _shortened(original, function, results, compares, swaps)
                setattr(tl.tensor, attribute, functools.update_wrapper(short, original))
    tl.tensor.__add__ = _shortened_pointers(tl.tensor.__add__)


def _results(like: tuple[Any, Any]) -> dict[tuple[int, int], Any]:
    """The wider dtype of each pair."""
    narrow, wide = like
    return {(id(a), id(b)): narrow if a is b is narrow else wide for a in like for b in like}


def _shortened(
    original: Callable[..., Any],
    function: Function,
    results: Mapping[tuple[int, int], Any],
    compares: bool,
    swaps: bool,
) -> Callable[..., Any]:
    def operator(self: Any, other: Any) -> Any:
        ours, is_block = self.handle.data, self.type.is_block()
        kind = other.__class__
        if kind is tl.tensor:
            dtype = results.get((id(self.dtype), id(other.dtype)))
            if dtype is None:
                return original(self, other)
            theirs, is_block = other.handle.data, is_block or other.type.is_block()
        else:
            number, dtype = other.value if kind is tl.constexpr else other, self.dtype
            if (id(dtype), id(dtype)) not in results or not _fits(number, dtype, compares):
                return original(self, other)
            theirs = _MAKERS[id(dtype)](number)
        data = function(theirs, ours) if swaps else function(ours, theirs)
        return _tensor(data, tl.int1 if compares else dtype, is_block)

    return operator


def _fits(number: Any, dtype: Any, compares: bool) -> bool:
    """True if Triton would give the number this dtype; it compares a float as fp32, if it can."""
    if number.__class__ is int:
        limit = _LIMITS.get(id(dtype), 0)
        return -limit <= number < limit
    return number.__class__ is float and (
        dtype is tl.float64 and not compares or dtype is tl.float32 and _is_float32(number)
    )


def _is_float32(number: float) -> bool:
    return 2.0**-126 <= abs(number) <= 2.0**127 or number == 0


def _shortened_pointers(add: Callable[..., Any]) -> Callable[..., Any]:
    """Addition, with a shortcut for a pointer and an offset."""
    sizes: dict[int, tuple[Any, int]] = {}  # of a pointer's type, kept, and its elements

    def add_offsets(self: Any, other: Any) -> Any:
        if self.dtype.__class__ is not tl.pointer_type or other.__class__ is not tl.tensor:
            return add(self, other)
        if other.dtype is not tl.int32 and other.dtype is not tl.int64:
            return add(self, other)
        if id(self.dtype) not in sizes:
            bits = self.dtype.element_ty.primitive_bitwidth
            sizes[id(self.dtype)] = self.dtype, max(1, bits // 8)
        size = sizes[id(self.dtype)][1]
        data = self.handle.data + size * other.handle.data.astype(np.uint64)
        return _tensor(data, self.dtype, self.type.is_block() or other.type.is_block())

    return functools.update_wrapper(add_offsets, add)


def _shorten_indexing() -> None:
    index = tl.tensor.__getitem__

    def getitem(self: Any, slices: Any) -> Any:
        """With new and whole dims, as in x[:, None]."""
        if slices.__class__ is tuple and self.type.is_block():
            if all(i is None or i.__class__ is slice and i == slice(None) for i in slices):
                return _tensor(self.handle.data[slices], self.dtype, True)
        return index(self, slices)

    tl.tensor.__getitem__ = functools.update_wrapper(getitem, index)


# --- casts and broadcasts --------------------------------------------------------------------


def _shortened_cast(cast: Callable[..., Any]) -> Callable[..., Any]:
    numbers = *FLOATS, *INTEGERS
    short = {(id(a), id(b)) for a in (*numbers, tl.int1) for b in numbers}
    short |= {(id(tl.float16), id(tl.float32)), (id(tl.float32), id(tl.float16))}

    def cast_at_once(self: Any, input: Any, dst_ty: Any, rounding: str | None = None) -> Any:
        dtype = dst_ty.scalar
        if input.dtype is dtype:
            return input
        if rounding or (id(input.dtype), id(dtype)) not in short:
            return cast(self, input, dst_ty, rounding)
        data = input.handle.data.astype(_MAKERS[id(dtype)])
        return _tensor(data, dtype, input.type.is_block())

    return functools.update_wrapper(cast_at_once, cast)


def _shortened_broadcast(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    shapes: dict[tuple[Any, Any], tuple[int, ...]] = {}

    def broadcast_at_once(self: Any, lhs: Any, rhs: Any) -> Any:
        blocks = lhs.type.is_block(), rhs.type.is_block()
        if not any(blocks) or (all(blocks) and lhs.type.shape is rhs.type.shape):
            return lhs, rhs
        pair = lhs.handle.data.shape, rhs.handle.data.shape
        if pair not in shapes:
            shapes[pair] = tuple(n for n in broadcast(self, lhs, rhs)[0].type.shape)
        shape = shapes[pair]
        return _stretch(lhs, shape), _stretch(rhs, shape)

    return functools.update_wrapper(broadcast_at_once, broadcast)


def _stretch(x: Any, shape: tuple[int, ...]) -> Any:
    if x.type.is_block() and x.handle.data.shape == shape:
        return x
    data = np.empty(shape, x.handle.data.dtype)
    data[...] = x.handle.data
    return _tensor(data, x.dtype, True)
