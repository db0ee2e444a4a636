"""The words that kernels are written in: vectors of a fixed number of lanes, loaded from and stored to addresses.

A kernel works on addresses (int64), not on arrays: a few operations on vectors turn into the same few instructions,
whatever Numba knows about the arrays. Each word's docstring gives the NumPy line that means the same, with ``m`` for
the memory at an address as an array of the vector's element.

Vector values are ordinary variables of a kernel: ``+``, ``-``, ``*`` work on them lane by lane, integers (``&``, ``|``,
``^``, ``<<``, ``>>`` too) with wrap-around. Literals in the kernel's source become lanes with ``splat``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel, register_default
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.core.typing.templates import signature as typed
from numba.extending import intrinsic

__all__ = [
    "F16X16",
    "F32X8",
    "F32X16",
    "I8X16",
    "I8X32",
    "I8X64",
    "I16X8",
    "I16X16",
    "I16X32",
    "I32X8",
    "I32X16",
    "U8X16",
    "U8X32",
    "U8X64",
    "U16X16",
    "U32X16",
    "Vector",
    "argument",
    "argument_float",
    "fma",
    "load",
    "load_scalar",
    "max_lanes",
    "maximum",
    "minimum",
    "reinterpret",
    "splat",
    "store",
    "store_scalar",
    "sum_lanes",
]  # fmt: skip

_ELEMENTS: dict[str, ir.Type] = {
    "f32": ir.FloatType(), "i8": ir.IntType(8), "u8": ir.IntType(8), "i16": ir.IntType(16), "u16": ir.IntType(16),
    "i32": ir.IntType(32), "u32": ir.IntType(32), "i64": ir.IntType(64), "f16": ir.HalfType(),
}  # fmt: skip
_SCALARS: dict[str, types.Type] = {
    "f32": types.float32, "i8": types.int8, "u8": types.uint8, "i16": types.int16, "u16": types.uint16,
    "i32": types.int32, "u32": types.uint32, "i64": types.int64,
}  # fmt: skip


class Vector(types.Type):
    """Numba's type of a vector: an element's name (f32, i8, u8, i16, ...) and a number of lanes."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"{element}x{lanes}")

    @property
    def llvm(self) -> ir.VectorType:
        """The vector in LLVM's terms."""
        return ir.VectorType(_ELEMENTS[self.element], self.lanes)

    @property
    def scalar(self) -> types.Type:
        """Numba's type of one lane."""
        return _SCALARS[self.element]

    @property
    def floating(self) -> bool:
        return self.element.startswith("f")

    @property
    def signed(self) -> bool:
        return not self.element.startswith("u")


@register_default(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


F32X8, F32X16 = Vector("f32", 8), Vector("f32", 16)
I8X16, I8X32, I8X64 = Vector("i8", 16), Vector("i8", 32), Vector("i8", 64)
U8X16, U8X32, U8X64 = Vector("u8", 16), Vector("u8", 32), Vector("u8", 64)
I16X8, I16X16, I16X32 = Vector("i16", 8), Vector("i16", 16), Vector("i16", 32)
I32X8, I32X16 = Vector("i32", 8), Vector("i32", 16)
U16X16, U32X16 = Vector("u16", 16), Vector("u32", 16)
F16X16 = Vector("f16", 16)


# -- what an intrinsic is made of ------------------------------------------------------------------------------------


def emit(builder: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Value]) -> ir.Value:
    """A call of LLVM's intrinsic ``name`` (its full name, such as ``llvm.fma.v16f32``)."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [arg.type for arg in args]), name)
    return builder.call(function, args)


def pointer(builder: ir.IRBuilder, address: ir.Value, to: ir.Type) -> ir.Value:
    """An address (i64) as a pointer."""
    return builder.inttoptr(address, to.as_pointer())


def _vector_of(kind: Any) -> Vector:
    """The vector meant by an argument that names one."""
    return kind.instance_type


# -- memory ----------------------------------------------------------------------------------------------------------


@intrinsic
def load(typingctx, kind, address):
    """``m[:lanes]``: a vector of ``kind`` from ``address``, aligned or not."""
    vector = _vector_of(kind)

    def codegen(context, builder, signature, args):
        return builder.load(pointer(builder, args[1], vector.llvm), align=1)

    return vector(kind, types.int64), codegen


@intrinsic
def store(typingctx, address, value):
    """``m[:lanes] = value``."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], pointer(builder, args[0], value.llvm), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def load_scalar(typingctx, kind, address):
    """``m[0]``: one number of the (Numba) type ``kind``, such as ``numba.float32``."""
    scalar = kind.dtype

    def codegen(context, builder, signature, args):
        return builder.load(pointer(builder, args[1], context.get_value_type(scalar)), align=1)

    return scalar(kind, types.int64), codegen


@intrinsic
def store_scalar(typingctx, address, value):
    """``m[0] = value``; the value's type says how many bytes."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], pointer(builder, args[0], args[1].type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def argument(typingctx, args, index):
    """``args[index]``: the kernel's argument number ``index``, an integer or an address."""

    def codegen(context, builder, signature, values):
        base = pointer(builder, values[0], ir.IntType(64))
        return builder.load(builder.gep(base, [values[1]]))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def argument_float(typingctx, args, index):
    """``args.view(float64)[index]`` as float32: the kernel's argument number ``index``, a number."""

    def codegen(context, builder, signature, values):
        base = pointer(builder, values[0], ir.DoubleType())
        return builder.fptrunc(builder.load(builder.gep(base, [values[1]])), ir.FloatType())

    return types.float32(types.int64, types.int64), codegen


# -- lanes -----------------------------------------------------------------------------------------------------------


@intrinsic
def splat(typingctx, kind, value):
    """``np.full(lanes, value)``."""
    vector = _vector_of(kind)

    def codegen(context, builder, signature, args):
        element = context.cast(builder, args[1], value, vector.scalar)
        return broadcast(builder, element, vector.lanes)

    return vector(kind, value), codegen


def broadcast(builder: ir.IRBuilder, element: ir.Value, lanes: int) -> ir.Value:
    """One value in every lane."""
    kind = ir.VectorType(element.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), element, ir.IntType(32)(0))
    return builder.shuffle_vector(
        first, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    )


@intrinsic
def fma(typingctx, a, b, c):
    """``a * b + c`` with one rounding; vectors of f32."""

    def codegen(context, builder, signature, args):
        return emit(builder, f"llvm.fma.v{a.lanes}f32", a.llvm, args)

    return a(a, a, a), codegen


@intrinsic
def maximum(typingctx, a, b):
    """``np.where(a > b, a, b)``: the second where one is NaN, as the instruction does it; f32 or integers."""
    return a(a, a), _selecting(a, ">")


@intrinsic
def minimum(typingctx, a, b):
    """``np.where(a < b, a, b)``."""
    return a(a, a), _selecting(a, "<")


def _selecting(vector: Vector, relation: str) -> Callable[..., ir.Value]:
    def codegen(context, builder, signature, args):
        if vector.floating:
            wins = builder.fcmp_ordered(relation, *args)
        elif vector.signed:
            wins = builder.icmp_signed(relation, *args)
        else:
            wins = builder.icmp_unsigned(relation, *args)
        return builder.select(wins, *args)

    return codegen


@intrinsic
def sum_lanes(typingctx, a):
    """``a.sum()``, halves added to halves; f32 or i32."""

    def codegen(context, builder, signature, args):
        return _fold(builder, args[0], a.lanes, builder.fadd if a.floating else builder.add)

    return a.scalar(a), codegen


@intrinsic
def max_lanes(typingctx, a):
    """``a.max()``; f32 without NaN."""

    def codegen(context, builder, signature, args):
        def larger(x: ir.Value, y: ir.Value) -> ir.Value:
            return builder.select(builder.fcmp_ordered(">", x, y), x, y)

        return _fold(builder, args[0], a.lanes, larger)

    return a.scalar(a), codegen


def _fold(builder: ir.IRBuilder, value: ir.Value, lanes: int, join: Callable[..., ir.Value]) -> ir.Value:
    index = ir.IntType(32)
    while lanes > 1:
        lanes //= 2
        low, high = (
            builder.shuffle_vector(
                value,
                ir.Constant(value.type, ir.Undefined),
                ir.Constant(ir.VectorType(index, lanes), [at + i for i in range(lanes)]),
            )
            for at in (0, lanes)
        )
        value = join(low, high)
    return builder.extract_element(value, index(0))


@intrinsic
def reinterpret(typingctx, kind, a):
    """``a.view(kind)``: the same bits."""
    vector = _vector_of(kind)

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[1], vector.llvm)

    return vector(kind, a), codegen


@intrinsic
def convert(typingctx, kind, a):
    """``a.astype(kind)``: as many lanes of another element; wider or narrower integers, integers <-> f32 (towards
    0)."""
    vector = _vector_of(kind)

    def codegen(context, builder, signature, args):
        value, target = args[1], vector.llvm
        if a.floating and vector.floating:
            widens = _bits(vector) > _bits(a)
            return builder.fpext(value, target) if widens else builder.fptrunc(value, target)
        if a.floating:
            return builder.fptosi(value, target) if vector.signed else builder.fptoui(value, target)
        if vector.floating:
            return builder.sitofp(value, target) if a.signed else builder.uitofp(value, target)
        if _bits(vector) <= _bits(a):
            return builder.trunc(value, target) if _bits(vector) < _bits(a) else value
        return builder.sext(value, target) if a.signed else builder.zext(value, target)

    return vector(kind, a), codegen


def _bits(vector: Vector) -> int:
    return int(vector.element[1:])


# -- operators -------------------------------------------------------------------------------------------------------

_FLOATING = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
_WHOLE = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.and_: "and_", operator.or_: "or_",
    operator.xor: "xor", operator.lshift: "shl",
}  # fmt: skip


def _operator(symbol: Any) -> None:
    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return typed(args[0], *args)
            return None

    infer_global(symbol)(Template)

    @lower_builtin(symbol, Vector, Vector)
    def lower(context, builder, signature, args):
        vector = signature.return_type
        if vector.floating:
            return getattr(builder, _FLOATING[symbol])(*args)
        if symbol is operator.rshift:
            return builder.ashr(*args) if vector.signed else builder.lshr(*args)
        return getattr(builder, _WHOLE[symbol])(*args)


for _symbol in {*_FLOATING, *_WHOLE, operator.rshift}:
    _operator(_symbol)
