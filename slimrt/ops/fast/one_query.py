"""How one query weighs keys: what a choice of blocks under a KV budget needs, once or twice a layer and token."""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import Any

import numpy as np
from numba import float32

from slimrt.ops.fast.attend_few import Grouping
from slimrt.ops.fast.attend_words import score_key
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.gemv import aligned_zeros
from slimrt.ops.fast.kernels import Kernel, compile_kernel
from slimrt.ops.fast.lanes import exp, sum_each
from slimrt.ops.fast.team import Program, address
from slimrt.ops.fast.vectors import (
    F32X16,
    argument,
    load,
    max_lanes,
    maximum,
    splat,
    store,
    store_scalar,
    sum_lanes,
)
from slimrt.ops.forks import after_fork, open_lock

__all__ = ["OneQuery"]

_LOWEST = -1e30  # instead of the score of a key that does not exist


@cache
def _weights_kernel(features: Features, head_dim: int, group: int) -> Kernel:
    """``softmax(q[h] @ keys[head].T / sqrt(Dh))`` for the query heads h of a KV head. Item: KV head.

    Args: 0 query f32 [H, Dh], 1 keys float16 [Hkv, N, Dh], 2 bytes from head to head, 3 N, 4 out f32 [H, N padded to
    16], 5 bytes from row to row of it, 6 scratch, 7 bytes of it for a thread.
    """
    grouping = Grouping(group)
    heads, chunks = grouping.together, grouping.chunks
    scale = np.float32(1 / math.sqrt(head_dim))
    score = score_key(head_dim, heads)

    def weigh(item, thread, args):
        count, width = argument(args, 3), argument(args, 5)
        keys = argument(args, 1) + item * argument(args, 2)
        sums = argument(args, 6) + thread * argument(args, 7)
        query = sums + heads * 16 * 64
        for chunk in range(chunks):
            first = item * group + min(chunk * heads, group - heads)
            rows = argument(args, 4) + first * width
            for i in range(0, heads * head_dim, 16):
                part = load(F32X16, argument(args, 0) + (first * head_dim + i) * 4)
                store(query + i * 4, part * splat(F32X16, scale))
            for some in range(0, count, 16):
                for i in range(16):
                    score(keys + min(some + i, count - 1) * head_dim * 2, query, sums + i * 64)
                for head in range(heads):
                    store(rows + head * width + some * 4, sum_each(sums + head * 16 * 64))
            for head in range(heads):
                row = rows + head * width
                for i in range(count, (count + 15) // 16 * 16):
                    store_scalar(row + i * 4, float32(_LOWEST))
                peaks = splat(F32X16, _LOWEST)
                for i in range(0, count, 16):
                    peaks = maximum(peaks, load(F32X16, row + i * 4))
                peak, total = splat(F32X16, max_lanes(peaks)), splat(F32X16, 0.0)
                for i in range(0, count, 16):
                    weights = exp(load(F32X16, row + i * 4) - peak)
                    total = total + weights
                    store(row + i * 4, weights)
                share = splat(F32X16, float32(1) / sum_lanes(total))
                for i in range(0, count, 16):
                    store(row + i * 4, load(F32X16, row + i * 4) * share)

    return compile_kernel(weigh, f"{features.key}-{head_dim}-{group}")


class OneQuery:
    """What one query pays to each key, on the threads of a FastOps; the program is made once for a shape of heads."""

    def __init__(self, ops: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        """``head_dim`` a multiple of 16."""
        group = heads // kv_heads
        self._team, self._lock = ops.team, threading.Lock()
        after_fork(self, open_lock)
        self._query = aligned_zeros(1, heads * head_dim * 4).view(np.float32)[0, : heads * head_dim]
        self._query.shape = heads, head_dim
        self._scratch = aligned_zeros(ops.threads, Grouping(group).together * (16 * 64 + head_dim * 4))
        self._program = Program()
        self._words = self._program.add(
            _weights_kernel(ops.features, head_dim, group), kv_heads,
            address(self._query), 0, 0, 0, 0, 0, address(self._scratch), self._scratch.strides[0],
        )  # fmt: skip

    def weigh(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """q f32 [1, H, Dh], k float16 [Hkv, N, Dh] -> softmax(q.k / sqrt(Dh)) f32 [H, N].

        The heads of k may lie any distance apart, their rows follow each other.
        """
        count = k.shape[1]
        out = np.empty((len(self._query), -(-count // 16) * 16), np.float32)
        with self._lock:
            self._query[...] = q[0]
            self._words[1:6] = address(k), k.strides[0], count, address(out), out.strides[0]
            self._team.run(self._program)
        return out[:, :count]
