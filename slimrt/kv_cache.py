"""Keys and values of one conversation, per layer, with the position of every row."""

from __future__ import annotations

import numpy as np

from slimrt.config import ModelConfig

_GROWTH = 256  # rows of slack when a layer grows: decode appends one row at a time


class KVCache:
    """Per layer: keys and values [Hkv, N, Dh] float32 and positions [N], rows in the order of their positions.

    Layers may hold different rows (pruning), so each has its own length and positions are data, never offsets.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._shape = (config.n_kv_heads, config.head_dim)
        self._keys = [np.empty((config.n_kv_heads, 0, config.head_dim), np.float32) for _ in range(config.n_layers)]
        self._values = [np.empty_like(keys) for keys in self._keys]
        self._positions = [np.empty(0, np.int64) for _ in range(config.n_layers)]

    def update(
        self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Append rows k, v [T, Hkv, Dh] at ``positions`` [T]; returns the layer's K, V [Hkv, N, Dh], positions [N].

        The returned arrays are views, valid until the next update or truncation.
        """
        held = len(self._positions[layer])
        length = held + len(positions)
        if length > self._keys[layer].shape[1]:
            self._grow(layer, held, length + _GROWTH)
        self._keys[layer][:, held:length] = k.transpose(1, 0, 2)
        self._values[layer][:, held:length] = v.transpose(1, 0, 2)
        self._positions[layer] = np.concatenate([self._positions[layer], positions])
        return self._keys[layer][:, :length], self._values[layer][:, :length], self._positions[layer]

    def _grow(self, layer: int, held: int, capacity: int) -> None:
        for store in (self._keys, self._values):
            grown = np.empty((self._shape[0], capacity, self._shape[1]), np.float32)
            grown[:, :held] = store[layer][:, :held]
            store[layer] = grown

    def truncate(self, length: int) -> None:
        """Forget every row whose position is ``length`` or more."""
        for layer, positions in enumerate(self._positions):
            self._positions[layer] = positions[: np.searchsorted(positions, length)]

    def clear(self, first_layer: int) -> None:
        """Forget every row of the layers from ``first_layer`` on."""
        for layer in range(first_layer, len(self._positions)):
            self._positions[layer] = self._positions[layer][:0]

    def rows(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All K, V [Hkv, N, Dh] and positions [N] of a layer, in order: views."""
        held = len(self._positions[layer])
        return self._keys[layer][:, :held], self._values[layer][:, :held], self._positions[layer]

    def length(self, layer: int) -> int:
        """How many rows a layer holds."""
        return len(self._positions[layer])

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held (slack not counted)."""
        row = 2 * 4 * self._shape[0] * self._shape[1]
        return sum(len(positions) * row for positions in self._positions)
