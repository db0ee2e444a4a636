"""Which blocks of a layer decode reads under a budget."""

from __future__ import annotations

import math

import numpy as np

from slimrt.config import CacheConfig

__all__ = ["Choice", "choose"]


class Choice:
    """Blocks to read: those of ``kept`` [tail] bool (``complete`` [n] has their numbers, ascending), and ``tail``, the
    block that holds the newest row."""

    def __init__(self, kept: np.ndarray) -> None:
        self.kept, self.tail = kept, len(kept)
        self.complete = np.flatnonzero(kept)

    def overlap(self, other: Choice) -> float:
        """The share of this choice's blocks that the other, which ends in the same tail, has too."""
        return (1 + int(np.count_nonzero(other.kept[self.complete]))) / (1 + len(self.complete))


def choose(scores: np.ndarray | None, tail: int, config: CacheConfig) -> Choice:
    """The sink, the tail, the local blocks before it, and the best of ``scores`` [tail]: as many as there are slots.

    Without scores later blocks are better. Ties go to the earlier block.
    """
    wanted = np.arange(tail, dtype=np.float32) if scores is None else scores.copy()
    wanted[: config.sink_blocks] = math.inf
    wanted[max(0, tail - config.local_blocks) :] = math.inf
    count = config.slots - 1
    if not 0 < count < tail:
        return Choice(np.arange(tail) < count)
    rivals = wanted[wanted > -math.inf]  # in a long context a small part
    least = np.partition(rivals, -count)[-count] if count <= len(rivals) else -math.inf
    kept = wanted > least
    kept[np.flatnonzero(wanted == least)[: count - np.count_nonzero(kept)]] = True
    return Choice(kept)
