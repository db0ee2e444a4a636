"""Causal attention of many rows: tiles of queries over blocks of keys, the scores never leave the core (FlashAttention,
arXiv 2205.14135).

An item is one tile: ``RUN`` tokens (cut from the first row of the context on) and one KV head with the query heads that
share it. Its rows go through the keys block by block. A row's reference maximum is that of its first block, and raised
only when a block exceeds it by more than ``_SLACK``: until then exp2 stays far from overflow, nothing needs to be
rescaled (the idea is FlashAttention-4's), and one pass over the scores does. Which keys a row reads depends on its
place in the context alone, and so do its bits.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from numba import float32, uint32
from numba.extending import intrinsic

from slimrt.ops.fast.bfloat import load_half, narrow_one
from slimrt.ops.fast.elements import elements
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import Kernel, compile_kernel, inline
from slimrt.ops.fast.lanes import constant, exp, joiner
from slimrt.ops.fast.products import panel_product, shape_of, tile_settings
from slimrt.ops.fast.vectors import (
    F16X16,
    F32X16,
    I32X16,
    U16X16,
    argument,
    argument_float,
    convert,
    fma,
    load,
    load_scalar,
    max_lanes,
    maximum,
    minimum,
    reinterpret,
    splat,
    store,
    store_scalar,
    sum_lanes,
)
from slimrt.prune.reach import RUN, SINK

__all__ = ["KEY_BLOCK", "flash_kernel", "pack_kernel", "tile_scratch"]

KEY_BLOCK = 256  # keys at a time: scores [rows of a product block, 256] float32 stay in the first cache
_SLACK = 60.0  # in powers of two: the sum of so many keys as a context can hold stays far below float32's 2**127
_LOWEST = -1e30
_LOG2_E = 1.4426950408889634

# 2**f for |f| <= 1/2 to a relative error of 7.5e-5 (bfloat16 rounds by 2e-3) and of 2e-9: minimax polynomials.
_EXP2_SHORT = (0.9999280735783665, 0.6932609862236728, 0.2426111218766864, 0.055171664924156406)
_EXP2_LONG = (
    1.000000000554169,
    0.6931472057372614,
    0.2402264689061963,
    0.055503287769756084,
    0.009618488958684751,
    0.0013399931215812828,
    0.00015345811579626934,
)

_first_pairs = joiner(*[at for i in range(8) for at in (i, 16 + i)])
_last_pairs = joiner(*[at for i in range(8, 16) for at in (i, 16 + i)])
_lane_numbers = constant(I32X16, *range(16))


@intrinsic
def _where_within(typingctx, kept, below, value, other):
    """``np.where(kept <= below, value, other)``, lane by lane; kept and below I32X16."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.icmp_signed("<=", args[0], args[1]), args[2], args[3])

    return value(kept, below, value, value), codegen


def _exp2(short: bool) -> Any:
    """The word ``exp2`` for F32X16: ``2 ** np.maximum(t, -126)`` for t below 120; NaN stays NaN."""
    # Halves of the coefficients and twice the power: so the power's exponent fits into the bits without an addition.
    c0, c1, c2, c3, c4, c5, c6 = (c / 2 for c in ((*_EXP2_SHORT, 0.0, 0.0, 0.0) if short else _EXP2_LONG))

    @inline
    def exp2(t):
        t = maximum(splat(F32X16, -126.0), t)
        # Adding 1.5 * 2**23 rounds to whole numbers and leaves them in the low bits; 128 more is the exponent's bias,
        # plus 1.
        shifted = t + splat(F32X16, 12583040.0)
        f = t - (shifted - splat(F32X16, 12583040.0))
        if short:
            p = splat(F32X16, c3)
        else:
            p = fma(splat(F32X16, c6), f, splat(F32X16, c5))
            p = fma(p, f, splat(F32X16, c4))
            p = fma(p, f, splat(F32X16, c3))
        p = fma(p, f, splat(F32X16, c2))
        p = fma(p, f, splat(F32X16, c1))
        p = fma(p, f, splat(F32X16, c0))
        # Multiplied, not added to the exponent's bits: whatever bits a NaN has, it stays one.
        return p * reinterpret(F32X16, reinterpret(I32X16, shifted) << splat(I32X16, 23))

    return exp2


def _capped(cap: float) -> Any:
    """The word ``squash(score, scale)`` for F32X16: of a score that the softmax multiplies with ``scale`` (that with a
    binary logarithm in it), cap * tanh(s / cap) in its place, s being the score over sqrt(Dh)."""
    inverse = 2.0 * math.log(2) / cap if cap else 0.0
    limit = cap / math.log(2) if cap else 0.0

    @inline
    def squash(score, scale):
        # tanh(y) = 1 - 2 / (1 + exp(2 y)); beyond 30 it is 1, and exp stays finite.
        twice = score * splat(F32X16, float32(scale * float32(inverse)))
        twice = maximum(splat(F32X16, -60.0), minimum(splat(F32X16, 60.0), twice))
        bent = splat(F32X16, 1.0) - splat(F32X16, 2.0) / (splat(F32X16, 1.0) + exp(twice))
        return bent * splat(F32X16, float32(float32(limit) / scale))

    return squash


@cache
def pack_kernel(features: Features) -> Kernel:
    """Keys and values as panels: an item is one block of ``KEY_BLOCK`` rows of one head; rows past N become zeros.

    0 keys, 1 values (float16, rows [Dh] of a head follow each other), 2 bytes from head to head of the keys, 3 of the
    values, 4 N, 5 blocks, 6 Dh, 7 Dh padded, 8 panels of keys [Hkv, blocks * 16, Dh padded * 16 elements], 9 panels of
    values [Hkv, Dh padded / 16, blocks * KEY_BLOCK * 16 elements], 10 scratch, 11 bytes of it for each thread: [2, Dh
    padded] elements
    """
    shape = shape_of(features)
    put = elements(features, shape).put
    bf16, width = shape.bf16, shape.element_bytes

    @inline
    def read(row, head_dim, out, padded, present):
        """``out[:head_dim] = row``, as elements, zeros up to ``padded``; zeros only where there is no such row."""
        whole = head_dim // 16 * 16 if present else 0
        for i in range(0, whole, 16):
            put(out, i, convert(F32X16, load(F16X16, row + 2 * i)))
        for i in range(whole, padded, 16):
            put(out, i, splat(F32X16, 0.0))
        if present:
            for i in range(whole, head_dim):
                value = load_half(row + 2 * i)
                if bf16:
                    store_scalar(out + 2 * i, narrow_one(value))
                else:
                    store_scalar(out + 4 * i, value)

    def pack(item, thread, args):
        blocks, head_dim, padded = argument(args, 5), argument(args, 6), argument(args, 7)
        head = item // blocks
        first = (item - head * blocks) * KEY_BLOCK
        present = argument(args, 4) - first
        keys = argument(args, 0) + head * argument(args, 2) + first * head_dim * 2
        values = argument(args, 1) + head * argument(args, 3) + first * head_dim * 2
        one = argument(args, 10) + thread * argument(args, 11)
        two = one + padded * width
        panel_bytes = padded * 16 * width
        out = argument(args, 8) + (head * blocks * (KEY_BLOCK // 16) + first // 16) * panel_bytes
        for n in range(KEY_BLOCK):
            read(keys + n * head_dim * 2, head_dim, one, padded, n < present)
            to = out + n // 16 * panel_bytes + (n & 15) * 4
            for step in range(padded * width // 4):  # a pair of bfloat16 or a float32: four bytes
                store_scalar(to + step * 64, load_scalar(uint32, one + step * 4))
        panel_bytes = blocks * KEY_BLOCK * 16 * width
        out = argument(args, 9) + head * (padded // 16) * panel_bytes + first * 16 * width
        for n in range(0, KEY_BLOCK, 2):
            row = values + n * head_dim * 2
            read(row, head_dim, one, padded, n < present)
            read(row + head_dim * 2, head_dim, two, padded, n + 1 < present)
            for d in range(0, padded, 16):
                to = out + d // 16 * panel_bytes + n * 16 * width
                if bf16:
                    a, b = load(U16X16, one + d * 2), load(U16X16, two + d * 2)
                    store(to, _first_pairs(a, b))
                    store(to + 32, _last_pairs(a, b))
                else:
                    store(to, load(F32X16, one + d * 4))
                    store(to + 64, load(F32X16, two + d * 4))

    return compile_kernel(pack, features.key)


def tile_scratch(features: Features, group: int, head_dim: int) -> int:
    """Bytes of scratch that ``flash_kernel`` needs for each thread."""
    shape = shape_of(features)
    rows = -(-RUN * group // shape.rows) * shape.rows
    padded = shape.padded(head_dim)
    tile = rows * (padded * (shape.element_bytes + 4) + 8)
    return tile + shape.rows * KEY_BLOCK * (4 + shape.element_bytes) + 256


@cache
def flash_kernel(features: Features, lowest: bool = False, cap: float = 0.0) -> Kernel:
    """One tile of queries of one KV head. ``cap``: scores are capped softly; ``lowest``: each row has a first key of
    its own (13), and none before it is read.

    0 tiles: int64 [items, 5] of (first token, tokens, KV head, first row it reads besides the sink or 0, the first
    token's place among the keys), 1 q float32 [T, H, Dh], 2 H, 3 Hkv, 4 Dh, 5 Dh padded, 6 panels of keys, 7 of values,
    8 blocks of keys, 9 log2(e) / sqrt(Dh), 10 out float32 [T, H, Dh], 11 scratch, 12 bytes of it for each thread,
    13 the first key that each row sees int64 [T], or 0, 14 sinks float32 [H] (in the scores' own unit), or 0
    """
    shape = shape_of(features)
    words = elements(features, shape)
    cast, put = words.cast, words.put
    score, mix = panel_product(features, shape), panel_product(features, shape, True)
    begin, end = tile_settings(features)
    exp2 = _exp2(shape.bf16)
    squash = _capped(cap)
    capped = cap != 0
    height, columns, width = shape.rows, shape.columns, shape.element_bytes

    @inline
    def softmax(scores, weights, keys, position, first_key, skipped_to, masked, scale, peaks, totals, r, mixed, padded):
        """One row of scores [keys] -> weights; raises the row's reference where the block calls for it."""
        at = scores + r * KEY_BLOCK * 4
        if capped:
            for i in range(0, keys, 16):
                store(at + 4 * i, squash(load(F32X16, at + 4 * i), float32(scale)))
        if lowest:
            low, high = splat(I32X16, position), splat(I32X16, skipped_to)
            nothing = splat(F32X16, _LOWEST)
            for i in range(0, keys, 16):
                number = splat(I32X16, first_key + i) + _lane_numbers()
                value = _where_within(number, low, load(F32X16, at + 4 * i), nothing)
                store(at + 4 * i, _where_within(high, number, value, nothing))
        elif masked:
            low, high = splat(I32X16, position), splat(I32X16, skipped_to - 1)
            nothing = splat(F32X16, _LOWEST)
            for i in range(0, keys, 16):
                number = splat(I32X16, first_key + i) + _lane_numbers()
                value = _where_within(number, low, load(F32X16, at + 4 * i), nothing)
                if first_key + i >= SINK:  # whole vectors: the sink ends at a multiple of 16
                    value = _where_within(number, high, nothing, value)
                store(at + 4 * i, value)
        peak = load_scalar(float32, peaks + 4 * r)
        raised = peak <= float32(_LOWEST)  # the first block: there is no reference yet
        for _ in range(2):
            if raised:
                highest = splat(F32X16, _LOWEST)
                for i in range(0, keys, 16):
                    highest = maximum(highest, load(F32X16, at + 4 * i))
                top = float32(max_lanes(highest) * scale)
                shrink = float32(2.0 ** float32(peak - top)) if peak > float32(_LOWEST) else float32(0.0)
                peak = top
                store_scalar(peaks + 4 * r, peak)
                store_scalar(totals + 4 * r, float32(load_scalar(float32, totals + 4 * r) * shrink))
                by = splat(F32X16, shrink)
                for d in range(0, padded, 16):
                    store(mixed + 4 * d, load(F32X16, mixed + 4 * d) * by)
            times, minus = splat(F32X16, scale), splat(F32X16, float32(-peak))
            total, highest = splat(F32X16, 0.0), splat(F32X16, 0.0)
            for i in range(0, keys, 16):
                power = fma(load(F32X16, at + 4 * i), times, minus)
                highest = maximum(highest, power)
                weight = exp2(power)
                total = total + weight
                put(weights + r * KEY_BLOCK * width, i, weight)
            if max_lanes(highest) <= float32(_SLACK) or raised:
                break
            raised = True
        store_scalar(totals + 4 * r, float32(load_scalar(float32, totals + 4 * r) + sum_lanes(total)))

    def flash(item, thread, args):
        tile = argument(args, 0) + item * 40
        token, tokens, head, first = argument(tile, 0), argument(tile, 1), argument(tile, 2), argument(tile, 3)
        heads, kv_heads, head_dim, padded = argument(args, 2), argument(args, 3), argument(args, 4), argument(args, 5)
        offset = argument(tile, 4) - token
        blocks, scale = argument(args, 8), argument_float(args, 9)
        group = heads // kv_heads
        rows = tokens * group
        whole = (rows + height - 1) // height * height
        key_bytes, value_bytes = padded * 16 * width, blocks * KEY_BLOCK * 16 * width
        keys = argument(args, 6) + head * blocks * (KEY_BLOCK // 16) * key_bytes
        values = argument(args, 7) + head * (padded // 16) * value_bytes
        queries = argument(args, 11) + thread * argument(args, 12)
        mixed = queries + whole * padded * width
        peaks = mixed + whole * padded * 4
        totals = peaks + whole * 4
        scores = (totals + whole * 4 + 63) // 64 * 64
        weights = scores + height * KEY_BLOCK * 4
        source = argument(args, 1) + (token * heads + head * group) * head_dim * 4
        for r in range(whole):
            at = min(r, rows - 1)  # rows that fill up the last block are copies
            place = at // group * heads + at % group
            cast(source + place * head_dim * 4, head_dim, queries + r * padded * width, padded)
            store_scalar(peaks + 4 * r, float32(_LOWEST))
            store_scalar(totals + 4 * r, float32(0.0))
        for i in range(0, whole * padded, 16):
            store(mixed + 4 * i, splat(F32X16, 0.0))
        begin()
        last = offset + token + tokens - 1
        for block in range(last // KEY_BLOCK + 1):
            start = block * KEY_BLOCK
            stop = start + KEY_BLOCK
            if lowest:
                if stop <= argument(argument(args, 13), token):
                    continue
            elif start >= SINK and stop <= first:
                continue
            # Of the block where the sink lies the sink only, of the one where the window begins what lies within: whole
            # columns both. Where that is the same block the gap between them is masked.
            if start == 0 and stop <= first:
                stop = SINK
            elif 0 < start < first:
                start = first
            skips = first > SINK and stop > SINK and start < first
            for r in range(0, whole, height):
                low = offset + token + r // group
                high = min(offset + token + (r + height - 1) // group, last)
                if start > high:
                    continue
                count = min(stop - start, (high - start) // columns * columns + columns)
                score(
                    queries + r * padded * width, padded * width, height, keys + start // 16 * key_bytes,
                    count // 16, key_bytes, padded, scores, KEY_BLOCK * 4,
                )  # fmt: skip
                masked = skips or start + count > low + 1
                for i in range(height):
                    position = min(offset + token + (r + i) // group, last)
                    lower = first if skips else 0
                    if lowest:
                        lower = argument(argument(args, 13), position - offset)
                    softmax(
                        scores, weights, count, position, start, lower, masked, scale,
                        peaks + 4 * r, totals + 4 * r, i, mixed + (r + i) * padded * 4, padded,
                    )  # fmt: skip
                mix(
                    weights, KEY_BLOCK * width, height, values + start * 16 * width, padded // 16, value_bytes,
                    count, mixed + r * padded * 4, padded * 4,
                )  # fmt: skip
        end()
        out = argument(args, 10) + (token * heads + head * group) * head_dim * 4
        for r in range(rows):
            place = out + (r // group * heads + r % group) * head_dim * 4
            at = mixed + r * padded * 4
            total = load_scalar(float32, totals + 4 * r)
            if argument(args, 14) != 0:
                # A sink so far above all keys that the power is infinite leaves nothing to them.
                sink = load_scalar(float32, argument(args, 14) + (head * group + r % group) * 4)
                total += float32(2.0 ** float32(sink * float32(_LOG2_E) - load_scalar(float32, peaks + 4 * r)))
            share = float32(1.0) / total
            d = 0
            while d + 16 <= head_dim:
                store(place + 4 * d, load(F32X16, at + 4 * d) * splat(F32X16, share))
                d += 16
            while d < head_dim:
                store_scalar(place + 4 * d, float32(load_scalar(float32, at + 4 * d) * share))
                d += 1

    return compile_kernel(flash, f"{features.key}-{lowest}-{cap:g}")
