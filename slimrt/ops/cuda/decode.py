"""Decode as one captured graph: a token passes all layers by a single launch.

What changes from token to token lies in device memory, in one small buffer that is filled before each launch: the
token, each layer's length, the angles. Everything else is fixed when the graph is captured: kernels, addresses, grids.
A cache that grows moves, so room is made ahead, and the graph is captured anew when that is used up.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from slimrt.kv.cache import KVCache

if TYPE_CHECKING:
    from slimrt.kv.cache import Cache
    from slimrt.models import Llama

__all__ = ["CapturedDecode"]

Array = Any  # the backend's array

_ROOM = 256  # tokens for which a captured graph serves before the cache has to grow


class CapturedDecode:
    """See ``slimrt.ops.protocol.Decoder``. It holds the graph of one cache. Callers in other threads wait."""

    def __init__(self, model: Llama, ops: Any) -> None:
        self._model, self._ops = model, ops
        c = model.config
        self._half = c.rope.dims // 2
        # Token, rows of each layer before it, rows with it; cos, sin, as aligned as kernels want vectors.
        self._angles_at = -(-(1 + 2 * c.n_layers) // 4) * 4
        size = self._angles_at + 2 * self._half
        self._device = ops.empty((size,), np.int32)
        self._host = ops.pinned((size,), np.int32)
        self._host[:] = 0
        self._sent: Any = None  # the fence after which ``_host`` may be written again
        self._stores: list[Array] = []
        self._graph: Any = None
        self._lock = threading.Lock()

    def step(
        self, cache: Cache, token: int, position: int, *, middle: int | None = None
    ) -> tuple[np.ndarray, Array | None]:
        """Read ``token``; the logits [V] on the host, the hidden states [1, D] of layer ``middle`` on the device."""
        ops = self._ops
        assert isinstance(cache, KVCache)
        with self._lock, ops.computing():  # its buffers and states are those of one token
            states = self._read(cache, token, position)
            logits = ops.to_host(self._model.logits(states[-1]))[0]
            return logits, None if middle is None else ops.copied(states[middle])

    def _read(self, cache: KVCache, token: int, position: int) -> list[Array]:
        """The states [1, D] after each layer's attention, and the last of all, valid until the next step."""
        layers = range(self._model.config.n_layers)
        stores = [cache.room(layer, 1) for layer in layers]
        fresh = len(stores) != len(self._stores) or any(a is not b for a, b in zip(stores, self._stores, strict=True))
        self._send(cache, token, position)
        if fresh:
            self._graph, self._stores = None, []  # its memory goes before the next one's is taken
            stores = [cache.room(layer, _ROOM) for layer in layers]
            self._graph = self._ops.capture(lambda: self._pass(stores))
            self._stores = stores
        states: list[Array] = self._graph.launch()
        for layer in layers:
            cache.appended(layer, np.array([position]))
        return states

    def _send(self, cache: KVCache, token: int, position: int) -> None:
        if self._sent is not None:
            self._sent.synchronize()
        held = np.array([cache.length(layer) for layer in range(self._model.config.n_layers)])
        cos, sin = self._model.rope_table(np.array([position]))
        integers = self._host[: 1 + 2 * len(held)]
        integers[0], integers[1 : 1 + len(held)], integers[1 + len(held) :] = token, held, held + 1
        self._host[self._angles_at :].view(np.float32)[:] = np.concatenate([cos[0], sin[0]])
        self._sent = self._ops.copy([(self._device, self._host)], after=self._ops.mark())
        self._ops.wait(self._sent)

    def _pass(self, stores: list[Array]) -> list[Array]:
        """The layer loop of one token -> the states [1, D] after each layer's attention, and the last of all."""
        model, ops, c = self._model, self._ops, self._model.config
        angles = self._device[self._angles_at :].view(np.float32).reshape(2, 1, self._half)
        x, states = model.embed(self._device[:1]), []
        for number, (layer, store) in enumerate(zip(model.layers, stores, strict=True)):
            q, k, v = model.qkv(layer, x, angles[0], angles[1])
            start, length = (self._device[at : at + 1] for at in (1 + number, 1 + c.n_layers + number))
            ops.append(store, k, v, start)
            splits = ops.splits(c.n_kv_heads, store.shape[2])
            x = model.project(layer, x, ops.attend_one(q, store[0], store[1], length, ops.empty(q.shape), splits))
            states.append(x)
            x = model.feed_forward(layer, x)
        return [*states, x]
