"""A layer's rows under a budget while a backend's decoder has them on loan (``slimrt.ops.protocol.Lender``): it chooses
their blocks, and brings them, where it computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimrt.config import CacheConfig
from slimrt.kv.cache import Positions
from slimrt.kv.choice import Choice
from slimrt.kv.host_blocks import HostBlocks
from slimrt.kv.ring import Transfers
from slimrt.ops.protocol import Array, Fetched, LentLayer, TakenBack

__all__ = ["LendableRows"]


class LendableRows:
    """What ``LayerRows`` does for that."""

    _config: CacheConfig
    _transfers: Transfers
    _states: dict[int, Any]
    _views: list[Array]
    _slot_positions: np.ndarray
    _wishes: np.ndarray
    _wished_at: int
    _slots_memory: Any
    _spill: Any
    positions: Positions
    choice: Choice | None
    slots: np.ndarray
    spilled: bool
    host: HostBlocks
    means: Array

    def lent(self) -> LentLayer | None:
        """The resident rows, while all slots are in use and the last one has the newest row or is to get the next."""
        if not self.spilled or self.choice is None or len(self.slots) != self._config.slots:
            return None
        if len(self.positions) // self._config.block < self._config.slots or self.slots.min() < 0:
            return None
        return LentLayer(
            self._slots_memory(), self.slots, self._wishes, self._wished_at, self.host.views, lambda: self.means
        )

    def appended(self, positions: np.ndarray) -> None:
        """A row [1] was written behind the last; what the slots hold is known when the rows are taken back."""
        self._states.clear()
        self.positions.append(positions)
        block = self._config.block
        if len(self.positions) % block == 0:
            self._spill(self._views[-1], len(self.positions) // block - 1, len(self.positions) // block)

    def take_back(self, now: TakenBack) -> None:
        """The slots have been changed to this."""
        block, tail = self._config.block, int(now.slots[-1])
        kept = np.zeros(tail, bool)
        kept[now.slots[:-1]] = True
        self.slots, self.choice = now.slots, Choice(kept)
        self._wishes, self._wished_at = now.wishes, now.wished_at
        places = (now.slots[:, None] * block + np.arange(block)).reshape(-1)
        there = places < len(self.positions)
        self._slot_positions[there] = self.positions.array[places[there]]
        nbytes = now.blocks * self.host.block_bytes
        self._transfers.bytes_to_device += nbytes
        self._transfers.fetched += Fetched(nbytes, 0, now.swaps)  # attention comes right behind each
