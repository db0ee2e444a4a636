"""Dot products of the types with blocks of 32 elements: four blocks a span. See ``dots``.

They hold element i and i + 16 in the nibbles of one byte, so four blocks give two vectors of 64 in the order that
activations call HALVES: lanes 4b .. 4b+3 of the integer sums belong to block b.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from gguf.constants import GGMLQuantizationType
from llvmlite import ir
from numba.extending import intrinsic

from slimrt.ops.fast.activations import HALVES, NATURAL, PAIRS, SCALES, SCALES16
from slimrt.ops.fast.block_numbers import E2M1, IQ4
from slimrt.ops.fast.byte_products import ints, pair_products, signed_products
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.formats import Words, dot_product
from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.lanes import bits_times, joiner, picker
from slimrt.ops.fast.vectors import (
    F32X8,
    F32X16,
    I8X32,
    I8X64,
    U8X64,
    U32X16,
    Vector,
    convert,
    fma,
    load,
    pointer,
    reinterpret,
    splat,
)

__all__: list[str] = []  # the types are entered into ``formats``

Kind = GGMLQuantizationType
F16X4, F16X8, F32X4 = Vector("f16", 4), Vector("f16", 8), Vector("f32", 4)
U16X8, U32X4, U64X1 = Vector("u16", 8), Vector("u32", 4), Vector("i64", 1)


@cache
def field(features: Features, size: int, stride: int, at: int) -> Callable[[Any], Any]:
    """``lambda w: m[:4 * stride].reshape(4, stride)[:, at : at + size].reshape(-1)``: a field of four blocks, as U8.

    Four loads, or two and one instruction that picks from both, where the fields are words of 32 bits.
    """
    kind = Vector("u8", 4 * size)
    picks = features.avx512 and size % 4 == stride % 4 == at % 4 == 0

    @intrinsic
    def read(typingctx, w):
        def codegen(context, builder, signature, args):
            def words(offset: int, count: int, bits: int) -> ir.Value:
                where = pointer(builder, builder.add(args[0], ir.IntType(64)(offset)), ints(bits, count))
                return builder.load(where, align=1)

            if picks:
                last = 4 * stride - 64  # where a second load of 64 bytes ends with the span
                starts = [(block * stride + at) // 4 + word for block in range(4) for word in range(size // 4)]
                index = [i if i < 16 else i - last // 4 + 16 for i in starts]
                value = builder.shuffle_vector(
                    words(0, 16, 32), words(last, 16, 32), ir.Constant(ints(32, len(index)), index)
                )
                return builder.bitcast(value, kind.llvm)
            parts = [words(block * stride + at, size, 8) for block in range(4)]
            while len(parts) > 1:
                index = list(range(2 * parts[0].type.count))
                mask = ir.Constant(ints(32, len(index)), index)
                parts = [builder.shuffle_vector(a, b, mask) for a, b in zip(parts[::2], parts[1::2], strict=True)]
            return parts[0]

        return kind(w), codegen

    return read


_doubled = picker(0, 0, 1, 1, 2, 2, 3, 3)
_by_block = picker(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6)
_low_words, _high_words = picker(0, 2, 4, 6), picker(1, 3, 5, 7)


def _nibble_blocks(features: Features, stride: int, *, minimum: bool, high_bits: int | None) -> Words:
    """Of the types whose blocks are d, maybe m, maybe 32 high bits, and 16 bytes of two nibbles.

    The element's integer is its nibble, plus 16 where its high bit is set.
    """
    products = pair_products(features)
    scales = field(features, 4 if minimum else 2, stride, 0)
    codes = field(features, 16, stride, stride - 16)
    tops = field(features, 4, stride, high_bits or 0)

    @inline
    def pairs(w):
        """[d0, m0, d1, m1, ...] as float32."""
        if minimum:
            return convert(F32X8, reinterpret(F16X8, scales(w)))
        return convert(F32X8, _doubled(reinterpret(F16X4, scales(w))))

    @inline
    def unpack(w):
        dm = pairs(w)
        packed = codes(w)
        low = packed & splat(U8X64, 15)
        high = reinterpret(U8X64, reinterpret(U32X16, packed) >> splat(U32X16, 4)) & splat(U8X64, 15)
        if high_bits is not None:
            words = reinterpret(U16X8, tops(w))  # of each block the bits of elements 0-15, then those of 16-31
            low = low | bits_times(reinterpret(U64X1, _low_words(words)), splat(U8X64, 16))
            high = high | bits_times(reinterpret(U64X1, _high_words(words)), splat(U8X64, 16))
        return low, high, _by_block(dm), dm

    @inline
    def multiply(sums, minima, unpacked, floats, record):
        low, high, scale, dm = unpacked
        whole = products(low, load(I8X64, record + HALVES), high, load(I8X64, record + HALVES + 64))
        sums = fma(scale * load(F32X16, record + SCALES16), convert(F32X16, whole), sums)
        return sums, fma(dm, load(F32X8, record + PAIRS), minima)

    return unpack, multiply


@dot_product(Kind.Q4_0, 128, -8.0)
def _q4_0(features: Features) -> Words:
    return _nibble_blocks(features, 18, minimum=False, high_bits=None)


@dot_product(Kind.Q4_1, 128, 1.0)
def _q4_1(features: Features) -> Words:
    return _nibble_blocks(features, 20, minimum=True, high_bits=None)


@dot_product(Kind.Q5_0, 128, -16.0)
def _q5_0(features: Features) -> Words:
    return _nibble_blocks(features, 22, minimum=False, high_bits=2)


@dot_product(Kind.Q5_1, 128, 1.0)
def _q5_1(features: Features) -> Words:
    return _nibble_blocks(features, 24, minimum=True, high_bits=4)


# -- codes that stand for numbers of a table -------------------------------------------------------------------------
#
# The numbers of MXFP4 and IQ4_NL are small beside the largest: an offset that makes them positive would cost precision.


def _table_blocks(features: Features, stride: int, numbers: Any, scales: Any) -> Words:
    """Of the types whose blocks end with 16 bytes of two codes; ``scales(w)`` is d of four blocks, F32X4."""
    (size, products), codes = signed_products(features), field(features, 16, stride, stride - 16)

    @inline
    def unpack(w):
        packed = codes(w)
        low = reinterpret(I8X64, numbers(packed & splat(U8X64, 15)))
        shifted = reinterpret(U8X64, reinterpret(U32X16, packed) >> splat(U32X16, 4))
        high = reinterpret(I8X64, numbers(shifted & splat(U8X64, 15)))
        return low, high, size(low), size(high), _each_four(scales(w))

    @inline
    def multiply(sums, minima, unpacked, floats, record):
        low, high, low_size, high_size, scale = unpacked
        whole = products(low_size, low, load(I8X64, record + HALVES))
        whole = whole + products(high_size, high, load(I8X64, record + HALVES + 64))
        return fma(scale * load(F32X16, record + SCALES16), convert(F32X16, whole), sums), minima

    return unpack, multiply


_each_four = picker(*(lane // 4 for lane in range(16)))


@dot_product(Kind.MXFP4, 128)
def _mxfp4(features: Features) -> Words:
    exponents = field(features, 1, 17, 0)

    @inline
    def scales(w):
        # 2 ** (exponent - 128) in two factors: the smallest are subnormal.
        exponent = convert(U32X4, exponents(w))
        half = exponent >> splat(U32X4, 1)
        first = reinterpret(F32X4, (half + splat(U32X4, 63)) << splat(U32X4, 23))
        return first * reinterpret(F32X4, ((exponent - half) + splat(U32X4, 63)) << splat(U32X4, 23))

    return _table_blocks(features, 17, E2M1, scales)


@dot_product(Kind.IQ4_NL, 128)
def _iq4_nl(features: Features) -> Words:
    halves = field(features, 2, 18, 0)

    @inline
    def scales(w):
        return convert(F32X4, reinterpret(F16X4, halves(w)))

    return _table_blocks(features, 18, IQ4, scales)


# -- whole bytes -----------------------------------------------------------------------------------------------------

_first_two, _last_two = (picker(*[0] * 8, *[1] * 8), picker(*[2] * 8, *[3] * 8))
_two = joiner(*range(64))


@dot_product(Kind.Q8_0, 128)
def _q8_0(features: Features) -> Words:
    (size, products), scales = signed_products(features), field(features, 2, 34, 0)

    @inline
    def unpack(w):
        first = _two(load(I8X32, w + 2), load(I8X32, w + 36))
        last = _two(load(I8X32, w + 70), load(I8X32, w + 104))
        return first, last, size(first), size(last), convert(F32X4, reinterpret(F16X4, scales(w)))

    @inline
    def multiply(sums, minima, unpacked, floats, record):
        first, last, first_size, last_size, scale = unpacked
        scale = scale * load(F32X4, record + SCALES)
        a = products(first_size, first, load(I8X64, record + NATURAL))
        b = products(last_size, last, load(I8X64, record + NATURAL + 64))
        sums = fma(_first_two(scale), convert(F32X16, a), sums)
        return fma(_last_two(scale), convert(F32X16, b), sums), minima

    return unpack, multiply
