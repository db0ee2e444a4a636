"""What attention of few rows does with one key, one value and one score: words of its kernels.

Query heads that share a KV head are computed together: each number of a key or value is loaded, and widened from
float16 to float32, once for all of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.lanes import exp, load_at, store_at
from slimrt.ops.fast.vectors import F16X16, F32X16, broadcast, emit, maximum, minimum, splat

__all__ = ["TILE", "capped_score", "mix_key", "score_key"]

TILE = 64  # keys at a time: the sink's length, so that a window behind it begins a tile


def _widened(builder: ir.IRBuilder, where: ir.Value, at: int) -> ir.Value:
    """16 float16 from ``at`` bytes behind an address, as float32."""
    return builder.fpext(load_at(builder, where, at, F16X16), F32X16.llvm)


@cache
def score_key(head_dim: int, heads: int) -> Any:
    """A function ``(key, q, sums)``: 16 partial sums of key [Dh] * q[h, Dh] to ``sums`` [h, 16 keys, 16] for each of
    the heads."""

    @intrinsic
    def score(typingctx, key, q, sums):
        def codegen(context, builder, signature, args):
            # Two sums for each head, of every other piece: neither waits for the one just begun.
            totals: dict[tuple[int, int], ir.Value] = {}
            for piece in range(head_dim // 16):
                value = _widened(builder, args[0], piece * 32)
                for head in range(heads):
                    query = load_at(builder, args[1], head * head_dim * 4 + piece * 64, F32X16)
                    chain = head, piece % 2
                    if chain in totals:
                        totals[chain] = emit(builder, "llvm.fma.v16f32", value.type, [value, query, totals[chain]])
                    else:
                        totals[chain] = builder.fmul(value, query)
            for head in range(heads):
                total = totals[head, 0]
                if (head, 1) in totals:
                    total = builder.fadd(total, totals[head, 1])
                store_at(builder, args[2], head * 16 * 64, total)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return score


@cache
def mix_key(heads: int, pieces: int, step: int) -> tuple[Any, Any, Any]:
    """``mixed [pieces, heads, 16]`` in registers: functions that load it (times a factor a head), add a key, store it.

    A key adds value [pieces, 16] times a weight for each head; the distances between weights and between the results of
    two heads are TILE * 4 and ``step`` bytes.
    """
    kind = types.UniTuple(F32X16, pieces * heads)

    @intrinsic
    def begin(typingctx, mixed, factors):
        def codegen(context, builder, signature, args):
            vectors = []
            for piece in range(pieces):
                for head in range(heads):
                    factor = broadcast(builder, load_at(builder, args[1], head * 4, types.float32), 16)
                    vectors.append(builder.fmul(load_at(builder, args[0], head * step + piece * 64, F32X16), factor))
            return context.make_tuple(builder, kind, vectors)

        return kind(types.int64, types.int64), codegen

    @intrinsic
    def add(typingctx, mixed, value, weights):
        def codegen(context, builder, signature, args):
            old = cgutils.unpack_tuple(builder, args[0])
            weights = [load_at(builder, args[2], head * TILE * 4, types.float32) for head in range(heads)]
            factors = [broadcast(builder, weight, 16) for weight in weights]
            new = []
            for piece in range(pieces):
                part = _widened(builder, args[1], piece * 32)
                for head in range(heads):
                    operands = [part, factors[head], old[piece * heads + head]]
                    new.append(emit(builder, "llvm.fma.v16f32", part.type, operands))
            return context.make_tuple(builder, kind, new)

        return kind(mixed, types.int64, types.int64), codegen

    @intrinsic
    def end(typingctx, mixed, to):
        def codegen(context, builder, signature, args):
            for number, vector in enumerate(cgutils.unpack_tuple(builder, args[0])):
                store_at(builder, args[1], number % heads * step + number // heads * 64, vector)
            return context.get_dummy_value()

        return types.void(mixed, types.int64), codegen

    return begin, add, end


@cache
def capped_score(cap: float) -> Any:
    """The word ``cap * np.tanh(score / cap)`` for F32X16."""
    inverse = 2.0 / cap if cap else 0.0

    @inline
    def squash(score):
        # tanh(y) = 1 - 2 / (1 + exp(2 y)); beyond 30 it is 1, and exp stays finite.
        twice = maximum(splat(F32X16, -60.0), minimum(splat(F32X16, 60.0), score * splat(F32X16, inverse)))
        return (splat(F32X16, 1.0) - splat(F32X16, 2.0) / (splat(F32X16, 1.0) + exp(twice))) * splat(F32X16, cap)

    return squash
