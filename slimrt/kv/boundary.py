"""Hidden states at the first pruning layer, kept where the model computes so that another question can be asked."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimrt.prune.asked import HEAD
from slimrt.prune.reach import runs

Array = Any  # the backend's array

_GROWTH = 256  # rows of slack when the store grows: decode appends one row at a time


class BoundaryStates:
    """Every token's hidden state [N, D] float32 at the attention of ``layer``, before anything is cut: behind it, or
    before it where no question has chosen the token yet, for what leaves there need not attend.

    Up to there the pass is dense, so these rows and the dense layers' keys and values are all that a later question
    needs: selection starts from them, and only the pruned stages run again. So do the queries of the first tokens at
    that layer: what stands before a document helps to choose. Plain arrays only, so it can be copied.
    """

    def __init__(self, layer: int, width: int) -> None:
        self.layer = layer
        self._width = width
        self._rows: Array = None
        self._attended = np.empty(0, bool)
        self._first: Array = None
        self.first_length = 0
        self.length = 0

    def append(self, x: Array, q: Array | None = None, *, attended: bool | np.ndarray = True) -> None:
        """Add rows x [T, D], and queries of the first of them, q [at most T, H, Dh], where they are known.
        ``attended``: whether they stand behind the attention, all of them or each [T]."""
        if q is not None:
            self._keep_first(q)
        end = self.length + len(x)
        if self._rows is None or end > len(self._rows):
            grown = np.empty_like(x, shape=(end + _GROWTH, self._width))
            if self.length:
                grown[: self.length] = self._rows[: self.length]
            self._rows = grown
            self._attended = np.concatenate([self.attended, np.zeros(len(grown) - self.length, bool)])
        self._rows[self.length : end] = x
        self._attended[self.length : end] = attended
        self.length = end

    def rows(self) -> Array:
        """All rows [N, D], a view."""
        return np.empty((0, self._width), np.float32) if self._rows is None else self._rows[: self.length]

    @property
    def attended(self) -> np.ndarray:
        """Which rows stand behind the attention, bool [N], a view."""
        return self._attended[: self.length]

    def waiting(self, rows: np.ndarray) -> np.ndarray:
        """Of ``rows`` those that have not attended."""
        return rows[~self.attended[rows]]

    def put(self, rows: np.ndarray, x: Array) -> None:
        """x [M, D] is what ``rows`` [M], ascending, are behind the attention."""
        for some in runs(rows):
            self._rows[rows[some.start] : rows[some.stop - 1] + 1] = x[some]
        self._attended[rows] = True

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
        """Forget the rows from ``length`` on."""
        self.length = min(self.length, length)
        self.first_length = min(self.first_length, length)

    @property
    def nbytes(self) -> int:
        return self.length * self._width * 4 + (0 if self._first is None else self._first.nbytes)
