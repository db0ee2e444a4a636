"""Dot products of the types with blocks of 256 elements, one a span. See ``dots``."""

from __future__ import annotations

from typing import Any

from gguf.constants import GGMLQuantizationType

from slimrt.ops.fast.activations import HALVES, NATURAL, RECORD_BYTES, SCALES, SCALES16, SUMS, SUMS16
from slimrt.ops.fast.block_numbers import (
    IQ4,
    half,
    iq4_xs_scales,
    q2_k_scales_and_minima,
    q3_k_scales,
    q6_k_scales,
    scales_and_minima,
)
from slimrt.ops.fast.byte_products import byte_products, signed_products
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.formats import Words, dot_product
from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.lanes import constant, joiner, picker, where_set
from slimrt.ops.fast.vectors import (
    F32X8,
    F32X16,
    I8X64,
    I32X16,
    U8X32,
    U8X64,
    U32X16,
    Vector,
    convert,
    fma,
    load,
    reinterpret,
    splat,
)

__all__: list[str] = []  # the types are entered into ``formats``

Kind = GGMLQuantizationType
F32X4 = Vector("f32", 4)

_eight, _sixteen = joiner(*range(8)), joiner(*range(16))
_twice = joiner(*range(32), *range(32))
_lower, _upper = picker(*range(8)), picker(*range(8, 16))
# What bit 2j of each byte, in the lower half, and bit 2j + 1, in the upper half, are tested with.
_bits = tuple(constant(U8X64, *[1 << 2 * j] * 32, *[2 << 2 * j] * 32) for j in range(4))


@inline
def _of_both(record, at):
    """A field of four floats of the record and of the next."""
    return _eight(load(F32X4, record + at), load(F32X4, record + RECORD_BYTES + at))


@inline
def _twofold(w):
    """32 bytes, twice."""
    once = load(U8X32, w)
    return _twice(once, once)


# -- sub-blocks of 32 ------------------------------------------------------------------------------------------------

_quarters = tuple(picker(*[2 * j] * 8, *[2 * j + 1] * 8) for j in range(4))


def _nibbles_256(features: Features, *, high_bits: int | None, nibbles: int) -> Words:
    """Of Q4_K and Q5_K: byte i of each 32 holds elements i and, in its upper half, i + 32."""
    products = byte_products(features)
    shifts = constant(U32X16, *[0] * 8, *[4] * 8)
    quarter0, quarter1, quarter2, quarter3 = _quarters
    bit0, bit1, bit2, bit3 = _bits

    @inline
    def part(w, j, bit):
        codes = reinterpret(U32X16, _twofold(w + nibbles + 32 * j))
        values = reinterpret(U8X64, codes >> shifts()) & splat(U8X64, 15)
        if high_bits is not None:  # bit i of byte j belongs to element j of sub-block i
            values = values | where_set(_twofold(w + high_bits) & bit, splat(U8X64, 16))
        return values

    @inline
    def unpack(w):
        scale = scales_and_minima(w)
        parts = part(w, 0, bit0()), part(w, 1, bit1()), part(w, 2, bit2()), part(w, 3, bit3())
        return parts, _lower(scale), _upper(scale)

    @inline
    def share(values, x):
        return convert(F32X16, products(splat(I32X16, 0), values, load(I8X64, x)))

    @inline
    def multiply(sums, minima, unpacked, floats, record):
        parts, scale, minimum = unpacked
        minima = fma(minimum, _of_both(record, SUMS), minima)
        d = scale * _of_both(record, SCALES)
        sums = fma(quarter0(d), share(parts[0], record + NATURAL), sums)
        sums = fma(quarter1(d), share(parts[1], record + NATURAL + 64), sums)
        sums = fma(quarter2(d), share(parts[2], record + RECORD_BYTES + NATURAL), sums)
        sums = fma(quarter3(d), share(parts[3], record + RECORD_BYTES + NATURAL + 64), sums)
        return sums, minima

    return unpack, multiply


@dot_product(Kind.Q4_K, 256, -1.0)
def _q4_k(features: Features) -> Words:
    return _nibbles_256(features, high_bits=None, nibbles=16)


@dot_product(Kind.Q5_K, 256, -1.0)
def _q5_k(features: Features) -> Words:
    return _nibbles_256(features, high_bits=16, nibbles=48)


_first_each_four = picker(*(i // 4 for i in range(16)))
_last_each_four = picker(*(4 + i // 4 for i in range(16)))


@dot_product(Kind.IQ4_XS, 256)
def _iq4_xs(features: Features) -> Words:
    # Sub-blocks as in IQ4_NL: byte i of 16 has the codes of elements i and i + 16.
    size, products = signed_products(features)

    @inline
    def record_of(w):
        packed = load(U8X64, w)
        low = reinterpret(I8X64, IQ4(packed & splat(U8X64, 15)))
        shifted = reinterpret(U8X64, reinterpret(U32X16, packed) >> splat(U32X16, 4))
        high = reinterpret(I8X64, IQ4(shifted & splat(U8X64, 15)))
        return low, high, size(low), size(high)

    @inline
    def unpack(w):
        scale = iq4_xs_scales(w)
        return record_of(w + 8), record_of(w + 72), _first_each_four(scale), _last_each_four(scale)

    @inline
    def share(codes, scale, record, sums):
        low, high, low_size, high_size = codes
        whole = products(low_size, low, load(I8X64, record + HALVES))
        whole = whole + products(high_size, high, load(I8X64, record + HALVES + 64))
        return fma(scale * load(F32X16, record + SCALES16), convert(F32X16, whole), sums)

    @inline
    def multiply(sums, minima, unpacked, floats, record):
        first, last, first_scale, last_scale = unpacked
        sums = share(first, first_scale, record, sums)
        return share(last, last_scale, record + RECORD_BYTES, sums), minima

    return unpack, multiply


# -- sub-blocks of 16 ------------------------------------------------------------------------------------------------

_sixteenths = tuple(picker(*(4 * j + i // 4 for i in range(16))) for j in range(4))
_pairwise = picker(*(i // 2 for i in range(16)))


def _times_sixteenths(features: Features) -> Any:
    """``multiply`` of what is unpacked to four vectors of 64 elements and, of each 16, d and m."""
    products = byte_products(features)
    sixteenth0, sixteenth1, sixteenth2, sixteenth3 = _sixteenths

    @inline
    def share(codes, x):
        return convert(F32X16, products(splat(I32X16, 0), codes, load(I8X64, x)))

    @inline
    def multiply(sums, minima, unpacked, floats, record):
        parts, scale, minimum = unpacked
        shares = minimum * _sixteen(load(F32X8, record + SUMS16), load(F32X8, record + RECORD_BYTES + SUMS16))
        minima = minima + _lower(shares) + _upper(shares)
        scale = scale * _pairwise(_of_both(record, SCALES))
        x = record + NATURAL
        sums = fma(sixteenth1(scale), share(parts[1], x + 64), fma(sixteenth0(scale), share(parts[0], x), sums))
        x += RECORD_BYTES
        sums = fma(sixteenth3(scale), share(parts[3], x + 64), fma(sixteenth2(scale), share(parts[2], x), sums))
        return sums, minima

    return multiply


def _pairs_of_bits(features: Features, at: int, numbers: Any, *, high_bits: int | None) -> Words:
    """Of the types that hold elements i, i + 32, i + 64 and i + 96 of each half in a byte; ``numbers(w)``: d and m."""
    shifts0, shifts1 = (constant(U32X16, *[4 * j] * 8, *[4 * j + 2] * 8) for j in (0, 1))
    bit0, bit1, bit2, bit3 = _bits

    @inline
    def part(w, half, shifts, bit):
        codes = reinterpret(U32X16, _twofold(w + at + 32 * half))
        values = reinterpret(U8X64, codes >> shifts) & splat(U8X64, 3)
        if high_bits is not None:  # bit i of byte j belongs to element j of each 32
            values = values | where_set(_twofold(w + high_bits) & bit, splat(U8X64, 4))
        return values

    @inline
    def unpack(w):
        scale, minimum = numbers(w)
        first = part(w, 0, shifts0(), bit0()), part(w, 0, shifts1(), bit1())
        last = part(w, 1, shifts0(), bit2()), part(w, 1, shifts1(), bit3())
        return first + last, scale, minimum

    return unpack, _times_sixteenths(features)


@dot_product(Kind.Q2_K, 256, -1.0)
def _q2_k(features: Features) -> Words:
    return _pairs_of_bits(features, 16, q2_k_scales_and_minima, high_bits=None)


@dot_product(Kind.Q3_K, 256, -4.0)
def _q3_k(features: Features) -> Words:
    @inline
    def numbers(w):
        scale = q3_k_scales(w)
        return scale, scale

    return _pairs_of_bits(features, 32, numbers, high_bits=0)


@dot_product(Kind.TQ2_0, 256, -1.0)
def _tq2_0(features: Features) -> Words:
    @inline
    def numbers(w):
        scale = half(w + 64)
        return scale, scale

    return _pairs_of_bits(features, 0, numbers, high_bits=None)


@dot_product(Kind.Q6_K, 256, -32.0)
def _q6_k(features: Features) -> Words:
    # Two halves of 128 elements: 64 bytes of low nibbles for elements i and i + 64, 32 bytes with two bits each for
    # elements i, i + 32, i + 64 and i + 96.
    low_shifts = constant(U32X16, *[0] * 8, *[2] * 8)
    high_shifts = constant(U32X16, *[4] * 8, *[6] * 8)

    @inline
    def values(codes, tops):
        return (codes & splat(U8X64, 15)) | ((tops & splat(U8X64, 3)) << splat(U8X64, 4))

    @inline
    def parts_of(w, tops):
        codes, both = load(U8X64, w), reinterpret(U32X16, _twofold(tops))
        high = reinterpret(U8X64, reinterpret(U32X16, codes) >> splat(U32X16, 4))
        first = values(codes, reinterpret(U8X64, both >> low_shifts()))
        return first, values(high, reinterpret(U8X64, both >> high_shifts()))

    @inline
    def unpack(w):
        scale = q6_k_scales(w)
        return parts_of(w, w + 128) + parts_of(w + 64, w + 160), scale, scale

    return unpack, _times_sixteenths(features)
