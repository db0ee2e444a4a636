"""Attention of a few query rows over all keys: what decode does, reading keys and values once for each query row.

The keys of one KV head are cut into spans; an item takes one and leaves its maximum, its sum and its weighted values,
which are joined as in flash-decoding. Keys and values are float16; all arithmetic is float32. The
query heads that share a KV head are computed together, so that each number is loaded and widened once for all of them.

What a row sees decides how its keys are cut, so it gives the same bits among others as alone: a table ``seen`` int64
[T, 7] has for each row the number of keys up to its own, how many of the first of them it leaves out, the keys of a
span; and where they are: the address of keys, of values (float16 [Hkv, N, Dh]), the bytes from head to head of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import float32

from slimrt.ops.fast.activations import quantize_row
from slimrt.ops.fast.attend_words import TILE, capped_score, mix_key, score_key
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.gemv import aligned_zeros
from slimrt.ops.fast.kernels import Kernel, compile_kernel, inline
from slimrt.ops.fast.lanes import exp, prefetch, sum_each
from slimrt.ops.fast.team import Program, address
from slimrt.ops.fast.vectors import (
    F32X16,
    argument,
    fma,
    load,
    load_scalar,
    max_lanes,
    maximum,
    splat,
    store,
    store_scalar,
    sum_lanes,
)
from slimrt.prune.reach import RUN, SINK, Reach

__all__ = [
    "SEEN", "Grouping", "attend", "attend_kernel", "join_kernel", "most_spans", "partial_bytes", "spans_for",
]  # fmt: skip

_TOGETHER = 4  # query heads that share a loaded key
_AHEAD = 4096  # bytes that keys and values are prefetched ahead
ITEMS = 32  # pieces of a layer's attention: some for each of eight threads
_HEAD = 16  # floats before the weighted values of a partial result: the maximum, the sum
_LOWEST = -1e30  # a maximum before there is one
SEEN = 7  # words of a row's entry
_SEEN_BYTES = SEEN * 8


def partial_bytes(head_dim: int) -> int:
    """What a span of keys leaves for a query head: its maximum, its sum, and (from _HEAD on) its weighted values."""
    return (_HEAD + head_dim) * 4


@dataclass(frozen=True)
class Grouping:
    """The ``group`` query heads of a KV head in ``chunks`` of ``together`` heads, which share each key that is loaded.

    The last chunk ends with the last head, so it may do some heads of the one before again, with the same result.
    """

    group: int

    @property
    def chunks(self) -> int:
        return -(-self.group // _TOGETHER)

    @property
    def together(self) -> int:
        return -(-self.group // self.chunks)

    def scratch_bytes(self, head_dim: int) -> int:
        """Of one thread: sums of 16 keys and scores of a tile, for one chunk; queries and results for all of them."""
        each = head_dim * 4 + partial_bytes(head_dim)
        return self.together * (16 * 64 + TILE * 4) + self.chunks * self.together * each


def spans_for(rows: np.ndarray, kv_heads: int) -> np.ndarray:
    """Keys a span, a multiple of TILE, for a query that sees ``rows`` keys: ``ITEMS`` items or fewer, not tiny ones;
    the same for any number of threads, so that the bits are."""
    wanted = -(-rows * kv_heads // ITEMS)
    return np.maximum(2, -(-wanted // TILE)) * TILE


def most_spans(kv_heads: int) -> int:
    """Spans of any number of keys, at most."""
    return -(-ITEMS // kv_heads)


@inline
def _first_row(reach, row):
    """``slimrt.prune.reach.first_row``."""
    first = row // RUN * RUN - reach
    if reach != 0 and first > SINK:
        return first
    return 0


@cache
def attend_kernel(features: Features, head_dim: int, group: int, cap: float = 0.0) -> Kernel:
    """Item: (KV head, span, query row), the row running fastest: rows follow each other at keys that are near.
    ``group`` = H / Hkv; ``cap``: of the scores, softly.

    Args: 0 queries f32 [T, H, Dh], 1 bytes from row to row of them, 2 ``seen``, 3 T, 4 Hkv, 5 spans of the row with
    most, 6 spans for which there is room, 7 partial results [T, H, room], 8 reach int64 [Hkv] or 0, 9 scratch, 10 bytes
    of it for a thread.
    """
    grouping = Grouping(group)
    heads, chunks = grouping.together, grouping.chunks
    row_bytes, pieces = head_dim * 2, head_dim // 16
    scale = np.float32(1 / math.sqrt(head_dim))
    partial = partial_bytes(head_dim)
    lines = -(-row_bytes // 64)
    # As many pieces of 16 columns at once as their sums fit into the registers beside what is added, for each of the
    # heads: half of 32, or two each of 16.
    sums_held = 16 if features.avx512 else 6
    wide = max(n for n in range(1, pieces + 1) if pieces % n == 0 and (n == 1 or n * heads <= sums_held))
    score = score_key(head_dim, heads)
    squash, capped = capped_score(cap), cap != 0
    begin, add, end = mix_key(heads, wide, partial)

    @inline
    def score_tile(q, keys, count, sums, scores):
        """Scores of 64 keys, of which ``count`` exist, for each head."""
        for some in range(0, TILE, 16):
            for i in range(16):
                key = keys + min(some + i, count - 1) * row_bytes
                for line in range(lines):
                    prefetch(key + _AHEAD + line * 64)
                score(key, q, sums + i * 64)
            for head in range(heads):
                value = sum_each(sums + head * 16 * 64)
                if capped:
                    value = squash(value)
                store(scores + head * TILE * 4 + some * 4, value)
        for head in range(heads):
            for i in range(count, TILE):
                store_scalar(scores + head * TILE * 4 + i * 4, np.float32(_LOWEST))

    @inline
    def weigh_tile(scores, result):
        """Scores to weights, with the maximum and the sum so far; returns by what older weights shrink."""
        a = maximum(load(F32X16, scores), load(F32X16, scores + 64))
        a = maximum(a, maximum(load(F32X16, scores + 128), load(F32X16, scores + 192)))
        peak = load_scalar(float32, result)
        higher = max(peak, max_lanes(a))
        shrink = max_lanes(exp(splat(F32X16, peak - higher)))
        total = splat(F32X16, 0.0)
        for i in range(TILE // 16):
            weights = exp(load(F32X16, scores + i * 64) - splat(F32X16, higher))
            store(scores + i * 64, weights)
            total = total + weights
        store_scalar(result, higher)
        store_scalar(result + 4, load_scalar(float32, result + 4) * shrink + sum_lanes(total))
        return shrink

    @inline
    def mix_tile(values, count, scores, shrinks, results):
        """``mixed[h] = mixed[h] * shrinks[h] + weights[h] @ values`` for each head, some columns after the others."""
        for part in range(pieces // wide):
            to = results + _HEAD * 4 + part * wide * 64
            mixed = begin(to, shrinks)
            for i in range(count):
                value = values + i * row_bytes + part * wide * 32
                for line in range(wide * 32 // 64):
                    prefetch(value + _AHEAD + line * 64)
                mixed = add(mixed, value, scores + i * 4)
            end(mixed, to)

    def attend(item, thread, args):
        tokens, kv_heads = argument(args, 3), argument(args, 4)
        spans, room = argument(args, 5), argument(args, 6)
        token, span, head = item % tokens, item // tokens % spans, item // tokens // spans
        own = argument(args, 2) + token * _SEEN_BYTES
        skipped, size = argument(own, 1), argument(own, 2)
        row = argument(own, 0) - skipped - 1
        if span * size > row:
            return
        first = 0
        if argument(args, 8) != 0:
            first = _first_row(argument(argument(args, 8), head), row)
        seen = row + 1
        if first != 0:
            seen += SINK - first  # the rows that are read count as one run
        keys = argument(own, 3) + head * argument(own, 5) + skipped * row_bytes
        values = argument(own, 4) + head * argument(own, 6) + skipped * row_bytes
        sums = argument(args, 9) + thread * argument(args, 10)
        scores = sums + heads * 16 * 64
        queries = scores + heads * TILE * 4
        results = queries + chunks * heads * head_dim * 4
        source_row = argument(args, 0) + token * argument(args, 1)
        for slot in range(chunks * heads):
            source = head * group + min(slot // heads * heads, group - heads) + slot % heads
            for i in range(0, head_dim, 16):
                query = load(F32X16, source_row + (source * head_dim + i) * 4)
                store(queries + (slot * head_dim + i) * 4, query * splat(F32X16, scale))
            for i in range(partial // 64):
                store(results + slot * partial + i * 64, splat(F32X16, 0.0))
            store_scalar(results + slot * partial, np.float32(_LOWEST))
        for at in range(span * size, min((span + 1) * size, seen), TILE):
            count = min(TILE, seen - at)
            start = at
            if at != 0 and first != 0:
                start += first - SINK
            for chunk in range(chunks):
                of_chunk = results + chunk * heads * partial
                score_tile(queries + chunk * heads * head_dim * 4, keys + start * row_bytes, count, sums, scores)
                for h in range(heads):  # the sums are done with: their place takes the factors
                    store_scalar(sums + h * 4, weigh_tile(scores + h * TILE * 4, of_chunk + h * partial))
                mix_tile(values + start * row_bytes, count, scores, sums, of_chunk)
        for slot in range(chunks * heads):
            target = (token * kv_heads + head) * group + min(slot // heads * heads, group - heads) + slot % heads
            to = argument(args, 7) + (target * room + span) * partial
            for i in range(partial // 64):
                store(to + i * 64, load(F32X16, results + slot * partial + i * 64))

    return compile_kernel(attend, f"{features.key}-{head_dim}-{group}-{cap:g}")


@cache
def join_kernel(features: Features, head_dim: int) -> Kernel:
    """Item: one query row. Joins its spans' results into f32 [H, Dh].

    Args: 0 partial results, 1 spans for which there is room, 2 H, 3 out, 4 bytes from row to row of out, 5 padded
    columns to quantize it, or 0, 6 ``seen``, 7 sinks f32 [H] or 0.
    """
    partial = partial_bytes(head_dim)

    def join(item, thread, args):
        room, heads = argument(args, 1), argument(args, 2)
        out, own = argument(args, 3) + item * argument(args, 4), argument(args, 6) + item * _SEEN_BYTES
        size = argument(own, 2)
        spans = (argument(own, 0) - argument(own, 1) + size - 1) // size
        for head in range(heads):
            results = argument(args, 0) + (item * heads + head) * room * partial
            peak = np.float32(_LOWEST)
            if argument(args, 7) != 0:
                peak = load_scalar(float32, argument(args, 7) + head * 4)
            sink = peak
            for span in range(spans):
                peak = max(peak, load_scalar(float32, results + span * partial))
            total = splat(F32X16, 0.0)
            if argument(args, 7) != 0:
                total = exp(splat(F32X16, sink - peak))
            for span in range(spans):  # its share takes the place of a span's maximum
                result = results + span * partial
                share = exp(splat(F32X16, load_scalar(float32, result) - peak))
                total = fma(share, splat(F32X16, load_scalar(float32, result + 4)), total)
                store_scalar(result, max_lanes(share))
            inverse = splat(F32X16, np.float32(1) / max_lanes(total))
            to = out + head * head_dim * 4
            for i in range(0, head_dim, 16):
                mixed = splat(F32X16, 0.0)
                for span in range(spans):
                    result = results + span * partial
                    mixed = fma(
                        load(F32X16, result + (_HEAD + i) * 4), splat(F32X16, load_scalar(float32, result)), mixed
                    )
                store(to + i * 4, mixed * inverse)
        if argument(args, 5) != 0:
            quantize_row(out, argument(args, 5))

    return compile_kernel(join, f"{features.key}-{head_dim}")


def attend(
    ops: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, reach: Reach = None, cap: float = 0.0,
    sinks: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Causal grouped-query attention by index, as ``NumpyOps.attend``, for few rows: q f32 [T, H, Dh] -> [T, H, Dh].

    k and v [Hkv, N, Dh] are float16 and their heads may lie any distance apart; Dh a multiple of 16.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, rows, _ = k.shape
    group = heads // kv_heads
    q = np.ascontiguousarray(q)
    k, v = (x if x.strides[1:] == (head_dim * 2, 2) else np.ascontiguousarray(x) for x in (k, v))
    seen = np.zeros((tokens, SEEN), np.int64)
    seen[:, 0] = np.arange(rows - tokens, rows) + 1
    seen[:, 2] = spans_for(seen[:, 0], kv_heads)
    seen[:, 3:] = address(k), address(v), k.strides[0], v.strides[0]
    spans, room = int((-(-seen[:, 0] // seen[:, 2])).max()), most_spans(kv_heads)
    partial = np.empty((tokens, heads, room, partial_bytes(head_dim)), np.uint8)
    scratch = aligned_zeros(ops.threads, Grouping(group).scratch_bytes(head_dim))
    windows = None if reach is None else np.array(reach, np.int64)
    out = np.empty(q.shape, np.float32)
    program = Program()
    program.add(
        attend_kernel(ops.features, head_dim, group, cap), tokens * kv_heads * spans,
        address(q), q.strides[0], address(seen), tokens, kv_heads, spans, room, address(partial),
        0 if windows is None else address(windows), address(scratch), scratch.strides[0],
    )  # fmt: skip
    joined = join_kernel(ops.features, head_dim)
    program.add(
        joined, tokens, address(partial), room, heads, address(out), out.strides[0], 0, address(seen),
        0 if sinks is None else address(sinks),
    )  # fmt: skip
    ops.team.run(program)
    return out
