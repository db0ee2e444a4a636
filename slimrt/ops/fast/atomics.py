"""The words of threads that work together: memory that all of them see, the time, and calls by address."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from slimrt.ops.fast.vectors import emit, pointer

__all__ = [
    "atomic_add", "atomic_load", "atomic_store", "call_kernel", "call_void", "compare_and_swap", "cycles", "pause",
]  # fmt: skip


@intrinsic
def atomic_load(typingctx, address):
    """The int64 at ``address``; what was written before it was stored is seen."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(pointer(builder, args[0], ir.IntType(64)), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(typingctx, address, value):
    """Store an int64; whoever sees it sees what was written before."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], pointer(builder, args[0], ir.IntType(64)), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to the int64 at ``address``; returns what was there before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], ir.IntType(64)), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def compare_and_swap(typingctx, address, expected, value):
    """Store ``value`` if ``expected`` is there; returns whether it was."""

    def codegen(context, builder, signature, args):
        place = pointer(builder, args[0], ir.IntType(64))
        return builder.extract_value(builder.cmpxchg(place, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the core that this is a spin."""

    def codegen(context, builder, signature, args):
        emit(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def cycles(typingctx):
    """The processor's time stamp counter."""

    def codegen(context, builder, signature, args):
        return emit(builder, "llvm.readcyclecounter", ir.IntType(64), [])

    return types.int64(), codegen


@intrinsic
def call_kernel(typingctx, function, item, thread, args):
    """Call the kernel at address ``function``."""

    def codegen(context, builder, signature, values):
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word, word])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def call_void(typingctx, function):
    """Call the C function at address ``function`` (``int f(void)``) and forget what it returns."""

    def codegen(context, builder, signature, values):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
