"""Patches of Triton's interpreter: bfloat16 as on a GPU, and shortcuts with the same results."""

import inspect
import itertools
import math

import pytest
import torch

from cogvx_kernels import _backend

if not _backend.INTERPRETED:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import TensorHandle, interpreter_semantic

from cogvx_kernels.tools import interpreter_speed
from tests.harness import known_bad_kernels

DTYPES = {
    tl.int1: np.bool_,
    tl.int8: np.int8,
    tl.int32: np.int32,
    tl.uint32: np.uint32,
    tl.int64: np.int64,
    tl.float16: np.float16,
    tl.float32: np.float32,
    tl.float64: np.float64,
}
POINTER = tl.pointer_type(tl.float32)
SHAPES = ((), (4,), (4, 1), (1, 2), (2, 4))
NUMBERS = (0, 1, -3, 7, 2**31, -(2**31), 2**40, 2.5, 0.1, 1e-40, 1e300, math.inf, math.nan, True)
OPERATORS = (
    *interpreter_speed.ARITHMETIC,
    *interpreter_speed.COMPARISONS,
    *interpreter_speed.DIVISIONS,
    *interpreter_speed.LOGIC,
)


# 0.1 is another number in fp32; the second is rounded up in fp16, but not by way of fp32.
FLOATS = 0.1, 1 + 2**-11 + 2**-40, math.inf, -7.5, 3.0, -0.0, 1e-3, 5e4


def tensor(dtype, shape):
    """Integers of both signs; for floats FLOATS, for a pointer addresses."""
    values = np.arange(1, 1 + math.prod(shape)).reshape(shape or (1,))
    if dtype is POINTER:
        data = (values * 64).astype(np.uint64)
    elif dtype.is_floating():
        data = np.array(FLOATS)[values - 1].astype(DTYPES[dtype])
    else:
        data = (values * (-1) ** values * 3).astype(DTYPES[dtype])
    return tl.tensor(
        TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype
    )


def result(function, *args):
    """Type, dtype of NumPy and bits, or the kind of error."""
    try:
        with np.errstate(all="ignore"):
            found = function(*args)
    except Exception as error:
        return type(error)
    results = found if isinstance(found, tuple) else (found,)
    return [
        (
            str(x.type),
            str(x.dtype),
            [int(n) for n in x.shape],
            x.numel.value,
            np.asarray(x.handle.data).dtype,
            np.asarray(x.handle.data).tobytes(),
        )
        for x in results
    ]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_the_results_of_triton(name):
    compared = 0
    for attribute in (f"__{name}__", f"__r{name}__"):
        short = getattr(tl.tensor, attribute)
        original = inspect.unwrap(short)
        assert original is not short
        for dtype, shape in itertools.product((*DTYPES, POINTER), SHAPES):
            x = tensor(dtype, shape)
            others = [tensor(d, s) for d, s in itertools.product(DTYPES, SHAPES)]
            for other in (*others, *NUMBERS, *map(tl.constexpr, NUMBERS)):
                expected = result(original, x, other)
                assert result(short, x, other) == expected, (attribute, x.type, other)
                compared += isinstance(expected, list)
    assert compared > 100


def test_casts_and_broadcasts_have_the_results_of_triton():
    cast, broadcast = TritonSemantic.cast, TritonSemantic.broadcast_impl_value
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        x = tensor(dtype, shape)
        for wanted in DTYPES:
            expected = result(inspect.unwrap(cast), interpreter_semantic, x, wanted)
            assert result(cast, interpreter_semantic, x, wanted) == expected
        for other in (tensor(d, s) for d, s in itertools.product((tl.int1, POINTER), SHAPES)):
            expected = result(inspect.unwrap(broadcast), interpreter_semantic, x, other)
            assert result(broadcast, interpreter_semantic, x, other) == expected


def test_new_dims_are_those_of_triton():
    for dtype, shape in itertools.product((tl.float32, POINTER), SHAPES):
        x, index = tensor(dtype, shape), tl.tensor.__getitem__
        for slices in itertools.product((None, slice(None)), repeat=3):
            for some in (slices, slices[:2], slices[:1]):
                if shape and some.count(slice(None)) == len(shape):
                    assert result(index, x, some) == result(inspect.unwrap(index), x, some)


def test_bfloat16_rounds_like_torch():
    specials = [
        math.nan,
        math.inf,
        -math.inf,
        0.0,
        -0.0,
        3.4e38,
        -3.4e38,
        1e-40,
        -1e-45,
        1.00390625,
    ]
    bits = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32)
    x = torch.cat([torch.tensor(specials), bits.view(torch.float32), torch.randn(1000)])
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    block = 1 << (x.numel() - 1).bit_length()
    known_bad_kernels.cast_kernel[(1,)](x, y, x.numel(), BLOCK=block)
    number = ~x.isnan()
    expected = x.to(torch.bfloat16)
    assert torch.equal(y[number].view(torch.int16), expected[number].view(torch.int16))
    assert y[~number].isnan().all() and number.sum() > 99_000
    widened = torch.empty_like(x)
    known_bad_kernels.cast_kernel[(1,)](expected, widened, x.numel(), BLOCK=block)
    assert torch.equal(widened[number], expected[number].float())


def test_arithmetic_on_bfloat16_blocks_is_refused() -> None:
    known_bad_kernels.double_kernel[(1,)](x := torch.ones(4), BLOCK=4)
    assert x.tolist() == [2.0] * 4
    with pytest.raises(Exception, match=r"arithmetic on a bfloat16 block: widen it"):
        known_bad_kernels.double_kernel[(1,)](torch.ones(4, dtype=torch.bfloat16), BLOCK=4)
