"""Dot products of the types with blocks of 256 elements, one a span. See ``dots``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gguf.constants import GGMLQuantizationType
from numba import float32

from slimrt.ops.fast.activations import HALVES, NATURAL, RECORD_BYTES, SCALES, SCALES16, SUMS, SUMS16
from slimrt.ops.fast.block_numbers import (
    IQ4,
    half,
    iq4_xs_scales,
    q2_k_numbers,
    q3_k_numbers,
    q6_k_numbers,
    scales_and_minima,
    times,
)
from slimrt.ops.fast.byte_products import byte_products, scaled_products, signed_products
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.formats import Words, dot_product
from slimrt.ops.fast.grid_points import GRID_SCALES, GRIDS, grid_part
from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.lanes import constant, joiner, picker
from slimrt.ops.fast.vectors import (
    F32X8,
    F32X16,
    I8X16,
    I8X64,
    I16X16,
    I32X16,
    U8X32,
    U8X64,
    U32X16,
    Vector,
    convert,
    fma,
    load,
    load_scalar,
    reinterpret,
    splat,
)

__all__: list[str] = []  # the types are entered into ``formats``

Kind = GGMLQuantizationType
F32X4 = Vector("f32", 4)

_eight, _sixteen = joiner(*range(8)), joiner(*range(16))
_twice = joiner(*range(32), *range(32))
_lower, _upper = picker(*range(8)), picker(*range(8, 16))


@inline
def _of_both(record, at):
    """A field of four floats of the record and of the next."""
    return _eight(load(F32X4, record + at), load(F32X4, record + RECORD_BYTES + at))


@inline
def _twofold(w):
    """32 bytes, twice."""
    once = load(U8X32, w)
    return _twice(once, once)


def _bit_movers(place: int) -> list[Any]:
    """Of 32 bytes, twice, bit 2j of the lower half and bit 2j + 1 of the upper one, moved to ``place``: a word for each
    j."""

    def mover(first: int) -> Any:
        # One of the two moves nothing.
        left, right = (
            constant(U32X16, *[max(0, sign * (place - first))] * 8, *[max(0, sign * (place - first - 1))] * 8)
            for sign in (1, -1)
        )

        @inline
        def move(twice):
            moved = (reinterpret(U32X16, twice) << left()) >> right()
            return reinterpret(U8X64, moved) & splat(U8X64, 1 << place)

        return move

    return [mover(2 * j) for j in range(4)]


# -- sub-blocks of 32 ------------------------------------------------------------------------------------------------

_quarters = tuple(picker(*[2 * j] * 8, *[2 * j + 1] * 8) for j in range(4))


def _nibbles_256(features: Features, *, high_bits: int | None, nibbles: int) -> Words:
    """Of Q4_K and Q5_K: byte i of each 32 holds elements i and, in its upper half, i + 32."""
    products = byte_products(features)
    shifts = constant(U32X16, *[0] * 8, *[4] * 8)
    quarter0, quarter1, quarter2, quarter3 = _quarters
    bit0, bit1, bit2, bit3 = _bit_movers(4)

    @inline
    def part(w, j, bit):
        codes = reinterpret(U32X16, _twofold(w + nibbles + 32 * j))
        values = reinterpret(U8X64, codes >> shifts()) & splat(U8X64, 15)
        if high_bits is not None:  # bit i of byte j belongs to element j of sub-block i
            values = values | bit(_twofold(w + high_bits))
        return values

    @inline
    def unpack(w):
        scale = scales_and_minima(w)
        parts = part(w, 0, bit0), part(w, 1, bit1), part(w, 2, bit2), part(w, 3, bit3)
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
_low_twice, _high_twice = picker(*range(8), *range(8)), picker(*range(8, 16), *range(8, 16))
_one_a_half = tuple(picker(*[2 * j] * 8, *[2 * j + 9] * 8) for j in range(4))  # of eight numbers twice
_halves_joined = joiner(*range(32))


def _sixteenths_256(features: Features, parts_of: Any, numbers: Any) -> Words:
    """``parts_of(w)``: four vectors of 64 elements; ``numbers(w)``: see ``block_numbers``."""
    products, scaled = byte_products(features), scaled_products(features)
    sixteenth0, sixteenth1, sixteenth2, sixteenth3 = _sixteenths
    pick0, pick1, pick2, pick3 = _one_a_half

    @inline
    def add_minima(minima, minimum, record):
        shares = minimum * _sixteen(load(F32X8, record + SUMS16), load(F32X8, record + RECORD_BYTES + SUMS16))
        return minima + _lower(shares) + _upper(shares)

    @inline
    def unpack_floats(w):
        d, scales, minimum = numbers(w)
        return parts_of(w), times(d, scales), minimum

    @inline
    def share(codes, x):
        return convert(F32X16, products(splat(I32X16, 0), codes, load(I8X64, x)))

    @inline
    def multiply_floats(sums, minima, unpacked, floats, record):
        parts, scale, minimum = unpacked
        minima = add_minima(minima, minimum, record)
        scale = scale * _pairwise(_of_both(record, SCALES))
        x = record + NATURAL
        sums = fma(sixteenth1(scale), share(parts[1], x + 64), fma(sixteenth0(scale), share(parts[0], x), sums))
        x += RECORD_BYTES
        sums = fma(sixteenth3(scale), share(parts[3], x + 64), fma(sixteenth2(scale), share(parts[2], x), sums))
        return sums, minima

    @inline
    def spread(twice):
        """Of eight scales, twice, those of two vectors of 64 elements, each scale for eight pairs of them."""
        return _halves_joined(pick0(twice), pick1(twice)), _halves_joined(pick2(twice), pick3(twice))

    @inline
    def unpack_whole(w):
        d, scales, minimum = numbers(w)
        wide = convert(I16X16, scales)
        return parts_of(w), spread(_low_twice(wide)) + spread(_high_twice(wide)), d, minimum

    @inline
    def add_share(total, codes, scales, x, scale):
        """Two blocks of 32 elements: to each a lane of 8 floats belongs."""
        both = _sixteen(splat(F32X8, load_scalar(float32, scale)), splat(F32X8, load_scalar(float32, scale + 4)))
        return fma(both, convert(F32X16, scaled(codes, load(I8X64, x), scales)), total)

    @inline
    def multiply_whole(sums, minima, unpacked, floats, record):
        parts, scales, d, minimum = unpacked
        minima = add_minima(minima, minimum, record)
        last = record + RECORD_BYTES
        total = add_share(splat(F32X16, 0.0), parts[0], scales[0], record + NATURAL, record + SCALES)
        total = add_share(total, parts[1], scales[1], record + NATURAL + 64, record + SCALES + 8)
        total = add_share(total, parts[2], scales[2], last + NATURAL, last + SCALES)
        total = add_share(total, parts[3], scales[3], last + NATURAL + 64, last + SCALES + 8)
        return fma(d, total, sums), minima

    return (unpack_floats, multiply_floats) if scaled is None else (unpack_whole, multiply_whole)


def _pairs_of_bits(features: Features, at: int, numbers: Any, *, high_bits: int | None) -> Words:
    """Of the types that hold elements i, i + 32, i + 64 and i + 96 of each half in a byte; ``numbers``: as above."""
    shifts0, shifts1 = (constant(U32X16, *[4 * j] * 8, *[4 * j + 2] * 8) for j in (0, 1))
    bit0, bit1, bit2, bit3 = _bit_movers(2)

    @inline
    def part(w, half, shifts, bit):
        codes = reinterpret(U32X16, _twofold(w + at + 32 * half))
        values = reinterpret(U8X64, codes >> shifts) & splat(U8X64, 3)
        if high_bits is not None:  # bit i of byte j belongs to element j of each 32
            values = values | bit(_twofold(w + high_bits))
        return values

    @inline
    def parts_of(w):
        first, last = shifts0(), shifts1()
        return part(w, 0, first, bit0), part(w, 0, last, bit1), part(w, 1, first, bit2), part(w, 1, last, bit3)

    return _sixteenths_256(features, parts_of, numbers)


@dot_product(Kind.Q2_K, 256, -1.0)
def _q2_k(features: Features) -> Words:
    return _pairs_of_bits(features, 16, q2_k_numbers, high_bits=None)


@dot_product(Kind.Q3_K, 256, -4.0)
def _q3_k(features: Features) -> Words:
    return _pairs_of_bits(features, 32, q3_k_numbers, high_bits=0)


@dot_product(Kind.TQ2_0, 256, -1.0)
def _tq2_0(features: Features) -> Words:
    @inline
    def numbers(w):
        d = half(w + 64)
        return d, splat(I8X16, 1), d

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
    def side(w, tops):
        codes, both = load(U8X64, w), reinterpret(U32X16, _twofold(tops))
        high = reinterpret(U8X64, reinterpret(U32X16, codes) >> splat(U32X16, 4))
        first = values(codes, reinterpret(U8X64, both >> low_shifts()))
        return first, values(high, reinterpret(U8X64, both >> high_shifts()))

    @inline
    def parts_of(w):
        return side(w, w + 128) + side(w + 64, w + 160)

    return _sixteenths_256(features, parts_of, q6_k_numbers)


# -- points of grids -------------------------------------------------------------------------------------------------


def _grid_points(kind: GGMLQuantizationType) -> Callable[[Features], Words]:
    def words(features: Features) -> Words:
        size, products = signed_products(features)
        part0, part1, part2, part3 = (grid_part(kind, part) for part in range(4))
        sixteenth0, sixteenth1, sixteenth2, sixteenth3 = _sixteenths
        scales = GRID_SCALES[kind]

        @inline
        def unpack(w):
            parts = part0(w), part1(w), part2(w), part3(w)
            return parts, (size(parts[0]), size(parts[1]), size(parts[2]), size(parts[3])), scales(w)

        @inline
        def share(size, numbers, x):
            return convert(F32X16, products(size, numbers, load(I8X64, x)))

        @inline
        def multiply(sums, minima, unpacked, floats, record):
            parts, sizes, scale = unpacked
            scale = scale * _pairwise(_of_both(record, SCALES))
            x, last = record + NATURAL, record + RECORD_BYTES + NATURAL
            sums = fma(sixteenth0(scale), share(sizes[0], parts[0], x), sums)
            sums = fma(sixteenth1(scale), share(sizes[1], parts[1], x + 64), sums)
            sums = fma(sixteenth2(scale), share(sizes[2], parts[2], last), sums)
            return fma(sixteenth3(scale), share(sizes[3], parts[3], last + 64), sums), minima

        return unpack, multiply

    return words


for _kind in GRIDS:
    dot_product(_kind, 256)(_grid_points(_kind))
