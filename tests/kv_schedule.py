"""Drives a KV cache as the engine does, with random keys and values, and holds it against a plain dictionary."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from slimrt.config import CacheConfig, ModelConfig, RopeConfig
from slimrt.kv.offload import OffloadedKVCache

LAYERS, HEADS, KV_HEADS, WIDTH = 6, 4, 2, 4


def sizes(n_layers: int = LAYERS, n_kv_heads: int = KV_HEADS, head_dim: int = WIDTH) -> ModelConfig:
    """A model of which only the sizes of its cache matter."""
    return ModelConfig(
        "llama", "sizes", n_layers, HEADS * head_dim, HEADS, n_kv_heads, head_dim, 1, 1, 1 << 20, 1e-5, RopeConfig()
    )


class Schedule:
    """A cache, and what it ought to hold: for each layer {position: (k, v)} in the order of positions."""

    def __init__(self, ops: Any, config: CacheConfig, seed: int = 0) -> None:
        self.ops, self.config = ops, config
        self.cache = OffloadedKVCache(sizes(), ops, config)
        self.rng = np.random.default_rng(seed)
        self.truth: list[dict[int, tuple[np.ndarray, np.ndarray]]] = [{} for _ in range(LAYERS)]
        self.length = 0

    def read(self, count: int, *, cuts: Sequence[tuple[int, float]] = (), layers: int = LAYERS) -> None:
        """A pass over ``count`` tokens. ``cuts``: behind these layers a share of the rows goes on, as in a pruned
        prefill; the first also brings back the rows of the tokens before. ``layers`` 0..: where the pass breaks off."""
        positions = np.arange(self.length, self.length + count)
        kept = dict(cuts)
        for layer in range(layers):
            self._layer(layer, positions, exact=bool(cuts))
            if layer in kept:
                if layer == cuts[0][0]:
                    positions = np.arange(self.length + count)
                    self.cache.clear(layer + 1)
                    for rows in self.truth[layer + 1 :]:
                        rows.clear()
                stays = self.rng.random(len(positions)) < kept[layer]
                stays[-1] = True  # the last token always goes on
                positions = positions[stays]
            self.cache.attended(layer)
        if layers < LAYERS:
            self.truncate(0 if cuts else self.length)
        else:
            self.length += count

    def break_off(self, count: int, layer: int) -> None:
        """A pass that ends between ``update`` and ``attended`` of ``layer``."""
        positions = np.arange(self.length, self.length + count)
        for number in range(layer + 1):
            self._layer(number, positions, exact=False)
            if number < layer:
                self.cache.attended(number)
        self.truncate(self.length)

    def _layer(self, layer: int, positions: np.ndarray, *, exact: bool) -> None:
        count = len(positions)
        k, v = self.rng.standard_normal((2, count, KV_HEADS, WIDTH), dtype=np.float32)
        q = self.rng.standard_normal((count, HEADS, WIDTH), dtype=np.float32)
        keys, values, found = self.cache.update(layer, k, v, positions, q, exact=exact)
        rows = self.truth[layer]
        rows.update({int(p): (k[i].copy(), v[i].copy()) for i, p in enumerate(positions)})
        k[:], v[:] = np.nan, np.nan  # the cache keeps no reference to what it was given
        order = np.fromiter(rows, np.int64)
        if exact or count > 1:
            assert np.array_equal(found, order)
        else:
            self._check_choice(found, order)
        assert keys.shape == values.shape == (KV_HEADS, len(found), WIDTH)
        assert np.array_equal(keys, np.stack([rows[p][0] for p in found.tolist()], axis=1))
        assert np.array_equal(values, np.stack([rows[p][1] for p in found.tolist()], axis=1))
        self.ops.attend(q, keys, values)

    def _check_choice(self, found: np.ndarray, order: np.ndarray) -> None:
        config = self.config
        capacity = config.slots * config.block
        assert len(np.unique(found)) == len(found)
        if len(order) <= capacity:
            assert set(found.tolist()) == set(order.tolist())
            return
        assert len(found) <= capacity
        tail = (len(order) - 1) // config.block
        assert len(found) == (config.slots - 1) * config.block + len(order) - tail * config.block
        always = [*order[: config.sink_blocks * config.block], *order[(tail - config.local_blocks) * config.block :]]
        assert set(always) <= set(found.tolist()) <= set(order.tolist())

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)
        self.length = min(self.length, length)
        for rows in self.truth:
            for position in [p for p in rows if p >= length]:
                del rows[position]

    def replace_by_copy(self) -> None:
        """Go on with a copy; the original is spoilt, so that anything shared shows."""
        original, self.cache = self.cache, copy.deepcopy(self.cache)
        for layer in range(LAYERS):
            original.clear(layer)
            k = np.full((3, KV_HEADS, WIDTH), np.nan, np.float32)
            original.update(layer, k, k, np.arange(3), None)
            original.attended(layer)
        original.close()

    def check_all(self) -> None:
        """Every row of every layer, wherever it lies."""
        for layer, rows in enumerate(self.truth):
            keys, values, positions = self.cache.rows(layer)
            assert self.cache.length(layer) == len(rows)
            assert positions.tolist() == list(rows)
            for i, p in enumerate(rows):
                assert np.array_equal(keys[:, i], rows[p][0])
                assert np.array_equal(values[:, i], rows[p][1])
