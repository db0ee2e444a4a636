"""Products of a block of rows with panels of weights or keys: the one place where multiplications of prefill happen.

A *panel* is 16 columns of the right factor, step by step: a step is two rows of it in bfloat16 (uint16 [K/2, 16, 2],
neighbouring rows interleaved, as both ``vdpbf16ps`` and the tiles want them) or one row in float32 ([K, 16]). The left
factor lies in plain rows of the same element. Whole numbers of 16 bits, with scales among them, are a third element:
see ``whole_products``. What a block product means, with ``a`` [R, K] and panels ``b`` as [K, 16 G]:

    c[:R, : 16 * G] = a @ b            # or +=, with ``accumulate``

in float32, each row's sum in the order of K whatever the block: a row gives the same bits wherever it lies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.lanes import loop
from slimrt.ops.fast.vectors import broadcast, emit, pointer
from slimrt.ops.fast.whole_products import BLOCK, PANEL, SCALE_BYTES, whole_block_product

__all__ = ["PANEL", "Shape", "block_product", "packed_shape", "panel_product", "shape_of", "sizes", "tile_settings"]

_BYTE, _INDEX, _WORD, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


class _BFloat(ir.types._BaseFloatType):  # llvmlite has no name for it
    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
BFLOAT = _BFloat()


@dataclass(frozen=True)
class Shape:
    """What a processor multiplies at a time."""

    element: Literal["f32", "bf16", "i16"]  # of both factors
    rows: int  # R
    panels: int  # G

    @property
    def bf16(self) -> bool:
        return self.element == "bf16"

    @property
    def whole(self) -> bool:
        """Whether the factors are whole numbers, with scales among them."""
        return self.element == "i16"

    @property
    def element_bytes(self) -> int:
        return 4 if self.element == "f32" else 2

    def row_bytes(self, inner: int) -> int:
        """Of ``inner`` factors of the left."""
        return inner * self.element_bytes + (-(-inner // BLOCK) * SCALE_BYTES if self.whole else 0)

    def panel_bytes(self, inner: int) -> int:
        """Of a panel with ``inner`` steps' factors."""
        return self.row_bytes(inner) * PANEL

    @property
    def columns(self) -> int:
        """Columns of a group of panels. K comes in multiples of this too, so that a product's result can be a
        factor."""
        return PANEL * self.panels

    def padded(self, columns: int) -> int:
        """``columns`` filled up to whole groups."""
        return -(-columns // self.columns) * self.columns


def shape_of(features: Features) -> Shape:
    """The block of floats that suits ``features``: as many sums as fit into the registers."""
    if features.amx:
        return Shape("bf16", 32, 2)  # four tiles of 16 x 16 sums, two tiles each of left and right
    if features.bf16:
        return Shape("bf16", 12, 2)  # 24 of 32 registers
    if features.avx512:
        return Shape("f32", 12, 2)
    return Shape("f32", 6, 1)  # 12 of 16 registers, a panel takes two: a tenth quicker than with 4 rows


def packed_shape(features: Features) -> Shape:
    """The block for weights of packed types: that of floats, with whole numbers in their place where these are quicker.

    Two instructions (vpmaddwd, vpaddd) multiply twice as many numbers as one on float32. With AVX2 that is 1.6 times as
    quick (measured on Zen 3), with VNNI one instruction does it. AVX-512 without VNNI would gain nothing: its two ports
    for vectors are full either way. Products of bfloat16 are as quick, and need no scales.
    """
    shape = shape_of(features)
    quicker = features.vnni if features.avx512 else True
    return replace(shape, element="i16") if quicker and not shape.bf16 else shape


@cache
def sizes(shape: Shape) -> tuple[Any, Any]:
    """For kernels: ``Shape.row_bytes`` and ``Shape.panel_bytes``."""
    width, scale = shape.element_bytes, SCALE_BYTES if shape.whole else 0

    @inline
    def row_bytes(inner):
        return inner * width + (inner + BLOCK - 1) // BLOCK * scale

    @inline
    def panel_bytes(inner):
        return row_bytes(inner) * PANEL

    return row_bytes, panel_bytes


@cache
def block_product(features: Features, shape: Shape, accumulate: bool) -> Any:
    """The intrinsic ``product(a, a_stride, b, panel_stride, k, c, c_stride)``: addresses, strides in bytes, K
    elements."""
    if shape.whole:
        return whole_block_product(features, shape.rows, shape.panels, accumulate)
    build = _tiles if features.amx else _vectors

    @intrinsic
    def product(typingctx, a, a_stride, b, panel_stride, k, c, c_stride):
        def codegen(context, builder, signature, args):
            build(builder, features, accumulate, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return product


def _vectors(builder: ir.IRBuilder, features: Features, accumulate: bool, *args: ir.Value) -> None:
    """Every sum is a vector of a row's columns; a step multiplies one number (pair) of a row with a row of panels."""
    a, a_stride, b, panel_stride, k, c, c_stride = args
    shape, lanes = shape_of(features), features.lanes
    parts = PANEL // lanes  # vectors in a panel
    vector = ir.VectorType(_FLOAT, lanes)
    step_bytes = 4  # of a row: a pair of bfloat16 or a float32

    def at(base: ir.Value, *offsets: ir.Value) -> ir.Value:
        for offset in offsets:
            base = builder.add(base, offset)
        return base

    def place(row: int, panel: int, part: int) -> ir.Value:
        address = at(c, builder.mul(c_stride, _WORD(row)), _WORD(64 * panel + 4 * lanes * part))
        return pointer(builder, address, vector)

    where = [(row, panel, part) for row in range(shape.rows) for panel in range(shape.panels) for part in range(parts)]
    zero = ir.Constant(vector, [0.0] * lanes)
    sums = [builder.load(place(*one), align=4) if accumulate else zero for one in where]
    # A base for every third row: with an index register scaled by 1 and 2 that is all an address needs.
    bases = [at(a, builder.mul(a_stride, _WORD(row))) for row in range(0, shape.rows, 3)]
    twice = builder.shl(a_stride, _WORD(1))

    def step(*carried: ir.Value) -> list[ir.Value]:
        rows, right, totals = carried[: len(bases)], carried[len(bases)], list(carried[len(bases) + 1 :])
        columns = [
            builder.load(
                pointer(
                    builder,
                    at(right, *([panel_stride] if panel else []), _WORD(4 * lanes * part)),
                    vector,
                ),
                align=4,
            )
            for panel in range(shape.panels)
            for part in range(parts)
        ]
        for row in range(shape.rows):
            offsets = [[], [a_stride], [twice]][row % 3]
            number = builder.load(pointer(builder, at(rows[row // 3], *offsets), _FLOAT), align=2)
            left = broadcast(builder, number, lanes)
            for column, value in enumerate(columns):
                index = row * len(columns) + column
                totals[index] = _multiply_add(builder, shape.bf16, left, value, totals[index])
        moved = [builder.add(row, _WORD(step_bytes)) for row in rows]
        return [*moved, builder.add(right, _WORD(64)), *totals]

    steps = builder.lshr(k, _WORD(1)) if shape.bf16 else k
    final = loop(builder, steps, [*bases, b, *sums], step)
    for one, value in zip(where, final[len(bases) + 1 :], strict=True):
        builder.store(value, place(*one), align=4)


def _multiply_add(builder: ir.IRBuilder, bf16: bool, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
    """total + left * right; in bfloat16 each lane is a pair of numbers, and the two products are added."""
    if not bf16:
        return emit(builder, f"llvm.fma.v{total.type.count}f32", total.type, [left, right, total])
    pairs = ir.VectorType(BFLOAT, 32)
    return emit(
        builder,
        "llvm.x86.avx512bf16.dpbf16ps.512",
        total.type,
        [total, builder.bitcast(left, pairs), builder.bitcast(right, pairs)],
    )


def _tiles(builder: ir.IRBuilder, features: Features, accumulate: bool, *args: ir.Value) -> None:
    """Tiles 0 to 3: sums of 16 x 16; 4 and 5: 16 rows x 32 of the left, 6 and 7: 32 x 16 columns of the right."""
    a, a_stride, b, panel_stride, k, c, c_stride = args
    void = ir.VoidType()

    def tile(name: str, *values: Any) -> None:
        emit(builder, f"llvm.x86.{name}", void, [_BYTE(v) if isinstance(v, int) else v for v in values])

    def memory(address: ir.Value) -> ir.Value:
        return builder.inttoptr(address, _BYTE.as_pointer())

    sums = [
        (
            2 * down + across,
            memory(builder.add(builder.add(c, builder.mul(c_stride, _WORD(16 * down))), _WORD(64 * across))),
        )
        for down in range(2)
        for across in range(2)
    ]
    for number, address in sums:
        if accumulate:
            tile("tileloadd64", number, address, c_stride)
        else:
            tile("tilezero", number)
    lower = builder.mul(a_stride, _WORD(16))

    def step(left: ir.Value, right: ir.Value) -> list[ir.Value]:
        tile("tileloadd64", 4, memory(left), a_stride)
        tile("tileloadd64", 6, memory(right), _WORD(64))
        tile("tdpbf16ps", 0, 4, 6)
        tile("tileloadd64", 7, memory(builder.add(right, panel_stride)), _WORD(64))
        tile("tdpbf16ps", 1, 4, 7)
        tile("tileloadd64", 5, memory(builder.add(left, lower)), a_stride)
        tile("tdpbf16ps", 2, 5, 6)
        tile("tdpbf16ps", 3, 5, 7)
        return [builder.add(left, _WORD(64)), builder.add(right, _WORD(1024))]

    loop(builder, builder.lshr(k, _WORD(5)), [a, b], step)
    for number, address in sums:
        tile("tilestored64", number, address, c_stride)


@cache
def tile_settings(features: Features) -> tuple[Any, Any]:
    """The intrinsics ``begin()`` and ``end()`` around a kernel's products: they set up and give back the thread's
    tiles.

    Nothing happens where no tiles are used. A thread that keeps its tiles costs time at every switch of threads.
    """

    @intrinsic
    def begin(typingctx):
        def codegen(context, builder, signature, args):
            if features.amx:
                # Palette 1; from byte 16 on each tile's bytes a row (uint16), from byte 48 on its rows: eight of 16 x
                # 64.
                words = [0] * 16
                words[0] = 1
                words[4:8] = [64 << 16 | 64] * 4
                words[12:14] = [0x10101010] * 2
                kind = ir.ArrayType(_INDEX, 16)
                setting = builder.alloca(kind)
                builder.store(ir.Constant(kind, words), setting)
                emit(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [builder.bitcast(setting, _BYTE.as_pointer())])
            return context.get_dummy_value()

        return types.void(), codegen

    @intrinsic
    def end(typingctx):
        def codegen(context, builder, signature, args):
            if features.amx:
                emit(builder, "llvm.x86.tilerelease", ir.VoidType(), [])
            return context.get_dummy_value()

        return types.void(), codegen

    return begin, end


@cache
def panel_product(features: Features, shape: Shape, accumulate: bool = False) -> Any:
    """``multiply(a, a_stride, rows, b, panels, panel_bytes, k, c, c_stride)``: a slice of rows with all panels of a
    matrix.

    ``a`` [rows, k], panels ``panel_bytes`` apart, ``c`` float32 [rows, 16 * panels]. Rows and panels are filled up to
    whole blocks. A group of panels stays near the core while all rows pass.
    """
    product = block_product(features, shape, accumulate)
    height, group = shape.rows, shape.panels

    @inline
    def multiply(a, a_stride, rows, b, panels, panel_bytes, k, c, c_stride):
        for panel in range(0, panels, group):
            for row in range(0, rows, height):
                product(
                    a + row * a_stride,
                    a_stride,
                    b + panel * panel_bytes,
                    panel_bytes,
                    k,
                    c + row * c_stride + panel * 64,
                    c_stride,
                )

    return multiply
