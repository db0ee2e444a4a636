"""Blocks of keys and values in host memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from slimrt.config import CacheConfig, ModelConfig
from slimrt.ops.protocol import Array, Ops

__all__ = ["HostBlocks", "host_slabs", "reserve_host_memory"]

_SLAB_ROWS = 1024  # host memory is taken in slabs: pinning is slow, and a slab is never moved or given back


class HostBlocks:
    """Blocks in host memory: [2, Hkv, block, Dh], keys and values of one block contiguous, so one transfer moves it."""

    def __init__(self, ops: Ops, config: CacheConfig, model: ModelConfig) -> None:
        self._ops = ops
        self._shape = (2, model.n_kv_heads, config.block, model.head_dim)
        self._per_slab, _ = host_slabs(config)
        self._slabs: list[Array] = []
        self.views: list[Array] = []  # one a block
        self.block_bytes = math.prod(self._shape) * np.dtype(ops.kv_type).itemsize

    def runs(self, device: Array, first: int, last: int) -> Iterator[tuple[Array, Array]]:
        """Blocks ``first`` to ``last`` (exclusive) beside the same of ``device`` [2, Hkv, rows from ``first`` on, Dh].

        Yields pairs (host, device) of equal shapes, as few as the slabs allow.
        """
        rows = self._shape[2]
        while first < last:
            slab, at = divmod(first, self._per_slab)
            if slab == len(self._slabs):
                self._slabs.append(self._ops.pinned((self._per_slab, *self._shape), self._ops.kv_type))
                self.views.extend(self._slabs[slab])
            count = min(self._per_slab - at, last - first)
            heads, width = self._shape[1], self._shape[3]
            blocks = device[:, :, : count * rows].reshape(2, heads, count, rows, width)  # splits an axis: a view
            yield self._slabs[slab][at : at + count], blocks.transpose(2, 0, 1, 3, 4)
            first += count
            device = device[:, :, count * rows :]

    def clear(self) -> None:
        """Let go of the memory."""
        self._slabs.clear()
        self.views.clear()


def host_slabs(config: CacheConfig) -> tuple[int, int]:
    """Blocks in a slab of host memory, and how many slabs a layer needs when the context is full."""
    blocks = max(1, _SLAB_ROWS // config.block)
    return blocks, -(-config.ctx // (blocks * config.block))


def reserve_host_memory(ops: Ops, config: CacheConfig, model: ModelConfig) -> None:
    """Take the host memory of one conversation that fills the context now, once: pinning in a prompt's way is slow."""
    blocks, slabs = host_slabs(config)
    ops.reserve((blocks, 2, model.n_kv_heads, config.block, model.head_dim), model.n_layers * slabs)
