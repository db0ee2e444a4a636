"""Packed rows to panels of whole numbers: each row's block of 256 columns rounded to int16 with a scale of its own.

Whatever the type, a row is unpacked to float32 first: a number then keeps some 13 bits beside its block's root mean
square, where the types' own whole numbers have 4 to 8 and would need a conversion to float32 every 32 columns.
"""

from __future__ import annotations

from functools import cache

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numba import float32, int64

from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import Kernel, compile_kernel
from slimrt.ops.fast.lanes import square_root, stack, sum_each
from slimrt.ops.fast.unpack import PANEL, turner
from slimrt.ops.fast.unpacked_rows import TILE_COLUMNS, row_unpacker
from slimrt.ops.fast.vectors import (
    F32X16,
    argument,
    fma,
    load,
    load_scalar,
    maximum,
    splat,
    store,
    store_scalar,
)
from slimrt.ops.fast.whole_products import BLOCK, SCALE_BYTES
from slimrt.ops.fast.whole_rows import RIGHT_LENGTH, round_numbers

__all__ = ["unpack_whole"]

assert TILE_COLUMNS == BLOCK
_FLOAT_BYTES = BLOCK * 4
_NUMBER_BYTES = BLOCK * 2 + 64  # of a row: rows a power of two apart would share a few sets of the cache
_TINY = 1e-36  # the square of a block's length below which it counts as 0
_tile, _numbers, _end = stack(PANEL * _FLOAT_BYTES), stack(PANEL * _NUMBER_BYTES), stack(PANEL * 64)
_squares, _factors = stack(PANEL * 64), stack(PANEL * 4)
_turn_in_place = turner(False)


@cache
def unpack_whole(features: Features, kind: GGMLQuantizationType, past_caches: bool = False) -> Kernel:
    """Item: one panel, as ``whole_products`` has it. Arguments and ``past_caches`` as ``unpack``'s; the columns of a
    panel (5) are a multiple of 16."""
    elements, nbytes = GGML_QUANT_SIZES[kind]
    unpack_row, turn = row_unpacker(kind), turner(past_caches)

    def unpack_panel(item, thread, args):
        stride, columns, width = argument(args, 1), argument(args, 3), argument(args, 5)
        packed = argument(args, 0) + item * PANEL * stride
        rows = min(PANEL, argument(args, 2) - item * PANEL)
        blocks = (width + BLOCK - 1) // BLOCK
        out = argument(args, 4) + item * (width * 2 + blocks * SCALE_BYTES) * PANEL
        tile, numbers, end, squares, factors = _tile(), _numbers(), _end(), _squares(), _factors()
        for start in range(0, width, BLOCK):
            many = min(BLOCK, width - start)
            for row in range(PANEL):
                count = min(BLOCK, columns - start) if row < rows else 0
                floats = tile + row * _FLOAT_BYTES
                unpack_row(packed + row * stride + start // elements * nbytes, count, floats)
                total = splat(F32X16, 0.0)
                for i in range(0, many, 16):
                    value = load(F32X16, floats + 4 * i)
                    total = fma(value, value, total)
                store(squares + row * 64, total)
            # The scales of all rows together: roots and quotients one after the other would take as long as all else.
            total = sum_each(squares)
            scale = square_root(maximum(splat(F32X16, _TINY), total)) * splat(F32X16, 1.0 / RIGHT_LENGTH)
            scale = scale + (total - total)  # NaN where a number is NaN or infinite
            store(out, scale)
            store(factors, splat(F32X16, 1.0) / scale)
            out += PANEL * SCALE_BYTES
            for row in range(PANEL):
                factor = load_scalar(float32, factors + row * 4)
                round_numbers(tile + row * _FLOAT_BYTES, many, factor, numbers + row * _NUMBER_BYTES)
            for column in range(0, many, 32):  # 16 pairs
                if many - column >= 32:
                    turn(numbers + column * 2, _NUMBER_BYTES, out + column * PANEL * 2)
                else:
                    _turn_in_place(numbers + column * 2, _NUMBER_BYTES, end)
                    for i in range(0, 16 * PANEL * 2, 8):
                        store_scalar(out + column * PANEL * 2 + i, load_scalar(int64, end + i))
            out += many * PANEL * 2

    return compile_kernel(unpack_panel, f"{features.key}-{kind.name}-{past_caches}")
