"""The row-wise part of a layer for many rows: an item is a slice of rows, which stays near the core from norm to
result.

Arguments are listed as words of the kernel's table. ``panels`` are those of ``unpack``: all parts of a stacked matrix
one after the other, each filled up to whole groups; biases are laid out like the panels' columns.
"""

from __future__ import annotations

from functools import cache

from numba import float32

from slimrt.ops.fast.bfloat import store_half
from slimrt.ops.fast.elements import elements
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import Kernel, compile_kernel, inline
from slimrt.ops.fast.lanes import spoil
from slimrt.ops.fast.products import panel_product, shape_of, tile_settings
from slimrt.ops.fast.vectors import (
    F16X16,
    F32X16,
    argument,
    argument_float,
    convert,
    load,
    load_scalar,
    store,
    store_scalar,
)

__all__ = ["RESULT_PANELS", "ROW_GAP", "feed_forward_kernel", "linear_kernel", "qkv_kernel"]

ROW_GAP = 64  # bytes behind each row of factors: rows a power of two apart would share a few sets of the cache
_FLOAT_MAX, _HALF_MAX = 3e38, 65520.0  # what rounds to infinity in float16 begins there
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


@cache
def qkv_kernel(features: Features) -> Kernel:
    """Norm, the stacked projection, bias, rotation: x [T, D] -> q float32 [T, H Dh], k and v float16 [T, Hkv Dh].

    0 x, 1 T, 2 rows of a slice, 3 D, 4 D padded, 5 gain, 6 eps, 7 panels, 8 how many, 9 bias or 0,
    10 first column of k, 11 of v, 12 cos, 13 sin [T, half], 14 half, 15 H, 16 Hkv, 17 Dh, 18 q, 19 k, 20 v,
    21 scratch, 22 bytes of it for each thread: rows [slice, D padded] elements, then [slice, columns] float32
    """
    shape, norm = shape_of(features), elements(features).norm
    multiply = panel_product(features)
    begin, end = tile_settings(features)
    height, width = shape.rows, shape.element_bytes

    def qkv(item, thread, args):
        x, tokens, size = argument(args, 0), argument(args, 1), argument(args, 2)
        d, padded = argument(args, 3), argument(args, 4)
        gain, eps = argument(args, 5), argument_float(args, 6)
        panels, count, bias = argument(args, 7), argument(args, 8), argument(args, 9)
        half, heads, kv_heads, head_dim = argument(args, 14), argument(args, 15), argument(args, 16), argument(args, 17)
        left = argument(args, 21) + thread * argument(args, 22)
        pitch = padded * width + ROW_GAP
        joint = left + size * pitch
        stride = count * 64
        first = item * size
        rows = min(size, tokens - first)
        for r in range(rows):
            norm(x + (first + r) * d * 4, gain, d, eps, left + r * pitch, padded)
        begin()
        whole = (rows + height - 1) // height * height
        multiply(left, pitch, whole, panels, count, padded * 16 * width, padded, joint, stride)
        end()
        k_columns, v_columns = 4 * argument(args, 10), 4 * argument(args, 11)
        for r in range(rows):
            at = joint + r * stride
            if bias != 0:
                _add(at, bias, count * 16, at)
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

    return compile_kernel(qkv, features.key)


@cache
def linear_kernel(features: Features) -> Kernel:
    """One projection of rows as they are: x [T, K] -> float32 [T, N], N the columns of all panels.

    0 x, 1 T, 2 rows of a slice, 3 K, 4 K padded, 5 panels, 6 how many, 7 bias or 0, 8 residual [T, N] or 0,
    9 N, 10 out, 11 scratch, 12 bytes of it for each thread: [slice, K padded] elements, then
    [slice, RESULT_PANELS * 16] float32
    """
    shape, cast = shape_of(features), elements(features).cast
    multiply = panel_product(features)
    begin, end = tile_settings(features)
    height, width = shape.rows, shape.element_bytes

    def linear(item, thread, args):
        x, tokens, size = argument(args, 0), argument(args, 1), argument(args, 2)
        k, padded = argument(args, 3), argument(args, 4)
        panels, count, bias, residual = argument(args, 5), argument(args, 6), argument(args, 7), argument(args, 8)
        columns, out = argument(args, 9), argument(args, 10)
        left = argument(args, 11) + thread * argument(args, 12)
        pitch = padded * width + ROW_GAP
        result = left + size * pitch
        first = item * size
        rows = min(size, tokens - first)
        for r in range(rows):
            cast(x + (first + r) * k * 4, k, left + r * pitch, padded)
        begin()
        whole = (rows + height - 1) // height * height
        panel_bytes = padded * 16 * width
        for panel in range(0, count, RESULT_PANELS):
            some = min(RESULT_PANELS, count - panel)
            stride = some * 64
            multiply(left, pitch, whole, panels + panel * panel_bytes, some, panel_bytes, padded, result, stride)
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

    return compile_kernel(linear, features.key)


@cache
def feed_forward_kernel(features: Features) -> Kernel:
    """Norm, gate and up, silu(gate) * up, down, residual: x [T, D] -> out float32 [T, D].

    0 x, 1 T, 2 rows of a slice, 3 D, 4 D padded, 5 gain, 6 eps, 7 panels of gate and up, 8 how many of each, 9 their
    bias or 0, 10 panels of down, 11 how many, 12 its bias or 0, 13 out, 14 scratch, 15 bytes of it for each thread:
    [slice, D padded] elements, [slice, F padded] elements, [slice, two groups] float32, [slice, columns of down]
    float32
    """
    shape, words = shape_of(features), elements(features)
    norm, gate = words.norm, words.gate
    multiply = panel_product(features)
    begin, end = tile_settings(features)
    height, group, width = shape.rows, shape.panels, shape.element_bytes

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
        pitch = padded * width + ROW_GAP
        hidden = left + size * pitch
        inner = count * 16  # F padded
        hidden_pitch = inner * width + ROW_GAP
        gates = hidden + size * hidden_pitch
        result = gates + size * group * 128
        first = item * size
        rows = min(size, tokens - first)
        for r in range(rows):
            norm(x + (first + r) * d * 4, gain, d, eps, left + r * pitch, padded)
        begin()
        whole = (rows + height - 1) // height * height
        panel_bytes, pair = padded * 16 * width, group * 128
        for panel in range(0, count, group):
            for up in range(2):
                where = panels + (panel + up * count) * panel_bytes
                multiply(left, pitch, whole, where, group, panel_bytes, padded, gates + up * group * 64, pair)
            for r in range(whole):
                for i in range(0, group * 16, 16):
                    g, u = gates + r * pair + i * 4, gates + r * pair + group * 64 + i * 4
                    if bias != 0:
                        _add(g, bias + (panel * 16 + i) * 4, 16, g)
                        _add(u, bias + ((panel + count) * 16 + i) * 4, 16, u)
                    gate(g, u, hidden + r * hidden_pitch, panel * 16 + i)
        stride = down_count * 64
        multiply(hidden, hidden_pitch, whole, down, down_count, inner * 16 * width, inner, result, stride)
        end()
        for r in range(rows):
            at = result + r * stride
            if down_bias != 0:
                _add(at, down_bias, d, at)
            _add(at, x + (first + r) * d * 4, d, out + (first + r) * d * 4)

    return compile_kernel(feed_forward, features.key)
