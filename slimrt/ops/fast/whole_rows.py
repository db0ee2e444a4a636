"""Floats to rows of whole numbers, as ``whole_products`` multiplies them: the blocks' scales, and rounding."""

from __future__ import annotations

import numpy as np
from numba import float32

from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.lanes import stack
from slimrt.ops.fast.vectors import (
    F32X16,
    I16X16,
    I32X16,
    convert,
    fma,
    load,
    load_scalar,
    max_lanes,
    maximum,
    reinterpret,
    splat,
    store,
    store_scalar,
    sum_lanes,
)
from slimrt.ops.fast.whole_products import BLOCK, SCALE_BYTES

__all__ = ["LEFT_LENGTH", "RIGHT_LENGTH", "round_numbers", "whole_cast", "whole_norm"]

# The products of two blocks, as vectors, must stay below 2**31; rounding makes one of 256 numbers at most 8 longer, and
# the floats that find its length err by less than one. Weights' lengths leave no number above 32767, so that their
# largest need not be looked for; that of the left is the rest.
LEFT_LENGTH, RIGHT_LENGTH = 65510.0, 32765.0
_LARGEST = 32767.0
_TINY = 1e-30  # blocks without a larger number count as 0: their scales could not be inverted
_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to whole numbers and leaves them in the low bits


@inline
def round_numbers(floats, count, factor, out):
    """``out[:count] = np.rint(floats * factor)``: float32 [count] to int16, count a multiple of 16."""
    times, shift = splat(F32X16, factor), splat(F32X16, _ROUND)
    for i in range(0, count, 16):
        whole = reinterpret(I32X16, load(F32X16, floats + 4 * i) * times + shift)
        store(out + 2 * i, convert(I16X16, whole))


@inline
def _round_block(floats, count, out):
    """Writes float32 [count], count a multiple of 16 of at most BLOCK, as int16 to the address ``out``; returns their
    scale: NaN if one of them is NaN or infinite."""
    zero = splat(F32X16, 0.0)
    peaks, squares = zero, zero
    for i in range(0, count, 16):
        a = load(F32X16, floats + 4 * i)
        peaks = maximum(peaks, maximum(a, zero - a))
    peak = max_lanes(peaks)
    inverse = float32(1.0) / peak if peak > float32(_TINY) else float32(0.0)
    for i in range(0, count, 16):  # of numbers up to 1: the squares of large ones would overflow
        a = load(F32X16, floats + 4 * i) * splat(F32X16, inverse)
        squares = fma(a, a, squares)
    length = float32(np.sqrt(sum_lanes(squares)) * float32(1.0 / LEFT_LENGTH))
    if length < float32(1.0 / _LARGEST):
        length = float32(1.0 / _LARGEST)
    scale = float32(peak * length)
    round_numbers(floats, count, float32(inverse / length), out)
    return float32(scale + (length - length))


_block_of_floats = stack(BLOCK * 4)


@inline
def whole_cast(x, n, out, padded):
    """A row of whole numbers at ``out`` [padded] from x float32 [n], zeros behind them; padded is a multiple of 16."""
    ends = _block_of_floats()
    for start in range(0, padded, BLOCK):
        count = min(BLOCK, padded - start)
        source = x + 4 * start
        if start + count > n:
            for i in range(count):
                value = float32(0.0)
                if start + i < n:
                    value = load_scalar(float32, x + 4 * (start + i))
                store_scalar(ends + 4 * i, value)
            source = ends
        to = out + 2 * start + start // BLOCK * SCALE_BYTES
        store_scalar(to, _round_block(source, count, to + SCALE_BYTES))


@inline
def whole_norm(x, gain, n, factor, out, padded):
    """``whole_cast`` of x * factor * gain [n]."""
    values = _block_of_floats()
    for start in range(0, padded, BLOCK):
        count = min(BLOCK, padded - start)
        whole = min(max((n - start) // 16 * 16, 0), count)
        for i in range(0, whole, 16):
            at = 4 * (start + i)
            store(values + 4 * i, load(F32X16, x + at) * splat(F32X16, factor) * load(F32X16, gain + at))
        for i in range(whole, count):
            value = float32(0.0)
            if start + i < n:
                at = 4 * (start + i)
                value = float32(load_scalar(float32, x + at) * factor * load_scalar(float32, gain + at))
            store_scalar(values + 4 * i, value)
        to = out + 2 * start + start // BLOCK * SCALE_BYTES
        store_scalar(to, _round_block(values, count, to + SCALE_BYTES))
