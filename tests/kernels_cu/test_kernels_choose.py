"""The kernel that chooses blocks under a budget, run on the CPU, against ``slimrt.kv.choice`` and what slots do."""

from __future__ import annotations

import numpy as np
import pytest

from slimrt.config import CacheConfig
from slimrt.kv.choice import Choice, choose
from tests.kernel_cases import Array, launch, mode, needs_compiler

__all__ = ["mode"]
pytestmark = needs_compiler


class Rows:
    """Slots of a layer in which the kernel and the cache's own rule take turns, each from what the other left."""

    def __init__(self, config: CacheConfig, tail: int, random: np.random.Generator) -> None:
        self.config, self.count = config, config.slots - 1
        self.homes = random.integers(1, 2**60, 700).astype(np.uint64)
        self.wishes, self.earlier = np.full(700, np.inf, np.float32), 0  # behind `earlier` none counts
        self.slots = np.append(random.permutation(choose(None, tail, config).complete), tail).astype(np.int32)

    def step(self, scores: Array, tail: int, overlap: float, decay: float) -> Array:
        """Choose by ``scores`` for a token in block ``tail``; the blocks that were brought."""
        forced = tail != self.slots[-1]
        wanted = scores.copy()
        np.maximum(wanted[: self.earlier], self.wishes[: self.earlier] * np.float32(decay), out=wanted[: self.earlier])
        choice, before = choose(wanted, tail, self.config), self.slots[:-1].copy()
        kept = np.zeros(tail, bool)
        kept[before] = True
        moves = forced or choice.overlap(Choice(kept)) < overlap
        common = next(n for n in range(self.count + 2) if (1 + n) / (1 + self.count) >= overlap)
        words = np.array([1, forced, tail, self.earlier, np.float32(decay).view(np.int32), common], np.int32)
        source, target = np.full(self.count, 7, np.uint64), np.full(self.count, -1, np.int32)
        moved, given = np.array([-1, 0, 0], np.int32), scores.copy()
        launch(
            "choose.cu", {}, "choose_blocks", (1,), 256,
            [words, given, self.wishes, self.slots, self.homes, source, target, moved,
             self.count, self.config.sink_blocks, self.config.local_blocks], 4 * self.count + len(self.homes),
        )  # fmt: skip
        assert np.array_equal(self.wishes[:tail], wanted)
        self.earlier = tail
        if not moves:
            assert np.array_equal(self.slots, [*before, tail]) and moved.tolist() == [0, 0, 0]
            return np.empty(0, np.int64)
        missing, free = np.setdiff1d(choice.complete, before), np.flatnonzero(~choice.kept[before])
        assert moved.tolist() == [len(free), 1, len(free)] and np.array_equal(target[: len(free)], free)
        assert np.array_equal(source[: len(free)], self.homes[missing])
        before[free] = missing
        assert np.array_equal(self.slots, [*before, tail])
        return missing


@pytest.mark.parametrize(("slots", "tail", "sink", "local"), [(8, 8, 1, 4), (40, 300, 0, 0), (300, 601, 3, 5)])
def test_choices_and_slots(slots: int, tail: int, sink: int, local: int) -> None:
    """Ties, blocks that none was compared with, more blocks than threads and fewer; tokens in a row."""
    random = np.random.default_rng(slots)
    config = CacheConfig(1 << 20, 16 * slots, sink_blocks=sink, local_blocks=local)
    rows, brought = Rows(config, tail, random), []
    for overlap, decay, grain in ((0.9, 0.0, 1e-4), (0.0, 0.85, 1e-4), (1.0, 0.85, 0.25), (0.9, 0.85, 1e-4)):
        scores = np.round((random.random(tail) - 0.5) / grain).astype(np.float32) * np.float32(grain)
        scores[random.random(tail) < 0.3] = -np.inf
        brought.append(rows.step(scores, tail, overlap, decay))
    tail += 1  # a block is full: the choice is forced
    brought.append(rows.step(random.random(tail).astype(np.float32), tail, 0.0, 0.5))
    assert not len(brought[1]) and (slots == 8 or len(brought[0])) and len(brought[-1])


def test_a_token_that_does_not_choose_moves_nothing() -> None:
    words, moved = np.array([0, 1, 5, 5, 0, 0], np.int32), np.array([9, 1, 2], np.int32)
    slots = np.array([0, 1, 4], np.int32)
    empty = np.empty(0, np.float32)
    args = [words, empty, empty, slots, np.empty(0, np.uint64), np.empty(0, np.uint64), empty, moved, 2, 1, 1]
    launch("choose.cu", {}, "choose_blocks", (1,), 256, args, 64)
    assert slots.tolist() == [0, 1, 4] and moved.tolist() == [0, 1, 2]
