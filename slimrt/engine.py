"""Prefill and decode: the layer loop, so that the whole method is visible in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slimrt.errors import ComputeError
from slimrt.kv_cache import KVCache
from slimrt.models import Llama

Progress = Callable[[int, int], None]  # (layers done, layers in all)

_UNPACK_ROWS = 16  # from so many rows on it pays to unpack a packed layer once, into scratch


class Engine:
    """One model on one backend. It holds no conversation: the cache and the positions are arguments."""

    def __init__(self, model: Llama, ops: Any) -> None:
        self.model, self.ops, self.config = model, ops, model.config

    def new_cache(self) -> KVCache:
        return KVCache(self.config)

    def prefill(
        self,
        cache: KVCache,
        ids: Sequence[int] | np.ndarray,
        start: int = 0,
        *,
        wanted: int = 1,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Run tokens ``ids`` [T], the first at position ``start``, through all layers, one layer at a time.

        Keys and values are appended to ``cache``, which holds what came before. Returns the hidden states [wanted, D]
        of the last ``wanted`` tokens, for ``logits``: the last layer computes those rows only.
        """
        model, ops = self.model, self.ops
        positions = np.arange(start, start + len(ids))
        cos, sin = model.rope(positions)
        x = model.embed(np.asarray(ids))
        for number, packed in enumerate(model.layers):
            layer = model.unpacked(packed) if len(ids) >= _UNPACK_ROWS else packed
            q, k, v = self._qkv(layer, x, cos, sin)
            keys, values, _ = cache.update(number, k, v, positions)
            if number == len(model.layers) - 1:
                x, q = x[len(x) - wanted :], q[len(q) - wanted :]
            x = self._finish(layer, x, ops.attend(q, keys, values))
            if progress:
                progress(number + 1, len(model.layers))
        return x

    def decode_step(self, cache: KVCache, token: int, position: int) -> np.ndarray:
        """Run one token through all layers; returns its next-token logits [V] (a host array)."""
        return self.logits(self.prefill(cache, [token], position))[0]

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Hidden states [T, D] -> logits [T, V] float32 on the host; raises ComputeError if they are not finite."""
        logits = np.empty((len(x), self.config.vocab_size), np.float32)

        def head(rows: slice) -> None:
            logits[rows] = self.ops.to_host(self.model.logits(x[rows]))

        self.ops.rows(head, len(x))
        if not np.isfinite(logits).all():
            raise ComputeError(
                "the model's logits are not finite; its weights hold NaN or infinity, or overflow; fetch or convert it anew"
            )
        return logits

    def _qkv(self, layer: Any, x: Any, cos: Any, sin: Any) -> tuple[Any, Any, Any]:
        c, empty = self.config, self.ops.empty
        if len(x) == 1:
            return self.model.qkv(layer, x, cos, sin)
        q = empty((len(x), c.n_heads, c.head_dim))
        k = empty((len(x), c.n_kv_heads, c.head_dim))
        v = empty((len(x), c.n_kv_heads, c.head_dim))

        def project(rows: slice) -> None:
            q[rows], k[rows], v[rows] = self.model.qkv(layer, x[rows], cos[rows], sin[rows])

        self.ops.rows(project, len(x))
        return q, k, v

    def _finish(self, layer: Any, x: Any, attention: Any) -> Any:
        if len(x) == 1:
            return self.model.finish(layer, x, attention)

        def finish(rows: slice) -> None:
            attended[rows] = self.model.finish(layer, x[rows], attention[rows])

        attended = self.ops.empty(x.shape)
        self.ops.rows(finish, len(x))
        return attended
