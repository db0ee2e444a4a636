"""The kernels that move rows, run on the CPU: what they write is bit for bit what NumPy's indexing gives."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernel_cases import NULL, half, launch, mode, needs_compiler, noise

__all__ = ["mode"]
pytestmark = needs_compiler


@pytest.mark.parametrize("width", [4, 2052])
def test_compact(width: int) -> None:
    x, rows = noise((50, width)), np.array([0, 3, 4, 30, 49], np.int32)
    out = np.empty((5, width), np.float32)
    launch("compact.cu", {}, "compact", (5,), 128, [x, out, rows, 4 * width])
    assert np.array_equal(out, x[rows])


@pytest.mark.parametrize(("tokens", "start"), [(1, 9), (7, 0), (3, 17)])
def test_kv_append(tokens: int, start: int) -> None:
    kv_heads, dh, capacity = 3, 72, 20
    joint = half(noise((tokens, 3 + 2 * kv_heads, dh)))
    k, v = joint[:, 2 : 2 + kv_heads], joint[:, 3 + kv_heads :]  # another head lies between them
    layer = half(noise((2, kv_heads, capacity, dh), 1))
    expected = layer.copy()
    expected[0, :, start : start + tokens], expected[1, :, start : start + tokens] = k.swapaxes(0, 1), v.swapaxes(0, 1)
    args = [k, v, layer, np.array([start], np.int32), kv_heads, dh, joint[0].size, capacity]
    launch("kv_append.cu", {"T": "f16"}, "kv_append", (tokens,), 128, args)
    assert np.array_equal(layer, expected)


@pytest.mark.parametrize("counted", [None, 2])
def test_blocks_and_slots(counted: int | None) -> None:
    """Scattered blocks of two slabs into scattered slots."""
    kv_heads, block, dh, slots = 2, 16, 72, 7
    slabs = [half(noise((4, 2, kv_heads, block, dh), seed)) for seed in (1, 2)]
    blocks = [slabs[0][3], slabs[1][0], slabs[1][2]]
    addresses = np.array([b.ctypes.data for b in blocks], np.uint64)
    layer = half(noise((2, kv_heads, slots * block, dh), 3))
    expected = layer.copy()
    places = np.array([5, 0, 2], np.int32)
    for place, source in list(zip(places, blocks, strict=True))[: counted or 3]:
        expected[:, :, place * block : (place + 1) * block] = source
    grid, sizes = (3, 2 * kv_heads), [block, dh, slots * block]
    count = NULL if counted is None else np.array([counted], np.int32)
    launch("kv_blocks.cu", {"T": "f16"}, "blocks_to_layer", grid, 128, [addresses, places, layer, *sizes, count])
    assert np.array_equal(layer, expected)
