"""A prompt's work in parts, between which others have their turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from slimrt.ops.protocol import Array, Ops

__all__ = ["Parts"]

_PART_S = 0.08  # that a part is to take: others wait for so long
_STEP = 128  # rows: parts are multiples of it, so that no kernel's tile is cut
_FIRST, _MOST = 512, 4096  # rows of a part before any was measured, and at most


class Parts:
    """Splits work on many rows, each of which is treated alone, into parts of about ``_PART_S`` seconds, by what parts
    of the same ``kind`` took before: a layer of a large model, on a slow machine, takes fewer rows at a time. Where a
    row's last bits depend on how many are with it (not ``ops.each_alone``) parts have ``_FIRST`` rows whatever they
    take: results must not depend on the clock.

    ``turn`` is called between parts; while it is None, nothing is split.
    """

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._rows: dict[str, int] = {}
        self.turn: Callable[[], None] | None = None

    def slices(self, kind: str, rows: int) -> Iterator[slice]:
        """The parts of ``rows`` rows, in order; the caller works on each before it asks for the next."""
        if self.turn is None:
            yield slice(0, rows)
            return
        low = 0
        while low < rows:
            size = self._rows.get(kind, _FIRST)
            high = rows if rows - low < size + _STEP else low + size  # no remainder of a few rows
            begun = time.monotonic()
            yield slice(low, high)
            self._measured(kind, high - low, time.monotonic() - begun)
            if low or high < rows:
                self.turn()
            low = high

    def _measured(self, kind: str, rows: int, seconds: float) -> None:
        if rows < _STEP or not self._ops.each_alone:
            return
        wanted = rows * _PART_S / max(seconds, 1e-6)
        grown = min(wanted, 2 * self._rows.get(kind, _FIRST), _MOST)  # a quick part may have been a lucky one
        self._rows[kind] = max(_STEP, int(grown) // _STEP * _STEP)

    def each(self, kind: str, work: Callable[[slice], Any], rows: int) -> Any:
        """``work`` of all rows: an array [T, ...], or a tuple of them."""
        results: tuple[Array, ...] = ()
        for some in self.slices(kind, rows):
            found = work(some)
            if some.stop - some.start == rows:
                return found
            arrays = found if isinstance(found, tuple) else (found,)
            if not results:
                results = tuple(self._ops.empty((rows, *array.shape[1:]), array.dtype) for array in arrays)
            for result, array in zip(results, arrays, strict=True):
                result[some] = array
        return results if len(results) > 1 else results[0]
