"""Products of a block of rows with panels as sums of whole numbers: int16 factors, int32 sums, a scale for each block.

Both factors are cut along K into blocks of 256 (the last may be shorter), each a scale and whole numbers of 16 bits:

    left, a row:    float32 scale, int16 [256]                              (516 bytes a block)
    right, a panel: float32 [16] scales of the columns, int16 [128, 16, 2]  (8256 bytes a block)

Neighbouring numbers along K lie together, as ``vpmaddwd`` wants them: it adds the products of two pairs. So

    c[r, n] += sum over blocks b of  (left[r, b] @ right[b, :, n]) * left_scale[r, b] * right_scale[b, n]

with the sum in the brackets exact. No sum overflows, whatever the numbers: the scales are chosen so that a block, as a
vector, is at most 65520 long on the left and 32775 on the right, and by Cauchy and Schwarz |a . b| <= |a| |b| < 2**31,
for any part of a block too. The root mean squares are then about 4100 and 2000; a number may reach 32767.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from slimrt.ops.fast.features import Features
from slimrt.ops.fast.lanes import loop
from slimrt.ops.fast.vectors import broadcast, emit, pointer

__all__ = ["BLOCK", "PANEL", "SCALE_BYTES", "whole_block_product"]

PANEL = 16  # columns of a panel
BLOCK = 256  # factors that share a scale
SCALE_BYTES = 4
_SHORT, _INDEX, _WORD, _FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


@cache
def whole_block_product(features: Features, rows: int, panels: int, accumulate: bool) -> Any:
    """See ``products.block_product``. K is even."""

    @intrinsic
    def product(typingctx, a, a_stride, b, panel_stride, k, c, c_stride):
        def codegen(context, builder, signature, args):
            _build(builder, features, rows, panels, accumulate, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return product


def _build(
    builder: ir.IRBuilder, features: Features, rows: int, panels: int, accumulate: bool, *args: ir.Value
) -> None:
    """Every sum is a vector of a row's columns; a step multiplies a pair of numbers of a row with a row of pairs."""
    a, a_stride, b, panel_stride, k, c, c_stride = args
    lanes = features.lanes
    ints, floats = ir.VectorType(_INDEX, lanes), ir.VectorType(_FLOAT, lanes)
    parts = [(panel, part) for panel in range(panels) for part in range(PANEL // lanes)]
    where = [(row, panel, part) for row in range(rows) for panel, part in parts]

    def at(base: ir.Value, *offsets: ir.Value) -> ir.Value:
        for offset in offsets:
            base = builder.add(base, offset)
        return base

    def place(row: int, panel: int, part: int) -> ir.Value:
        address = at(c, builder.mul(c_stride, _WORD(row)), _WORD(64 * panel + 4 * lanes * part))
        return pointer(builder, address, floats)

    def columns(right: ir.Value, kind: ir.Type) -> list[ir.Value]:
        """A row of all panels, 64 bytes of each."""
        return [
            builder.load(
                pointer(
                    builder,
                    at(right, builder.mul(panel_stride, _WORD(panel)), _WORD(4 * lanes * part)),
                    kind,
                ),
                align=4,
            )
            for panel, part in parts
        ]

    # A base for every third row: with an index register scaled by 1 and 2 that is all an address needs.
    bases = [at(a, builder.mul(a_stride, _WORD(row))) for row in range(0, rows, 3)]
    twice = builder.shl(a_stride, _WORD(1))

    def of_row(starts: tuple[ir.Value, ...], row: int, kind: ir.Type) -> ir.Value:
        offsets = [[], [a_stride], [twice]][row % 3]
        return builder.load(pointer(builder, at(starts[row // 3], *offsets), kind), align=2)

    def block(left: ir.Value, *carried: ir.Value) -> list[ir.Value]:
        """The next of the ``left`` numbers along K, from where ``carried`` point."""
        heads, head = carried[:-1], carried[-1]
        whole = builder.icmp_signed("<", left, _WORD(BLOCK))
        steps = builder.lshr(builder.select(whole, left, _WORD(BLOCK)), _WORD(1))

        def step(*carried: ir.Value) -> list[ir.Value]:
            starts, right, totals = carried[: len(bases)], carried[len(bases)], list(carried[len(bases) + 1 :])
            row_of_pairs = columns(right, ints)
            for row in range(rows):
                pair = broadcast(builder, of_row(starts, row, _INDEX), lanes)
                for column, value in enumerate(row_of_pairs):
                    index = row * len(parts) + column
                    totals[index] = _multiply_add(builder, features, pair, value, totals[index])
            return [*[at(start, _WORD(4)) for start in starts], at(right, _WORD(64)), *totals]

        zeros = [ir.Constant(ints, [0] * lanes)] * len(where)
        starts = [at(start, _WORD(SCALE_BYTES)) for start in heads]
        final = loop(builder, steps, [*starts, at(head, _WORD(PANEL * SCALE_BYTES)), *zeros], step)
        scales = columns(head, floats)
        for number, ((row, panel, part), total) in enumerate(zip(where, final[len(bases) + 1 :], strict=True)):
            of_columns = builder.fmul(builder.sitofp(total, floats), scales[number % len(parts)])
            scale = broadcast(builder, of_row(heads, row, _FLOAT), lanes)
            before = builder.load(place(row, panel, part), align=4)
            result = emit(builder, f"llvm.fma.v{lanes}f32", floats, [of_columns, scale, before])
            builder.store(result, place(row, panel, part), align=4)
        return [builder.sub(left, _WORD(BLOCK)), *final[: len(bases) + 1]]

    if not accumulate:
        for one in where:
            builder.store(ir.Constant(floats, [0.0] * lanes), place(*one), align=4)
    blocks = builder.lshr(at(k, _WORD(BLOCK - 1)), _WORD(BLOCK.bit_length() - 1))
    loop(builder, blocks, [k, *bases, b], block)


def _multiply_add(
    builder: ir.IRBuilder, features: Features, left: ir.Value, right: ir.Value, total: ir.Value
) -> ir.Value:
    """total + the products of both numbers of each pair; vectors of 32 bits."""
    lanes = total.type.count
    if features.vnni if features.avx512 else features.avxvnni:
        return emit(builder, f"llvm.x86.avx512.vpdpwssd.{32 * lanes}", total.type, [total, left, right])
    pairs = ir.VectorType(_SHORT, 2 * lanes)
    name = "llvm.x86.avx512.pmaddw.d.512" if features.avx512 else "llvm.x86.avx2.pmadd.wd"
    products = emit(builder, name, total.type, [builder.bitcast(left, pairs), builder.bitcast(right, pairs)])
    return builder.add(total, products)
