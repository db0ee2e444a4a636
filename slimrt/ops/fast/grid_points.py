"""Types whose codes number the points of a grid (IQ2, IQ3): a block of 256 as signed bytes and scales.

A code of 8 to 10 bits stands for 4 or 8 whole numbers, all positive, and a bit for each says which are turned. Grids
are those of the ``gguf`` package, the layouts ggml's (ggml-common.h, ggml-quants.c). Products and panels read the same:
a weight is its byte times the scale of its 16, which is ``gguf.quants``' number bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from gguf import quants
from gguf.constants import GGMLQuantizationType
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from slimrt.ops.fast.block_numbers import half
from slimrt.ops.fast.byte_products import ints
from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.lanes import joiner, picker
from slimrt.ops.fast.vectors import (
    F32X8,
    F32X16,
    I8X64,
    I32X16,
    U32X16,
    Vector,
    broadcast,
    convert,
    load,
    pointer,
    splat,
)

__all__ = ["GRIDS", "GRID_SCALES", "grid_part"]

Kind = GGMLQuantizationType
U8X4, U8X8, U32X8 = Vector("u8", 4), Vector("u8", 8), Vector("u32", 8)
_WORD = ir.IntType(64)


def _read(builder: ir.IRBuilder, w: ir.Value, at: int, bits: int = 8) -> ir.Value:
    """An unsigned number of so many bits ``at`` bytes behind an address, as 64 bits."""
    value = builder.load(pointer(builder, builder.add(w, _WORD(at)), ir.IntType(bits)), align=1)
    return value if bits == 64 else builder.zext(value, _WORD)


def _bits(builder: ir.IRBuilder, value: ir.Value, left: int, mask: int) -> ir.Value:
    """``(value << left) & mask``, to the right where ``left`` is negative."""
    moved = builder.shl(value, _WORD(left)) if left >= 0 else builder.lshr(value, _WORD(-left))
    return builder.and_(moved, _WORD(mask))


def _seven_bit_signs(builder: ir.IRBuilder, fields: list[ir.Value]) -> ir.Value:
    """Eight fields of 7 bits as bytes, whose top bits make the number of set ones even."""
    x = _WORD(0)
    for number, field in enumerate(fields):
        x = builder.or_(x, builder.shl(field, _WORD(8 * number)))
    parity = x
    for shift, mask in ((4, 0x0F), (2, 0x3F), (1, 0x7F)):
        moved = _bits(builder, parity, -shift, mask * 0x0101010101010101)
        parity = builder.xor(parity, moved)
    return builder.or_(x, builder.shl(_bits(builder, parity, 0, 0x0101010101010101), _WORD(7)))


def _four_fields(builder: ir.IRBuilder, word: ir.Value) -> list[ir.Value]:
    return [_bits(builder, word, -7 * i, 127) for i in range(4)]


# Of 64 elements of a block: numbers of its grid points, and the bits that say which elements are turned.
Found = tuple[list[ir.Value], ir.Value]
Codes = Callable[[ir.IRBuilder, ir.Value, int], Found]


def _with_tops(builder: ir.IRBuilder, w: ir.Value, low: int, high: int, count: int) -> list[ir.Value]:
    """``count`` bytes at ``low`` and, above each, as many of the 16 bits at ``high`` as it has."""
    kind = ints(32, count)
    where = pointer(builder, builder.add(w, _WORD(low)), ints(8, count))
    codes, bits = builder.zext(builder.load(where, align=1), kind), 16 // count
    tops = broadcast(builder, builder.trunc(_read(builder, w, high, 16), ir.IntType(32)), count)
    tops = builder.lshr(tops, ir.Constant(kind, list(range(0, 16, bits))))
    tops = builder.shl(builder.and_(tops, ir.Constant(kind, [(1 << bits) - 1] * count)), ir.Constant(kind, [8] * count))
    both = builder.or_(codes, tops)
    return [builder.zext(builder.extract_element(both, ir.IntType(32)(lane)), _WORD) for lane in range(count)]


def _iq2_xxs(b: ir.IRBuilder, w: ir.Value, part: int) -> Found:
    at = 2 + 16 * part
    signs = [field for first in (4, 12) for field in _four_fields(b, _read(b, w, at + first, 32))]
    return [_read(b, w, at + first + i) for first in (0, 8) for i in range(4)], _seven_bit_signs(b, signs)


def _iq2_xs(b: ir.IRBuilder, w: ir.Value, part: int) -> Found:
    words = [_read(b, w, 2 + 16 * part + 2 * i, 16) for i in range(8)]
    return [_bits(b, word, 0, 511) for word in words], _seven_bit_signs(b, [_bits(b, word, -9, 127) for word in words])


def _iq2_s(b: ir.IRBuilder, w: ir.Value, part: int) -> Found:
    return _with_tops(b, w, 2 + 8 * part, 66 + 2 * part, 8), _read(b, w, 34 + 8 * part, 64)


def _iq3_xxs(b: ir.IRBuilder, w: ir.Value, part: int) -> Found:
    at = 66 + 8 * part
    signs = [field for first in (0, 4) for field in _four_fields(b, _read(b, w, at + first, 32))]
    return [_read(b, w, 2 + 16 * part + i) for i in range(16)], _seven_bit_signs(b, signs)


def _iq3_s(b: ir.IRBuilder, w: ir.Value, part: int) -> Found:
    return _with_tops(b, w, 2 + 16 * part, 66 + 2 * part, 16), _read(b, w, 74 + 8 * part, 64)


_CODES: dict[GGMLQuantizationType, Codes] = {
    Kind.IQ2_XXS: _iq2_xxs, Kind.IQ2_XS: _iq2_xs, Kind.IQ2_S: _iq2_s, Kind.IQ3_XXS: _iq3_xxs, Kind.IQ3_S: _iq3_s,
}  # fmt: skip
GRIDS = tuple(_CODES)


@cache
def _grid(kind: GGMLQuantizationType) -> tuple[tuple[int, ...], int]:
    """The points of a grid as little-endian words, and their size in bits."""
    package: Any = getattr(quants, kind.name)
    package.init_grid()
    points = package.grid.reshape(package.grid_shape).astype("u1")
    return tuple(points.view(f"<u{points.shape[1]}")[:, 0].tolist()), 8 * points.shape[1]


@cache
def grid_part(kind: GGMLQuantizationType, part: int) -> Any:
    """The word ``(w) -> I8X64``: elements 64 * part to 64 * part + 63 of the block at w, without their scales."""
    (points, bits), codes, name = _grid(kind), _CODES[kind], f"slimrt.grid.{kind.name}"

    @intrinsic
    def numbers(typingctx, w):
        def codegen(context, builder, signature, args):
            module, word = builder.module, ir.IntType(bits)
            table = module.globals.get(name)
            if table is None:
                kind_of_table = ir.ArrayType(word, len(points))
                table = cgutils.add_global_variable(module, kind_of_table, name)
                table.initializer = ir.Constant(kind_of_table, list(points))
                table.linkage, table.global_constant = "internal", True
            found, signs = codes(builder, args[0], part)
            # One by one: AMD's instructions that gather take longer.
            value = ir.Constant(ints(bits, len(found)), ir.Undefined)
            for lane, code in enumerate(found):
                point = builder.load(builder.gep(table, [_WORD(0), code]))
                value = builder.insert_element(value, point, ir.IntType(32)(lane))
            value = builder.bitcast(value, I8X64.llvm)
            turned = builder.bitcast(signs, ir.VectorType(ir.IntType(1), 64))
            return builder.select(turned, builder.neg(value), value)

        return I8X64(w), codegen

    return numbers


# -- scales: F32X16, of each 16 elements -----------------------------------------------------------------------------

_odd = picker(*range(1, 16, 2))
_both = picker(*(i // 2 for i in range(16)))
_zipped = joiner(*(i // 2 + 8 * (i % 2) for i in range(16)))
_zipped_twice = joiner(*(i // 4 + 4 * (i // 2 % 2) for i in range(16)))


@inline
def _nibbles(codes):
    """The nibbles of 8 bytes, the low one of each first: I32X16."""
    return convert(I32X16, _zipped(codes & splat(U8X8, 15), codes >> splat(U8X8, 4)))


@inline
def _iq2_xxs_scales(w):
    codes = convert(F32X8, _odd(load(U32X16, w + 2)) >> splat(U32X8, 28))
    return half(w) * (splat(F32X16, 0.5) + _both(codes)) * splat(F32X16, 0.25)


@inline
def _iq2_xs_scales(w):
    return half(w) * (splat(F32X16, 0.5) + convert(F32X16, _nibbles(load(U8X8, w + 66)))) * splat(F32X16, 0.25)


@inline
def _iq2_s_scales(w):
    return half(w) * (splat(F32X16, 0.5) + convert(F32X16, _nibbles(load(U8X8, w + 74)))) * splat(F32X16, 0.25)


@inline
def _iq3_xxs_scales(w):
    codes = convert(F32X8, load(U32X8, w + 66) >> splat(U32X8, 28))
    return half(w) * (splat(F32X16, 0.5) + _both(codes)) * splat(F32X16, 0.5)


@inline
def _iq3_s_scales(w):
    packed = load(U8X4, w + 106)
    codes = convert(I32X16, _zipped_twice(packed & splat(U8X4, 15), packed >> splat(U8X4, 4)))
    return half(w) * (splat(F32X16, 1.0) + splat(F32X16, 2.0) * convert(F32X16, codes))


GRID_SCALES: dict[GGMLQuantizationType, Any] = {
    Kind.IQ2_XXS: _iq2_xxs_scales, Kind.IQ2_XS: _iq2_xs_scales, Kind.IQ2_S: _iq2_s_scales,
    Kind.IQ3_XXS: _iq3_xxs_scales, Kind.IQ3_S: _iq3_s_scales,
}  # fmt: skip
"""The word ``(w) -> F32X16`` of each type."""
