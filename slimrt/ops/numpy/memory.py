"""Memory operations on NumPy: copies run on a thread of their own, as they run on a copy stream of a GPU.

Two queues: compute (the caller's thread) and copies. They meet only at fences, so the rules are those of a GPU and code
that keeps them runs on both: a copy that reads what compute writes, or writes what compute reads, starts ``after`` a
``mark`` of the compute queue; compute that needs what a copy brings, or reuses what it reads, first ``wait``s for its
fence; a copy that depends on another starts ``after`` that one's fence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slimrt.ops.numpy.tasks import Task, Tasks

__all__ = ["Fence", "NumpyMemory"]

Array = np.ndarray


class Reached:
    """A fence that has passed: compute runs on the calling thread, so wherever it is asked, it has got there.

    It has no state. A Future of ``concurrent.futures`` has a lock, which a Ctrl-C between two of its steps leaves
    locked, and then whoever asks it next waits for ever.
    """

    def done(self) -> bool:
        """Whether it has passed."""
        return True

    def exception(self) -> None:
        """What went wrong: nothing."""

    def result(self) -> None:
        """Wait for it."""


Fence = Task | Reached  # done(): whether the copy has ended, well or badly
_REACHED = Reached()


class NumpyMemory:
    """Allocation, copies and fences; the device's memory is the host's.

    ``kv_type``: what keys and values are kept as.
    """

    kv_type: type = np.float32
    fetches_behind = True

    def __init__(self) -> None:
        self._copies = Tasks(1)  # no thread before the first copy

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Uninitialised memory on the device."""
        return np.empty(shape, dtype)

    def pinned(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Uninitialised host memory that copies reach at full speed."""
        return np.empty(shape, dtype)

    def reserve(self, shape: tuple[int, ...], count: int) -> None:
        """Make ready what ``count`` calls of ``pinned(shape)`` will ask for: nothing, it costs nothing here."""

    def copy(self, pairs: Sequence[tuple[Array, Array]], after: Fence | None = None) -> Fence:
        """Queue the copies (destination, source) in order, host to device or back, strided or not; returns at once.

        They start when ``after`` has passed. If that failed, or one of these fails, the rest are left out and the
        exception is raised by ``wait``, here and in what comes after this fence.
        """

        def work() -> None:
            if after is not None:
                after.result()
            for destination, source in pairs:
                np.copyto(destination, source)

        return self._copies.submit(work)

    def fetch_blocks(self, layer: Array, blocks: Sequence[tuple[int, Array]], after: Fence) -> Fence:
        """Queue copies of host ``blocks``, (slot, [2, Hkv, block, Dh]) each, into rows slot * block and on of ``layer``
        [2, Hkv, capacity, Dh], as ``copy`` does."""
        rows = blocks[0][1].shape[2]
        return self.copy([(layer[:, :, slot * rows : (slot + 1) * rows], block) for slot, block in blocks], after)

    def mark(self) -> Fence:
        """A fence that passes when compute has done all that was asked of it, and waited for, so far."""
        return _REACHED

    def wait(self, fence: Fence) -> None:
        """What is computed from here on runs after ``fence``; raises the exception of a copy that failed."""
        fence.result()

    def finish(self) -> None:
        """Return when both queues have done all that was asked: the caller may read host memory that copies fill."""
        self._copies.submit(_nothing).result()

    def to_host(self, x: Array) -> Array:
        """``x`` as a NumPy array."""
        return x

    def floats(self, x: Array) -> np.ndarray:
        """``x`` as float32 on the host."""
        return np.asarray(x, np.float32)

    def close(self) -> None:
        """Finish all copies and end their thread; a later copy starts another."""
        self._copies.close()


def _nothing() -> None:
    """A task that ends when those before it have."""
