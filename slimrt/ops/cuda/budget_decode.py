"""Decode under a KV budget as one captured graph: each layer's blocks are chosen, and brought, where it computes.

The cache lends its layers' resident rows (``Lent``). From then on what lies in which slot is known on the device alone:
a kernel scores the blocks by their units, another chooses and notes what is missing, a third brings that from the
host's page-locked memory, and the attention reads the slots. The host says how many rows there are, and copies each
block that is full to its own memory, as without a graph. When anybody else looks at the cache it takes its rows back,
and with them what was chosen.

All blocks are compared, however long the context is: on a device that costs less than finding the best groups first.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from slimrt.ops.cuda.decode import CapturedDecode, places
from slimrt.ops.protocol import Array, Cache, Lender, Lent, LentLayer, Part, TakenBack

__all__ = ["BudgetedDecode"]

_START, _LENGTH, _UNITS, _STEP = range(4)  # words of a layer; those of choose.cu begin with the last
_SCORES = ("token_max", "token_mass", "unit_softmax")  # by the kernels that count in device memory


class _Tables:
    """Where the kernels keep what they choose by; whoever borrows next uses it again, so that a graph over it serves
    on."""

    def __init__(self, ops: Any, layers: int, blocks: int, count: int) -> None:
        """``count`` slots a layer, the tail's aside."""
        self.shape = layers, blocks, count
        self.wishes, self.scores = ops.empty((layers, blocks), np.float32), ops.empty((blocks,), np.float32)
        self.slots, self.moved = (ops.empty((layers, n), np.int32) for n in (count + 1, 3))
        self.source, self.target = ops.empty((count,), np.uint64), ops.empty((count,), np.int32)
        self.homes: np.ndarray = ops.pinned((layers, blocks), np.uint64)  # the kernel reads a few of them from there


class _Borrowed:
    """What a cache has lent; the choices of its layers are in ``tables`` until it takes them back. ``layers`` is then
    empty. The cache holds it, the decoder does not: what a forgotten conversation has lent goes with it."""

    layers: Sequence[LentLayer]

    def __init__(self, lent: Lent, ops: Any, tables: _Tables | None) -> None:
        """``tables`` that nobody uses."""
        config, layers = lent.config, lent.layers
        self.config, self.layers, self._ops = config, layers, ops
        self.count = config.slots - 1
        shape = len(layers), -(-config.ctx // config.block)
        fits = tables is not None and tables.shape == (*shape, self.count)
        self.tables = tables if tables is not None and fits else _Tables(ops, *shape, self.count)
        wishes = np.zeros(shape, np.float32)
        for number, layer in enumerate(layers):
            wishes[number, : len(layer.wishes)] = layer.wishes
        ops.load(self.tables.wishes, wishes)
        ops.load(self.tables.slots, np.array([layer.slots for layer in layers], np.int32))
        ops.load(self.tables.moved, np.zeros((len(layers), 3), np.int32))
        self.wished = [(len(layer.wishes), layer.wished_at) for layer in layers]
        self.tails = [int(layer.slots[-1]) for layer in layers]
        self._known = [0] * len(layers)
        # So many of the tail's blocks must be there already, of which the tail itself is one, for nothing to move.
        shares = (1 + np.arange(self.count + 1)) / (1 + self.count)
        self.common = int(np.searchsorted(shares, config.overlap))

    def memory(self) -> list[Array]:
        """All that a captured graph has the addresses of, beside the tables."""
        return [array for layer in self.layers for array in (layer.store, layer.means())]

    def learn_homes(self) -> None:
        """Where the host keeps blocks that it has got since the last time; no launch may be under way."""
        for number, layer in enumerate(self.layers):
            first, count = self._known[number], min(len(layer.homes), self.tables.homes.shape[1])
            if first < count:
                self.tables.homes[number, first:count] = [home.ctypes.data for home in layer.homes[first:count]]
                self._known[number] = count

    def give_back(self) -> list[TakenBack]:
        """What was chosen, by layer."""
        t = self.tables
        slots, wishes, moved = (self._ops.to_host(x) for x in (t.slots, t.wishes, t.moved))
        return [
            TakenBack(
                slots[number].astype(np.int64), wishes[number, :earlier].copy(), at,
                int(moved[number, 1]), int(moved[number, 2]),
            )
            for number, (earlier, at) in enumerate(self.wished)
        ]  # fmt: skip

    def let_go(self) -> None:
        """The cache has its rows back, or they are gone."""
        self.layers = ()


class BudgetedDecode(CapturedDecode):
    """See ``slimrt.ops.protocol.Decoder``; for caches under a budget. What one does not lend goes layer by layer."""

    _words = _STEP + 6
    _tables: _Tables | None = None
    _captured_over: _Tables | None = None
    _held: weakref.ref[_Borrowed] | None = None

    def step(self, parts: Sequence[Part]) -> tuple[np.ndarray, list[Array | None]]:
        """See ``CapturedDecode``."""
        (part,), ops, n_layers = parts, self._ops, self._model.config.n_layers
        (token,), position, middle = part.tokens, part.position, part.middle
        cache = cast(Lender, part.cache)  # the engine's, under a budget
        with ops.computing():
            borrowed = self._borrow(cache)
            if borrowed is None:
                self._write_words(token, position, np.zeros((n_layers, self._words), np.int32))
                states = self._by_layers(cache, position)
            else:
                if self._is_stale(borrowed):  # captured while the token runs once, and chooses nothing yet
                    self._write_words(token, position, self._layer_words(borrowed, cache, choosing=False))
                    self._capture(borrowed)
                self._write_words(token, position, self._layer_words(borrowed, cache, choosing=True))
                states = self._graph.launch()
                self._note_choices(borrowed, cache)
                for layer in range(n_layers):
                    cache.appended(layer, np.array([position]))
            hidden = None if middle is None else ops.copied(states[middle])
            ops.mark().synchronize()
            return self._logits[None].copy(), [hidden]

    # -- what the cache lends ---------------------------------------------------------------------------------------

    @property
    def _borrowed(self) -> _Borrowed | None:
        return None if self._held is None else self._held()

    def _borrow(self, cache: Lender) -> _Borrowed | None:
        """What ``cache`` lends, with all that the host has of it."""
        borrowed = self._borrowed
        if borrowed is None or not cache.lends_to(borrowed):
            lent = cache.lend(_SCORES)
            if lent is None:
                return None
            free = borrowed is None or not borrowed.layers
            borrowed = _Borrowed(lent, self._ops, self._tables if free else None)
            self._tables, self._held = borrowed.tables, weakref.ref(borrowed)
            cache.lent_to(borrowed)
        cache.settled()
        borrowed.learn_homes()
        return borrowed

    def _is_stale(self, borrowed: _Borrowed) -> bool:
        """Whether what was lent lies elsewhere than when the graph was captured: means move when they grow."""
        return self._captured_over is not borrowed.tables or places(borrowed.memory()) != self._places

    def _capture(self, borrowed: _Borrowed) -> None:
        pool = None if self._graph is None else self._graph.pool
        self._graph, self._places = None, []  # its memory serves the next one
        stores = [layer.store for layer in borrowed.layers]
        self._graph = self._ops.capture(lambda: self._pass(stores), pool)
        self._places, self._captured_over = places(borrowed.memory()), borrowed.tables

    def _layer_words(self, borrowed: _Borrowed, cache: Cache, *, choosing: bool) -> np.ndarray:
        c, words = borrowed.config, []
        for number, tail in enumerate(borrowed.tails):
            held = cache.length(number)
            now = held // c.block
            row = borrowed.count * c.block + held - now * c.block
            step = [0] * (self._words - _UNITS)
            if choosing and self._chooses(borrowed, number, held):
                earlier, at = borrowed.wished[number]
                decay = int(np.float32(c.decay ** (held - at)).view(np.int32))
                units = now * (c.block // c.unit)
                step = [units, 1, int(now != tail), now, earlier, decay, borrowed.common]
            words.append([row, row + 1, *step])
        return np.array(words, np.int32)

    def _chooses(self, borrowed: _Borrowed, number: int, held: int) -> bool:
        c = borrowed.config
        return held // c.block != borrowed.tails[number] or (held + number) % c.choose_every == 0

    def _note_choices(self, borrowed: _Borrowed, cache: Cache) -> None:
        c = borrowed.config
        for number in range(len(borrowed.tails)):
            held = cache.length(number)
            if self._chooses(borrowed, number, held):
                tail = borrowed.tails[number] = held // c.block
                borrowed.wished[number] = (tail, held) if c.decay else (0, 0)

    # -- a layer ------------------------------------------------------------------------------------------------------

    def _mixed(self, number: int, q: Array, store: Array) -> Array:
        """The attention of the query ``q`` over the blocks that it wants, once they are in their slots."""
        c, ops, borrowed = self._model.config, self._ops, self._borrowed
        assert borrowed is not None
        cache, layer, t = borrowed.config, borrowed.layers[number], borrowed.tables
        ops.score_captured(cache.score, q, layer.means(), cache.block // cache.unit, self._word(number, _UNITS),
                           t.scores)  # fmt: skip
        moved = t.moved[number]
        ops.choose_blocks(
            self._word(number, _STEP, 6), t.scores, t.wishes[number], t.slots[number], t.homes[number], t.source,
            t.target, moved, cache.sink_blocks, cache.local_blocks,
        )  # fmt: skip
        ops.bring_blocks(store, t.source, t.target, moved, cache.block)
        splits = ops.splits(c.n_kv_heads, store.shape[2])
        length = self._word(number, _LENGTH)
        return ops.attend_one(q, store[0], store[1], length, ops.empty(q.shape), splits, cap=c.attention_cap)

    def _by_layers(self, cache: Cache, position: int) -> list[Array]:
        """A token whose rows the cache appends and chooses itself."""
        model, ops, c = self._model, self._ops, self._model.config
        turns, states, where = self._turns(), [], np.array([position])
        x = ops.begin(model.embedding, self._host, self._device)
        if c.embedding_scale != 1:
            x = x * np.float32(c.embedding_scale)
        for number, layer in enumerate(model.layers):
            q, k, v = self._qkv(layer, x, turns[layer.turns])
            keys, values, _ = cache.update(number, k, v, where, q)
            mixed = ops.attend(q, keys, values, cap=c.attention_cap)
            x = ops.project(x, mixed, layer.out, layer.out_bias, layer.attn_merge)
            states.append(ops.copied(x))
            cache.attended(number)
            x = self._fed(layer, x)
        ops.normed_head(x, model.norm, c.norm_eps, model.head, self._logits)
        return states
