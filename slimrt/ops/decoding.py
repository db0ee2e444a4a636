"""What a backend may offer that reads one token through the whole model at once, instead of layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from slimrt.kv_cache import KVCache
from slimrt.ops.reach import Reach

__all__ = ["Decoder"]


class Decoder(Protocol):
    """Made by a backend's ``decoder(model)``; None there: the engine goes through the layers as for many tokens."""

    def step(
        self,
        cache: KVCache,
        token: int,
        position: int,
        *,
        reach: Sequence[Reach] | None = None,
        middle: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Read one token: its keys and values are appended to every layer of ``cache``.

        ``reach``: for each layer how far back its KV heads look. Returns the logits [V] (finite or not), and the hidden
        states [1, D] of layer ``middle`` (None: none) between attention and feed-forward; both new arrays.
        """
