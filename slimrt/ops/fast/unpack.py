"""Packed rows to the panels that products of many rows read: bfloat16 or float32, a layer at a time, as fast as memory.

A panel holds 16 rows of the packed matrix, column after column: float32 [columns][16], or bfloat16 in pairs of
columns, [columns / 2][16][2]. 16 rows are unpacked into a tile of float32 that stays in the first-level cache, then
turned over in blocks of 16 x 16 words. The bfloat16 numbers are those of float32, rounded to nearest even.
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
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import Kernel, compile_kernel
from slimrt.ops.fast.lanes import joiner, load_at, stack
from slimrt.ops.fast.unpacked_rows import TILE_COLUMNS, row_unpacker
from slimrt.ops.fast.vectors import (
    F32X16,
    U32X16,
    argument,
    load,
    load_scalar,
    pointer,
    store,
    store_scalar,
)

__all__ = ["PANEL", "turner", "unpack"]

PANEL = 16  # rows
_ROW_BYTES = TILE_COLUMNS * 4

_paired = joiner(*range(32))
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
