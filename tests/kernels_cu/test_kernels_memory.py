"""The kernels that move rows, run on the CPU: what they write is bit for bit what NumPy's indexing gives."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernel_cases import NULL, half, launch, mode, needs_compiler, noise

__all__ = ["mode"]
pytestmark = needs_compiler


@pytest.mark.parametrize("width", [4, 2052])
@pytest.mark.parametrize("with_positions", [False, True])
def test_compact(width: int, with_positions: bool) -> None:
    x = noise((50, width))
    positions = np.random.default_rng(1).permutation(1000)[:50].astype(np.int32)
    rows = np.array([0, 3, 4, 30, 49], np.int32)
    out, kept = np.empty((5, width), np.float32), np.full(5, -7, np.int32)
    args = [x, out, rows, positions if with_positions else NULL, kept if with_positions else NULL, 4 * width]
    launch("compact.cu", {}, "compact", (5,), 128, args)
    assert np.array_equal(out, x[rows])
    assert np.array_equal(kept, positions[rows] if with_positions else np.full(5, -7))


@pytest.mark.parametrize(("tokens", "start"), [(1, 9), (7, 0), (3, 17)])
def test_kv_append(tokens: int, start: int) -> None:
    kv_heads, dh, capacity = 3, 72, 20
    joint = half(noise((tokens, 2 + 2 * kv_heads, dh)))
    k, v = joint[:, 2 : 2 + kv_heads], joint[:, 2 + kv_heads :]
    layer = half(noise((2, kv_heads, capacity, dh), 1))
    expected = layer.copy()
    expected[0, :, start : start + tokens], expected[1, :, start : start + tokens] = k.swapaxes(0, 1), v.swapaxes(0, 1)
    args = [k, v, layer, np.array([start], np.int32), kv_heads, dh, joint[0].size, capacity]
    launch("kv_append.cu", {"T": "f16"}, "kv_append", (tokens,), 128, args)
    assert np.array_equal(layer, expected)


def test_blocks_and_slots() -> None:
    """Scattered blocks of two slabs into scattered slots, and back into other blocks."""
    kv_heads, block, dh, slots = 2, 16, 72, 7
    slabs = [half(noise((4, 2, kv_heads, block, dh), seed)) for seed in (1, 2)]
    blocks = [slabs[0][3], slabs[1][0], slabs[1][2]]
    addresses = np.array([b.ctypes.data for b in blocks], np.uint64)
    layer = half(noise((2, kv_heads, slots * block, dh), 3))
    expected = layer.copy()
    places = np.array([5, 0, 2], np.int32)
    for place, source in zip(places, blocks, strict=True):
        expected[:, :, place * block : (place + 1) * block] = source
    grid, sizes = (3, 2 * kv_heads), [block, dh, slots * block]
    launch("kv_blocks.cu", {"T": "f16"}, "blocks_to_layer", grid, 128, [addresses, places, layer, *sizes])
    assert np.array_equal(layer, expected)

    back = np.array([1, 5, 6], np.int32)
    before = [slab.copy() for slab in slabs]
    launch("kv_blocks.cu", {"T": "f16"}, "layer_to_blocks", grid, 128, [addresses, back, layer, *sizes])
    assert np.array_equal(layer, expected)
    for slab, at, slot in ((0, 3, 1), (1, 0, 5), (1, 2, 6)):
        before[slab][at] = layer[:, :, slot * block : (slot + 1) * block]
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(slabs, before, strict=True))
