"""A backend that shows every missing fence on a machine where copies are otherwise done before anybody looks.

A copy is done as late as the rules allow: when its fence is waited for. Until then its destination holds NaN (or, where
it comes after another copy, what it held before), and its source is read only then. A copy that starts too early
(before compute has left what it overwrites) is refused, and so is one that does not say what it comes after.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import numpy as np

from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.prune.reach import Reach

Pairs = Sequence[tuple[np.ndarray, np.ndarray]]


class TooEarly(AssertionError):
    """A copy was not ordered after what it depends on."""


class DeferredFence:
    """A point in the copy queue; ``time`` is the point of the compute queue that it comes after."""

    def __init__(self, pairs: Pairs, after: DeferredFence | None, time: int) -> None:
        self._pairs, self._after, self.time = pairs, after, time
        self._done = False
        self._error: Exception | None = None

    def done(self) -> bool:
        return self._done

    def run(self) -> None:
        """Do the copies now, if they are not done; raises what failed, here or in what came before."""
        if not self._done:
            self._done = True
            try:
                if self._after is not None:
                    self._after.run()
                for destination, source in self._pairs:
                    np.copyto(destination, source)
            except Exception as error:
                self._error = error
        if self._error is not None:
            raise self._error


class DeferredOps(NumpyOps):
    """NumPy with copies that are as late as they may be. ``fail_at``: the copy of that number raises."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__(1)
        self.time = 0  # of the compute queue: counts attentions
        self.copies = 0
        self._fail_at = fail_at
        self._pinned: list[np.ndarray] = []
        self._attended: list[tuple[np.ndarray, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        return np.full(shape, np.nan, dtype)

    def pinned(self, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        self._pinned.append(np.full(shape, np.nan, dtype))
        return self._pinned[-1]

    def _on_host(self, array: np.ndarray) -> bool:
        return any(np.may_share_memory(array, pinned) for pinned in self._pinned)

    def attend(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        out: np.ndarray | None = None,
        reach: Reach = None,
        **how: Any,
    ) -> np.ndarray:
        self.time += 1
        self._attended = [*self._attended[-64:], (k, self.time), (v, self.time)]
        return super().attend(q, k, v, out, reach, **how)

    def copy(self, pairs: Pairs, after: DeferredFence | None = None) -> DeferredFence:  # type: ignore[override]
        pairs = list(pairs)
        if after is None:
            raise TooEarly("a copy that touches the device comes after nothing")
        for destination, source in pairs:
            assert destination.shape == source.shape
            assert self._on_host(destination) != self._on_host(source)  # one side each
            device = source if self._on_host(destination) else destination
            for array, time in self._attended:
                if time > after.time and np.may_share_memory(device, array):
                    raise TooEarly("a copy may start before compute has left what it touches")
        if after.done():  # else what comes before may still have to read the destination
            for destination, _ in pairs:
                destination[...] = np.nan
        if self.copies == self._fail_at:
            pairs = [(np.empty(2), np.empty(3))]  # cannot be copied
        self.copies += 1
        return DeferredFence(pairs, after, after.time)

    def mark(self) -> DeferredFence:  # type: ignore[override]
        fence = DeferredFence((), None, self.time)
        fence.run()
        return fence

    def wait(self, fence: DeferredFence) -> None:  # type: ignore[override]
        fence.run()

    def finish(self) -> None:
        """Nothing: what nobody waited for stays as late as it is."""


class ForgetfulOps(DeferredOps):
    """Leaves out the waits of one place in the program: their copies end late, after ``LATE`` further attentions.

    ``forget`` None leaves out nothing; ``places`` collects where copies were waited for that had not ended.
    """

    LATE = 3

    def __init__(self, forget: str | None = None) -> None:
        super().__init__()
        self.forget, self.places = forget, set[str]()
        self._late: list[tuple[int, DeferredFence]] = []

    def wait(self, fence: DeferredFence) -> None:  # type: ignore[override]
        place = _place(sys._getframe(1))
        if not fence.done():
            self.places.add(place)
        if place == self.forget and not fence.done():
            self._late.append((self.time + self.LATE, fence))
        else:
            fence.run()

    def attend(self, *args: Any, **how: Any) -> np.ndarray:
        result = super().attend(*args, **how)
        for time, fence in self._late:
            if time <= self.time:
                fence.run()
        self._late = [(time, fence) for time, fence in self._late if time > self.time]
        return result


def _place(frame: FrameType | None) -> str:
    """The functions of the cache that led to a wait, the outermost last."""
    names = []
    while frame is not None and "slimrt" in frame.f_code.co_filename:
        names.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return " < ".join(name for name in names if name not in ("Transfers.wait", "wait_all"))
