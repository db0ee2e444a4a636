"""Decode as one captured graph: a token passes the whole model, from its embedding to its logits, by a single launch.

What changes from token to token is a few words: the token, each layer's length, the angles. The host writes them to
page-locked memory, the graph's first kernel brings them to the device, and its last leaves the logits in page-locked
memory. Everything else is fixed when the graph is captured: kernels, addresses, grids. A cache that grows moves, so
room is made ahead, and the graph is captured again when that is used up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from slimrt.ops.protocol import Array, Cache, Part

__all__ = ["CapturedDecode", "places"]

_ROOM = 256  # tokens for which a captured graph serves before the cache has to grow


class CapturedDecode:
    """See ``slimrt.ops.protocol.Decoder``. It holds the graph of one cache, and nothing of the cache itself: what that
    gives back is free at once. Callers in other threads wait in ``ops.computing``, for there is one set of buffers."""

    _words = 3  # of each layer, that the host writes for a token: rows before it, rows with it, the first that it sees

    def __init__(self, model: Any, ops: Any, *, fused: bool) -> None:
        """``model``: a Llama on ``ops``, a CupyOps. ``fused``: its layers are LLaMA's, for which there are kernels that
        norm, multiply and turn in one; others pass a layer as a prompt's rows do, one launch after the other."""
        self._model, self._ops, self._fused = model, ops, fused
        c = model.config
        self._halves = [len(table.frequencies) for table in model.rope_tables]
        # The token, the words of each layer; cos, sin, as aligned as kernels want vectors.
        self._angles_at = -(-(1 + self._words * c.n_layers) // 4) * 4
        size = self._angles_at + 2 * sum(self._halves)
        self._device = ops.empty((size,), np.int32)
        self._host = ops.pinned((size,), np.int32)
        self._host[:] = 0
        self._logits = ops.pinned((c.vocab_size,), np.float32)
        self._places: list[tuple[int, tuple[int, ...]]] = []  # of what the graph reads and writes beside its own memory
        self._graph: Any = None

    most = 1  # what the graph does is for one token

    def step(self, parts: Sequence[Part]) -> tuple[np.ndarray, list[Array | None]]:
        """Read one token; the logits [1, V] on the host, the hidden states [1, D] of layer ``middle`` on the device."""
        (part,), ops = parts, self._ops
        (token,), cache, position, middle = part.tokens, part.cache, part.position, part.middle
        with ops.computing():
            self._write(cache, token, position)
            states = self._captured(cache).launch()
            for layer in range(self._model.config.n_layers):
                cache.appended(layer, np.array([position]))
            hidden = None if middle is None else ops.copied(states[middle])
            ops.mark().synchronize()
            return self._logits[None].copy(), [hidden]

    def _captured(self, cache: Cache) -> Any:
        """The graph for ``cache`` as it lies."""
        layers = range(self._model.config.n_layers)
        if places(cache.room(layer, 1) for layer in layers) != self._places:
            pool = None if self._graph is None else self._graph.pool
            self._graph, self._places = None, []  # its memory serves the next one
            stores = [cache.room(layer, _ROOM) for layer in layers]
            self._graph = self._ops.capture(lambda: self._pass(stores), pool)
            self._places = places(stores)
        return self._graph

    def _write(self, cache: Cache, token: int, position: int) -> None:
        """For the graph to find. The one before has ended: its logits were waited for."""
        c = self._model.config
        held = np.array([cache.length(layer) for layer in range(c.n_layers)])
        first = [_first_seen(cache, layer, position, c.window(layer)) for layer in range(c.n_layers)]
        self._write_words(token, position, np.stack([held, held + 1, first], axis=1))

    def _write_words(self, token: int, position: int, words: np.ndarray) -> None:
        """``words`` [layers, _words]."""
        waves = [wave[0] for table in self._model.rope_tables for wave in table(np.array([position]))]
        self._host[0] = token
        self._host[1 : 1 + words.size] = words.reshape(-1)
        self._host[self._angles_at :].view(np.float32)[:] = np.concatenate(waves)

    def _word(self, layer: int, number: int, count: int = 1) -> Array:
        """Words of a layer from ``number`` on, int32 [count], on the device."""
        at = 1 + self._words * layer + number
        return self._device[at : at + count]

    def _turns(self) -> list[tuple[Array, Array]]:
        """cos and sin [1, half] of each of the model's tables, and last those of no rotation."""
        turns: list[tuple[Array, Array]] = []
        at, angles = 0, self._device[self._angles_at :].view(np.float32)
        for half in self._halves:
            cos, sin = angles[at : at + 2 * half].reshape(2, 1, half)
            turns, at = [*turns, (cos, sin)], at + 2 * half
        none = turns[0][0][:, :0]
        return [*turns, (none, none)]

    def _pass(self, stores: list[Array]) -> list[Array]:
        """One token through the model -> the states [1, D] after each layer's attention."""
        model, ops, c = self._model, self._ops, self._model.config
        turns, states, eps = self._turns(), [], c.norm_eps
        x = ops.begin(model.embedding, self._host, self._device)
        if c.embedding_scale != 1:
            x = x * np.float32(c.embedding_scale)
        for number, (layer, store) in enumerate(zip(model.layers, stores, strict=True)):
            angles = turns[layer.turns]
            if self._fused:
                start = self._word(number, 0)
                q = ops.normed_heads(
                    x, layer.attn_norm, eps, layer.qkv, layer.qkv_bias, *angles, start, store, c.n_heads
                )
            else:
                q, k, v = self._qkv(layer, x, angles)
                ops.append(store, k, v, self._word(number, 0))
            mixed = self._mixed(number, q, store)
            if self._fused:
                x = ops.add_linear(x, mixed.reshape(1, -1), layer.out, layer.out_bias)
                states.append(x)
                hidden = ops.normed_gated(x, layer.ffn_norm, eps, layer.gate_up, layer.gate_up_bias)
                x = ops.add_linear(x, hidden, layer.down, layer.down_bias)
            else:
                x = ops.project(x, mixed, layer.out, layer.out_bias, layer.attn_merge)
                states.append(ops.copied(x))  # x is overwritten
                x = self._fed(layer, x)
        ops.normed_head(x, model.norm, eps, model.head, self._logits)
        return states

    def _qkv(self, layer: Any, x: Array, angles: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        c = self._model.config
        heads = c.n_heads, c.n_kv_heads, c.head_dim
        return self._ops.qkv(
            x, layer.attn_norm, c.norm_eps, layer.qkv, layer.qkv_bias, *angles, heads, layer.head_norms
        )

    def _fed(self, layer: Any, x: Array) -> Array:
        c = self._model.config
        return self._ops.feed_forward(
            x, layer.ffn_norm, c.norm_eps, layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias,
            c.activation, layer.ffn_merge,
        )  # fmt: skip

    def _mixed(self, number: int, q: Array, store: Array) -> Array:
        """The attention [1, H, Dh] of the query ``q`` over the rows of layer ``number`` in ``store``."""
        c, ops = self._model.config, self._ops
        how = {"start": self._word(number, 2) if c.window(number) else None, "cap": c.attention_cap}
        splits = ops.splits(c.n_kv_heads, store.shape[2])
        return ops.attend_one(q, store[0], store[1], self._word(number, 1), ops.empty(q.shape), splits, **how)


def places(arrays: Iterable[Array]) -> list[tuple[int, tuple[int, ...]]]:
    """Where ``arrays`` of one type lie on the device, and their shapes: a graph serves whatever lies so."""
    return [(int(array.data.ptr), tuple(array.shape)) for array in arrays]


def _first_seen(cache: Cache, layer: int, position: int, window: int) -> int:
    """The first row of a layer that a token at ``position`` sees, which are the last ``window`` positions (0: all)."""
    return int(np.searchsorted(cache.positions(layer), position - window + 1)) if window else 0
