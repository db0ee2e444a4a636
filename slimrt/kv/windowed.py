"""A cache under a budget for a model some of whose layers have windows: these keep all rows where the model computes,
for they read the last ones only, and nothing is to be chosen; the others have the budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slimrt.config import CacheConfig, ModelConfig
from slimrt.kv.cache import KVCache
from slimrt.kv.offload import OffloadedKVCache
from slimrt.kv.ring import Transfers
from slimrt.ops.protocol import Array, Fetched, Ops

__all__ = ["WindowedKVCache"]


class WindowedKVCache:
    """See ``slimrt.ops.protocol.Cache`` for what the methods do."""

    def __init__(self, model: ModelConfig, ops: Ops, config: CacheConfig) -> None:
        whole = model.sees_all()
        self._budgeted = OffloadedKVCache(replace(model, n_layers=len(whole)), ops, config)
        self._resident = KVCache(replace(model, n_layers=model.n_layers - len(whole)), ops)
        self._places: list[tuple[KVCache | OffloadedKVCache, int]] = []
        counts = {True: 0, False: 0}
        for layer in range(model.n_layers):
            windowed = bool(model.window(layer))
            self._places.append((self._resident if windowed else self._budgeted, counts[windowed]))
            counts[windowed] += 1

    @property
    def intact(self) -> bool:
        return self._budgeted.intact

    @property
    def transfers(self) -> Transfers:
        """What moved."""
        return self._budgeted.transfers

    @property
    def fetched(self) -> Fetched:
        return self._budgeted.fetched

    def update(
        self, layer: int, k: Array, v: Array, positions: np.ndarray, q: Array | None, *, exact: bool = False
    ) -> tuple[Array, Array, np.ndarray]:
        cache, number = self._places[layer]
        return cache.update(number, k, v, positions, q, exact=exact)

    def room(self, layer: int, rows: int) -> Array | None:
        cache, number = self._places[layer]
        return cache.room(number, rows)

    def appended(self, layer: int, positions: np.ndarray) -> None:
        cache, number = self._places[layer]
        cache.appended(number, positions)

    def attended(self, layer: int) -> None:
        cache, number = self._places[layer]
        cache.attended(number)

    def truncate(self, length: int) -> None:
        self._budgeted.truncate(length)
        self._resident.truncate(length)

    def clear(self, first_layer: int) -> None:
        for cache in (self._budgeted, self._resident):
            cache.clear(sum(owner is cache for owner, _ in self._places[:first_layer]))

    def length(self, layer: int) -> int:
        cache, number = self._places[layer]
        return cache.length(number)

    def positions(self, layer: int) -> np.ndarray:
        cache, number = self._places[layer]
        return cache.positions(number)

    def rows(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        cache, number = self._places[layer]
        return cache.rows(number)

    def layer_nbytes(self, layer: int) -> tuple[int, int]:
        cache, number = self._places[layer]
        return cache.layer_nbytes(number)

    @property
    def nbytes_device(self) -> int:
        return self._budgeted.nbytes_device + self._resident.nbytes_device

    @property
    def nbytes_host(self) -> int:
        return self._budgeted.nbytes_host

    def close(self) -> None:
        self._budgeted.close()
        self._resident.close()
