"""Weights that do not fit on the device: each layer's pass through two slots there, one ahead of compute.

The layers' packed bytes lie in page-locked host memory, one piece a layer, so that one transfer brings a layer. The
ring is that of keys and values (``slimrt.kv.ring``), with the same fences: compute waits for a layer's bytes, and a
slot is written again only when compute has left it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from slimrt.kv.ring import Ring, Transfers
from slimrt.ops.protocol import Array, StreamingOps

__all__ = ["SLOTS", "StreamedLayers", "layer_bytes"]

SLOTS = 2
_ALIGN = 256  # bytes: what the device's own allocator gives
_MATRICES = ("qkv", "out", "gate_up", "down")


def layer_bytes(parts: Sequence[int]) -> int:
    """Bytes that the parts of a layer take in a slot, each aligned."""
    return sum(-(-nbytes // _ALIGN) * _ALIGN for nbytes in parts)


class StreamedLayers:
    """Layers to loop over, in order, as often as one likes; the matrices of one are valid until the next is asked for.

    ``layers``: whose matrices lie in host memory (``host_weight`` of the backend); they are copied into page-locked
    memory here, one after the other, so an iterator over layers that are made when asked for never holds two.
    """

    def __init__(self, ops: StreamingOps, layers: Iterator[Any]) -> None:
        self._ops = ops
        self.transfers = Transfers()
        self._layers: list[Any] = []  # without their matrices
        self._slabs: list[np.ndarray] = []
        self._places: list[dict[str, list[tuple[Any, int, int]]]] = []  # parts without data, from where to where
        for layer in layers:
            self._take_in(layer)
        size = max(slab.nbytes for slab in self._slabs) // np.dtype(ops.kv_type).itemsize
        self._ring = Ring(ops, (size,), SLOTS, self.transfers)

    def _take_in(self, layer: Any) -> None:
        parts = [part for name in _MATRICES for part in getattr(layer, name).parts]
        slab = self._ops.pinned((layer_bytes([part.data.nbytes for part in parts]),), np.uint8)
        places: dict[str, list[tuple[Any, int, int]]] = {}
        at = 0
        for name in _MATRICES:
            places[name] = []
            for part in getattr(layer, name).parts:
                data = part.data
                slab[at : at + data.nbytes] = data
                places[name].append((dataclasses.replace(part, data=None), at, at + data.nbytes))
                at += layer_bytes([data.nbytes])
        self._slabs.append(slab)
        self._places.append(places)
        self._layers.append(dataclasses.replace(layer, **dict.fromkeys(_MATRICES)))

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self)):
            self._fetch(number)
            slot = self._ring.take(number)
            try:
                # While this layer computes, the next comes; after the last one the first, for the next token.
                self._fetch((number + 1) % len(self))
                yield dataclasses.replace(self._layers[number], **self._matrices(number, slot.view(np.uint8)))
            finally:
                self._ring.leave(number, lambda _: [])

    def _fetch(self, number: int) -> None:
        slab = self._slabs[number]
        self._ring.fetch(number, lambda slot: [(slot.view(np.uint8)[: len(slab)], slab)])

    def _matrices(self, number: int, slot: Array) -> dict[str, Any]:
        return {
            name: self._ops.placed_weight(
                [dataclasses.replace(part, data=slot[at:end]) for part, at, end in self._places[number][name]]
            )
            for name in _MATRICES
        }

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return sum(slab.nbytes for slab in self._slabs)
