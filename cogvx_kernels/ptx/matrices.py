"""Fragments of mma.sync, and the rounding of tensor cores.

Lane 4 g + t of a warp holds elements of rows g and g + 8 (of B: column g), columns by t. Arrays of
registers are (CTAs, warps, g, t, register).
"""

import numpy as np

from .values import WIDEN, Array

TF32_MASK = np.uint32(0xFFFFE000)


def left(registers: Array, kind: str) -> Array:
    """The operand A of an m16n8k*, (CTAs, warps, 16, k), in fp32."""
    x = _elements(registers, kind)
    ctas, warps, _, _, count, each = x.shape
    halves = count // 2
    # register r: row g + 8 (r & 1), column each t + e + 4 each (r >> 1)
    x = x.reshape(ctas, warps, 8, 4, halves, 2, each).transpose(0, 1, 5, 2, 4, 3, 6)
    return np.ascontiguousarray(x).reshape(ctas, warps, 16, halves * 4 * each)


def right(registers: Array, kind: str) -> Array:
    """The operand B, (CTAs, warps, k, 8), in fp32."""
    x = _elements(registers, kind)
    # register r: column g, row each t + e + 4 each r
    x = x.transpose(0, 1, 4, 3, 5, 2)
    return np.ascontiguousarray(x).reshape(*x.shape[:2], -1, 8)


def _elements(registers: Array, kind: str) -> Array:
    """Elements of registers, one more dim of 1 (tf32) or 2 (16 bits), in fp32."""
    if kind == "tf32":
        return (registers & TF32_MASK).view(np.float32)[..., None]
    return WIDEN[kind](np.ascontiguousarray(registers)[..., None].view(np.uint16))


def rounded(wide: Array) -> Array:
    """A sum in fp64 as fp32, towards zero, as tensor cores round."""
    out = wide.astype(np.float32)
    over = abs(out.astype(np.float64)) > abs(wide)
    result: Array = np.where(over, np.nextafter(out, np.float32(0)), out)
    return result


def multiply(a: Array, b: Array, sums: Array) -> list[Array]:
    """The four registers of a @ b + sums: exact products, summed in fp64, rounded once."""
    ctas, warps = sums.shape[:2]
    # register r: row g + 8 (r >> 1), column 2 t + (r & 1)
    total = sums.reshape(ctas, warps, 8, 4, 2, 2).transpose(0, 1, 4, 2, 3, 5)
    wide = np.matmul(a.astype(np.float64), b.astype(np.float64))
    out = rounded(wide + total.reshape(ctas, warps, 16, 8))
    out = out.reshape(ctas, warps, 2, 8, 4, 2).transpose(0, 1, 3, 4, 2, 5)
    out = out.reshape(ctas, warps * 32, 4)
    return [np.ascontiguousarray(out[..., k]) for k in range(4)]
