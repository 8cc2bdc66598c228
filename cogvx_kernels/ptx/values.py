"""Results of scalar PTX instructions, on arrays (CTAs, threads); either axis is 1 if uniform.

Registers hold bits: 16-bit floats are uint16, 32-bit floats are float32 or uint32 by the
instruction that reads them.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

SMALLEST_NORMAL = 1.17549435e-38  # of fp32


def approximate(x: Array, ulps: int) -> Array:
    """The fp32 result of an approximate instruction, changed by up to `ulps` (0, 1 or 2).

    The change is a hash of the result's bits, so that a run can be repeated.
    """
    x = x.astype(f4)
    if not ulps:
        return x
    bits = x.view(u4)
    drawn = (bits * u4(2654435761)) >> u4(13)
    if ulps == 2:
        change = (drawn & u4(3)) + (drawn >> u4(2) & u4(1))  # 0 to 4
    else:
        change = (drawn & u4(3)) // u4(2) + (drawn & u4(1))  # 0 to 2
    changed = (bits + change - u4(ulps)).view(f4)
    result: Array = np.where(np.isfinite(x) & (abs(x) > 1e-37), changed, x)
    return result


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c: exact product, sum in fp64, rounded to fp32.

    Rounded twice only where the sum in fp64 is itself rounded to a tie of fp32, 1 in 2**29.
    """
    return (a.astype(f8) * b + c).astype(f4)


def flush(x: Array) -> Array:
    """Subnormal numbers become zeros (.ftz)."""
    result: Array = np.where(abs(x) < f4(SMALLEST_NORMAL), np.copysign(f4(0), x), x)
    return result


def divide(a: Array, b: Array) -> Array:
    """Quotient of signed integers, towards zero."""
    q = a // b
    result: Array = q + ((q * b != a) & ((a < 0) != (b < 0)))
    return result


def remainder(a: Array, b: Array) -> Array:
    """Remainder of signed integers, with the sign of a."""
    result: Array = a - divide(a, b) * b
    return result


def shift_left(a: Array, n: Array, bits: int) -> Array:
    """a << n, 0 if n is at least the width."""
    shifted = a << np.minimum(n, bits - 1).astype(a.dtype)
    result: Array = np.where(n < bits, shifted, a.dtype.type(0))
    return result


def shift_right(a: Array, n: Array, bits: int) -> Array:
    """a >> n, arithmetic for signed integers; n is cut to the width."""
    shifted: Array = a >> np.minimum(n, bits - 1).astype(a.dtype)
    if a.dtype.kind == "i":
        return shifted
    result: Array = np.where(n < bits, shifted, a.dtype.type(0))
    return result


def high_product_64(a: Array, b: Array) -> Array:
    """The upper half of unsigned 64-bit products."""
    low, half = u8(0xFFFFFFFF), u8(32)
    ah, al, bh, bl = a >> half, a & low, b >> half, b & low
    middle = (al * bl >> half) + (ah * bl & low) + (al * bh & low)
    result: Array = ah * bh + (ah * bl >> half) + (al * bh >> half) + (middle >> half)
    return result


def high_signed_product_64(a: Array, b: Array) -> Array:
    """The upper half of signed 64-bit products: a negative factor is 2^64 less than its bits."""
    a_bits, b_bits = a.astype(u8), b.astype(u8)
    high = high_product_64(a_bits, b_bits)
    high = high - np.where(a < 0, b_bits, u8(0)) - np.where(b < 0, a_bits, u8(0))
    result: Array = high.astype(i8)
    return result


def bf16_of(x: Array) -> Array:
    """Round fp32 to the bits of bf16, to nearest even."""
    bits = x.view(u4)
    rounded: Array = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    nan = np.isnan(x)
    return np.where(nan, u2(0x7FFF), rounded) if nan.any() else rounded


def of_bf16(x: Array) -> Array:
    return (x.astype(u4) << u4(16)).view(f4)


def f16_of(x: Array) -> Array:
    return x.astype(f2).view(u2)


def of_f16(x: Array) -> Array:
    return x.view(f2).astype(f4)


WIDEN = {"bf16": of_bf16, "f16": of_f16}


def pack(parts: list[Array], wide: Any) -> Array:
    """Registers side by side in a wider one, the first lowest."""
    parts = list(np.broadcast_arrays(*parts))
    bits = 8 * parts[0].dtype.itemsize
    out: Array = parts[0].astype(wide)
    for k, part in enumerate(parts[1:], 1):
        out = out | (part.astype(wide) << wide(k * bits))
    return out


def unpack(x: Array, narrow: Any) -> list[Array]:
    """The parts of a register, the lowest first."""
    bits = 8 * narrow().itemsize
    count = x.dtype.itemsize * 8 // bits
    return [(x >> x.dtype.type(k * bits)).astype(narrow) for k in range(count)]


def extract(a: Array, start: int, count: int) -> Array:
    """The bit field of `count` bits from `start` (bfe), with its sign if `a` is signed."""
    bits, kind = 8 * a.dtype.itemsize, a.dtype.type
    count = min(count, bits - start)
    if count <= 0:
        return a * kind(0)
    result: Array = (a << kind(bits - start - count)) >> kind(bits - count)
    return result


def insert(a: Array, b: Array, start: int, count: int) -> Array:
    """b with the lowest `count` bits of a from bit `start` (bfi)."""
    kind = b.dtype.type
    mask = kind((((1 << count) - 1) << start) & (2 ** (8 * b.dtype.itemsize) - 1))
    result: Array = (b & ~mask) | ((a << kind(start)) & mask)
    return result


def to_integer(x: Array, kind: Any) -> Array:
    """A float without a fraction as an integer, saturated; NaN becomes 0."""
    info = np.iinfo(kind)
    wide = np.nan_to_num(x.astype(f8), nan=0.0, posinf=np.inf, neginf=-np.inf)
    inside = np.clip(wide, float(info.min), np.nextafter(float(info.max) + 1, 0.0))
    out: Array = inside.astype(kind)
    return np.where(wide >= float(info.max), kind(info.max), out)


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """Any bitwise function of three: bit k of `table` is its value at the bits (a, b, c) of k."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), u4)
    for k in range(8):
        if table >> k & 1:
            out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


def permute(a: Array, b: Array, selectors: Array) -> Array:
    """prmt: each byte of the result is a byte of (b, a), or its sign repeated."""
    wide = a.astype(u8) | (b.astype(u8) << u8(32))
    out: Array = np.zeros((1, 1), u4)
    for k in range(4):
        s = (selectors >> u4(4 * k)) & u4(0xF)
        byte = (wide >> ((s & u4(7)).astype(u8) * u8(8))).astype(u4) & u4(0xFF)
        sign = np.where(byte >> u4(7), u4(0xFF), u4(0))
        out = out | (np.where(s & u4(8), sign, byte) << u4(8 * k))
    return out


def funnel(a: Array, b: Array, n: Array, left: bool, wrap: bool) -> Array:
    """shf: the 64 bits (b, a) shifted; the upper half of a left shift, the lower of a right one."""
    n = (n & u4(31)) if wrap else np.minimum(n, u4(32))
    wide = a.astype(u8) | (b.astype(u8) << u8(32))
    if left:
        return ((wide << n.astype(u8)) >> u8(32)).astype(u4)
    return (wide >> n.astype(u8)).astype(u4)
