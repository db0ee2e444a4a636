"""Attention of many query rows over all keys: what prefill does, on the kernels of ``flash``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from slimrt.ops.fast.features import Features
from slimrt.ops.fast.flash import KEY_BLOCK, flash_kernel, pack_kernel, tile_scratch
from slimrt.ops.fast.products import shape_of
from slimrt.ops.fast.team import Program, address
from slimrt.prune.reach import first_row, tiles

__all__ = ["attend"]

_LOG2_E = 1.4426950408889634


def attend(
    ops: Any, features: Features, q: np.ndarray, k: np.ndarray, v: np.ndarray, reach: Sequence[int],
    places: np.ndarray | None = None, first: np.ndarray | None = None, cap: float = 0.0,
    sinks: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Causal grouped-query attention by index, as ``NumpyOps.attend``: q f32 [T, H, Dh] -> [T, H, Dh].

    k and v [Hkv, N, Dh] are float16, the rows of a head follow each other. ``features``: what is multiplied with, some
    of those of ``ops``, a FastOps.
    """
    tokens, heads, width = q.shape
    kv_heads, keys, _ = k.shape
    shape = shape_of(features)
    blocks, padded = -(-keys // KEY_BLOCK), shape.padded(width)
    places = np.arange(keys - tokens, keys) if places is None else places
    out = np.empty(q.shape, np.float32)
    element = shape.element_bytes
    packed = np.empty(2 * kv_heads * blocks * KEY_BLOCK * padded * element + 64, np.uint8)
    key_panels = -(-address(packed) // 64) * 64
    value_panels = key_panels + kv_heads * blocks * KEY_BLOCK * padded * element
    program = Program()
    scratch, stride = ops.thread_scratch(program, tile_scratch(features, heads // kv_heads, width))
    items = np.array(
        [
            (some.start, some.stop - some.start, head, first_row(reach[head], place), place)
            for some, place in reversed(
                [(some, int(places[some.start])) for some in tiles(places)]
            )  # the longest first
            for head in range(kv_heads)
        ],
        np.int64,
    )
    program.add(
        pack_kernel(features), kv_heads * blocks,
        address(k), address(v), k.strides[0], v.strides[0], keys, blocks, width, padded, key_panels, value_panels,
        scratch, stride,
    )  # fmt: skip
    lowest = None if first is None else np.maximum(first, 0).astype(np.int64)
    program.add(
        flash_kernel(features, first is not None, cap), len(items),
        address(items), address(q), heads, kv_heads, width, padded, key_panels, value_panels, blocks,
        _LOG2_E / math.sqrt(width), address(out), scratch, stride, 0 if lowest is None else address(lowest),
        0 if sinks is None else address(sinks),
    )  # fmt: skip
    ops.team.run(program)
    return out
