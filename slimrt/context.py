"""What the engine reads into, what follows it, and what it tells of a cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from slimrt.kv.boundary import BoundaryStates
from slimrt.ops.protocol import Array, Cache
from slimrt.prune.schedule import Windows

__all__ = ["Context", "Kept", "Progress", "Trace"]

Progress = Callable[[int, int], None]  # (layers done, layers in all)


@dataclass
class Context:
    """What the model has read: keys and values, and (for a pruned prompt) the hidden states where pruning begins.

    ``windows``: those under which its first rows were read; the engine sets them.
    """

    cache: Cache
    boundary: BoundaryStates | None = None
    windows: Windows = field(default_factory=Windows)
    length: int = 0

    def truncate(self, length: int) -> None:
        """Forget all tokens from index ``length`` on."""
        self.length = min(self.length, length)
        self.cache.truncate(length)
        if self.boundary is not None:
            self.boundary.truncate(length)


class Kept(NamedTuple):
    """What a cut kept: the places [K] of tokens in the prompt; in words why more than usual (empty: not more)."""

    positions: np.ndarray
    why: str


class Trace(Protocol):
    """Follows one prefill (``slimrt.explain`` does), called from within the layer loop."""

    def begin(self) -> None:
        """The tokens are embedded, the layers begin."""

    def attention(self, layer: int, q: Array, keys: Array) -> None:
        """Queries q [T, H, Dh] of the last active rows will be held against ``keys`` [Hkv, N, Dh]."""

    def cut(
        self, layer: int, positions: np.ndarray, scores: np.ndarray, rows: np.ndarray, by: np.ndarray | None
    ) -> None:
        """Of the active ``positions`` [N], whose blocks scored ``scores`` [B], those at ``rows`` go on. ``by`` [B]: the
        position of the token that wants a block most (-1: none does); None where the score does not tell."""

    def layer(self, layer: int) -> None:
        """A layer is done."""
