"""The vector that a packed matrix is multiplied with: as float32, and as int8 for each block of 32.

A packed weight is a small integer times its block's scale, so a product of whole blocks is a sum of integer products
times two scales. The vector x is rounded to ``d * q`` with int8 q and one float32 d for each 32 elements (llama.cpp
does the same, with d in half precision), and laid out as the dot products read it, in *records* of 128 elements.

``quantized`` is the same in NumPy.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import Kernel, compile_kernel, inline
from slimrt.ops.fast.lanes import joiner
from slimrt.ops.fast.vectors import (
    F32X16,
    I8X16,
    I32X16,
    argument,
    convert,
    load,
    max_lanes,
    maximum,
    reinterpret,
    splat,
    store,
    store_scalar,
    sum_lanes,
)

__all__ = [
    "HALVES", "NATURAL", "PAIRS", "RECORD", "RECORD_BYTES", "SCALES", "SCALES16", "SUMS", "SUMS16", "activation_bytes",
    "padded", "quantize_kernel", "quantize_row", "quantized",
]  # fmt: skip

RECORD = 128  # elements
# Where things lie in a record, in bytes. q: int8 [4, 32], d: float32 [4].
NATURAL = 0  # q as it is
HALVES = 128  # q[:, :16], then q[:, 16:]: the order in which nibbles lie in a block
SCALES16 = 256  # d, each four times: float32 [16], for the 16 sums of four products in HALVES order
PAIRS = 320  # float32 [4, 2]: 0 and d * q.sum()
SCALES = 352  # d
SUMS = 368  # d * q.sum(axis=1)
SUMS16 = 384  # float32 [4, 2]: d * the sum of q[:, :16], and of q[:, 16:]
RECORD_BYTES = 448  # whole cache lines


def padded(columns: int) -> int:
    """``columns`` rounded up to two records, the longest block: what is beyond the end counts as 0."""
    return -(-columns // (2 * RECORD)) * 2 * RECORD


def activation_bytes(columns: int) -> int:
    """Size of one vector's buffer: float32 [padded(columns)], then the records."""
    return padded(columns) * 4 + padded(columns) // RECORD * RECORD_BYTES


def quantized(x: np.ndarray) -> np.ndarray:
    """x [..., n] float32, n a multiple of 32, as the kernels see it: rounded to d * q, float32."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    peak = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    return (np.rint(blocks * inverse) * (peak / np.float32(127))).reshape(x.shape)


_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to whole numbers and leaves them in the low bits


@inline
def quantize_record(floats, record):
    """Fill the record at an address from the 128 floats at another."""
    for block in range(4):
        a = load(F32X16, floats + block * 128)
        b = load(F32X16, floats + block * 128 + 64)
        zero = splat(F32X16, 0.0)
        peak = max_lanes(maximum(maximum(a, zero - a), maximum(b, zero - b)))
        scale = peak / np.float32(127)
        inverse = np.float32(127) / peak if peak > np.float32(0) else np.float32(0)
        shift = splat(F32X16, _ROUND)
        a = a * splat(F32X16, inverse) + shift
        b = b * splat(F32X16, inverse) + shift
        low = convert(I8X16, reinterpret(I32X16, a))
        high = convert(I8X16, reinterpret(I32X16, b))
        sum_low = sum_lanes(a - shift)
        sum_high = sum_lanes(b - shift)
        scale += (sum_low + sum_high) - (sum_low + sum_high)  # NaN if one of the floats is NaN or infinite, else 0
        sum_low *= scale
        sum_high *= scale
        store(record + NATURAL + block * 32, low)
        store(record + NATURAL + block * 32 + 16, high)
        store(record + HALVES + block * 16, low)
        store(record + HALVES + 64 + block * 16, high)
        store(record + SCALES16 + block * 16, four(splat(F32X16, scale), zero))
        store_scalar(record + PAIRS + block * 8, np.float32(0))
        store_scalar(record + PAIRS + block * 8 + 4, sum_low + sum_high)
        store_scalar(record + SCALES + block * 4, scale)
        store_scalar(record + SUMS + block * 4, sum_low + sum_high)
        store_scalar(record + SUMS16 + block * 8, sum_low)
        store_scalar(record + SUMS16 + block * 8 + 4, sum_high)


four: Any = joiner(0, 1, 2, 3)


@inline
def quantize_row(buffer, width):
    """Fill the records of the buffer at an address from its floats; ``width`` is the padded number of columns."""
    for record in range(width // RECORD):
        quantize_record(buffer + record * RECORD * 4, buffer + width * 4 + record * RECORD_BYTES)


@cache
def quantize_kernel(features: Features) -> Kernel:
    """Item: one vector. Args: 0 buffers, 1 bytes from one to the next, 2 padded columns."""

    def quantize(item, thread, args):
        quantize_row(argument(args, 0) + item * argument(args, 1), argument(args, 2))

    return compile_kernel(quantize, features.key)
