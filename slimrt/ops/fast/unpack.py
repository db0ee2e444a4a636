"""Packed rows to the panels that products of many rows read: bfloat16 or float32, a layer at a time, as fast as memory.

A panel holds 16 rows of the packed matrix, column after column: float32 [columns][16], or bfloat16 in pairs of
columns, [columns / 2][16][2]. 16 rows are unpacked into a tile of float32 that stays in the first-level cache, then
turned over in blocks of 16 x 16 words.

The float32 numbers are bit for bit those of ``gguf.dequantize``, which the operations here follow one by one: no sum
and product are ever joined. The bfloat16 numbers are these, rounded to nearest even.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from llvmlite import ir
from numba import float32, types
from numba.extending import intrinsic

from slimrt.ops.fast.bfloat import narrower
from slimrt.ops.fast.dots import scales_and_minima
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import Kernel, compile_kernel, inline
from slimrt.ops.fast.lanes import bits_times, joiner, load_at, picker, stack, table
from slimrt.ops.fast.vectors import (
    F16X16,
    F32X16,
    I8X16,
    I32X16,
    U8X16,
    U16X16,
    U32X16,
    Vector,
    argument,
    convert,
    load,
    load_scalar,
    pointer,
    reinterpret,
    splat,
    store,
    store_scalar,
)

__all__ = ["PANEL", "TILE_COLUMNS", "row_unpacker", "turner", "unpack"]

PANEL = 16  # rows
TILE_COLUMNS = 256
_ROW_BYTES = TILE_COLUMNS * 4

Kind = GGMLQuantizationType
F16X1, F32X1, U16X1 = Vector("f16", 1), Vector("f32", 1), Vector("u16", 1)
U8X1 = Vector("u8", 1)
U32X1, U16X2 = Vector("u32", 1), Vector("u16", 2)

_all = picker(*[0] * 16)
_first, _second = picker(0), picker(1)
_paired = joiner(*range(32))


_scales = stack(64)
_tile, _pairs, _end = stack(PANEL * _ROW_BYTES), stack(PANEL * 64), stack(PANEL * 64)


def turner(past_caches: bool) -> Callable[[int, int, int], Any]:
    """``(tile, stride, out): out[:] = tile.T``: 16 rows of 16 words of 32 bits, ``stride`` bytes apart, to [16, 16].

    ``past_caches``: whole lines go to memory without being read first; ``out`` lies on a line's boundary.
    """

    @intrinsic
    def turn(typingctx, tile, stride, out):
        def codegen(context, builder, signature, args):
            word = ir.IntType(64)
            rows = [
                load_at(builder, builder.add(args[0], builder.mul(args[1], word(row))), 0, U32X16) for row in range(16)
            ]
            # Blocks of 8 x 8, then of 4 x 4, 2 x 2, 1 x 1 that lie across the diagonal change places.
            for width in (8, 4, 2, 1):
                upper = [lane + 16 - width if lane & width else lane for lane in range(16)]
                lower = [lane + 16 if lane & width else lane + width for lane in range(16)]
                masks = [ir.Constant(ir.VectorType(ir.IntType(32), 16), lanes) for lanes in (upper, lower)]
                for row in range(16):
                    if not row & width:
                        pair = rows[row], rows[row + width]
                        rows[row], rows[row + width] = (builder.shuffle_vector(*pair, mask) for mask in masks)
            for row, value in enumerate(rows):
                where = pointer(builder, builder.add(args[2], word(row * 64)), value.type)
                written = builder.store(value, where, align=64 if past_caches else 1)
                if past_caches:
                    hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
                    written.set_metadata("nontemporal", hint)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return turn


_turn_in_place = turner(False)


# -- one block to float32 --------------------------------------------------------------------------------------------

_UNPACKERS: dict[GGMLQuantizationType, Any] = {}


def _unpacks(kind: GGMLQuantizationType) -> Callable[[Any], Any]:
    """A function ``(w, to)`` that writes the block at w as float32."""

    def register(function: Any) -> Any:
        _UNPACKERS[kind] = inline(function)
        return function

    return register


@inline
def _half(address):
    """The float16 at an address in every lane."""
    return _all(convert(F32X1, load(F16X1, address)))


@inline
def _whole(values):
    """16 small integers as float32."""
    return convert(F32X16, convert(I32X16, values))


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
    d, codes = _half(w), load(U8X16, w + 2)
    store(to, d * _centred(_low(codes), 8))
    store(to + 64, d * _centred(_high(codes), 8))


@_unpacks(Kind.Q4_1)
def _q4_1(w, to):
    d, m, codes = _half(w), _half(w + 2), load(U8X16, w + 4)
    store(to, d * _whole(_low(codes)) + m)
    store(to + 64, d * _whole(_high(codes)) + m)


@inline
def _with_tops(codes, bits):
    """Nibbles with a fifth bit from ``bits`` (16 of them, U16X1)."""
    return codes | bits_times(bits, splat(U8X16, 16))


@_unpacks(Kind.Q5_0)
def _q5_0(w, to):
    d, tops, codes = _half(w), load(U16X2, w + 2), load(U8X16, w + 6)
    store(to, d * _centred(_with_tops(_low(codes), _first(tops)), 16))
    store(to + 64, d * _centred(_with_tops(_high(codes), _second(tops)), 16))


@_unpacks(Kind.Q5_1)
def _q5_1(w, to):
    d, m, tops, codes = _half(w), _half(w + 2), load(U16X2, w + 4), load(U8X16, w + 8)
    store(to, d * _whole(_with_tops(_low(codes), _first(tops))) + m)
    store(to + 64, d * _whole(_with_tops(_high(codes), _second(tops))) + m)


@_unpacks(Kind.Q8_0)
def _q8_0(w, to):
    d = _half(w)
    store(to, d * _whole(load(I8X16, w + 2)))
    store(to + 64, d * _whole(load(I8X16, w + 18)))


_e2m1 = table(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@_unpacks(Kind.MXFP4)
def _mxfp4(w, to):
    # 2 ** (exponent - 128) in two factors: the smallest are subnormal.
    exponent = convert(U32X16, _all(load(U8X1, w)))
    half = exponent >> splat(U32X16, 1)
    first = reinterpret(F32X16, (half + splat(U32X16, 63)) << splat(U32X16, 23))
    d = first * reinterpret(F32X16, ((exponent - half) + splat(U32X16, 63)) << splat(U32X16, 23))
    codes = load(U8X16, w + 1)
    store(to, d * _whole(reinterpret(I8X16, _e2m1(_low(codes)))))
    store(to + 64, d * _whole(reinterpret(I8X16, _e2m1(_high(codes)))))


@_unpacks(Kind.Q4_K)
def _q4_k(w, to):
    numbers = _scales()
    store(numbers, scales_and_minima(w))
    for pair in range(4):
        for side in range(2):
            d = splat(F32X16, load_scalar(float32, numbers + pair * 8 + side * 4))
            m = splat(F32X16, load_scalar(float32, numbers + 32 + pair * 8 + side * 4))
            for part in range(2):
                codes = load(U8X16, w + 16 + pair * 32 + part * 16) >> splat(U8X16, side * 4)
                store(to + pair * 256 + side * 128 + part * 64, d * _whole(_low(codes)) - m)


@_unpacks(Kind.Q5_K)
def _q5_k(w, to):
    numbers = _scales()
    store(numbers, scales_and_minima(w))
    for pair in range(4):
        for side in range(2):
            d = splat(F32X16, load_scalar(float32, numbers + pair * 8 + side * 4))
            m = splat(F32X16, load_scalar(float32, numbers + 32 + pair * 8 + side * 4))
            for part in range(2):
                codes = load(U8X16, w + 48 + pair * 32 + part * 16) >> splat(U8X16, side * 4)
                tops = load(U8X16, w + 16 + part * 16) >> splat(U8X16, pair * 2 + side)
                values = _low(codes) | ((tops & splat(U8X16, 1)) << splat(U8X16, 4))
                store(to + pair * 256 + side * 128 + part * 64, d * _whole(values) - m)


@_unpacks(Kind.Q6_K)
def _q6_k(w, to):
    numbers = _scales()
    store(numbers, _half(w + 208) * _whole(load(I8X16, w + 192)))
    for piece in range(16):  # of 16 elements: 8 to a half, of which 4 in low nibbles, then 4 in high ones
        half, within = piece // 8, piece % 8
        codes = load(U8X16, w + half * 64 + within % 4 * 16) >> splat(U8X16, within // 4 * 4)
        tops = load(U8X16, w + 128 + half * 32 + within % 2 * 16) >> splat(U8X16, within // 2 * 2)
        values = _low(codes) | ((tops & splat(U8X16, 3)) << splat(U8X16, 4))
        d = splat(F32X16, load_scalar(float32, numbers + piece * 4))
        store(to + piece * 64, d * _centred(values, 32))


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


# -- the kernel ------------------------------------------------------------------------------------------------------


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


@cache
def unpack(
    features: Features, kind: GGMLQuantizationType, target: Literal["bf16", "f32"], past_caches: bool = False
) -> Kernel:
    """Item: one panel. KeyError if there is no unpacker for ``kind``.

    ``past_caches``: for panels that no cache will hold until they are read; they lie on lines' boundaries. Measured for
    32 MiB of them: 2.3 G elements a second instead of 1.2. But a small model's panels, written so, made its prefill of
    128 tokens take twice as long.

    Args: 0 packed rows, 1 bytes a row, 2 rows (those that the last panel lacks are zeros), 3 columns, 4 panels,
    5 columns of a panel: as many, for bfloat16 rounded up to a multiple of 32, with zeros.
    """
    elements, nbytes = GGML_QUANT_SIZES[kind]
    unpack_row = row_unpacker(kind)
    narrow, short = narrower(features), target == "bf16"
    turn = turner(past_caches)
    word = 2 if short else 4

    def unpack_panel(item, thread, args):
        stride, columns, width = argument(args, 1), argument(args, 3), argument(args, 5)
        packed = argument(args, 0) + item * PANEL * stride
        rows = min(PANEL, argument(args, 2) - item * PANEL)
        out = argument(args, 4) + item * width * PANEL * word
        tile, pairs, turned = _tile(), _pairs(), _end()
        for start in range(0, width, TILE_COLUMNS):
            for row in range(PANEL):
                count = min(TILE_COLUMNS, columns - start)
                if row >= rows:
                    count = 0
                unpack_row(packed + row * stride + start // elements * nbytes, count, tile + row * _ROW_BYTES)
            many = min(TILE_COLUMNS, width - start)
            if short:
                for column in range(0, many, 32):
                    for row in range(PANEL):
                        at = tile + row * _ROW_BYTES + column * 4
                        store(pairs + row * 64, _paired(narrow(load(F32X16, at)), narrow(load(F32X16, at + 64))))
                    turn(pairs, 64, out + (start + column) * PANEL * 2)
            else:
                for column in range(0, many, 16):
                    if many - column >= 16:
                        turn(tile + column * 4, _ROW_BYTES, out + (start + column) * PANEL * 4)
                    else:
                        _turn_in_place(tile + column * 4, _ROW_BYTES, turned)
                        for i in range((many - column) * PANEL):
                            at = (start + column) * PANEL * 4 + i * 4
                            store_scalar(out + at, load_scalar(float32, turned + i * 4))

    return compile_kernel(unpack_panel, f"{features.key}-{kind.name}-{target}-{past_caches}")
