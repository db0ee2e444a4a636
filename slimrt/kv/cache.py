"""Keys and values of one conversation, per layer, with the position of every row: what every cache does, and the
cache that keeps all of it where it is computed."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from slimrt.config import ModelConfig

__all__ = ["Cache", "KVCache", "Positions"]

Array = Any  # the backend's array

_GROWTH = 256  # rows of slack when a layer grows: decode appends one row at a time


class Cache(Protocol):
    """Per layer: keys and values [Hkv, N, Dh] (the backend's ``kv_type``) and positions [N], rows in the order of their
    positions.

    Layers may hold different rows (pruning), so each has its own length and positions are data, never offsets. A pass
    goes through the layers in order and calls ``update`` and then ``attended`` once for each; a pass that was broken
    off is followed by ``truncate`` to where it began.
    """

    @property
    def intact(self) -> bool:
        """False when rows were lost (a copy failed); only ``truncate(0)`` helps then."""

    def update(
        self, layer: int, k: Array, v: Array, positions: np.ndarray, q: Array | None, *, exact: bool = False
    ) -> tuple[Array, Array, np.ndarray]:
        """Append rows k, v [T, Hkv, Dh] at ``positions`` [T]; returns K, V [Hkv, N, Dh] and positions [N] to attend to.

        With T > 1 or ``exact`` these are all rows of the layer, in order. Else a cache may leave out rows that the
        query q [T, H, Dh] hardly wants, and order the rest as it likes (one query sees all of it). The arrays are
        valid until ``attended``. q is None where rows come from elsewhere than a pass.
        """

    def attended(self, layer: int) -> None:
        """The attention of ``layer`` has run: what ``update`` returned may be moved or overwritten."""

    def truncate(self, length: int) -> None:
        """Forget every row whose position is ``length`` or more, and a pass that was under way."""

    def clear(self, first_layer: int) -> None:
        """Forget every row of the layers from ``first_layer`` on; the pass goes on with new rows for them."""

    def length(self, layer: int) -> int:
        """How many rows a layer holds."""

    def rows(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All K, V [Hkv, N, Dh] and positions [N] of a layer, in order; valid until the next call.

        They may lie on the device or on the host: the backend's ``to_host`` takes both.
        """

    def layer_nbytes(self, layer: int) -> tuple[int, int]:
        """Of ``nbytes_device`` and ``nbytes_host`` the share of one layer."""

    @property
    def nbytes_device(self) -> int:
        """Bytes of the rows, and what else serves them, that lie where the model computes (slack not counted)."""

    @property
    def nbytes_host(self) -> int:
        """Bytes of the rows that lie in host memory (slack not counted)."""

    def close(self) -> None:
        """Wait for what is under way and let go of the memory; the cache cannot be used any more."""


class Positions:
    """The positions [N] of a layer's rows, ascending; appending does not copy them all."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.int64)
        self.array = self._buffer

    def __len__(self) -> int:
        return len(self.array)

    def append(self, positions: np.ndarray) -> None:
        held = len(self.array)
        length = held + len(positions)
        if length > len(self._buffer):
            self._buffer = np.empty(length + max(_GROWTH, held // 2), np.int64)
            self._buffer[:held] = self.array
        self._buffer[held:length] = positions
        self.array = self._buffer[:length]

    def truncate(self, rows: int) -> None:
        """Keep the first ``rows``."""
        self.array = self._buffer[:rows]

    def before(self, length: int) -> int:
        """How many rows lie before position ``length``."""
        return int(np.searchsorted(self.array, length))


class KVCache:
    """All rows stay where they are computed, none is left out. Plain arrays only, so it can be copied and pickled."""

    intact = True

    def __init__(self, config: ModelConfig, ops: Any) -> None:
        self._shape = (config.n_kv_heads, config.head_dim)
        # By layer keys, then values: [2, Hkv, capacity, Dh].
        none = (2, config.n_kv_heads, 0, config.head_dim)
        self._layers = [ops.empty(none, ops.kv_type) for _ in range(config.n_layers)]
        self._positions = [Positions() for _ in range(config.n_layers)]

    def update(
        self, layer: int, k: Array, v: Array, positions: np.ndarray, q: Array | None, *, exact: bool = False
    ) -> tuple[Array, Array, np.ndarray]:
        """Append; returns views of all rows."""
        held = len(self._positions[layer])
        store = self.room(layer, len(positions))
        store[0, :, held : held + len(positions)] = k.transpose(1, 0, 2)
        store[1, :, held : held + len(positions)] = v.transpose(1, 0, 2)
        self._positions[layer].append(positions)
        return self._views(layer)

    def room(self, layer: int, rows: int) -> Array:
        """The layer's memory [2, Hkv, capacity, Dh], with room for ``rows`` more; it moves when it has to grow."""
        held = len(self._positions[layer])
        if held + rows > self._layers[layer].shape[2]:
            shape = (2, self._shape[0], held + rows + _GROWTH, self._shape[1])
            grown = np.empty_like(self._layers[layer], shape=shape)
            grown[:, :, :held] = self._layers[layer][:, :, :held]
            self._layers[layer] = grown
        return self._layers[layer]

    def appended(self, layer: int, positions: np.ndarray) -> None:
        """Rows at ``positions`` have been written behind the layer's last, within its ``room``."""
        self._positions[layer].append(positions)

    def _views(self, layer: int) -> tuple[Array, Array, np.ndarray]:
        length = len(self._positions[layer])
        keys, values = self._layers[layer][:, :, :length]
        return keys, values, self._positions[layer].array

    def attended(self, layer: int) -> None:
        """Nothing to do: no row moves."""

    def truncate(self, length: int) -> None:
        """Forget every row whose position is ``length`` or more."""
        for positions in self._positions:
            positions.truncate(positions.before(length))

    def clear(self, first_layer: int) -> None:
        """Forget every row of the layers from ``first_layer`` on."""
        for positions in self._positions[first_layer:]:
            positions.truncate(0)

    def length(self, layer: int) -> int:
        """How many rows a layer holds."""
        return len(self._positions[layer])

    def rows(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views of all rows."""
        return self._views(layer)

    def layer_nbytes(self, layer: int) -> tuple[int, int]:
        """Bytes of the rows that a layer holds, and 0 in host memory."""
        return len(self._positions[layer]) * 2 * self._layers[layer].itemsize * self._shape[0] * self._shape[1], 0

    @property
    def nbytes_device(self) -> int:
        """Bytes of the rows held."""
        return sum(self.layer_nbytes(layer)[0] for layer in range(len(self._positions)))

    @property
    def nbytes_host(self) -> int:
        """None: everything is resident."""
        return 0

    def close(self) -> None:
        """Let go of the memory."""
        self._layers.clear()
