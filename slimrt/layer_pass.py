"""The rows of a prompt on their way through one layer, all at once or (on a CPU) block by block, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from slimrt.attention import Attention
from slimrt.models import Llama
from slimrt.models.llama import Turns
from slimrt.ops.protocol import Array, Cache, Ops
from slimrt.parts import Parts
from slimrt.prune.asked import HEAD
from slimrt.prune.schedule import Schedule
from slimrt.row_blocks import STEP, Queries, row_blocks, rows_at_a_time

__all__ = ["Layer", "LayerPass"]


class Layer(NamedTuple):
    """What rows of a layer attend to: keys and values [Hkv, N, Dh] and the positions [N] of their rows."""

    keys: Array
    values: Array
    positions: np.ndarray


class LayerPass:
    """Layers of one model on one backend; blocks as ``slimrt.row_blocks`` has them."""

    def __init__(self, model: Llama, ops: Ops, attention: Attention, parts: Parts) -> None:
        self._model, self._ops, self._attention, self._parts = model, ops, attention, parts
        self._block_rows = rows_at_a_time(model.config) if ops.rows_in_blocks else None

    def attended(
        self,
        cache: Cache,
        schedule: Schedule,
        layer: Any,
        number: int,
        x: Array,
        positions: np.ndarray,
        turns: Turns,
        *,
        first: int = 0,
        exact: bool = True,
        look: Callable[[Array, Array], None] | None = None,
    ) -> tuple[Array, Queries, Array]:
        """x [T, D] into layer ``number`` -> its rows from ``first`` on after attention and projection, queries of
        theirs, at least those that a cut or a further question wants, and the layer's keys.

        Keys and values of all rows go to the cache. ``look`` is shown all queries of the result's rows and the keys. x
        may be overwritten.
        """
        windows = schedule.windows
        blocks = self._blocks(len(x))
        if len(blocks) == 1:
            q, k, v = self._qkv(layer, x, turns, positions)
            keys, values, held = cache.update(number, k, v, positions, q, exact=exact)
            x, q = x[first:], q[first:]
            if look:
                look(q, keys)
            attention = self._attention.attend(windows, number, q, positions, keys, values, held)
            return self._projected(layer, x, attention), Queries(q, q, len(q)), keys
        if first or look or cache.room(number, len(x)) is None:
            return self._with_all_queries(cache, schedule, layer, number, x, positions, turns, first, exact, look)
        begin = end = None
        for block in blocks:
            q, k, v = self._qkv(layer, x[block], _some(turns, block), positions[block])
            keys, values, held = cache.update(number, k, v, positions[block], q, exact=exact)
            attention = self._attention.attend(windows, number, q, positions[block], keys, values, held)
            x[block] = self._projected(layer, x[block], attention)
            begin, end = _ends(begin, end, q, schedule.fresh_rows)
        return x, Queries(begin, end, len(x)), keys

    def _with_all_queries(
        self,
        cache: Cache,
        schedule: Schedule,
        layer: Any,
        number: int,
        x: Array,
        positions: np.ndarray,
        turns: Turns,
        first: int,
        exact: bool,
        look: Callable[[Array, Array], None] | None,
    ) -> tuple[Array, Queries, Array]:
        """``attended`` where all keys, values and queries must be there before a row attends: the last layer, whose
        result is wanted of few rows, a cache that takes a layer's rows in one piece, and where somebody looks."""
        q, k, v = self._all_qkv(layer, x, turns, positions)
        keys, values, held = cache.update(number, k, v, positions, q, exact=exact)
        x, q = x[first:], q[first:]
        if look:
            look(q, keys)
        before = keys.shape[1] - len(q)
        for block in self._blocks(len(x)):
            seen = slice(0, before + block.stop)  # causal: none of these rows looks farther
            attention = self._attention.attend(
                schedule.windows, number, q[block], positions[: first + block.stop], keys[:, seen], values[:, seen],
                held[seen],
            )  # fmt: skip
            x[block] = self._projected(layer, x[block], attention)
        return x, Queries(q, q, len(q)), keys

    def keyed(
        self,
        cache: Cache,
        schedule: Schedule,
        layer: Any,
        number: int,
        x: Array,
        positions: np.ndarray,
        turns: Turns,
        *,
        look: Callable[[Array, Array], None] | None = None,
    ) -> tuple[Queries, Layer]:
        """Keys and values of x [T, D] in layer ``number`` go to the cache, and no row attends yet -> queries of the
        rows, at least those that a cut or a further question wants, and what rows of the layer attend to.

        ``look`` is shown all queries and the keys.
        """
        blocks = self._blocks(len(x))
        if len(blocks) == 1 or look or cache.room(number, len(x)) is None:
            q, k, v = self._all_qkv(layer, x, turns, positions)
            held = Layer(*cache.update(number, k, v, positions, q, exact=True))
            if look:
                look(q, held.keys)
            return Queries(q, q, len(q)), held
        begin = end = None
        for block in blocks:
            q, k, v = self._qkv(layer, x[block], _some(turns, block), positions[block])
            held = Layer(*cache.update(number, k, v, positions[block], q, exact=True))
            begin, end = _ends(begin, end, q, schedule.fresh_rows)
        return Queries(begin, end, len(x)), held

    def attended_some(
        self,
        schedule: Schedule,
        layer: Any,
        number: int,
        x: Array,
        places: np.ndarray,
        positions: np.ndarray,
        turns: Turns,
        held: Layer,
    ) -> Array:
        """x [M, D], the rows at ``places`` [M] of what layer ``number`` holds, after attention and projection, with the
        bits that ``attended`` gives all of them; x may be overwritten. Their queries are made once more."""
        blocks = self._blocks(len(x))
        for block in blocks:
            q, _, _ = self._qkv(layer, x[block], _some(turns, block), positions[block])
            attention = self._attention.attend(
                schedule.windows, number, q, positions[block], held.keys, held.values, held.positions, places[block]
            )
            result = self._projected(layer, x[block], attention)
            if len(blocks) == 1:
                return result
            x[block] = result
        return x

    def kept(self, x: Array, rows: np.ndarray) -> Array:
        """x[rows], ascending; in blocks they move forward in the memory of x."""
        if len(self._blocks(len(x))) == 1:
            return self._ops.take(x, rows)
        for low in range(0, len(rows), STEP):
            some = rows[low : low + STEP]
            x[low : low + len(some)] = x[some]
        return x[: len(rows)]

    def fed(self, layer: Any, x: Array) -> Array:
        """x [T, D] after the feed-forward of a layer; it may be overwritten."""
        blocks = self._blocks(len(x))
        if len(blocks) == 1 or self._model.config.experts:  # each expert would be unpacked for each block
            return self._fed_forward(layer, x)
        for block in blocks:
            x[block] = self._fed_forward(layer, x[block])
        return x

    # Each in parts, between which others have their turn.

    def _qkv(self, layer: Any, x: Array, turns: Turns, positions: np.ndarray) -> tuple[Array, Array, Array]:
        def work(some: slice) -> Any:
            return self._model.qkv(layer, x[some], _some(turns, some))

        q, k, v = self._parts.each("qkv", work, len(x))
        return self._model.grown(q, positions), k, v

    def _all_qkv(self, layer: Any, x: Array, turns: Turns, positions: np.ndarray) -> list[Array]:
        """Queries, keys and values of all rows, computed in blocks."""
        blocks, gathered = self._blocks(len(x)), list[Array]()
        for block in blocks:
            results = self._qkv(layer, x[block], _some(turns, block), positions[block])
            if len(blocks) == 1:
                return list(results)
            if not gathered:
                gathered = [self._ops.empty((len(x), *result.shape[1:]), result.dtype) for result in results]
            for whole, result in zip(gathered, results, strict=True):
                whole[block] = result
        return gathered

    def _projected(self, layer: Any, x: Array, attention: Array) -> Array:
        return self._parts.each("project", lambda some: self._model.project(layer, x[some], attention[some]), len(x))

    def _fed_forward(self, layer: Any, x: Array) -> Array:
        return self._parts.each("feed forward", lambda some: self._model.feed_forward(layer, x[some]), len(x))

    def _blocks(self, rows: int) -> list[slice]:
        return [slice(0, rows)] if self._block_rows is None else row_blocks(rows, self._block_rows)


def _ends(begin: Array | None, end: Array | None, q: Array, last: int) -> tuple[Array, Array]:
    """Copies of the first ``HEAD`` and of the ``last`` queries so far, with those of ``q`` [n, H, Dh]."""
    return (
        q[:HEAD].copy() if begin is None else begin,
        (q if end is None else np.concatenate([end, q]))[-last:].copy(),
    )


def _some(turns: Turns, rows: slice) -> Turns:
    return tuple((cos[rows], sin[rows]) for cos, sin in turns)
