"""Keys and values of one conversation, per layer, with the position of every row, all kept where they are computed."""

from __future__ import annotations

import numpy as np

from slimrt.config import ModelConfig
from slimrt.ops.protocol import Array, Fetched, Ops

__all__ = ["KVCache", "Positions"]

_GROWTH = 256  # rows of slack when a layer grows: decode appends one row at a time


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
            grown = np.empty(length + max(_GROWTH, held // 2), np.int64)
            grown[:held] = self.array
            self._buffer = grown
        self._buffer[held:length] = positions
        self.array = self._buffer[:length]

    def truncate(self, rows: int) -> None:
        """Keep the first ``rows``."""
        self.array = self._buffer[:rows]

    def before(self, length: int) -> int:
        """How many rows lie before position ``length``."""
        return int(np.searchsorted(self.array, length))


class KVCache:
    """All rows stay where they are computed, none is left out (see ``slimrt.ops.protocol.Cache`` for the methods).

    Plain arrays only, so it can be copied and pickled.
    """

    intact = True
    fetched = Fetched()

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
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

    def positions(self, layer: int) -> np.ndarray:
        """The positions [N] of a layer's rows."""
        return self._positions[layer].array

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
