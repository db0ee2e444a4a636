"""Numbers of 16 bits: bfloat16 (float32 without its lower 16 bits, rounded to nearest even) for factors, half for the
cache.

``narrow(x)`` means ``bits = x.view(uint32); ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(uint16)``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import float32, types, uint16
from numba.extending import intrinsic

from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.products import BFLOAT
from slimrt.ops.fast.vectors import U16X16, U32X16, convert, emit, pointer, reinterpret, splat

__all__ = ["load_half", "narrow_one", "narrower", "store_half"]


@cache
def narrower(features: Features) -> Any:
    """The word ``narrow`` for kernels: F32X16 -> U16X16."""
    if features.bf16:

        @intrinsic
        def instruction(typingctx, a):
            """``narrow(a)`` in one instruction (numbers below 2**-126 become 0)."""

            def codegen(context, builder, signature, args):
                short = ir.VectorType(BFLOAT, 16)
                value = emit(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", short, args)
                return builder.bitcast(value, U16X16.llvm)

            return U16X16(a), codegen

        return instruction

    @inline
    def steps(a):
        bits = reinterpret(U32X16, a)
        odd = (bits >> splat(U32X16, 16)) & splat(U32X16, 1)
        return convert(U16X16, (bits + odd + splat(U32X16, 0x7FFF)) >> splat(U32X16, 16))

    return steps


@intrinsic
def _as_bits(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@inline
def narrow_one(value):
    """``narrow`` of one number."""
    bits = _as_bits(float32(value))
    return uint16((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16)


@intrinsic
def load_half(typingctx, address):
    """``m.view(float16)[0].astype(float32)``."""

    def codegen(context, builder, signature, args):
        half = builder.load(pointer(builder, args[0], ir.HalfType()), align=2)
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.int64), codegen


@intrinsic
def store_half(typingctx, address, value):
    """``m.view(float16)[0] = value``, rounded to nearest even."""

    def codegen(context, builder, signature, args):
        half = builder.fptrunc(args[1], ir.HalfType())
        builder.store(half, pointer(builder, args[0], ir.HalfType()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen
