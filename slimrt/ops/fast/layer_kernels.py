"""The row-wise part of a layer for many rows: an item is a slice of rows, which stays near the core from norm to
result.

Arguments are listed as words of the kernel's table. ``panels`` are those of ``unpack``: all parts of a stacked matrix
one after the other, each filled up to whole groups; biases are laid out like the panels' columns.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import float32

from slimrt.ops.fast.bfloat import store_half
from slimrt.ops.fast.elements import elements, mean_square
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import Kernel, compile_kernel, inline
from slimrt.ops.fast.lanes import spoil
from slimrt.ops.fast.products import Shape, panel_product, shape_of, sizes, tile_settings
from slimrt.ops.fast.team import address
from slimrt.ops.fast.vectors import (
    F16X16,
    F32X16,
    argument,
    argument_float,
    convert,
    load,
    load_scalar,
    splat,
    store,
    store_scalar,
)
from slimrt.ops.fast.whole_products import BLOCK
from slimrt.ops.layer import HeadNorms

__all__ = [
    "RESULT_PANELS",
    "ROW_GAP",
    "WAITING_BYTES",
    "feed_forward_kernel",
    "head_norm_words",
    "linear_kernel",
    "norm_in_place",
    "qkv_kernel",
]

ROW_GAP = 64  # bytes behind each row of factors: rows a power of two apart would share a few sets of the cache
_FLOAT_MAX, _HALF_MAX = 3e38, 65520.0  # what rounds to infinity in float16 begins there
WAITING_BYTES = BLOCK * 4 + ROW_GAP  # of a row's floats that wait to be rounded
RESULT_PANELS = 64  # of a product that waits to be added to something


@inline
def _add(a, b, n, out):
    """``out[:n] = a + b``, float32."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        store(out + 4 * i, load(F32X16, a + 4 * i) + load(F32X16, b + 4 * i))
    for i in range(whole, n):
        store_scalar(out + 4 * i, float32(load_scalar(float32, a + 4 * i) + load_scalar(float32, b + 4 * i)))


@inline
def _copy(a, n, out):
    """``out[:n] = a``, float32."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        store(out + 4 * i, load(F32X16, a + 4 * i))
    for i in range(whole, n):
        store_scalar(out + 4 * i, load_scalar(float32, a + 4 * i))


@inline
def _halve(a, n, out):
    """``out[:n] = a.astype(float16)``."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        store(out + 2 * i, convert(F16X16, load(F32X16, a + 4 * i)))
    for i in range(whole, n):
        store_half(out + 2 * i, load_scalar(float32, a + 4 * i))


@inline
def _turn(head, cos, sin, half):
    """Rotate the pairs (i, half + i) of one head [Dh] float32 in place."""
    whole = half // 16 * 16
    for i in range(0, whole, 16):
        c, s = load(F32X16, cos + 4 * i), load(F32X16, sin + 4 * i)
        a, b = load(F32X16, head + 4 * i), load(F32X16, head + 4 * (half + i))
        store(head + 4 * i, a * c - b * s)
        store(head + 4 * (half + i), b * c + a * s)
    for i in range(whole, half):
        d, t = load_scalar(float32, cos + 4 * i), load_scalar(float32, sin + 4 * i)
        x, y = load_scalar(float32, head + 4 * i), load_scalar(float32, head + 4 * (half + i))
        store_scalar(head + 4 * i, float32(x * d - y * t))
        store_scalar(head + 4 * (half + i), float32(y * d + x * t))


@inline
def norm_in_place(x, gain, n, eps, scale):
    """``x[:n] = x / np.sqrt(np.mean(x * x) + eps) * gain * scale``, float32; without a gain (0) ``x * scale``."""
    whole = n // 16 * 16
    factor = float32(scale)
    if gain != 0:
        factor = float32(scale / np.sqrt(float32(mean_square(x, n) + eps)))
    for i in range(0, whole, 16):
        value = load(F32X16, x + 4 * i) * splat(F32X16, factor)
        if gain != 0:
            value = value * load(F32X16, gain + 4 * i)
        store(x + 4 * i, value)
    for i in range(whole, n):
        other = float32(load_scalar(float32, x + 4 * i) * factor)
        if gain != 0:
            other = float32(other * load_scalar(float32, gain + 4 * i))
        store_scalar(x + 4 * i, other)


@inline
def norm_heads(x, gain, heads, head_dim, whole, eps, scale):
    """``norm_in_place`` of each of the heads [heads, Dh], or (``whole``) of all as one row."""
    if whole != 0:
        norm_in_place(x, gain, heads * head_dim, eps, scale)
    else:
        for head in range(heads):
            norm_in_place(x + head * head_dim * 4, gain, head_dim, eps, scale)


def head_norm_words(norms: HeadNorms | None, width: int) -> tuple[int, int, int]:
    """Addresses of the gains of queries and keys (0: none), and whether they are those of whole rows."""
    if norms is None or norms.q_gain is None or norms.k_gain is None:
        return 0, 0, 0
    return address(norms.q_gain), address(norms.k_gain), int(len(norms.q_gain) != width)


@cache
def qkv_kernel(features: Features, shape: Shape, norms: bool = False) -> Kernel:
    """Norm, the stacked projection, bias, rotation: x [T, D] -> q float32 [T, H Dh], k and v float16 [T, Hkv Dh].

    0 x, 1 T, 2 rows of a slice, 3 D, 4 D padded, 5 gain, 6 eps, 7 panels, 8 how many, 9 bias or 0,
    10 first column of k, 11 of v, 12 cos, 13 sin [T, half], 14 half, 15 H, 16 Hkv, 17 Dh, 18 q, 19 k, 20 v,
    21 scratch, 22 bytes of it for each thread: rows [slice, D padded] elements, then [slice, columns] float32;
    with ``norms`` 23 gain of q, 24 of k (or 0), 25 whether of whole rows, 26 eps, 27 factor of q. A gain (5) of 0 is
    none, and x is taken as it is.
    """
    words, multiply = elements(features, shape), panel_product(features, shape)
    norm, cast = words.norm, words.cast
    begin, end = tile_settings(features)
    height, (row_bytes, panel_bytes) = shape.rows, sizes(shape)

    def qkv(item, thread, args):
        x, tokens, size = argument(args, 0), argument(args, 1), argument(args, 2)
        d, padded = argument(args, 3), argument(args, 4)
        gain, eps = argument(args, 5), argument_float(args, 6)
        panels, count, bias = argument(args, 7), argument(args, 8), argument(args, 9)
        half, heads, kv_heads, head_dim = argument(args, 14), argument(args, 15), argument(args, 16), argument(args, 17)
        left = argument(args, 21) + thread * argument(args, 22)
        pitch = row_bytes(padded) + ROW_GAP
        joint = left + size * pitch
        stride = count * 64
        first = item * size
        rows = min(size, tokens - first)
        for r in range(rows):
            if gain != 0:
                norm(x + (first + r) * d * 4, gain, d, eps, left + r * pitch, padded)
            else:
                cast(x + (first + r) * d * 4, d, left + r * pitch, padded)
        begin()
        whole = (rows + height - 1) // height * height
        multiply(left, pitch, whole, panels, count, panel_bytes(padded), padded, joint, stride)
        end()
        k_columns, v_columns = 4 * argument(args, 10), 4 * argument(args, 11)
        for r in range(rows):
            at = joint + r * stride
            if bias != 0:
                _add(at, bias, count * 16, at)
            if norms:
                norm_eps, q_scale = argument_float(args, 26), argument_float(args, 27)
                norm_heads(at, argument(args, 23), heads, head_dim, argument(args, 25), norm_eps, q_scale)
                norm_heads(at + k_columns, argument(args, 24), kv_heads, head_dim, argument(args, 25), norm_eps, 1.0)
            cos, sin = argument(args, 12) + (first + r) * half * 4, argument(args, 13) + (first + r) * half * 4
            for head in range(heads):
                _turn(at + head * head_dim * 4, cos, sin, half)
            for head in range(kv_heads):
                _turn(at + k_columns + head * head_dim * 4, cos, sin, half)
            # Infinite scores would choose keys or leave them out without a word: NaN is seen in the logits.
            spoil(at, heads * head_dim, _FLOAT_MAX)
            spoil(at + k_columns, kv_heads * head_dim, _HALF_MAX)
            _copy(at, heads * head_dim, argument(args, 18) + (first + r) * heads * head_dim * 4)
            kv = kv_heads * head_dim
            _halve(at + k_columns, kv, argument(args, 19) + (first + r) * kv * 2)
            _halve(at + v_columns, kv, argument(args, 20) + (first + r) * kv * 2)

    return compile_kernel(qkv, f"{features.key}-{shape.element}-{norms}")


@cache
def linear_kernel(features: Features, shape: Shape) -> Kernel:
    """One projection of rows as they are: x [T, K] -> float32 [T, N], N the columns of all panels.

    0 x, 1 T, 2 rows of a slice, 3 K, 4 K padded, 5 panels, 6 how many, 7 bias or 0, 8 residual [T, N] or 0,
    9 N, 10 out, 11 scratch, 12 bytes of it for each thread: [slice, K padded] elements, then
    [slice, RESULT_PANELS * 16] float32
    """
    cast, multiply = elements(features, shape).cast, panel_product(features, shape)
    begin, end = tile_settings(features)
    height, (row_bytes, panel_bytes) = shape.rows, sizes(shape)

    def linear(item, thread, args):
        x, tokens, size = argument(args, 0), argument(args, 1), argument(args, 2)
        k, padded = argument(args, 3), argument(args, 4)
        panels, count, bias, residual = argument(args, 5), argument(args, 6), argument(args, 7), argument(args, 8)
        columns, out = argument(args, 9), argument(args, 10)
        left = argument(args, 11) + thread * argument(args, 12)
        pitch = row_bytes(padded) + ROW_GAP
        result = left + size * pitch
        first = item * size
        rows = min(size, tokens - first)
        for r in range(rows):
            cast(x + (first + r) * k * 4, k, left + r * pitch, padded)
        begin()
        whole = (rows + height - 1) // height * height
        apart = panel_bytes(padded)
        for panel in range(0, count, RESULT_PANELS):
            some = min(RESULT_PANELS, count - panel)
            stride = some * 64
            multiply(left, pitch, whole, panels + panel * apart, some, apart, padded, result, stride)
            low = panel * 16
            wanted = min(some * 16, columns - low)
            for r in range(rows):
                at, to = result + r * stride, ((first + r) * columns + low) * 4
                if bias != 0:
                    _add(at, bias + low * 4, wanted, at)
                if residual != 0:
                    _add(at, residual + to, wanted, out + to)
                else:
                    _copy(at, wanted, out + to)
        end()

    return compile_kernel(linear, f"{features.key}-{shape.element}")


@cache
def feed_forward_kernel(features: Features, first: Shape, second: Shape, activation: str = "silu") -> Kernel:
    """Norm, gate and up, act(gate) * up, down, residual: x [T, D] -> out float32 [T, D]. ``first`` multiplies with gate
    and up, ``second`` with down; they differ in their elements alone.

    0 x, 1 T, 2 rows of a slice, 3 D, 4 D padded, 5 gain, 6 eps, 7 panels of gate and up, 8 how many of each, 9 their
    bias or 0, 10 panels of down, 11 how many, 12 its bias or 0, 13 out, 14 scratch, 15 bytes of it for each thread:
    [slice, D padded] elements, [slice, F padded] elements, [slice, two groups] float32, [slice, columns of down]
    float32, where down's elements are whole numbers [slice, BLOCK] float32; 16 what the result is added to [T, D] or
    0. A gain (5) of 0 is none.
    """
    words, cast_hidden = elements(features, first), elements(features, second).cast
    norm, cast = words.norm, words.cast
    # A block of whole numbers is rounded when all of it is there as floats.
    waits = second.whole
    gate = elements(features, shape_of(features) if waits else second, activation).gate
    multiply, multiply_hidden = panel_product(features, first), panel_product(features, second)
    begin, end = tile_settings(features)
    height, group, group_columns = first.rows, first.panels, first.columns
    (row_bytes, panel_bytes), (hidden_bytes, down_bytes) = sizes(first), sizes(second)

    def feed_forward(item, thread, args):
        x, tokens, size = argument(args, 0), argument(args, 1), argument(args, 2)
        d, padded = argument(args, 3), argument(args, 4)
        gain, eps = argument(args, 5), argument_float(args, 6)
        panels, count, bias = argument(args, 7), argument(args, 8), argument(args, 9)
        down, down_count, down_bias, out = (
            argument(args, 10),
            argument(args, 11),
            argument(args, 12),
            argument(args, 13),
        )
        left = argument(args, 14) + thread * argument(args, 15)
        pitch = row_bytes(padded) + ROW_GAP
        hidden = left + size * pitch
        inner = count * 16  # F padded
        hidden_pitch = hidden_bytes(inner) + ROW_GAP
        gates = hidden + size * hidden_pitch
        result = gates + size * group * 128
        stride = down_count * 64
        waiting = result + size * stride
        first_row = item * size
        rows = min(size, tokens - first_row)
        for r in range(rows):
            at = x + (first_row + r) * d * 4
            if gain != 0:
                norm(at, gain, d, eps, left + r * pitch, padded)
            else:
                cast(at, d, left + r * pitch, padded)
        begin()
        whole = (rows + height - 1) // height * height
        apart, pair = panel_bytes(padded), group * 128
        for panel in range(0, count, group):
            for up in range(2):
                where = panels + (panel + up * count) * apart
                multiply(left, pitch, whole, where, group, apart, padded, gates + up * group * 64, pair)
            for r in range(whole):
                for i in range(0, group_columns, 16):
                    g, u = gates + r * pair + i * 4, gates + r * pair + group * 64 + i * 4
                    if bias != 0:
                        _add(g, bias + (panel * 16 + i) * 4, 16, g)
                        _add(u, bias + ((panel + count) * 16 + i) * 4, 16, u)
                    if waits:
                        gate(g, u, waiting + r * WAITING_BYTES, (panel * 16 + i) % BLOCK)
                    else:
                        gate(g, u, hidden + r * hidden_pitch, panel * 16 + i)
            if waits:
                done = (panel + group) * 16
                if done % BLOCK == 0 or done == inner:
                    start = (done - 1) // BLOCK * BLOCK
                    for r in range(whole):
                        to = hidden + r * hidden_pitch + hidden_bytes(start)
                        cast_hidden(waiting + r * WAITING_BYTES, done - start, to, done - start)
        multiply_hidden(hidden, hidden_pitch, whole, down, down_count, down_bytes(inner), inner, result, stride)
        end()
        for r in range(rows):
            at, row = result + r * stride, (first_row + r) * d * 4
            if down_bias != 0:
                _add(at, down_bias, d, at)
            if argument(args, 16) != 0:
                _add(at, argument(args, 16) + row, d, out + row)
            else:
                _copy(at, d, out + row)

    return compile_kernel(feed_forward, f"{features.key}-{first.element}-{second.element}-{activation}")
