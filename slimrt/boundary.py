"""Hidden states at the first pruning layer, kept in host memory so that another question can be asked."""

from __future__ import annotations

import numpy as np

_GROWTH = 256  # rows of slack when the store grows: decode appends one row at a time


class BoundaryStates:
    """Every token's hidden state [N, D] after the attention of ``layer``, before anything is cut.

    Up to there the pass is dense, so these rows and the dense layers' keys and values are all that a later question
    needs: selection starts from them, and only the pruned stages run again.
    """

    def __init__(self, layer: int, width: int) -> None:
        self.layer = layer
        self._rows = np.empty((0, width), np.float32)
        self.length = 0

    def append(self, x: np.ndarray) -> None:
        """Add rows x [T, D] (host memory)."""
        end = self.length + len(x)
        if end > len(self._rows):
            grown = np.empty((end + _GROWTH, self._rows.shape[1]), np.float32)
            grown[: self.length] = self._rows[: self.length]
            self._rows = grown
        self._rows[self.length : end] = x
        self.length = end

    def rows(self) -> np.ndarray:
        """All rows [N, D], a view."""
        return self._rows[: self.length]

    def truncate(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        self.length = min(self.length, length)

    @property
    def nbytes(self) -> int:
        return self.length * self._rows.shape[1] * 4
