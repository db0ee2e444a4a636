"""Rows from a file back to where the model computes: into a cache, and beside it."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimrt.ops.protocol import Array, Cache, Ops

__all__ = ["placed", "restore_layer"]


def placed(ops: Ops, rows: np.ndarray, dtype: Any = np.float32) -> Array:
    """``rows``, of any shape, where the model computes, as ``dtype``."""
    found = ops.empty(rows.shape, dtype)
    ops.wait(ops.copy([(found, rows)], after=ops.mark()))
    return found


def restore_layer(
    ops: Ops, cache: Cache, layer: int, keys: np.ndarray, values: np.ndarray, positions: np.ndarray
) -> None:
    """Give a layer of an empty cache its rows, K, V [Hkv, n, Dh] at ``positions`` [n], as a pass over a prompt would;
    layers in order."""
    if len(positions):
        k, v = (placed(ops, rows.transpose(1, 0, 2), ops.kv_type) for rows in (keys, values))
        cache.update(layer, k, v, positions, None, exact=True)
    cache.attended(layer)
