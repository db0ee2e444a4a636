"""Sums of products of bytes: the one thing in decode for which processors have different instructions.

With VNNI (vpdpbusd, 512 bits or 256) four products are added to a sum at once; without it two steps do the same. All of
them multiply unsigned bytes by signed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from slimrt.ops.fast.features import Features
from slimrt.ops.fast.vectors import I32X16, emit

__all__ = ["byte_products", "ints", "signed_products"]


@cache
def byte_products(features: Features) -> Callable[[Any, Any, Any], Any]:
    """``(sums I32X16, a U8X64, b I8X64) -> sums + (a.astype(i4) * b).reshape(16, 4).sum(axis=1)``; a at most 127."""

    @intrinsic
    def products(typingctx, sums, a, b):
        def codegen(context, builder, signature, args):
            if _counts_bytes(features):
                return _dpbusd(builder, features, *args)
            return builder.add(args[0], _maddubs(builder, features, *args[1:]))

        return sums(sums, a, b), codegen

    return products


@cache
def signed_products(features: Features) -> Callable[[Any, Any], Any]:
    """``(a I8X64, b I8X64) -> (a.astype(i4) * b).reshape(16, 4).sum(axis=1)``; b at least -127."""

    @intrinsic
    def products(typingctx, a, b):
        def codegen(context, builder, signature, args):
            first, second = args
            if _counts_bytes(
                features
            ):  # (a + 128) * b - 128 * b; a + 128 as unsigned is a with its top bit turned over
                top, zero = ir.Constant(first.type, [-128] * 64), ir.Constant(ints(32, 16), None)
                both = _dpbusd(builder, features, zero, builder.xor(first, top), second)
                return builder.sub(both, _dpbusd(builder, features, zero, top, second))
            # |a| * (b with a's sign). |a| may be 128: a sum of two products is then at most 2 * 128 * 127 < 2**15.
            negative = builder.icmp_signed("<", first, ir.Constant(first.type, None))
            size = builder.select(negative, builder.neg(first), first)
            turned = builder.select(negative, builder.neg(second), second)
            return _maddubs(builder, features, size, turned)

        return I32X16(a, b), codegen

    return products


def ints(bits: int, lanes: int) -> ir.VectorType:
    """LLVM's type of a vector of integers."""
    return ir.VectorType(ir.IntType(bits), lanes)


def _counts_bytes(features: Features) -> bool:
    """Whether there is vpdpbusd for the widest vectors at hand."""
    return features.vnni if features.avx512 else features.avxvnni


def _dpbusd(builder: ir.IRBuilder, features: Features, sums: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """vpdpbusd: sums [16] + the sums of four products each of unsigned a [64] and signed b [64]."""
    operands = [sums, builder.bitcast(a, sums.type), builder.bitcast(b, sums.type)]
    if features.avx512:
        return emit(builder, "llvm.x86.avx512.vpdpbusd.512", sums.type, operands)
    halves = [_half(builder, value) for value in operands]
    parts = [emit(builder, "llvm.x86.avx512.vpdpbusd.256", ints(32, 8), side) for side in zip(*halves, strict=True)]
    return _whole(builder, parts)


def _maddubs(builder: ir.IRBuilder, features: Features, a: ir.Value, b: ir.Value) -> ir.Value:
    """The same in two steps: vpmaddubsw sums two products in 16 bits (which must hold them), vpmaddwd two of these."""
    if features.avx512:
        pairs = emit(builder, "llvm.x86.avx512.pmaddubs.w.512", ints(16, 32), [a, b])
        ones = ir.Constant(ints(16, 32), [1] * 32)
        return emit(builder, "llvm.x86.avx512.pmaddw.d.512", ints(32, 16), [pairs, ones])
    ones = ir.Constant(ints(16, 16), [1] * 16)
    parts = []
    for side in zip(_half(builder, a), _half(builder, b), strict=True):
        pairs = emit(builder, "llvm.x86.avx2.pmadd.ub.sw", ints(16, 16), side)
        parts.append(emit(builder, "llvm.x86.avx2.pmadd.wd", ints(32, 8), [pairs, ones]))
    return _whole(builder, parts)


def _half(builder: ir.IRBuilder, value: ir.Value) -> list[ir.Value]:
    """A vector's lower and upper half."""
    count = value.type.count // 2
    masks = (ir.Constant(ints(32, count), list(range(at, at + count))) for at in (0, count))
    return [builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask) for mask in masks]


def _whole(builder: ir.IRBuilder, halves: list[ir.Value]) -> ir.Value:
    """Two halves of I32X16 joined."""
    return builder.shuffle_vector(*halves, ir.Constant(ints(32, 16), list(range(16))))
