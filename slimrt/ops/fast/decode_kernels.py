"""The parts of decode between products and attention: norms, the rotation, the gate. A row gives the same bits among
others as alone."""

from __future__ import annotations

import math
from functools import cache

from numba import float32

from slimrt.ops.fast.activations import RECORD, RECORD_BYTES, padded, quantize_record, quantize_row
from slimrt.ops.fast.elements import activation_argument, clamps
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import Kernel, compile_kernel
from slimrt.ops.fast.lanes import exp, spoil
from slimrt.ops.fast.layer_kernels import norm_heads, norm_in_place
from slimrt.ops.fast.vectors import (
    F16X16,
    F32X16,
    argument,
    argument_float,
    convert,
    fma,
    load,
    load_scalar,
    splat,
    store,
    store_scalar,
    sum_lanes,
)

__all__ = ["PLACE", "append_kernel", "gate_items", "gate_kernel", "merge_kernel", "norm_kernel"]

PLACE = 5  # words of a row's place in a cache, and what its query is multiplied with
_PLACE_BYTES = PLACE * 8
_RECORDS = 4  # of act(gate) * up that an item computes


@cache
def norm_kernel(features: Features) -> Kernel:
    """``out = x / np.sqrt(np.mean(x * x) + eps) * gain`` [n], all padded with zeros to 16; then rounded to int8.

    Item: one row. Args: 0 x, 1 gain or 0 (out = x), 2 n, 3 eps (float), 4 out, 5 padded columns, 6 whether to round, 7
    whether to subtract the mean from x first, 8 and 9 bytes from row to row of x and out.
    """

    def norm(item, thread, args):
        x, gain, count = argument(args, 0) + item * argument(args, 8), argument(args, 1), argument(args, 2)
        out = argument(args, 4) + item * argument(args, 9)
        if gain == 0:
            for i in range(0, count, 16):
                store(out + i * 4, load(F32X16, x + i * 4))
            if argument(args, 6) != 0:
                quantize_row(out, argument(args, 5))
            return
        if argument(args, 7) != 0:
            total = splat(F32X16, 0.0)
            for i in range(0, count, 16):
                total = total + load(F32X16, x + i * 4)
            middle = sum_lanes(total) / float32(count)
            whole = count // 16 * 16
            for i in range(0, whole, 16):
                store(out + i * 4, load(F32X16, x + i * 4) - splat(F32X16, middle))
            for i in range(whole, count):
                store_scalar(out + i * 4, float32(load_scalar(float32, x + i * 4) - middle))
            x = out
        squares = splat(F32X16, 0.0)
        for i in range(0, count, 16):
            value = load(F32X16, x + i * 4)
            squares = fma(value, value, squares)
        mean = sum_lanes(squares) / float32(count)
        factor = splat(F32X16, float32(1) / float32(math.sqrt(mean + argument_float(args, 3))))
        for i in range(0, count, 16):
            store(out + i * 4, load(F32X16, x + i * 4) * factor * load(F32X16, gain + i * 4))
        if argument(args, 6) != 0:
            quantize_row(out, argument(args, 5))

    return compile_kernel(norm, features.key)


@cache
def merge_kernel(features: Features) -> Kernel:
    """``out = residual + norm(x) * scale`` [n], all padded with zeros to 16.

    Item: one row. Args: 0 x, 1 gain or 0 (no norm), 2 n, 3 eps (float), 4 scale (float), 5 residual, 6 out, 7 bytes
    from row to row of these three. x is overwritten.
    """

    def merge(item, thread, args):
        before = item * argument(args, 7)
        x, residual, out = argument(args, 0) + before, argument(args, 5) + before, argument(args, 6) + before
        norm_in_place(x, argument(args, 1), argument(args, 2), argument_float(args, 3), argument_float(args, 4))
        for i in range(0, argument(args, 2), 16):
            store(out + i * 4, load(F32X16, residual + i * 4) + load(F32X16, x + i * 4))

    return compile_kernel(merge, features.key)


@cache
def append_kernel(features: Features, head_dim: int, norms: bool = False) -> Kernel:
    """Rotate q and k [H + Hkv, Dh] (pairs (i, half + i) by an angle) in place; k and v to float16 rows of the cache.
    With ``norms`` q and k are normed before.

    Item: one row. Args: 0 q, k, v f32 [H + 2 Hkv, Dh], 1 H, 2 Hkv, 3 cos, 4 sin [half], 5 half, 6 places int64 [T, 5]
    (where a row's key and value go: addresses of keys and values, bytes from head to head, row there; and with
    ``norms`` a factor of its query, float64), 7 bytes from row
    to row of q, k, v, 8 of cos and sin; with ``norms`` 9 gain of q, 10 of k (or 0), 11 whether of whole rows, 12 eps,
    13 factor of q.
    """

    def append(item, thread, args):
        joint, heads, kv_heads = argument(args, 0) + item * argument(args, 7), argument(args, 1), argument(args, 2)
        if norms:
            whole_rows, eps = argument(args, 11), argument_float(args, 12)
            own = argument_float(argument(args, 6) + item * _PLACE_BYTES, 4)
            norm_heads(joint, argument(args, 9), heads, head_dim, whole_rows, eps, argument_float(args, 13) * own)
            norm_heads(joint + heads * head_dim * 4, argument(args, 10), kv_heads, head_dim, whole_rows, eps, 1.0)
        turned = item * argument(args, 8)
        cos, sin, half = argument(args, 3) + turned, argument(args, 4) + turned, argument(args, 5)
        whole = half // 16 * 16
        for head in range(heads + kv_heads):
            x = joint + head * head_dim * 4
            for i in range(0, whole, 16):
                c, s = load(F32X16, cos + i * 4), load(F32X16, sin + i * 4)
                a, b = load(F32X16, x + i * 4), load(F32X16, x + (half + i) * 4)
                store(x + i * 4, a * c - b * s)
                store(x + (half + i) * 4, b * c + a * s)
            for i in range(whole, half):
                d, t = load_scalar(float32, cos + i * 4), load_scalar(float32, sin + i * 4)
                e, f = load_scalar(float32, x + i * 4), load_scalar(float32, x + (half + i) * 4)
                store_scalar(x + i * 4, float32(e * d - f * t))
                store_scalar(x + (half + i) * 4, float32(f * d + e * t))
        # Infinite scores would choose keys or leave them out without a word: NaN is seen in the logits.
        spoil(joint, heads * head_dim, 3e38)
        spoil(joint + heads * head_dim * 4, kv_heads * head_dim, 65520.0)
        place = argument(args, 6) + item * _PLACE_BYTES
        offset = argument(place, 3) * head_dim * 2
        for head in range(kv_heads):
            for side in range(2):
                x = joint + (heads + side * kv_heads + head) * head_dim * 4
                to = argument(place, side) + head * argument(place, 2) + offset
                for i in range(0, head_dim, 16):
                    store(to + i * 2, convert(F16X16, load(F32X16, x + i * 4)))

    return compile_kernel(append, f"{features.key}-{head_dim}-{norms}")


@cache
def gate_kernel(features: Features, activation: str = "silu") -> Kernel:
    """``out = act(gate) * up * weight``, rounded to int8. Item: _RECORDS records of a row, padded with zeros.

    Args: 0 gate, 1 up, 2 bytes from row to row of both, 3 buffers of activations, 4 bytes from one to the next,
    5 padded columns, 6 the rows' weights f32, or 0 for none.
    """
    argument_of = activation_argument(activation)
    clamp_gate, clamp_up = clamps(activation)

    def activate(item, thread, args):
        width = argument(args, 5)
        items = (width // RECORD + _RECORDS - 1) // _RECORDS
        row, part = item // items, item % items
        gate, up = argument(args, 0) + row * argument(args, 2), argument(args, 1) + row * argument(args, 2)
        out = argument(args, 3) + row * argument(args, 4)
        weight = splat(F32X16, 1.0)
        if argument(args, 6) != 0:
            weight = splat(F32X16, load_scalar(float32, argument(args, 6) + row * 4))
        for record in range(part * _RECORDS, min((part + 1) * _RECORDS, width // RECORD)):
            for at in range(record * RECORD * 4, (record + 1) * RECORD * 4, 64):
                value = clamp_gate(load(F32X16, gate + at))
                share = splat(F32X16, 1.0) / (splat(F32X16, 1.0) + exp(splat(F32X16, 0.0) - argument_of(value)))
                store(out + at, value * share * clamp_up(load(F32X16, up + at)) * weight)
            quantize_record(out + record * RECORD * 4, out + width * 4 + record * RECORD_BYTES)

    return compile_kernel(activate, f"{features.key}-{activation}")


def gate_items(width: int) -> int:
    """Items of ``gate_kernel`` for a row of ``width``."""
    return -(-padded(width) // (RECORD * _RECORDS))
