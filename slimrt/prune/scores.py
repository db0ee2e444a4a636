"""How much the last queries of a prompt want each block of keys: the scores that decide what stays.

Every score maps the rotated queries q [W, H, Dh] of the last W of N rows and the keys k [Hkv, N, Dh] to one number per
block of ``block`` rows, [B] float32, higher is wanted more. ``unit`` divides ``block``. A row sees keys up to itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

__all__ = ["BLOCK_SCORES", "WEIGHT_SCORES", "block_mass", "unit_means"]

Array = np.ndarray

_ROWS = 16  # queries whose products with all keys lie in memory at a time


def unit_means(k: Array, unit: int) -> Array:
    """Mean key of each run of ``unit`` rows: k [Hkv, N, Dh] -> [Hkv, U, Dh]; the last unit may be shorter."""
    starts = np.arange(0, k.shape[1], unit)
    sums = np.add.reduceat(k, starts, axis=1)
    sums /= np.diff(np.append(starts, k.shape[1]))[None, :, None].astype(np.float32)
    return sums


def _products(q: Array, k: Array) -> Array:
    """q . k / sqrt(Dh) -> [H, W, N]; query head h reads KV head h // (H/Hkv)."""
    window, heads, width = q.shape
    kv_heads = k.shape[0]
    scaled = (
        (q * np.float32(1 / math.sqrt(width))).transpose(1, 0, 2).reshape(kv_heads, heads // kv_heads * window, width)
    )
    return np.matmul(scaled, k.transpose(0, 2, 1)).reshape(heads, window, k.shape[1])


def _softmax(scores: Array) -> Array:
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def _attention(q: Array, k: Array) -> Array:
    """Attention of the last W rows over all keys, causal -> [H, W, N]."""
    scores = _products(q, k)
    window, keys = scores.shape[1:]
    later = np.arange(keys)[None, :] > (keys - window + np.arange(window))[:, None]
    scores[:, later] = -np.inf
    return _softmax(scores)


def _per_block(values: Array, size: int, reduce: np.ufunc) -> Array:
    """Reduce the last axis in runs of ``size``."""
    return reduce.reduceat(values, np.arange(0, values.shape[-1], size), axis=-1)


def block_mass(q: Array, k: Array, block: int, causal: bool, cap: float = 0.0, sinks: Array | None = None) -> Array:
    """The attention that each query in each head pays to each block: q [W, H, Dh], k [Hkv, N, Dh] -> [W, H, B].

    ``causal``: the queries are those of the last W rows, and see keys up to their own; else they see all. ``cap``: a
    score s becomes cap * tanh(s / cap), where the model's attention does the same. ``sinks`` [H]: what each head's
    softmax has besides the keys; that share falls to no block.
    """
    window, heads, _ = q.shape
    kv_heads, keys, _ = k.shape
    group = heads // kv_heads
    result = np.empty((window, heads, -(-keys // block)), np.result_type(q, k))
    aside = np.zeros((window, heads), result.dtype)
    later = np.arange(window)[None, :] > np.arange(window)[:, None]  # which of the last W keys a query does not see
    # Some rows of one KV head at a time, so that their products with all keys stay in the cache.
    for head in range(kv_heads):
        mine = slice(head * group, (head + 1) * group)
        for first in range(0, window, _ROWS):
            rows = slice(first, first + _ROWS)
            scores = _products(q[rows, mine], k[head : head + 1])
            if cap:
                scores = np.tanh(scores / np.float32(cap)) * np.float32(cap)
            if causal:
                np.copyto(scores[:, :, keys - window :], -np.inf, where=later[rows])
            peak = scores.max(axis=-1, keepdims=True)
            if sinks is not None:
                peak = np.maximum(peak, sinks[mine].reshape(-1, 1, 1))
                aside[rows, mine] = np.exp(sinks[mine].reshape(-1, 1) - peak[:, :, 0]).T
            scores -= peak
            np.exp(scores, out=scores)
            result[rows, mine] = _per_block(scores, block, np.add).transpose(1, 0, 2)
    result /= result.sum(axis=-1, keepdims=True) + aside[:, :, None]
    return result


def mean_qk(q: Array, k: Array, block: int, unit: int) -> Array:
    """SlimInfer's published score: |q . mean key| averaged over queries and heads, the best unit of the block."""
    units = np.abs(_products(q, unit_means(k, unit))).mean(axis=(0, 1))
    return _per_block(units, block // unit, np.maximum)


def unit_softmax(q: Array, k: Array, block: int, unit: int) -> Array:
    """Softmax over the units' mean keys, averaged over queries, the best head, summed over the block's units."""
    units = _softmax(_products(q, unit_means(k, unit))).mean(axis=1)
    return _per_block(units, block // unit, np.add).max(axis=0)


def token_max(q: Array, k: Array, block: int, unit: int) -> Array:
    """The strongest attention that any of the queries, in any head, pays to any token of the block."""
    return _strongest(_attention(q, k), block)


def token_mass(q: Array, k: Array, block: int, unit: int) -> Array:
    """The attention that the block receives in all, averaged over queries, in the head that wants it most."""
    return _mass(_attention(q, k), block)


def _strongest(weights: Array, block: int) -> Array:
    """token_max of attention weights [H, W, N] -> [B]."""
    return _per_block(weights.max(axis=(0, 1)), block, np.maximum)


def _mass(weights: Array, block: int) -> Array:
    """token_mass of attention weights [H, W, N] -> [B]."""
    return _per_block(weights.mean(axis=1), block, np.add).max(axis=0)


BLOCK_SCORES: dict[str, Callable[[Array, Array, int, int], Array]] = {
    "mean_qk": mean_qk,
    "unit_softmax": unit_softmax,
    "token_max": token_max,
    "token_mass": token_mass,
}

# Of those the ones that follow from attention weights [H, W, N] alone: for backends that have computed them.
WEIGHT_SCORES: dict[str, Callable[[Array, int], Array]] = {"token_max": _strongest, "token_mass": _mass}
