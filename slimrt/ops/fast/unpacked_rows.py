"""Packed rows to float32, sixteen numbers at a time: what every kind of panel is made from.

The numbers are bit for bit those of ``gguf.dequantize``, which the operations here follow one by one: no sum and
product are ever joined.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numba import float32

from slimrt.ops.fast.block_numbers import (
    E2M1,
    IQ4,
    half,
    iq4_xs_scales,
    q2_k_numbers,
    q3_k_numbers,
    q6_k_numbers,
    scales_and_minima,
    times,
)
from slimrt.ops.fast.grid_points import GRID_SCALES, GRIDS, grid_part
from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.lanes import bits_times, picker, stack
from slimrt.ops.fast.vectors import (
    F16X16,
    F32X16,
    I8X16,
    I32X16,
    U8X16,
    U16X16,
    U32X16,
    Vector,
    convert,
    load,
    load_scalar,
    reinterpret,
    splat,
    store,
)

__all__ = ["TILE_COLUMNS", "row_unpacker"]

TILE_COLUMNS = 256

Kind = GGMLQuantizationType
F16X1, F32X1, U16X1 = Vector("f16", 1), Vector("f32", 1), Vector("u16", 1)
U8X1 = Vector("u8", 1)
U32X1, U16X2 = Vector("u32", 1), Vector("u16", 2)

_first, _second, _all = picker(0), picker(1), picker(*[0] * 16)
_scales, _minima, _codes = stack(64), stack(64), stack(256)

_UNPACKERS: dict[GGMLQuantizationType, Any] = {}


def _unpacks(kind: GGMLQuantizationType) -> Callable[[Any], Any]:
    """A function ``(w, to)`` that writes the block at w as float32."""

    def register(function: Any) -> Any:
        _UNPACKERS[kind] = inline(function)
        return function

    return register


@inline
def _whole(values):
    """16 small integers as float32."""
    return convert(F32X16, convert(I32X16, values))


@inline
def _signed(values):
    """16 bytes, as signed ones, as float32."""
    return _whole(reinterpret(I8X16, values))


@inline
def _low(codes):
    return codes & splat(U8X16, 15)


@inline
def _high(codes):
    return codes >> splat(U8X16, 4)


@inline
def _centred(values, centre):
    return convert(F32X16, convert(I32X16, values) - splat(I32X16, centre))


@_unpacks(Kind.Q4_0)
def _q4_0(w, to):
    d, codes = half(w), load(U8X16, w + 2)
    store(to, d * _centred(_low(codes), 8))
    store(to + 64, d * _centred(_high(codes), 8))


@_unpacks(Kind.Q4_1)
def _q4_1(w, to):
    d, m, codes = half(w), half(w + 2), load(U8X16, w + 4)
    store(to, d * _whole(_low(codes)) + m)
    store(to + 64, d * _whole(_high(codes)) + m)


@inline
def _with_tops(codes, bits):
    """Nibbles with a fifth bit from ``bits`` (16 of them, U16X1)."""
    return codes | bits_times(bits, splat(U8X16, 16))


@_unpacks(Kind.Q5_0)
def _q5_0(w, to):
    d, tops, codes = half(w), load(U16X2, w + 2), load(U8X16, w + 6)
    store(to, d * _centred(_with_tops(_low(codes), _first(tops)), 16))
    store(to + 64, d * _centred(_with_tops(_high(codes), _second(tops)), 16))


@_unpacks(Kind.Q5_1)
def _q5_1(w, to):
    d, m, tops, codes = half(w), half(w + 2), load(U16X2, w + 4), load(U8X16, w + 8)
    store(to, d * _whole(_with_tops(_low(codes), _first(tops))) + m)
    store(to + 64, d * _whole(_with_tops(_high(codes), _second(tops))) + m)


@_unpacks(Kind.Q8_0)
def _q8_0(w, to):
    d = half(w)
    store(to, d * _whole(load(I8X16, w + 2)))
    store(to + 64, d * _whole(load(I8X16, w + 18)))


@_unpacks(Kind.MXFP4)
def _mxfp4(w, to):
    # 2 ** (exponent - 128) in two factors: the smallest are subnormal.
    exponent = convert(U32X16, _all(load(U8X1, w)))
    less = exponent >> splat(U32X16, 1)
    first = reinterpret(F32X16, (less + splat(U32X16, 63)) << splat(U32X16, 23))
    d = first * reinterpret(F32X16, ((exponent - less) + splat(U32X16, 63)) << splat(U32X16, 23))
    codes = load(U8X16, w + 1)
    store(to, d * _signed(E2M1(_low(codes))))
    store(to + 64, d * _signed(E2M1(_high(codes))))


@_unpacks(Kind.IQ4_NL)
def _iq4_nl(w, to):
    d, codes = half(w), load(U8X16, w + 2)
    store(to, d * _signed(IQ4(_low(codes))))
    store(to + 64, d * _signed(IQ4(_high(codes))))


@_unpacks(Kind.IQ4_XS)
def _iq4_xs(w, to):
    numbers = _scales()
    store(numbers, iq4_xs_scales(w))
    for part in range(8):
        d, codes = splat(F32X16, load_scalar(float32, numbers + part * 4)), load(U8X16, w + 8 + part * 16)
        store(to + part * 128, d * _signed(IQ4(_low(codes))))
        store(to + part * 128 + 64, d * _signed(IQ4(_high(codes))))


def _nibbles_256(*, high_bits: int | None, nibbles: int) -> Any:
    """Of Q4_K and Q5_K: sub-blocks of 32, byte i of each 32 holds elements i and, in its upper half, i + 32."""

    def unpack(w, to):
        numbers = _scales()
        store(numbers, scales_and_minima(w))
        for pair in range(4):
            for side in range(2):
                d = splat(F32X16, load_scalar(float32, numbers + pair * 8 + side * 4))
                m = splat(F32X16, load_scalar(float32, numbers + 32 + pair * 8 + side * 4))
                for part in range(2):
                    values = _low(load(U8X16, w + nibbles + pair * 32 + part * 16) >> splat(U8X16, side * 4))
                    if high_bits is not None:  # bit i of byte j belongs to element j of sub-block i
                        tops = load(U8X16, w + high_bits + part * 16) >> splat(U8X16, pair * 2 + side)
                        values = values | ((tops & splat(U8X16, 1)) << splat(U8X16, 4))
                    store(to + pair * 256 + side * 128 + part * 64, d * _whole(values) - m)

    return unpack


_unpacks(Kind.Q4_K)(_nibbles_256(high_bits=None, nibbles=16))
_unpacks(Kind.Q5_K)(_nibbles_256(high_bits=16, nibbles=48))


@_unpacks(Kind.Q6_K)
def _q6_k(w, to):
    numbers = _scales()
    d, scales, _ = q6_k_numbers(w)
    store(numbers, times(d, scales))
    for piece in range(16):  # of 16 elements: 8 to a half, of which 4 in low nibbles, then 4 in high ones
        side, within = piece // 8, piece % 8
        codes = load(U8X16, w + side * 64 + within % 4 * 16) >> splat(U8X16, within // 4 * 4)
        tops = load(U8X16, w + 128 + side * 32 + within % 2 * 16) >> splat(U8X16, within // 2 * 2)
        values = _low(codes) | ((tops & splat(U8X16, 3)) << splat(U8X16, 4))
        d = splat(F32X16, load_scalar(float32, numbers + piece * 4))
        store(to + piece * 64, d * _centred(values, 32))


@inline
def _two_bits(w, piece):
    """Of the types whose bytes hold elements i, i + 32, i + 64 and i + 96 of each half: those of 16 elements."""
    return (load(U8X16, w + piece // 8 * 32 + piece % 2 * 16) >> splat(U8X16, piece % 8 // 2 * 2)) & splat(U8X16, 3)


@_unpacks(Kind.Q2_K)
def _q2_k(w, to):
    numbers, minima = _scales(), _minima()
    d, scales, minimum = q2_k_numbers(w)
    store(numbers, times(d, scales))
    store(minima, minimum)
    for piece in range(16):
        d = splat(F32X16, load_scalar(float32, numbers + piece * 4))
        m = splat(F32X16, load_scalar(float32, minima + piece * 4))
        store(to + piece * 64, d * _whole(_two_bits(w + 16, piece)) - m)


@_unpacks(Kind.Q3_K)
def _q3_k(w, to):
    numbers = _scales()
    d, scales, _ = q3_k_numbers(w)
    store(numbers, times(d, scales))
    for piece in range(16):  # bit i of byte j of the first 32 belongs to element j of each 32
        tops = (load(U8X16, w + piece % 2 * 16) >> splat(U8X16, piece // 2)) & splat(U8X16, 1)
        values = _two_bits(w + 32, piece) | (tops << splat(U8X16, 2))
        store(to + piece * 64, splat(F32X16, load_scalar(float32, numbers + piece * 4)) * _centred(values, 4))


@_unpacks(Kind.TQ2_0)
def _tq2_0(w, to):
    d = half(w + 64)
    for piece in range(16):
        store(to + piece * 64, d * _centred(_two_bits(w, piece), 1))


def _unpacks_grid(kind: GGMLQuantizationType) -> None:
    part0, part1, part2, part3 = (grid_part(kind, part) for part in range(4))
    scales = GRID_SCALES[kind]

    @_unpacks(kind)
    def unpack_grid(w, to):
        numbers, codes = _scales(), _codes()
        store(numbers, scales(w))
        store(codes, part0(w))
        store(codes + 64, part1(w))
        store(codes + 128, part2(w))
        store(codes + 192, part3(w))
        for piece in range(16):
            d = splat(F32X16, load_scalar(float32, numbers + piece * 4))
            store(to + piece * 64, d * _whole(load(I8X16, codes + piece * 16)))


for _kind in GRIDS:
    _unpacks_grid(_kind)


# The floats have blocks of one element. They are read 16 at a time, and one by one at the end of a row.


@inline
def _wide_bfloats(w):
    return reinterpret(F32X16, convert(U32X16, load(U16X16, w)) << splat(U32X16, 16))


@_unpacks(Kind.F32)
def _f32(w, to):
    store(to, load(F32X1, w))


@_unpacks(Kind.F16)
def _f16(w, to):
    store(to, convert(F32X1, load(F16X1, w)))


@_unpacks(Kind.BF16)
def _bf16(w, to):
    store(to, reinterpret(F32X1, convert(U32X1, load(U16X1, w)) << splat(U32X1, 16)))


@inline
def _f32_16(w, to):
    store(to, load(F32X16, w))


@inline
def _f16_16(w, to):
    store(to, convert(F32X16, load(F16X16, w)))


@inline
def _bf16_16(w, to):
    store(to, _wide_bfloats(w))


_SIXTEEN = {Kind.F32: _f32_16, Kind.F16: _f16_16, Kind.BF16: _bf16_16}


@cache
def row_unpacker(kind: GGMLQuantizationType) -> Any:
    """For kernels: ``unpack_row(w, columns, to)``: float32 [TILE_COLUMNS] at ``to`` from up to TILE_COLUMNS columns at
    w, whole blocks, and zeros behind them. KeyError if there is no unpacker for ``kind``."""
    elements, nbytes = GGML_QUANT_SIZES[kind]
    one = _UNPACKERS[kind]
    sixteen = _SIXTEEN.get(kind, one)
    together = 16 if kind in _SIXTEEN else elements

    @inline
    def unpack_row(w, columns, to):
        for column in range(columns // together * together, TILE_COLUMNS, 16):
            store(to + column * 4, splat(F32X16, 0.0))
        for column in range(0, columns - together + 1, together):
            sixteen(w + column // elements * nbytes, to + column * 4)
        if together != elements:
            for column in range(columns // together * together, columns):
                one(w + column // elements * nbytes, to + column * 4)

    return unpack_row
