"""Hidden states at the first pruning layer, kept where the model computes so that another question can be asked."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimrt.ops.protocol import Ops
from slimrt.prune.asked import HEAD

Array = Any  # the backend's array

_GROWTH = 256  # rows of slack when a store grows: decode appends one row at a time


class _Rows:
    """Rows [n, D], to which more are added; what is there never changes, so whoever is interrupted leaves it right."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._buffer: Array = None
        self.length = 0

    @property
    def array(self) -> Array:
        """All rows, a view."""
        return np.empty((0, self._width), np.float32) if self._buffer is None else self._buffer[: self.length]

    def add(self, x: Array) -> np.ndarray:
        """Their numbers [T]."""
        begin, end = self.length, self.length + len(x)
        if begin == end:
            return np.empty(0, np.int64)
        if self._buffer is None or end > len(self._buffer):
            grown = np.empty_like(x, shape=(end + _GROWTH, self._width))
            if begin:
                grown[:begin] = self._buffer[:begin]
            self._buffer = grown
        self._buffer[begin:end] = x
        self.length = end
        return np.arange(begin, end)


class BoundaryStates:
    """Every token's hidden state float32 [D] at the attention of ``layer``, before anything is cut: behind it, or
    before it where no question has chosen the token yet, for what leaves there need not attend.

    Up to there the pass is dense, so these rows and the dense layers' keys and values are all that a later question
    needs: selection starts from them, and only the pruned stages run again. So do the queries of the first tokens at
    that layer: what stands before a document helps to choose. Plain arrays only, so it can be copied.
    """

    def __init__(self, layer: int, width: int) -> None:
        self.layer = layer
        self._before, self._behind = _Rows(width), _Rows(width)
        # Of each token the number of its row: n in ``_behind``, or -1 - n in ``_before``.
        self._places = np.empty(0, np.int64)
        self._first: Array = None
        self.first_length = 0
        self.length = 0

    def append(self, x: Array, q: Array | None = None, *, attended: bool = True) -> None:
        """Add rows x [T, D], and queries of the first of them, q [at most T, H, Dh], where they are known.
        ``attended``: whether they stand behind the attention."""
        self._add(self._behind.add(x) if attended else -1 - self._before.add(x), q)

    def restore(self, before: Array, behind: Array, attended: np.ndarray, q: Array | None) -> None:
        """Add tokens of which some stand ``before`` the attention and some ``behind`` it, as ``attended`` [T] says."""
        places = np.empty(len(attended), np.int64)
        places[attended], places[~attended] = self._behind.add(behind), -1 - self._before.add(before)
        self._add(places, q)

    def _add(self, places: np.ndarray, q: Array | None) -> None:
        end = self.length + len(places)
        if q is not None:
            self._keep_first(q)
        if end > len(self._places):
            self._places = np.concatenate([self._places[: self.length], np.zeros(len(places) + _GROWTH, np.int64)])
        self._places[self.length : end] = places
        self.length = end

    @property
    def attended(self) -> np.ndarray:
        """Of each token whether its state is the one behind the attention, bool [N]."""
        return self._places[: self.length] >= 0

    def waiting(self, tokens: np.ndarray) -> np.ndarray:
        """Those of ``tokens`` that have not attended."""
        return tokens[self._places[tokens] < 0]

    def before(self, ops: Ops, tokens: np.ndarray) -> Array:
        """The states [T, D] of ``tokens`` that have not attended, a copy."""
        return ops.take(self._before.array, -1 - self._places[tokens])

    def behind(self, ops: Ops, tokens: np.ndarray) -> Array:
        """The states [T, D] of ``tokens`` that have, a copy."""
        return ops.take(self._behind.array, self._places[tokens])

    def put(self, tokens: np.ndarray, x: Array) -> None:
        """x [T, D] is what ``tokens`` are behind the attention."""
        places = self._places.copy()
        places[tokens] = self._behind.add(x)
        self._places = places

    def marks(self) -> np.ndarray:
        """Which tokens have attended, for ``reset``."""
        return self._places

    def reset(self, marks: np.ndarray) -> None:
        """Those that attended since ``marks`` have not."""
        self._places = marks
        self.truncate(self.length)

    def on_host(self, ops: Ops, length: int) -> np.ndarray:
        """The states float32 [length, D] of the first tokens, as ``attended`` says."""
        places, width = self._places[:length], self._before.array.shape[1]
        result, there = np.empty((length, width), np.float32), places >= 0
        result[there] = ops.to_host(self._behind.array)[places[there]]
        result[~there] = ops.to_host(self._before.array)[-1 - places[~there]]
        return result

    def _keep_first(self, q: Array) -> None:
        """Of the queries those of the prompt's first ``HEAD`` tokens, as long as none is missing."""
        if self.first_length != self.length or self.length >= HEAD:
            return
        if self._first is None:
            self._first = np.empty_like(q, shape=(HEAD, *q.shape[1:]))
        count = min(len(q), HEAD - self.length)
        self._first[self.length : self.length + count] = q[:count]
        self.first_length += count

    def first_queries(self) -> Array:
        """Queries [T, H, Dh] of the first ``first_length`` tokens, a view; decoded tokens leave none."""
        assert self._first is not None
        return self._first[: self.first_length]

    def truncate(self, length: int) -> None:
        """Forget the tokens from index ``length`` on."""
        self.length = min(self.length, length)
        self.first_length = min(self.first_length, length)
        places = self._places[: self.length]
        self._behind.length = int(places.max(initial=-1)) + 1
        self._before.length = -int(places.min(initial=0))

    @property
    def nbytes(self) -> int:
        rows = self._before.length + self._behind.length
        return rows * self._before.array.shape[1] * 4 + (0 if self._first is None else self._first.nbytes)
