"""A KV cache with a budget: prompts are read exactly, decode reads a fixed number of resident rows a layer.

Prefill computes a layer in a staging slot of the ring, leaves the chosen blocks resident, and copies the complete ones
to host memory behind the next layers; a prompt that continues an earlier one finds the layer's old rows brought into a
slot while the layers before it computed. Decode chooses blocks by the query against the mean keys of units, as Quest
(arXiv 2406.10774) and InfLLM (arXiv 2402.04617) do, each layer for itself, and waits for what it fetches: what would
come a token later would no longer be what this one wants (docs/experiments.md). ``fetched`` tells how much that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimrt.config import CacheConfig, ModelConfig
from slimrt.errors import ComputeError
from slimrt.kv.choice import Choice, choose
from slimrt.kv.layer_rows import LayerRows
from slimrt.kv.ring import Pairs, Ring, Transfers
from slimrt.ops.protocol import Array, Borrower, Fetched, Lent, Ops

__all__ = ["OffloadedKVCache"]


@dataclass
class _Open:
    """The layer in its staging slot: the first block that the host lacks; once it is ``settled``, ``choice`` became
    resident (None: all of it). ``q`` [1, H, Dh]: the query that chooses, None where there is none."""

    layer: int
    lacking: int
    q: Array | None
    choice: Choice | None = None
    settled: bool = False


class _NotingFailure:
    """Around what waits for copies: an exception means that rows are lost. An interrupt does not: what it breaks off
    can be mended from what is there."""

    def __init__(self, cache: OffloadedKVCache) -> None:
        self._cache = cache

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self._cache._failure = error


class OffloadedKVCache:
    """See ``slimrt.ops.protocol.Cache`` for what the methods do. ``transfers`` counts what moved."""

    def __init__(self, model: ModelConfig, ops: Ops, config: CacheConfig) -> None:
        self._model, self._ops, self._config = model, ops, config
        self.transfers = Transfers()
        self._layers = [LayerRows(ops, config, model, self.transfers) for _ in range(model.n_layers)]
        self._ring: Ring | None = None  # while a pass over many tokens runs
        self._open: _Open | None = None
        self._failure: BaseException | None = None
        self._borrower: Borrower | None = None

    @property
    def intact(self) -> bool:
        return self._failure is None

    @property
    def fetched(self) -> Fetched:
        self._take_back()
        return self.transfers.fetched

    # -- a pass -------------------------------------------------------------------------------------------------------

    def update(
        self, layer: int, k: Array, v: Array, positions: np.ndarray, q: Array | None, *, exact: bool = False
    ) -> tuple[Array, Array, np.ndarray]:
        """Append rows; returns all of them, or in decode the resident ones.

        Raises what a copy raised that these rows depend on, and ComputeError from then on until ``truncate(0)``.
        """
        if self._failure is not None:
            raise ComputeError(
                f"keys and values were lost when a copy failed ({self._failure!r}); start the conversation again"
            ) from self._failure
        with _NotingFailure(self):
            self._take_back()
            rows = self._layers[layer]
            rows.note_state(len(positions) == 1 and not exact)
            if not rows.spilled and len(rows) + len(positions) <= rows.capacity:
                return rows.append(k, v, positions)
            if exact or len(positions) > 1:
                return self._update_whole(layer, k, v, positions, q)
            return self._update_one(layer, k, v, positions, q)

    def room(self, layer: int, rows: int) -> None:
        """None: what a query reads is chosen here."""

    def appended(self, layer: int, positions: np.ndarray) -> None:
        """By who has the rows on loan: there is no ``room``."""
        assert self._borrower is not None, "rows come by update only"
        with _NotingFailure(self):
            self._layers[layer].appended(positions)

    def attended(self, layer: int) -> None:
        """Choose what of the layer stays resident, now that its attention is queued (a choice waits for compute); start
        copying its new blocks to the host; after the last layer, wait until all are there."""
        if self._ring is None:
            return
        with _NotingFailure(self):
            if self._open is not None:
                slot = self._ring.taken(layer)
                assert slot is not None and self._open.layer == layer
                self._settle_open(slot, self._open.q)
            self._leave()
            if layer == self._model.n_layers - 1:
                self._end_pass()

    # -- decode -------------------------------------------------------------------------------------------------------

    def _update_one(
        self, layer: int, k: Array, v: Array, positions: np.ndarray, q: Array | None
    ) -> tuple[Array, Array, np.ndarray]:
        rows = self._layers[layer]
        choice = self._decode_choice(layer, q)
        if rows.choice is not choice:
            rows.move_to(choice)
        return rows.append_one(k, v, positions)

    def _decode_choice(self, layer: int, q: Array | None) -> Choice:
        """What the layer reads when one row more has come: all if it fits, else what it chooses.

        The present choice serves until the layer's turn comes, and then as long as enough of what is wanted now is in
        it.
        """
        rows = self._layers[layer]
        tail, present = len(rows) // self._config.block, rows.choice
        if present is not None and present.tail != tail:
            present = None
        if tail < self._config.slots:
            return present or choose(None, tail, self._config)
        if not rows.spilled:
            rows.begin_spilling()
        if present is None or (len(rows) + layer) % self._config.choose_every == 0:
            choice = self._choose(rows, tail, q)
            if present is None or choice.overlap(present) < self._config.overlap:
                return choice
        return present

    def _choose(self, rows: LayerRows, tail: int, q: Array | None) -> Choice:
        """The blocks that the query q [1, H, Dh] wants, when block ``tail`` holds the newest row."""
        if tail < self._config.slots or q is None:
            return choose(None, tail, self._config)
        return choose(rows.wanted(q, tail), tail, self._config)

    # -- on loan: see slimrt.ops.protocol.Lender ----------------------------------------------------------------------

    def lend(self, scores: Sequence[str]) -> Lent | None:
        self._take_back()
        if self._failure is not None or self._ring is not None or self._config.score not in scores:
            return None
        layers = [layer for rows in self._layers if (layer := rows.lent()) is not None]
        return Lent(self._config, layers) if len(layers) == len(self._layers) else None

    def lent_to(self, borrower: Borrower) -> None:
        self._borrower = borrower

    def lends_to(self, borrower: Borrower) -> bool:
        return self._borrower is borrower and self._failure is None

    def settled(self) -> None:
        with _NotingFailure(self):
            for rows in self._layers:
                rows.settle()

    def _take_back(self) -> None:
        """Before anybody looks at what the slots hold. Where an interrupt comes the rows stay on loan."""
        if self._borrower is not None:
            for rows, now in zip(self._layers, self._borrower.give_back(), strict=True):
                rows.take_back(now)
            self._no_loan()

    def _no_loan(self) -> None:
        if self._borrower is not None:
            borrower, self._borrower = self._borrower, None
            borrower.let_go()

    # -- prefill ------------------------------------------------------------------------------------------------------

    def _update_whole(
        self, layer: int, k: Array, v: Array, positions: np.ndarray, q: Array | None
    ) -> tuple[Array, Array, np.ndarray]:
        ring = self._ring or self._begin_pass(int(positions[-1]) + 1)
        rows, block = self._layers[layer], self._config.block
        self._fetch_ahead(ring, layer)
        slot = ring.take(layer)
        rows.stage_resident(slot)
        held, n = len(rows), len(rows) + len(positions)
        slot[0, :, held:n] = k.transpose(1, 0, 2)
        slot[1, :, held:n] = v.transpose(1, 0, 2)
        rows.positions.append(positions)
        lacking = n // block
        if n > rows.capacity:
            lacking = rows.on_host
            rows.learn_means(slot[0, :, lacking * block :], lacking, n // block)
        self._open = _Open(layer, lacking, None if q is None else q[-1:])
        for number in range(layer + 1, min(layer + self._config.lookahead + 1, len(self._layers))):
            self._fetch_ahead(ring, number)
        return slot[0, :, :n], slot[1, :, :n], rows.positions.array

    def _begin_pass(self, length: int) -> Ring:
        """Staging slots for the longest layer of a pass that brings the context to ``length`` tokens."""
        for rows in self._layers:
            rows.settle()
        block = self._config.block
        shape = (2, self._model.n_kv_heads, -(-length // block) * block, self._model.head_dim)
        self._ring = Ring(self._ops, shape, 1 + self._config.lookahead, self.transfers)
        return self._ring

    def _fetch_ahead(self, ring: Ring, layer: int) -> None:
        rows = self._layers[layer]
        if rows.spilled:
            ring.fetch(layer, rows.staged)

    def _settle_open(self, slot: Array, q: Array | None) -> None:
        """Fill the resident slots of the layer that ``slot`` holds with what the query q wants."""
        opened = self._open
        assert opened is not None
        rows = self._layers[opened.layer]
        if not opened.settled and len(rows) > rows.capacity:
            rows.forget_wishes()  # so that what follows a prompt does not depend on how it was read
            opened.choice = self._choose(rows, (len(rows) - 1) // self._config.block, q)
        opened.settled = True  # before the slots change: an interrupt leaves what mends them
        rows.settle_from(slot, opened.choice)

    def _leave(self) -> None:
        """The layer in its staging slot is done: what the host lacks of it goes there."""
        if self._open is None or self._ring is None:
            return
        layer, lacking = self._open.layer, self._open.lacking
        rows, block = self._layers[layer], self._config.block
        complete = len(rows) // block if rows.spilled else 0

        def pairs(slot: Array) -> Pairs:
            return list(rows.host.runs(slot[:, :, lacking * block :], lacking, complete))

        self._ring.leave(layer, pairs)
        rows.on_host = complete
        self._open = None

    def _end_pass(self) -> None:
        """Wait for the copies of a pass and drop its staging slots, also where the pass was broken off."""
        if self._ring is None:
            return
        try:
            self._ring.close()
        except Exception:
            self._ring = None
            raise
        self._ring = None  # not where an interrupt came: copies are still under way

    # -- forgetting ---------------------------------------------------------------------------------------------------

    def truncate(self, length: int) -> None:
        """Forget every row whose position is ``length`` or more; a failed copy surfaces in the next ``update``."""
        self._settle()
        if length:
            self._take_back()
        else:
            self._no_loan()
        for rows in self._layers:
            if length:
                rows.truncate(length)
            else:
                rows.reset()
        if not length:
            self._failure = None

    def _settle(self) -> None:
        """Wait for all that is under way; what was being computed is as complete as it will get."""
        try:
            if self._open is not None and self._ring is not None:
                slot = self._ring.taken(self._open.layer)
                if slot is None:  # left before
                    self._open = None
                else:
                    self._settle_open(slot, None)
                    self._leave()
        except Exception as error:
            self._failure = self._failure or error
        for task in (self._end_pass, *(rows.settle for rows in self._layers)):
            try:
                task()
            except Exception as error:
                self._failure = self._failure or error
        self._open = None

    def clear(self, first_layer: int) -> None:
        """Forget every row of the layers from ``first_layer`` on, also what is on its way for them."""
        with _NotingFailure(self):
            self._take_back()
            if self._ring is not None:
                self._ring.discard(first_layer)
            for rows in self._layers[first_layer:]:
                rows.settle()
                rows.reset()

    # -- looking ------------------------------------------------------------------------------------------------------

    def length(self, layer: int) -> int:
        """How many rows a layer holds, resident or not."""
        return len(self._layers[layer])

    def positions(self, layer: int) -> np.ndarray:
        """The positions [N] of a layer's rows, in order."""
        return self._layers[layer].positions.array

    def rows(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All rows of a layer, gathered in host memory. Not while a pass runs."""
        with _NotingFailure(self):
            self._take_back()
            self._layers[layer].settle()
            self._ops.finish()
            return self._layers[layer].rows()

    def layer_nbytes(self, layer: int) -> tuple[int, int]:
        """Bytes of one layer where the model computes (the ring, which all share, aside) and in host memory."""
        self._take_back()
        return self._layers[layer].nbytes_device, self._layers[layer].nbytes_host

    @property
    def nbytes_device(self) -> int:
        """Bytes of resident rows, of unit means, and of the staging slots while a prompt is read."""
        self._take_back()
        ring = self._ring.nbytes if self._ring is not None else 0
        return sum(rows.nbytes_device for rows in self._layers) + ring

    @property
    def nbytes_host(self) -> int:
        """Bytes of the blocks in host memory; those that are resident as well are there too."""
        return sum(rows.nbytes_host for rows in self._layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedKVCache:
        """A cache of the same rows on the same backend."""
        other = OffloadedKVCache(self._model, self._ops, self._config)
        for layer in range(len(self._layers)):
            keys, values, positions = self.rows(layer)
            if len(positions):
                shape = len(positions), *keys.shape[::2]
                k, v = (self._ops.empty(shape, self._ops.kv_type) for _ in range(2))
                pairs = [(k, keys.transpose(1, 0, 2)), (v, values.transpose(1, 0, 2))]
                self._ops.wait(self._ops.copy(pairs, after=self._ops.mark()))
                other.update(layer, k, v, positions, None, exact=True)
            other.attended(layer)
        return other

    def close(self) -> None:
        """Wait for all copies and let go of the memory."""
        self._settle()
        self._no_loan()
        for rows in self._layers:
            rows.close()
