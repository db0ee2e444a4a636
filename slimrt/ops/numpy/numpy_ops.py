"""The CPU backend in NumPy: the executable specification of every kernel, tuned as far as NumPy goes.

Weights lie as float32 rows where memory allows, else packed as in the file. All arithmetic is float32; shapes use the
alphabet of ``slimrt.config``. Every array an operation returns is new unless it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimrt.ops.layer import LayerOps
from slimrt.ops.numpy.memory import NumpyMemory
from slimrt.ops.numpy.workers import Workers, available_cores, single_threaded_blas
from slimrt.prune.reach import RUN, SINK, Reach, first_row
from slimrt.prune.scores import BLOCK_SCORES, block_mass, unit_means
from slimrt.weights.gguf import TensorInfo
from slimrt.weights.pages import let_go
from slimrt.weights.quants import dequantize

__all__ = ["NumpyOps", "Weight"]

Array = np.ndarray

# Tiles measured best on two cores with 1 MiB of L2 each: a [128 * H/Hkv, 512] score tile stays in L2.
QUERY_TILE = RUN
KEY_TILE = 512
ROW_CHUNK = 256  # tokens that go through the row-wise part of a layer together
_FEW_ROWS = 16  # up to so many rows (decode) a product is cut by its outputs and attention by its keys
_SPLIT_BYTES = 16 << 20  # of a matrix: below this a second thread costs more than it saves
MASKED_SCORES = 1 << 20  # that a thread holds where each row has a mask of its own
GELU = 2 * math.sqrt(2 / math.pi)
GATE_LIMIT, GATE_SLOPE = 7.0, 1.702  # of gpt-oss's gate
_SPLIT_KEYS = 2048  # that one thread attends to at a time in decode


@dataclass(frozen=True)
class Weight:
    """A matrix [out, in], or several stacked along ``out``; opaque to everything but this backend.

    ``dense`` is the float32 matrix, or None where only the packed ``parts`` are held (views of the mapped file).
    """

    parts: tuple[TensorInfo, ...]
    dense: Array | None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[-1]

    @property
    def nbytes(self) -> int:
        return self.dense.nbytes if self.dense is not None else sum(part.nbytes for part in self.parts)


class NumpyOps(NumpyMemory, LayerOps):
    """Compute and memory operations on NumPy arrays.

    ``threads``: how many cores to use (None: all that the process may). ``packed``: keep weights as they lie in the
    file and unpack them on use, a layer at a time in prefill: slow, for models whose float32 form exceeds the memory.
    """

    name = "numpy"
    exact_rows = 1  # of a prompt that was read before so many rows run again at least, for the same bits as then
    unpack_rows = 16  # from so many rows on it pays to unpack a packed layer once, into scratch
    each_alone = False  # a BLAS library sums in an order that depends on how many rows there are
    rows_in_blocks = True  # a long prompt passes a layer block by block, so that scratch is bounded
    whole_rows = 1  # up to so many rows pass a layer in one piece

    def __init__(self, threads: int | None = None, *, packed: bool = False) -> None:
        super().__init__()
        self.threads = threads or available_cores()
        self.packed = packed
        self._workers = Workers(self.threads)

    # -- weights ----------------------------------------------------------------------------------------------------

    def weight(self, *parts: TensorInfo, half: int = 0) -> Weight:
        """A handle on ``parts`` [out_i, in] stacked along out. ``half``: in decode rows i and i + half of each 2 half
        are wanted together (0: none are), which a backend may make use of."""
        if self.packed:
            return Weight(parts, None)
        dense = self._unpack(parts)
        for part in parts:  # what the file holds is not read again: else it would count beside the unpacked matrix
            let_go(part.data)
        return Weight(parts, dense)

    def vector(self, *parts: TensorInfo | int) -> Array:
        """Small tensors (norms, biases) as one float32 [n]; a number stands for so many zeros."""
        arrays = [np.zeros(p, np.float32) if isinstance(p, int) else dequantize(p).reshape(-1) for p in parts]
        return np.concatenate(arrays)

    def unpacked(self, weight: Weight) -> Weight:
        """``weight`` ready for many rows: itself if dense, else an unpacked copy that the caller drops after use."""
        return weight if weight.dense is not None else Weight(weight.parts, self._unpack(weight.parts))

    def _unpack(self, parts: Sequence[TensorInfo]) -> Array:
        stacked = np.empty((sum(part.shape[0] for part in parts), parts[0].shape[-1]), np.float32)
        at = 0
        for part in parts:
            dequantize(part, out=stacked[at : at + part.shape[0]])
            at += part.shape[0]
        return stacked

    def decoder(self, model: Any, *, budget: bool = False) -> None:
        """None: a token goes through the layers one operation after the other, see ``slimrt.ops.protocol``."""

    # -- parallel structure -----------------------------------------------------------------------------------------

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around every pass: this team's threads in place of the BLAS library's, no warnings of overflow.

        A BLAS library's threads wait for each other in a spin; where another program has one of the cores, decode
        was measured at 2 to 20 tokens/s with them and at 35 to 53 without. Damaged weights may overflow anywhere:
        that is reported once, with the logits, and not as a warning by each operation.
        """
        with single_threaded_blas, np.errstate(over="ignore", invalid="ignore"):
            yield

    def rows(self, task: Callable[[slice], object], count: int) -> None:
        """Call ``task(slice)`` for slices that cover ``count`` rows once, in parallel.

        Everything in a layer but attention treats each token alone, so the engine runs it this way: a slice goes
        through all of its products while it is warm in the cache, and scratch is bounded by the slice.
        """
        if count <= _FEW_ROWS:
            task(slice(0, count))
            return
        if count >= 4 * ROW_CHUNK:  # BLAS rounds by the rows of a product: the same ones in whatever blocks they come
            self._workers.map(task, [slice(lo, min(lo + ROW_CHUNK, count)) for lo in range(0, count, ROW_CHUNK)])
            return
        # Equal slices: a last slice much shorter than the others would leave threads idle.
        chunks = -(-count // ROW_CHUNK)
        chunks = -(-chunks // self.threads) * self.threads
        size = -(-count // chunks)
        self._workers.map(task, [slice(lo, min(lo + size, count)) for lo in range(0, count, size)])

    # -- compute ----------------------------------------------------------------------------------------------------

    def angles(self, table: Any, positions: Array) -> tuple[Array, Array]:
        """cos and sin of ``positions`` [T] -> two [T, dims/2]; ``table``: a RopeTable."""
        return table(positions)

    def embed(self, weight: Weight, ids: Array) -> Array:
        """Rows ``ids`` [T] of ``weight`` [V, D] -> [T, D]."""
        if weight.dense is not None:
            return weight.dense[ids]
        (part,) = weight.parts
        unique, inverse = np.unique(ids, return_inverse=True)
        picked = TensorInfo(part.name, (len(unique), part.shape[-1]), part.type, part.data[unique])
        return dequantize(picked)[inverse]

    def linear(self, x: Array, weight: Weight, bias: Array | None = None, out: Array | None = None) -> Array:
        """x [T, in] @ weight.T [in, out] (+ bias [out]) -> [T, out], into ``out`` where given."""
        if weight.dense is not None and (len(x) > _FEW_ROWS or weight.nbytes < _SPLIT_BYTES):
            out = np.matmul(x, weight.dense.T, out=out)
        elif weight.dense is not None:
            out = self._linear_few(x, weight.dense, out)
        else:
            if out is None:
                out = np.empty((x.shape[0], weight.shape[0]), np.float32)
            at = 0
            for part in weight.parts:
                step = max(1, (1 << 22) // part.shape[-1])  # 16 MiB of float32 at a time
                for lo in range(0, part.shape[0], step):
                    block = dequantize(part, slice(lo, lo + step))
                    np.matmul(x, block.T, out=out[:, at : at + len(block)])
                    at += len(block)
        if bias is not None:
            out += bias
        return out

    def add_linear(self, x: Array, y: Array, weight: Weight, bias: Array | None = None) -> Array:
        """x [T, out] + y [T, in] @ weight.T (+ bias) -> [T, out]: a residual connection."""
        return x + self.linear(y, weight, bias)

    def head(self, x: Array, weight: Weight) -> Array:
        """x [T, D] @ weight.T [D, V] -> logits [T, V]."""
        return self.linear(x, weight)

    def _linear_few(self, x: Array, matrix: Array, out: Array | None) -> Array:
        """Few rows x [T, in], large ``matrix`` [out, in]: reading it is the work, so the threads share its rows."""
        result = np.empty((len(x), len(matrix)), np.float32) if out is None else out
        step = -(-len(matrix) // (2 * self.threads))

        def part(lo: int) -> None:
            np.matmul(x, matrix[lo : lo + step].T, out=result[:, lo : lo + step])

        self._workers.map(part, range(0, len(matrix), step))
        return result

    def rmsnorm(self, x: Array, gain: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * gain over the last axis (arXiv 1910.07467); x [T, D]."""
        square = np.einsum("td,td->t", x, x)
        square /= x.shape[-1]
        square += eps
        np.sqrt(square, out=square)
        normed = x / square[:, None]
        normed *= gain
        return normed

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotate the first 2*cos.shape[1] dimensions of each head in place: pairs (i, i + half) by the row's angle.

        x [T, heads, Dh], cos and sin [T, half]. Weights of the interleaved layout are reordered to this one at load.
        """
        half = cos.shape[-1]
        cos, sin = cos[:, None], sin[:, None]
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = a * sin
        a *= cos
        a -= b * sin
        b *= cos
        b += turned
        return x

    def swiglu(self, gate_up: Array) -> Array:
        """silu(gate) * up; gate_up [T, 2F] with gate first -> [T, F]."""
        gate, up = np.split(gate_up, 2, axis=-1)
        with np.errstate(over="ignore"):  # exp(-gate) = inf for gate < -88 gives the right limit, gate / inf = 0
            denominator = np.exp(-gate)
        denominator += 1
        result = gate / denominator
        result *= up
        return result

    def geglu(self, gate_up: Array) -> Array:
        """gelu(gate) * up, gelu in its tanh form (arXiv 1606.08415): gate * sigmoid(2 sqrt(2 / pi) (gate + 0.044715
        gate^3)); gate_up [T, 2F] with gate first -> [T, F]."""
        gate, up = np.split(gate_up, 2, axis=-1)
        with np.errstate(over="ignore"):
            denominator = np.exp(-(gate + gate * gate * gate * np.float32(0.044715)) * np.float32(GELU))
        denominator += 1
        result = gate / denominator
        result *= up
        return result

    def clamped(self, gate_up: Array) -> Array:
        """gpt-oss's gate: with g = min(gate, 7) and u = up within -7 .. 7, g * sigmoid(1.702 g) * (u + 1); gate_up [T,
        2F] with gate first -> [T, F]."""
        gate, up = np.split(gate_up, 2, axis=-1)
        gate = np.minimum(gate, np.float32(GATE_LIMIT))
        with np.errstate(over="ignore"):
            denominator = np.exp(gate * np.float32(-GATE_SLOPE))
        denominator += 1
        result = gate / denominator
        result *= np.clip(up, np.float32(-GATE_LIMIT), np.float32(GATE_LIMIT)) + np.float32(1)
        return result

    def score_blocks(self, kind: str, q: Array, k: Array, block: int, unit: int) -> np.ndarray:
        """How much the queries q [W, H, Dh] of the last rows want each block of k [Hkv, N, Dh] -> [B] on the host."""
        return BLOCK_SCORES[kind](q, k, block, unit)

    def block_mass(
        self, q: Array, k: Array, block: int, causal: bool, cap: float = 0.0, sinks: Array | None = None
    ) -> np.ndarray:
        """Attention of q [W, H, Dh] by block of k [Hkv, N, Dh] -> [W, H, B] on the host; see ``scores.block_mass``."""
        return block_mass(q, k, block, causal, cap, sinks)

    def unit_means(self, k: Array, unit: int) -> Array:
        """Mean key of each run of ``unit`` rows: k [Hkv, N, Dh] -> [Hkv, ceil(N / unit), Dh]."""
        return unit_means(k, unit)

    def columns(self, x: Array, columns: np.ndarray) -> Array:
        """x[:, columns]: of x [Hkv, N, Dh] some of the N."""
        return x.take(columns, axis=1)

    def take(self, x: Array, rows: Array) -> Array:
        """x[rows]: the rows that go on; rows ascending."""
        return x[rows]

    def attend(
        self, q: Array, k: Array, v: Array, out: Array | None = None, reach: Reach = None,
        *, first: np.ndarray | None = None, cap: float = 0.0, precise: bool = False, sinks: Array | None = None,
    ) -> Array:  # fmt: skip
        """Causal grouped-query attention by index: query row t sees key rows 0 .. N-T+t.

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
            self._attend_masked(q, k, v, out, reach or [0] * len(k), first, cap, sinks)
            return out
        if q.shape[0] > _FEW_ROWS:
            self._attend_tiles(q, k, v, out, reach or [0] * len(k))
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
        self, q: Array, k: Array, v: Array, out: Array, reach: Sequence[int], first: np.ndarray | None, cap: float,
        sinks: Array | None = None,
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
            places = np.arange(keys - tokens + at.start, keys - tokens + at.stop)
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

    def _attend_tiles(self, q: Array, k: Array, v: Array, out: Array, reach: Sequence[int]) -> None:
        """Prefill: tiles of QUERY_TILE tokens x KEY_TILE keys, all tiles of one query tile on one thread.

        Instead of a running maximum (FlashAttention, arXiv 2205.14135) each row uses the maximum of its diagonal tile
        as the reference, folded into the product as column Dh + 1, so that ``exp`` is the only pass over a tile
        besides the two products. A row whose later scores exceed the reference by more than exp can hold becomes
        non-finite, and its tile is done again with the running maximum.
        """
        tokens, heads, width = q.shape
        kv_heads, keys, _ = k.shape
        group = heads // kv_heads
        offset = keys - tokens
        scale = np.float32(1 / math.sqrt(width))
        extended = np.ones((kv_heads, keys, width + 1), np.float32)
        extended[..., :width] = k
        ones = np.ones(KEY_TILE, np.float32)

        def tile(job: tuple[int, int]) -> None:
            lo, head = job
            hi = min(lo + QUERY_TILE - (offset + lo) % QUERY_TILE, tokens)
            rows = (hi - lo) * group
            queries = np.empty((rows, width + 1), np.float32)
            np.multiply(
                q[lo:hi, head * group : (head + 1) * group],
                scale,
                out=queries.reshape(hi - lo, group, width + 1)[..., :width],
            )
            first = first_row(reach[head], offset + lo)
            diagonal = max(first, (offset + lo) // KEY_TILE * KEY_TILE)
            scores = queries[:, :width] @ k[head, diagonal : offset + hi].T
            seen = np.arange(diagonal, offset + hi)[None, :] <= np.arange(offset + lo, offset + hi)[:, None]
            scores.reshape(hi - lo, group, -1)[
                ~np.broadcast_to(seen[:, None], (hi - lo, group, seen.shape[1]))
            ] = -np.inf
            peak = scores.max(axis=1)
            np.negative(peak, out=queries[:, width])
            scores -= peak[:, None]
            np.exp(scores, out=scores)
            mixed = scores @ v[head, diagonal : offset + hi]
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
        starts = [0, *range(QUERY_TILE - offset % QUERY_TILE, tokens, QUERY_TILE)]
        self._workers.map(tile, [(lo, head) for lo in reversed(starts) for head in range(kv_heads)])


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
