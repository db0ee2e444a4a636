"""Rows of factors: float32 numbers stored as the element that products want, and what is done on the way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import float32

from slimrt.ops.fast.bfloat import narrow_one, narrower
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.lanes import exp
from slimrt.ops.fast.products import Shape
from slimrt.ops.fast.vectors import (
    F32X16,
    fma,
    load,
    load_scalar,
    maximum,
    minimum,
    splat,
    store,
    store_scalar,
    sum_lanes,
)
from slimrt.ops.fast.whole_rows import whole_cast, whole_norm

__all__ = ["Elements", "activation_argument", "clamps", "elements", "mean_square"]

_LIMIT, _SLOPE = 7.0, 1.702  # of gpt-oss's gate
_GELU = 1.5957691216057308  # 2 sqrt(2 / pi)


@dataclass(frozen=True)
class Elements:
    """Functions for kernels; addresses are of elements, ``out`` [padded], x and gain float32 [n]. Rows of whole numbers
    have no put and no gate: a block's scale needs all of its numbers first.

    put(out, i, v): ``out[i : i + 16] = v``
    cast(x, n, out, padded): ``out[:n] = x``, zeros up to ``padded``
    norm(x, gain, n, eps, out, padded): ``out[:n] = x / np.sqrt(np.mean(x * x) + eps) * gain``, zeros up to ``padded``
    gate(g, u, out, i): ``out[i : i + 16] = g / (1 + np.exp(-g)) * u`` for 16 numbers at the addresses g and u; with the
    activation gelu the exponential is that of -2 sqrt(2 / pi) (g + 0.044715 g^3), with clamped see ``NumpyOps.clamped``
    """

    put: Any
    cast: Any
    norm: Any
    gate: Any


@cache
def activation_argument(activation: str) -> Any:
    """The word t for F32X16 in which ``activation`` is g / (1 + exp(-t(g))): g itself, gelu's in its tanh form, or a
    multiple of g (that is clamped before, see ``clamps``)."""
    if activation == "silu":

        @inline
        def argument_of(value):
            return value

    elif activation == "clamped":

        @inline
        def argument_of(value):
            return value * splat(F32X16, _SLOPE)

    else:

        @inline
        def argument_of(value):
            cubed = value * value * value
            return fma(cubed, splat(F32X16, 0.044715), value) * splat(F32X16, _GELU)

    return argument_of


@cache
def clamps(activation: str) -> tuple[Any, Any]:
    """The words for F32X16 that gate and up pass first: of ``clamped`` min(g, 7), and 1 + u within -7 .. 7."""
    if activation != "clamped":

        @inline
        def plain(value):
            return value

        return plain, plain

    @inline
    def clamp_gate(value):
        return minimum(splat(F32X16, _LIMIT), value)

    @inline
    def clamp_up(value):
        return minimum(splat(F32X16, _LIMIT), maximum(splat(F32X16, -_LIMIT), value)) + splat(F32X16, 1.0)

    return clamp_gate, clamp_up


@inline
def mean_square(x, n):
    """``np.mean(x[:n] * x[:n])``, float32."""
    whole = n // 16 * 16
    squares = splat(F32X16, 0.0)
    for i in range(0, whole, 16):
        value = load(F32X16, x + 4 * i)
        squares = fma(value, value, squares)
    total = sum_lanes(squares)
    for i in range(whole, n):
        one = load_scalar(float32, x + 4 * i)
        total += one * one
    return float32(total / float32(n))


@inline
def _norm_factor(x, n, eps):
    """``1 / np.sqrt(np.mean(x * x) + eps)``."""
    return float32(1.0 / np.sqrt(float32(mean_square(x, n) + eps)))


@cache
def elements(features: Features, shape: Shape, activation: str = "silu") -> Elements:
    """Those of the element of ``shape``."""
    if shape.whole:

        @inline
        def norm_whole(x, gain, n, eps, out, padded):
            whole_norm(x, gain, n, _norm_factor(x, n, eps), out, padded)

        return Elements(None, whole_cast, norm_whole, None)
    argument_of = activation_argument(activation)
    clamp_gate, clamp_up = clamps(activation)
    if shape.bf16:
        narrow = narrower(features)

        @inline
        def put(out, i, value):
            store(out + 2 * i, narrow(value))

        @inline
        def put_one(out, i, value):
            store_scalar(out + 2 * i, narrow_one(value))

    else:

        @inline
        def put(out, i, value):
            store(out + 4 * i, value)

        @inline
        def put_one(out, i, value):
            store_scalar(out + 4 * i, float32(value))

    @inline
    def cast(x, n, out, padded):
        whole = n // 16 * 16
        for i in range(0, whole, 16):
            put(out, i, load(F32X16, x + 4 * i))
        for i in range(whole, n):
            put_one(out, i, load_scalar(float32, x + 4 * i))
        for i in range(n, padded):
            put_one(out, i, 0.0)

    @inline
    def norm(x, gain, n, eps, out, padded):
        whole, factor = n // 16 * 16, _norm_factor(x, n, eps)
        for i in range(0, whole, 16):
            put(out, i, load(F32X16, x + 4 * i) * splat(F32X16, factor) * load(F32X16, gain + 4 * i))
        for i in range(whole, n):
            put_one(out, i, load_scalar(float32, x + 4 * i) * factor * load_scalar(float32, gain + 4 * i))
        for i in range(n, padded):
            put_one(out, i, 0.0)

    @inline
    def gate(g, u, out, i):
        value = clamp_gate(load(F32X16, g))
        one = splat(F32X16, 1.0)
        put(out, i, value / (one + exp(splat(F32X16, 0.0) - argument_of(value))) * clamp_up(load(F32X16, u)))

    return Elements(put, cast, norm, gate)
