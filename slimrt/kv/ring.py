"""The ring of staging slots through which keys and values of whole layers pass during prefill, and what moved."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimrt.ops.protocol import Array, Fetched, Ops, Pairs

__all__ = ["Ring", "Transfers"]

Fence = Any  # the backend's fence


@dataclass
class Transfers:
    """What moved between host and device. ``waits``: how often compute came before a copy had ended. ``fetched``: what
    decode asked for."""

    bytes_to_device: int = 0
    bytes_to_host: int = 0
    waits: int = 0
    fetched: Fetched = field(default_factory=Fetched)

    def wait(self, ops: Ops, fence: Fence) -> None:
        """``ops.wait``, counted."""
        self.waits += not fence.done()
        ops.wait(fence)

    def note_fetched(self, ops: Ops, fence: Fence, nbytes: int) -> None:
        """Compute comes for blocks that decode asked for, before it waits for them."""
        in_time = ops.fetches_behind and fence.done()
        self.fetched += Fetched(nbytes, nbytes if in_time else 0, 0 if in_time else 1)


class Ring:
    """``slots`` device buffers of ``shape``, allocated here and never again.

    A slot goes round: ``fetch`` claims it for a layer and starts the copies into it, ``take`` hands it to compute once
    they have ended (or claims one that nothing is fetched into), ``leave`` says that compute has read it for the last
    time and starts the copies out of it. The next copies into it start after that, and compute that takes it unfetched
    waits for that: the copy queue and compute hold each other back when the ring is full, neither overwrites the other.
    """

    def __init__(self, ops: Ops, shape: tuple[int, ...], slots: int, transfers: Transfers) -> None:
        self._ops, self._transfers = ops, transfers
        self._buffers = [ops.empty(shape, ops.kv_type) for _ in range(slots)]
        self._left: list[Fence] = [ops.mark()] * slots  # after it, nobody reads or writes the slot
        self._free = deque(range(slots))  # the one that was left longest ago first
        self._coming: dict[int, tuple[int, Fence]] = {}  # by layer
        self._taken: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def fetch(self, layer: int, pairs: Callable[[Array], Pairs]) -> bool:
        """Start bringing ``pairs(slot)`` for ``layer``; False if it is on its way, or if the ring is full."""
        if layer in self._coming or not self._free:
            return False
        slot = self._free.popleft()
        copies = pairs(self._buffers[slot])
        self._transfers.bytes_to_device += sum(destination.nbytes for destination, _ in copies)
        self._coming[layer] = slot, self._ops.copy(copies, after=self._left[slot])
        return True

    def take(self, layer: int) -> Array:
        """The layer's slot, for compute to read and write until ``leave``; raises what its copies raised."""
        if layer not in self._coming:
            slot = self._free.popleft()
            self._coming[layer] = slot, self._left[slot]
        slot, ready = self._coming[layer]
        self._transfers.wait(self._ops, ready)
        self._taken[layer] = slot
        self._coming.pop(layer, None)
        return self._buffers[slot]

    def leave(self, layer: int, pairs: Callable[[Array], Pairs]) -> None:
        """Compute has read the layer's slot; start copying ``pairs(slot)`` out, the slot is free when they are done."""
        slot = self._taken[layer]
        self._left[slot] = self._ops.mark()
        copies = pairs(self._buffers[slot])
        if copies:
            self._transfers.bytes_to_host += sum(destination.nbytes for destination, _ in copies)
            self._left[slot] = self._ops.copy(copies, after=self._left[slot])
        self._free.append(slot)
        self._taken.pop(layer)

    def taken(self, layer: int) -> Array | None:
        """The layer's slot between ``take`` and ``leave``, else None."""
        return self._buffers[self._taken[layer]] if layer in self._taken else None

    def discard(self, first_layer: int) -> None:
        """Give up what is on its way for layers from ``first_layer`` on; the slots are free when it has arrived."""
        for layer in [layer for layer in self._coming if layer >= first_layer]:
            slot, ready = self._coming.pop(layer)
            self._left[slot] = ready
            self._free.appendleft(slot)

    def close(self) -> None:
        """Wait for every copy; the first exception is raised when all have ended."""
        wait_all(self._ops, self._transfers, [*(ready for _, ready in self._coming.values()), *self._left])


def wait_all(ops: Ops, transfers: Transfers, fences: Sequence[Fence]) -> None:
    """Compute waits for all ``fences``; the first exception is raised after the last wait."""
    errors: list[Exception] = []
    for fence in fences:
        try:
            transfers.wait(ops, fence)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
