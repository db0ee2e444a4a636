"""What one prefill did, as the engine tells it: the layers' times, and what each cut saw and kept."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["CutTrace", "PrefillTrace"]


@dataclass(frozen=True)
class CutTrace:
    """One cut, at the attention of ``layer``.

    ``positions`` [N]: the tokens that were active, by their place in the prompt. ``scores`` [B]: those of their blocks.
    ``kept`` [K]: the places in the prompt of those that went on. ``by`` [B]: the places of the tokens that wanted the
    blocks most (-1: none did); None where the score does not tell.
    """

    layer: int
    positions: np.ndarray
    scores: np.ndarray
    kept: np.ndarray
    by: np.ndarray | None = None


@dataclass
class PrefillTrace:
    """An ``slimrt.context.Trace`` that remembers. ``seconds``: one number a layer."""

    seconds: list[float] = field(default_factory=list)
    cuts: list[CutTrace] = field(default_factory=list)
    _last: float = 0.0

    def begin(self) -> None:
        """The layers begin."""
        self._last = time.perf_counter()

    def attention(self, layer: int, q: Any, keys: Any) -> None:
        """Nothing of it is kept."""

    def cut(
        self, layer: int, positions: np.ndarray, scores: np.ndarray, rows: np.ndarray, by: np.ndarray | None
    ) -> None:
        """Of the active ``positions`` [N], whose blocks scored ``scores`` [B], those at ``rows`` go on."""
        scored = np.array(scores, np.float64)
        self.cuts.append(CutTrace(layer, positions.copy(), scored, positions[rows], None if by is None else by.copy()))

    def layer(self, layer: int) -> None:
        """A layer is done."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
