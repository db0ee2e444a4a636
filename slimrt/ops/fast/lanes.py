"""Words of ``vectors`` about the order of lanes, and those that unpacking and attention need.

Those that take lane numbers are made first (``first_half = picker(0, 1, 2, 3)``) and called in a kernel then, because
lane numbers are part of the instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, types
from numba.extending import intrinsic

from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.vectors import (
    F32X16,
    I32X16,
    Vector,
    emit,
    fma,
    load,
    load_scalar,
    maximum,
    minimum,
    pointer,
    reinterpret,
    splat,
    store_scalar,
    sum_lanes,
)

__all__ = [
    "bits_times",
    "constant",
    "exp",
    "joiner",
    "load_at",
    "loop",
    "picker",
    "prefetch",
    "spoil",
    "square_root",
    "stack",
    "store_at",
    "sum_each",
    "table",
    "where_set",
]

_INDEX = ir.IntType(32)


def constant(kind: Vector, *values: float) -> Callable[[], Any]:
    """``lambda: np.array(values, kind)``."""

    @intrinsic
    def make(typingctx):
        def codegen(context, builder, signature, args):
            return ir.Constant(kind.llvm, [kind.llvm.element(value) for value in values])

        return kind(), codegen

    return make


def picker(*lanes: int) -> Callable[[Any], Any]:
    """``lambda a: a[list(lanes)]``."""

    @intrinsic
    def pick(typingctx, a):
        def codegen(context, builder, signature, args):
            return builder.shuffle_vector(args[0], ir.Constant(args[0].type, ir.Undefined), _indices(lanes))

        return Vector(a.element, len(lanes))(a), codegen

    return pick


def joiner(*lanes: int) -> Callable[[Any, Any], Any]:
    """``lambda a, b: np.concatenate([a, b])[list(lanes)]``; a and b of the same kind."""

    @intrinsic
    def join(typingctx, a, b):
        def codegen(context, builder, signature, args):
            return builder.shuffle_vector(args[0], args[1], _indices(lanes))

        return Vector(a.element, len(lanes))(a, b), codegen

    return join


def _indices(lanes: tuple[int, ...]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INDEX, len(lanes)), [_INDEX(lane) for lane in lanes])


def stack(nbytes: int) -> Callable[[], Any]:
    """A function that gives the address of so many bytes that live until its caller returns, on a line's boundary."""

    @intrinsic
    def take(typingctx):
        def codegen(context, builder, signature, args):
            with builder.goto_entry_block():  # once a call, not once a turn of a loop
                memory = builder.alloca(ir.ArrayType(ir.IntType(8), nbytes))
            memory.align = 64
            return builder.ptrtoint(memory, ir.IntType(64))

        return types.int64(), codegen

    return take


def load_at(builder: ir.IRBuilder, address: ir.Value, offset: int, kind: Any) -> ir.Value:
    """For intrinsics: ``m[0]``, a vector of ``kind`` (or numba.float32) ``offset`` bytes behind ``address``."""
    llvm = kind.llvm if isinstance(kind, Vector) else ir.FloatType()
    return builder.load(pointer(builder, builder.add(address, ir.IntType(64)(offset)), llvm), align=1)


def store_at(builder: ir.IRBuilder, address: ir.Value, offset: int, value: ir.Value) -> None:
    """For intrinsics: ``m[0] = value``, a vector, ``offset`` bytes behind ``address``."""
    builder.store(value, pointer(builder, builder.add(address, ir.IntType(64)(offset)), value.type), align=1)


def loop(builder: ir.IRBuilder, count: ir.Value, phis: list[ir.Value], body: Callable[..., list[ir.Value]]) -> Any:
    """For intrinsics: ``for _ in range(count): phis = body(*phis)``, count at least 1; returns the last ones."""
    word = ir.IntType(64)
    before, steps = builder.block, builder.append_basic_block("steps")
    after = builder.append_basic_block("done")
    builder.branch(steps)
    builder.position_at_end(steps)
    number = builder.phi(word)
    number.add_incoming(word(0), before)
    carried = [builder.phi(value.type) for value in phis]
    for phi, value in zip(carried, phis, strict=True):
        phi.add_incoming(value, before)
    updated = body(*carried)
    following = builder.add(number, word(1))
    number.add_incoming(following, builder.block)
    for phi, value in zip(carried, updated, strict=True):
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), steps, after)
    builder.position_at_end(after)
    return updated


def table(*values: int) -> Callable[[Any], Any]:
    """``lambda codes: np.array(values, np.uint8)[codes]``: 16 values; codes in 16 lanes or a multiple of 32."""

    @intrinsic
    def look_up(typingctx, codes):
        wide = codes.lanes % 32 == 0
        name, lanes = ("llvm.x86.avx2.pshuf.b", 32) if wide else ("llvm.x86.ssse3.pshuf.b.128", 16)
        kind = ir.VectorType(ir.IntType(8), lanes)
        entries = ir.Constant(kind, [value & 255 for value in values] * (lanes // 16))

        def codegen(context, builder, signature, args):
            parts = []
            for at in range(0, codes.lanes, lanes):
                some = builder.shuffle_vector(
                    args[0], ir.Constant(args[0].type, ir.Undefined), _indices(tuple(range(at, at + lanes)))
                )
                parts.append(emit(builder, name, kind, [entries, some]))
            while len(parts) > 1:
                both = _indices(tuple(range(2 * parts[0].type.count)))
                parts = [builder.shuffle_vector(a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)]
            return parts[0]

        return codes(codes), codegen

    return look_up


@intrinsic
def bits_times(typingctx, bits, value):
    """``np.where(np.unpackbits(bits.view(uint8), bitorder="little"), value, 0)``: a bit for each lane of ``value``."""

    def codegen(context, builder, signature, args):
        mask = builder.bitcast(args[0], ir.VectorType(ir.IntType(1), value.lanes))
        return builder.select(mask, args[1], ir.Constant(args[1].type, None))

    return value(bits, value), codegen


@intrinsic
def where_set(typingctx, a, value):
    """``np.where(a != 0, value, 0)``."""

    def codegen(context, builder, signature, args):
        return builder.select(
            builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None)),
            args[1],
            ir.Constant(args[1].type, None),
        )

    return value(a, value), codegen


@intrinsic
def prefetch(typingctx, address):
    """Bring the cache line of ``address`` nearer; any address will do, nothing is read."""

    def codegen(context, builder, signature, args):
        where = pointer(builder, args[0], ir.IntType(8))
        emit(builder, "llvm.prefetch.p0", ir.VoidType(), [where, _INDEX(0), _INDEX(3), _INDEX(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def square_root(typingctx, a):
    """``np.sqrt(a)``; f32."""

    def codegen(context, builder, signature, args):
        return emit(builder, f"llvm.sqrt.v{a.lanes}f32", a.llvm, args)

    return a(a), codegen


@inline
def exp(x):
    """``np.exp(np.clip(x, -87.3, 88))`` for F32X16, to about 1e-7: 2**n * e**r with |r| <= ln(2) / 2; NaN stays NaN."""
    x = minimum(splat(F32X16, 88.0), maximum(splat(F32X16, -87.3), x))  # both yield the second where one is NaN
    # Adding 1.5 * 2**23 rounds to whole numbers and leaves them in the low bits.
    shifted = fma(x, splat(F32X16, 1.4426950408889634), splat(F32X16, 12582912.0))
    whole = shifted - splat(F32X16, 12582912.0)
    r = fma(whole, splat(F32X16, -0.693359375), x)  # ln(2) in two parts: the product with the first is exact
    r = fma(whole, splat(F32X16, 2.12194440e-4), r)
    # Cephes' polynomial for (e**r - 1 - r) / r**2.
    p = splat(F32X16, 1.9875691500e-4)
    p = fma(p, r, splat(F32X16, 1.3981999507e-3))
    p = fma(p, r, splat(F32X16, 8.3334519073e-3))
    p = fma(p, r, splat(F32X16, 4.1665795894e-2))
    p = fma(p, r, splat(F32X16, 1.6666665459e-1))
    p = fma(p, r, splat(F32X16, 5.0000001201e-1))
    p = fma(p, r * r, r) + splat(F32X16, 1.0)
    # Multiplied, not added to the exponent's bits: whatever bits a NaN has, it stays one.
    return p * reinterpret(F32X16, (reinterpret(I32X16, shifted) << splat(I32X16, 23)) + splat(I32X16, 127 << 23))


@inline
def spoil(x, count, largest):
    """``if not (abs(m[:count]) < largest).all(): m[:count] = np.nan``, float32 at ``x``; ``largest`` at most 3e38."""
    whole = count // 16 * 16
    factor = float32(3.4028235e38) / float32(largest)
    total = splat(F32X16, 0.0)
    for i in range(0, whole, 16):
        scaled = load(F32X16, x + 4 * i) * splat(F32X16, factor)
        total = total + (scaled - scaled)  # NaN for NaN and infinity, else 0
    rest = sum_lanes(total)
    for i in range(whole, count):
        number = float32(load_scalar(float32, x + 4 * i) * factor)
        rest += number - number
    if rest != float32(0):
        for i in range(count):
            store_scalar(x + 4 * i, float32(np.nan))


@intrinsic
def sum_each(typingctx, address):
    """``m.reshape(16, 16).sum(axis=1)``: of 16 vectors F32X16 that follow each other, each one's sum: F32X16."""
    vector = F32X16.llvm

    def codegen(context, builder, signature, args):
        base = pointer(builder, args[0], vector)
        left = [builder.load(builder.gep(base, [ir.IntType(64)(row)]), align=1) for row in range(16)]
        # Each step joins rows half the list apart: their halves (quarters, ...) side by side, then added. After four
        # steps lane i is all of row i.
        for width in (8, 4, 2, 1):
            low = [base + i + 16 * row for base in range(0, 16, 2 * width) for row in (0, 1) for i in range(width)]
            high = [index + width for index in low]
            half = len(left) // 2
            left = [
                builder.fadd(*(builder.shuffle_vector(a, b, _indices(tuple(pick))) for pick in (low, high)))
                for a, b in zip(left[:half], left[half:], strict=True)
            ]
        return left[0]

    return F32X16(types.int64), codegen
