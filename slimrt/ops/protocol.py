"""What a backend may offer that reads one token through the whole model at once, instead of layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from slimrt.kv.cache import Cache

__all__ = ["Decoder"]


class Decoder(Protocol):
    """Made by a backend's ``decoder(model, budget=...)`` for caches with or without a budget of resident rows; None
    there: the engine goes through the layers as for many tokens."""

    def step(
        self,
        cache: Cache,
        token: int,
        position: int,
        *,
        middle: int | None = None,
    ) -> tuple[np.ndarray, Any]:
        """Read one token: its keys and values are appended to every layer of ``cache``; it looks at all of them, or at
        those that the cache chooses.

        Returns the logits [V] on the host (finite or not), and the hidden states [1, D] of layer ``middle`` (None:
        None) between attention and feed-forward, where the model computes; both new arrays.
        """
