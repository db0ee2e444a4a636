"""One dot product for each type of packed weights: all that the products of few rows know about a format.

A matrix row is cut into *spans* of whole blocks. ``unpack(w)`` makes vectors of the span at address w, and
``multiply(sums, minima, unpacked, floats, record)`` adds what it contributes, to two vectors: with a weight of d * q +
offset * m (d, m of its block, or sub-block; m is d itself where the type stores none), x of the activations and every
lane a partial sum,

    sums   += (d * q * x).sum()        minima += (m * x).sum()        row @ x == sums.sum() + offset * minima.sum()

A span may reach past the end of its row: there x is 0, and w the next row, or a copy of the end with zeros behind it.
The block formats are those of ggml (ggml-common.h); ``gguf.quants`` is the same in NumPy. Packed types have their words
in ``dots_32`` and ``dots_256``, by the size of their blocks, floats here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from gguf.constants import GGMLQuantizationType

from slimrt.ops.fast import dots_32, dots_256  # noqa: F401  # which enter their types
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.formats import MAKERS, Format, Words, dot_product
from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.vectors import F16X16, F32X16, U16X16, U32X16, convert, fma, load, reinterpret, splat

__all__ = ["FORMATS", "Format", "format_of"]

Kind = GGMLQuantizationType
FORMATS = MAKERS.keys()


@cache
def format_of(kind: GGMLQuantizationType, features: Features) -> Format:
    """The format of ``kind``, its words made for ``features``. KeyError for a kind not in FORMATS."""
    return MAKERS[kind](features)


def _floats(widened: Any, size: int) -> Words:
    """Of types that ``widened(address)`` reads as F32X16; ``size`` bytes for an element."""

    @inline
    def unpack(w):
        return widened(w), widened(w + 16 * size), widened(w + 32 * size), widened(w + 48 * size)

    @inline
    def multiply(sums, minima, unpacked, floats, record):
        # Two chains and one sum at the end: the next span waits for one addition only.
        a = unpacked[0] * load(F32X16, floats)
        b = unpacked[1] * load(F32X16, floats + 64)
        a = fma(unpacked[2], load(F32X16, floats + 128), a)
        b = fma(unpacked[3], load(F32X16, floats + 192), b)
        return sums + (a + b), minima

    return unpack, multiply


@dot_product(Kind.F32, 64, quantized=False)
def _f32(features: Features) -> Words:
    @inline
    def widened(w):
        return load(F32X16, w)

    return _floats(widened, 4)


@dot_product(Kind.F16, 64, quantized=False)
def _f16(features: Features) -> Words:
    @inline
    def widened(w):
        return convert(F32X16, load(F16X16, w))

    return _floats(widened, 2)


@dot_product(Kind.BF16, 64, quantized=False)
def _bf16(features: Features) -> Words:
    @inline
    def widened(w):
        return reinterpret(F32X16, convert(U32X16, load(U16X16, w)) << splat(U32X16, 16))

    return _floats(widened, 2)
