"""Hidden states at the first pruning layer, kept where the model computes so that another question can be asked."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # the backend's array

_GROWTH = 256  # rows of slack when the store grows: decode appends one row at a time


class BoundaryStates:
    """Every token's hidden state [N, D] float32 after the attention of ``layer``, before anything is cut.

    Up to there the pass is dense, so these rows and the dense layers' keys and values are all that a later question
    needs: selection starts from them, and only the pruned stages run again. Plain arrays only, so it can be copied.
    """

    def __init__(self, layer: int, width: int) -> None:
        self.layer = layer
        self._width = width
        self._rows: Array = None
        self.length = 0

    def append(self, x: Array) -> None:
        """Add rows x [T, D]."""
        end = self.length + len(x)
        if self._rows is None or end > len(self._rows):
            grown = np.empty_like(x, shape=(end + _GROWTH, self._width))
            if self.length:
                grown[: self.length] = self._rows[: self.length]
            self._rows = grown
        self._rows[self.length : end] = x
        self.length = end

    def rows(self) -> Array:
        """All rows [N, D], a view."""
        return np.empty((0, self._width), np.float32) if self._rows is None else self._rows[: self.length]

    def truncate(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        self.length = min(self.length, length)

    @property
    def nbytes(self) -> int:
        return self.length * self._width * 4
