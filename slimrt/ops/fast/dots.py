"""One dot product for each type of packed weights: all that the products of few rows know about a format.

A matrix row is cut into *spans* of whole blocks. ``unpack(w)`` makes vectors of the span at address w, and
``multiply(sums, minima, unpacked, floats, record)`` adds what it contributes, to two vectors: with a weight of d * q +
offset * m (d, m of its block, or sub-block; m is d itself where the type stores none), x of the activations and every
lane a partial sum,

    sums   += (d * q * x).sum()        minima += (m * x).sum()        row @ x == sums.sum() + offset * minima.sum()

The types of 32 elements a block hold element i and i + 16 in the nibbles of one byte, so four blocks give two
vectors of 64 in the order that activations call HALVES: lanes 4b .. 4b+3 of the integer sums belong to block b.

A span may reach past the end of its row: there x is 0, and w the next row, or a copy of the end with zeros behind it.
The block formats are those of ggml (ggml-common.h); ``gguf.quants`` is the same in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from llvmlite import ir
from numba.extending import intrinsic

from slimrt.ops.fast.activations import (
    HALVES,
    NATURAL,
    PAIRS,
    RECORD_BYTES,
    SCALES,
    SCALES16,
    SUMS,
    SUMS16,
)  # fmt: skip
from slimrt.ops.fast.byte_products import byte_products, ints, pair_products, signed_products
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.lanes import bits_times, constant, joiner, picker, table, where_set
from slimrt.ops.fast.vectors import (
    F32X8,
    F32X16,
    I8X16,
    I8X32,
    I8X64,
    I32X16,
    U8X16,
    U8X32,
    U8X64,
    Vector,
    convert,
    fma,
    load,
    pointer,
    reinterpret,
    splat,
)

__all__ = ["FORMATS", "Format", "format_of", "scales_and_minima"]

Kind = GGMLQuantizationType

F16X1, F16X2, F16X4, F16X8, F16X16 = (Vector("f16", lanes) for lanes in (1, 2, 4, 8, 16))
F32X1, F32X2, F32X4 = (Vector("f32", lanes) for lanes in (1, 2, 4))
U8X4 = Vector("u8", 4)
U32X2, U32X4, U32X16 = (Vector("u32", lanes) for lanes in (2, 4, 16))
U16X8, U16X16, U64X1 = Vector("u16", 8), Vector("u16", 16), Vector("i64", 1)


@dataclass(frozen=True)
class Format:
    """How rows of one type are multiplied: see the module."""

    kind: GGMLQuantizationType
    span: int  # elements
    nbytes: int  # of a span
    offset: float
    quantized: bool  # whether it reads records; else the floats
    unpack: Callable[..., Any]
    multiply: Callable[..., Any]


Words = tuple[Any, Any]  # unpack and multiply
_MAKERS: dict[GGMLQuantizationType, tuple[int, float, bool, Callable[[Features], Words]]] = {}
FORMATS = _MAKERS.keys()


def _format(
    kind: GGMLQuantizationType, span: int, offset: float = 0.0, *, quantized: bool = True
) -> Callable[[Callable[[Features], Words]], Callable[[Features], Words]]:
    def register(maker: Callable[[Features], Words]) -> Callable[[Features], Words]:
        _MAKERS[kind] = span, offset, quantized, maker
        return maker

    return register


@cache
def format_of(kind: GGMLQuantizationType, features: Features) -> Format:
    """The format of ``kind``, its words made for ``features``. KeyError for a kind not in FORMATS."""
    span, offset, quantized, maker = _MAKERS[kind]
    elements, size = GGML_QUANT_SIZES[kind]
    return Format(kind, span, span // elements * size, offset, quantized, *maker(features))


# -- four blocks of 32 -----------------------------------------------------------------------------------------------


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


@_format(Kind.Q4_0, 128, -8.0)
def _q4_0(features: Features) -> Words:
    return _nibble_blocks(features, 18, minimum=False, high_bits=None)


@_format(Kind.Q4_1, 128, 1.0)
def _q4_1(features: Features) -> Words:
    return _nibble_blocks(features, 20, minimum=True, high_bits=None)


@_format(Kind.Q5_0, 128, -16.0)
def _q5_0(features: Features) -> Words:
    return _nibble_blocks(features, 22, minimum=False, high_bits=2)


@_format(Kind.Q5_1, 128, 1.0)
def _q5_1(features: Features) -> Words:
    return _nibble_blocks(features, 24, minimum=True, high_bits=4)


# MXFP4 (OCP Microscaling Formats 1.0): a power of two for each 32 elements, and twice their numbers (e2m1) in the order
# of the codes. These are small beside the largest, so an offset that makes them positive would cost precision.
_e2m1 = table(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_each_four = picker(*(lane // 4 for lane in range(16)))


@_format(Kind.MXFP4, 128)
def _mxfp4(features: Features) -> Words:
    (size, products), codes, exponents = (
        signed_products(features),
        field(features, 16, 17, 1),
        field(features, 1, 17, 0),
    )

    @inline
    def unpack(w):
        # 2 ** (exponent - 128) in two factors: the smallest are subnormal.
        exponent = convert(U32X4, exponents(w))
        half = exponent >> splat(U32X4, 1)
        first = reinterpret(F32X4, (half + splat(U32X4, 63)) << splat(U32X4, 23))
        d = first * reinterpret(F32X4, ((exponent - half) + splat(U32X4, 63)) << splat(U32X4, 23))
        packed = codes(w)
        low = reinterpret(I8X64, _e2m1(packed & splat(U8X64, 15)))
        shifted = reinterpret(U8X64, reinterpret(U32X16, packed) >> splat(U32X16, 4))
        high = reinterpret(I8X64, _e2m1(shifted & splat(U8X64, 15)))
        return low, high, size(low), size(high), _each_four(d)

    @inline
    def multiply(sums, minima, unpacked, floats, record):
        low, high, low_size, high_size, scale = unpacked
        whole = products(low_size, low, load(I8X64, record + HALVES))
        whole = whole + products(high_size, high, load(I8X64, record + HALVES + 64))
        return fma(scale * load(F32X16, record + SCALES16), convert(F32X16, whole), sums), minima

    return unpack, multiply


_first_two, _last_two = (picker(*[0] * 8, *[1] * 8), picker(*[2] * 8, *[3] * 8))
_two = joiner(*range(64))


@_format(Kind.Q8_0, 128)
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


# -- blocks of 256 ---------------------------------------------------------------------------------------------------

_eight = joiner(*range(8))
_twice = joiner(*range(32), *range(32))
_quarters = tuple(picker(*[2 * j] * 8, *[2 * j + 1] * 8) for j in range(4))
_sixteenths = tuple(picker(*(4 * j + i // 4 for i in range(16))) for j in range(4))
_pairwise = picker(*(i // 2 for i in range(16)))
_lower, _upper = picker(*range(8)), picker(*range(8, 16))
_all = picker(*[0] * 16)
_sixteen = joiner(*range(16))


@inline
def _of_both(record, at):
    """A field of four floats of the record and of the next."""
    return _eight(load(F32X4, record + at), load(F32X4, record + RECORD_BYTES + at))


_words_1_2, _words_3_3, _zipped = picker(1, 2), picker(3, 3), joiner(0, 2, 1, 3)
_nibble_of_word = constant(U32X2, 0, 4)
_d_and_dmin = picker(*[0] * 8, *[1] * 8)


@inline
def scales_and_minima(w):
    """Of a block of Q4_K or Q5_K d * scale of each of the 8 sub-blocks, then dmin * minimum: F32X16.

    The 6-bit numbers lie in bytes 4-15: 0-3 are scales 0-3 and, on top, two bits each of scales 4-7; 4-7 the same of
    minima; 8-11 the low nibbles of scales (low) and minima (high) 4-7.
    """
    head = load(U32X4, w)
    first, last = _words_1_2(head), _words_3_3(head) >> _nibble_of_word()
    last = (last & splat(U32X2, 0x0F0F0F0F)) | ((first >> splat(U32X2, 2)) & splat(U32X2, 0x30303030))
    bytes_ = reinterpret(U8X16, _zipped(first & splat(U32X2, 0x3F3F3F3F), last))
    d = convert(F32X2, load(F16X2, w))
    return _d_and_dmin(d) * convert(F32X16, convert(I32X16, bytes_))


def _nibbles_256(features: Features, *, high_bits: int | None, nibbles: int) -> Words:
    """Of Q4_K and Q5_K: byte i of each 32 holds elements i and, in its upper half, i + 32."""
    products = byte_products(features)
    shifts = constant(U32X16, *[0] * 8, *[4] * 8)
    quarter0, quarter1, quarter2, quarter3 = _quarters
    bit0, bit1, bit2, bit3 = (constant(U8X64, *[1 << 2 * j] * 32, *[2 << 2 * j] * 32) for j in range(4))

    @inline
    def part(w, j, bit):
        codes = load(U8X32, w + nibbles + 32 * j)
        values = reinterpret(U8X64, reinterpret(U32X16, _twice(codes, codes)) >> shifts()) & splat(U8X64, 15)
        if high_bits is not None:  # bit i of byte j belongs to element j of sub-block i
            tops = load(U8X32, w + high_bits)
            values = values | where_set(_twice(tops, tops) & bit, splat(U8X64, 16))
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


@_format(Kind.Q4_K, 256, -1.0)
def _q4_k(features: Features) -> Words:
    return _nibbles_256(features, high_bits=None, nibbles=16)


@_format(Kind.Q5_K, 256, -1.0)
def _q5_k(features: Features) -> Words:
    return _nibbles_256(features, high_bits=16, nibbles=48)


@_format(Kind.Q6_K, 256, -32.0)
def _q6_k(features: Features) -> Words:
    # Two halves of 128 elements: 64 bytes of low nibbles for elements i and i + 64, 32 bytes with two bits each for
    # elements i, i + 32, i + 64 and i + 96; a scale for each 16 elements.
    products = byte_products(features)
    sixteenth0, sixteenth1, sixteenth2, sixteenth3 = _sixteenths
    low_shifts = constant(U32X16, *[0] * 8, *[2] * 8)
    high_shifts = constant(U32X16, *[4] * 8, *[6] * 8)

    @inline
    def values(codes, tops):
        return (codes & splat(U8X64, 15)) | ((tops & splat(U8X64, 3)) << splat(U8X64, 4))

    @inline
    def half(w, tops):
        codes, both = load(U8X64, w), load(U8X32, tops)
        both = reinterpret(U32X16, _twice(both, both))
        high = reinterpret(U8X64, reinterpret(U32X16, codes) >> splat(U32X16, 4))
        first = values(codes, reinterpret(U8X64, both >> low_shifts()))
        return first, values(high, reinterpret(U8X64, both >> high_shifts()))

    @inline
    def unpack(w):
        d = convert(F32X1, load(F16X1, w + 208))
        scale = _all(d) * convert(F32X16, convert(I32X16, load(I8X16, w + 192)))
        return half(w, w + 128), half(w + 64, w + 160), scale

    @inline
    def share(codes, x):
        return convert(F32X16, products(splat(I32X16, 0), codes, load(I8X64, x)))

    @inline
    def multiply(sums, minima, unpacked, floats, record):
        low, high, scale = unpacked
        shares = scale * _sixteen(load(F32X8, record + SUMS16), load(F32X8, record + RECORD_BYTES + SUMS16))
        minima = minima + _lower(shares) + _upper(shares)
        scale = scale * _pairwise(_of_both(record, SCALES))
        x = record + NATURAL
        sums = fma(sixteenth1(scale), share(low[1], x + 64), fma(sixteenth0(scale), share(low[0], x), sums))
        x += RECORD_BYTES
        sums = fma(sixteenth3(scale), share(high[1], x + 64), fma(sixteenth2(scale), share(high[0], x), sums))
        return sums, minima

    return unpack, multiply


# -- floats ----------------------------------------------------------------------------------------------------------


def _floats(widened: Any, size: int) -> Words:
    """Of types that ``widened(address)`` reads as F32X16; ``size`` bytes for an element."""

    @inline
    def unpack(w):
        return widened(w), widened(w + 16 * size), widened(w + 32 * size), widened(w + 48 * size)

    @inline
    def multiply(sums, minima, unpacked, floats, record):
        # Two chains and one sum at the end: the next span waits for one addition only.
        a = unpacked[0] * load(F32X16, floats)
        b = unpacked[1] * load(F32X16, floats + 64)
        a = fma(unpacked[2], load(F32X16, floats + 128), a)
        b = fma(unpacked[3], load(F32X16, floats + 192), b)
        return sums + (a + b), minima

    return unpack, multiply


@_format(Kind.F32, 64, quantized=False)
def _f32(features: Features) -> Words:
    @inline
    def widened(w):
        return load(F32X16, w)

    return _floats(widened, 4)


@_format(Kind.F16, 64, quantized=False)
def _f16(features: Features) -> Words:
    @inline
    def widened(w):
        return convert(F32X16, load(F16X16, w))

    return _floats(widened, 2)


@_format(Kind.BF16, 64, quantized=False)
def _bf16(features: Features) -> Words:
    @inline
    def widened(w):
        return reinterpret(F32X16, convert(U32X16, load(U16X16, w)) << splat(U32X16, 16))

    return _floats(widened, 2)
