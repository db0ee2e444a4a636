"""Sums of products of bytes: the one thing in decode for which processors have different instructions.

With VNNI (vpdpbusd, 512 bits or 256) four products are added to a sum at once; without it two steps do the same. All of
them multiply unsigned bytes by signed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from slimrt.ops.fast.features import Features
from slimrt.ops.fast.vectors import I32X16, emit

__all__ = ["byte_products", "counts_bytes", "ints", "pair_products", "scaled_products", "signed_products"]


@cache
def byte_products(features: Features) -> Callable[[Any, Any, Any], Any]:
    """``(sums I32X16, a U8X64, b I8X64) -> sums + (a.astype(i4) * b).reshape(16, 4).sum(axis=1)``; a at most 127."""

    @intrinsic
    def products(typingctx, sums, a, b):
        def codegen(context, builder, signature, args):
            if counts_bytes(features):
                return _dpbusd(builder, features, *args)
            return builder.add(args[0], _maddubs(builder, features, *args[1:]))

        return sums(sums, a, b), codegen

    return products


@cache
def pair_products(features: Features) -> Callable[[Any, Any, Any, Any], Any]:
    """``(a, b, c, d) -> (a.astype(i4) * b + c.astype(i4) * d).reshape(16, 4).sum(axis=1)``; a, c U8X64 of at most 31,
    b, d I8X64 of at least -127: four products then fit into 16 bits."""

    @intrinsic
    def products(typingctx, a, b, c, d):
        def codegen(context, builder, signature, args):
            if counts_bytes(features):
                first = _dpbusd(builder, features, ir.Constant(ints(32, 16), None), *args[:2])
                return _dpbusd(builder, features, first, *args[2:])
            return _maddubs(builder, features, *args)

        return I32X16(a, b, c, d), codegen

    return products


@cache
def signed_products(features: Features) -> tuple[Callable[[Any], Any], Callable[[Any, Any, Any], Any]]:
    """``size(a)`` and ``products(size(a), a, b) -> (a.astype(i4) * b).reshape(16, 4).sum(axis=1)``; a and b I8X64, b at
    least -127. What depends on a alone is done once for several b."""

    @intrinsic
    def size(typingctx, a):
        def codegen(context, builder, signature, args):
            if counts_bytes(features):  # a + 128 as unsigned is a with its top bit turned over
                return builder.xor(args[0], _top())
            negative = builder.icmp_signed("<", args[0], ir.Constant(args[0].type, None))
            return builder.select(negative, builder.neg(args[0]), args[0])

        return a(a), codegen

    @intrinsic
    def products(typingctx, size, a, b):
        def codegen(context, builder, signature, args):
            size, first, second = args
            if counts_bytes(features):  # (a + 128) * b - 128 * b
                zero = ir.Constant(ints(32, 16), None)
                both = _dpbusd(builder, features, zero, size, second)
                return builder.sub(both, _dpbusd(builder, features, zero, _top(), second))
            # |a| * (b with a's sign). |a| may be 128: a sum of two products is then at most 2 * 128 * 127 < 2**15.
            return _maddubs(builder, features, size, _with_sign(builder, features, second, first))

        return I32X16(size, a, b), codegen

    return size, products


@cache
def scaled_products(features: Features) -> Any:
    """``(a U8X64, b I8X64, scales I16X32) -> ((a.astype(i4) * b).reshape(32, 2).sum(axis=1) * scales).reshape(16,
    2).sum(axis=1)``; a at most 127. The scales come for nothing where products take two steps; None elsewhere."""
    if counts_bytes(features):
        return None

    @intrinsic
    def products(typingctx, a, b, scales):
        def codegen(context, builder, signature, args):
            return _maddubs(builder, features, *args[:2], scales=args[2])

        return I32X16(a, b, scales), codegen

    return products


def _top() -> ir.Constant:
    return ir.Constant(ints(8, 64), [-128] * 64)


def _with_sign(builder: ir.IRBuilder, features: Features, b: ir.Value, a: ir.Value) -> ir.Value:
    """b [64], turned where a is negative; anything where a is 0."""
    if features.avx512:
        negative = builder.icmp_signed("<", a, ir.Constant(a.type, None))
        return builder.select(negative, builder.neg(b), b)
    halves = zip(_half(builder, b), _half(builder, a), strict=True)
    return _whole(builder, [emit(builder, "llvm.x86.avx2.psign.b", ints(8, 32), half) for half in halves])


def ints(bits: int, lanes: int) -> ir.VectorType:
    """LLVM's type of a vector of integers."""
    return ir.VectorType(ir.IntType(bits), lanes)


def counts_bytes(features: Features) -> bool:
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


def _maddubs(builder: ir.IRBuilder, features: Features, *factors: ir.Value, scales: ir.Value | None = None) -> ir.Value:
    """The same in two steps, of one or more pairs a, b: vpmaddubsw sums two products in 16 bits (which must hold the
    sums of all pairs), vpmaddwd two of these, times scales [32]."""
    if scales is None:
        scales = ir.Constant(ints(16, 32), [1] * 32)
    if features.avx512:
        pairs = _pairs(builder, "llvm.x86.avx512.pmaddubs.w.512", factors)
        return emit(builder, "llvm.x86.avx512.pmaddw.d.512", ints(32, 16), [pairs, scales])
    parts = []
    for *side, scale in zip(*(_half(builder, factor) for factor in (*factors, scales)), strict=True):
        pairs = _pairs(builder, "llvm.x86.avx2.pmadd.ub.sw", side)
        parts.append(emit(builder, "llvm.x86.avx2.pmadd.wd", ints(32, 8), [pairs, scale]))
    return _whole(builder, parts)


def _pairs(builder: ir.IRBuilder, name: str, factors: Sequence[ir.Value]) -> ir.Value:
    """Sums of two products in 16 bits, of each a and b of ``factors`` together."""
    kind = ints(16, factors[0].type.count // 2)
    both = zip(factors[::2], factors[1::2], strict=True)
    return reduce(builder.add, [emit(builder, name, kind, pair) for pair in both])


def _half(builder: ir.IRBuilder, value: ir.Value) -> list[ir.Value]:
    """A vector's lower and upper half."""
    count = value.type.count // 2
    masks = (ir.Constant(ints(32, count), list(range(at, at + count))) for at in (0, count))
    return [builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask) for mask in masks]


def _whole(builder: ir.IRBuilder, halves: list[ir.Value]) -> ir.Value:
    """Two halves of a vector joined."""
    lanes = 2 * halves[0].type.count
    return builder.shuffle_vector(*halves, ir.Constant(ints(32, lanes), list(range(lanes))))
