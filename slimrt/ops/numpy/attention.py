"""Attention in NumPy: in decode by spans of keys, in prefill by tiles, under masks of their own in plain lines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from slimrt.ops.numpy.workers import Workers
from slimrt.prune.reach import RUN, SINK, Reach, first_row, tiles

__all__ = ["FEW_ROWS", "KEY_TILE", "MASKED_SCORES", "QUERY_TILE", "NumpyAttention"]

Array = np.ndarray

# Tiles measured best on two cores with 1 MiB of L2 each: a [128 * H/Hkv, 512] score tile stays in L2.
QUERY_TILE = RUN
KEY_TILE = 512
FEW_ROWS = 16  # up to so many rows (decode) a product is cut by its outputs and attention by its keys
MASKED_SCORES = 1 << 20  # that a thread holds where each row has a mask of its own
_SPLIT_KEYS = 2048  # that one thread attends to at a time in decode


class NumpyAttention:
    """For a backend whose ``_workers`` share the work."""

    _workers: Workers

    def attend(
        self, q: Array, k: Array, v: Array, out: Array | None = None, reach: Reach = None,
        *, places: np.ndarray | None = None, first: np.ndarray | None = None, cap: float = 0.0, precise: bool = False,
        sinks: Array | None = None,
    ) -> Array:  # fmt: skip
        """Causal grouped-query attention by index: query row t sees key rows 0 .. N-T+t, or 0 .. places[t].

        q [T, H, Dh], k and v [Hkv, N, Dh], query head h reads KV head h // (H/Hkv) -> [T, H, Dh]. After pruning rows
        are not contiguous in position, but they keep their order, so an index-causal mask is right. ``reach``: how far
        back each KV head looks, see ``slimrt.prune.reach``. ``first`` [T]: row t sees no key before this one. ``cap``:
        scores become cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118). ``precise`` changes nothing: all is
        float32. ``sinks`` [H]: the softmax of each head has one score more, this one, whose weight goes to no value
        (gpt-oss, arXiv 2508.10925; the idea is that of arXiv 2309.17453).
        """
        if out is None:
            out = np.empty(q.shape, np.float32)
        if first is not None or cap or sinks is not None:
            self._attend_masked(q, k, v, out, reach or [0] * len(k), places, first, cap, sinks)
            return out
        if q.shape[0] > FEW_ROWS or places is not None:
            self._attend_tiles(q, k, v, out, reach or [0] * len(k), places)
        elif reach and any(reach):
            group = q.shape[1] // len(k)
            for head, rows in enumerate(reach):
                heads = slice(head * group, (head + 1) * group)
                for t, row in enumerate(range(k.shape[1] - len(q), k.shape[1])):
                    read = _reached(k[head : head + 1], v[head : head + 1], rows, row)
                    self._attend_few(q[t : t + 1, heads], *read, out[t : t + 1, heads])
        else:
            self._attend_few(q, k, v, out)
        return out

    def _attend_few(self, q: Array, k: Array, v: Array, out: Array) -> None:
        """Decode: the query heads that share a KV head in one product, the keys cut into spans that threads share.

        Each span leaves its maximum, sum and weighted values; they are joined as in flash-decoding.
        """
        tokens, heads, width = q.shape
        kv_heads, keys, _ = k.shape
        group = heads // kv_heads
        rows = tokens * group
        scaled = (q * np.float32(1 / math.sqrt(width))).reshape(tokens, kv_heads, group, width)
        queries = scaled.transpose(1, 0, 2, 3).reshape(kv_heads, rows, width)
        last_seen = np.repeat(np.arange(keys - tokens, keys), group)[:, None]  # by each row
        starts = range(0, keys, _SPLIT_KEYS)
        peak = np.empty((len(starts), kv_heads, rows, 1), np.float32)
        total = np.empty_like(peak)
        mixed = np.empty((len(starts), kv_heads, rows, width), np.float32)

        def span(number: int) -> None:
            lo = starts[number]
            hi = min(lo + _SPLIT_KEYS, keys)
            scores = np.matmul(queries, k[:, lo:hi].transpose(0, 2, 1))
            if hi > keys - tokens + 1:
                scores[:, np.arange(lo, hi) > last_seen] = -np.inf
            # A span that a row sees nothing of has no maximum; any number will do, its sum is 0.
            peak[number] = np.maximum(scores.max(axis=-1, keepdims=True), np.finfo(np.float32).min)
            scores -= peak[number]
            np.exp(scores, out=scores)
            total[number] = scores.sum(axis=-1, keepdims=True)
            np.matmul(scores, v[:, lo:hi], out=mixed[number])

        self._workers.map(span, range(len(starts)))
        share = np.exp(peak - peak.max(axis=0))
        result = (mixed * share).sum(axis=0) / (total * share).sum(axis=0)
        out[...] = result.reshape(kv_heads, tokens, group, width).transpose(1, 0, 2, 3).reshape(tokens, heads, width)

    def _attend_masked(
        self, q: Array, k: Array, v: Array, out: Array, reach: Sequence[int], rows: np.ndarray | None,
        first: np.ndarray | None, cap: float, sinks: Array | None = None,
    ) -> None:  # fmt: skip
        """The rule in plain lines, a KV head and some rows at a time: mask, cap, softmax."""
        tokens, heads, width = q.shape
        kv_heads, keys, _ = k.shape
        group = heads // kv_heads
        lowest = np.zeros(tokens, np.int64) if first is None else np.maximum(first, 0)
        step = max(1, min(QUERY_TILE, MASKED_SCORES // (group * keys)))

        def some(job: tuple[int, int]) -> None:
            lo, head = job
            at = slice(lo, min(lo + step, tokens))
            places = np.arange(keys - tokens + at.start, keys - tokens + at.stop) if rows is None else rows[at]
            start, stop = int(lowest[at].min()), int(places[-1]) + 1
            key = np.arange(start, stop)[None, :]
            begins = np.array([first_row(reach[head], int(place)) for place in places])[:, None]
            seen = (key <= places[:, None]) & (key >= lowest[at, None]) & ((key < SINK) | (key >= begins))
            queries = q[at, head * group : (head + 1) * group].transpose(1, 0, 2) * np.float32(1 / math.sqrt(width))
            scores = np.matmul(queries, k[head, start:stop].T)
            if cap:
                scores /= np.float32(cap)
                np.tanh(scores, out=scores)
                scores *= np.float32(cap)
            scores[:, ~seen] = -np.inf
            peak = scores.max(axis=-1, keepdims=True)
            if sinks is not None:
                sink = sinks[head * group : (head + 1) * group].reshape(group, 1, 1)
                peak = np.maximum(peak, sink)
            scores -= peak
            np.exp(scores, out=scores)
            total = scores.sum(axis=-1, keepdims=True)
            if sinks is not None:
                total += np.exp(sink - peak)
            mixed = np.matmul(scores, v[head, start:stop]) / total
            out[at, head * group : (head + 1) * group] = mixed.transpose(1, 0, 2)

        self._workers.map(some, [(lo, head) for lo in range(0, tokens, step) for head in range(kv_heads)])

    def _attend_tiles(
        self, q: Array, k: Array, v: Array, out: Array, reach: Sequence[int], places: np.ndarray | None = None
    ) -> None:
        """Prefill: tiles of QUERY_TILE tokens x KEY_TILE keys, all tiles of one query tile on one thread.

        Instead of a running maximum (FlashAttention, arXiv 2205.14135) each row uses the maximum of its diagonal tile
        as the reference, folded into the product as column Dh + 1, so that ``exp`` is the only pass over a tile
        besides the two products. A row whose later scores exceed the reference by more than exp can hold becomes
        non-finite, and its tile is done again with the running maximum.
        """
        tokens, heads, width = q.shape
        kv_heads, keys, _ = k.shape
        group = heads // kv_heads
        places = np.arange(keys - tokens, keys) if places is None else places
        scale = np.float32(1 / math.sqrt(width))
        extended = np.ones((kv_heads, keys, width + 1), np.float32)
        extended[..., :width] = k
        ones = np.ones(KEY_TILE, np.float32)

        def tile(job: tuple[slice, int]) -> None:
            lo, hi, head = job[0].start, job[0].stop, job[1]
            begin, end = int(places[lo]), int(places[lo]) + hi - lo
            rows = (hi - lo) * group
            queries = np.empty((rows, width + 1), np.float32)
            np.multiply(
                q[lo:hi, head * group : (head + 1) * group],
                scale,
                out=queries.reshape(hi - lo, group, width + 1)[..., :width],
            )
            first = first_row(reach[head], begin)
            diagonal = max(first, begin // KEY_TILE * KEY_TILE)
            scores = queries[:, :width] @ k[head, diagonal:end].T
            seen = np.arange(diagonal, end)[None, :] <= np.arange(begin, end)[:, None]
            scores.reshape(hi - lo, group, -1)[
                ~np.broadcast_to(seen[:, None], (hi - lo, group, seen.shape[1]))
            ] = -np.inf
            peak = scores.max(axis=1)
            np.negative(peak, out=queries[:, width])
            scores -= peak[:, None]
            np.exp(scores, out=scores)
            mixed = scores @ v[head, diagonal:end]
            total = scores.sum(axis=1)
            scores = np.empty((rows, KEY_TILE), np.float32)
            part = np.empty((rows, width), np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # checked below
                for at, stop in _key_tiles(first, diagonal):
                    tile_scores = scores[:, : stop - at]
                    np.matmul(queries, extended[head, at:stop].T, out=tile_scores)
                    np.exp(tile_scores, out=tile_scores)
                    total += tile_scores @ ones[: stop - at]
                    mixed += np.matmul(tile_scores, v[head, at:stop], out=part)
                mixed /= total[:, None]
            if not (np.isfinite(total).all() and np.isfinite(mixed).all()):
                mixed = _attend_online(queries[:, :width], k[head], v[head], seen, first, diagonal, group)
            out[lo:hi, head * group : (head + 1) * group] = mixed.reshape(hi - lo, group, width)

        # Tiles are cut from the first row of the context on, so the first of a prompt that continues one may be short.
        self._workers.map(tile, [(some, head) for some in reversed(tiles(places)) for head in range(kv_heads)])


def _key_tiles(first: int, end: int) -> list[tuple[int, int]]:
    """Spans of at most KEY_TILE keys that cover the rows from ``first`` to ``end``, and the sink before them."""
    sink = [(0, SINK)] if first else []
    return sink + [(at, min(at + KEY_TILE, end)) for at in range(first, end, KEY_TILE)]


def _reached(k: Array, v: Array, reach: int, row: int) -> tuple[Array, Array]:
    """Of k and v [1, N, Dh] the rows that query ``row`` reads: views, or copies where the sink is apart."""
    first = first_row(reach, row)
    if not first:
        return k[:, : row + 1], v[:, : row + 1]
    read = [np.concatenate([x[:, :SINK], x[:, first : row + 1]], axis=1) for x in (k, v)]
    return read[0], read[1]


def _attend_online(queries: Array, k: Array, v: Array, seen: Array, first: int, diagonal: int, group: int) -> Array:
    """One query tile with the running maximum: scaled queries [rows, Dh], k and v [N, Dh], seen [tokens, diagonal]."""
    rows, width = queries.shape
    peak = np.full(rows, -np.inf, np.float32)
    total = np.zeros(rows, np.float32)
    mixed = np.zeros((rows, width), np.float32)
    end = diagonal + seen.shape[1]
    for at, stop in ((diagonal, end), *_key_tiles(first, diagonal)):
        scores = queries @ k[at:stop].T
        if at == diagonal:
            scores[np.repeat(~seen, group, axis=0)] = -np.inf
        higher = np.maximum(peak, scores.max(axis=1))
        shrink = np.exp(peak - higher)
        scores -= higher[:, None]
        np.exp(scores, out=scores)
        total = total * shrink + scores.sum(axis=1)
        mixed = mixed * shrink[:, None] + scores @ v[at:stop]
        peak = higher
    return mixed / total[:, None]
