"""The attention kernels, run on the CPU, against NumPyOps.attend and float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from slimrt.prune.reach import SINK, first_row
from tests.kernel_cases import NULL, Array, assert_as_exact, full, half, launch, mode, needs_compiler, noise, rounded

__all__ = ["mode"]
pytestmark = needs_compiler


def seen_rows(reach: int, row: int) -> Array:
    first = first_row(reach, row)
    rows = np.arange(row + 1)
    return rows[(rows >= first) | (rows < SINK)] if first else rows


def attention(
    q: Array,
    k: Array,
    v: Array,
    reach: Sequence[int] | None,
    kind: str | None = None,
    window: int = 0,
    cap: float = 0.0,
) -> Array:
    """In float64, or naively with 16-bit weights and result where ``kind`` is given. ``window``: the last keys that a
    row sees (0: all); ``cap``: of scores."""
    tokens, heads, width = q.shape
    kv_heads, keys, _ = k.shape
    real = np.float32 if kind else np.float64
    out = np.empty(q.shape, real)
    for t in range(tokens):
        for head in range(heads):
            kv = head // (heads // kv_heads)
            rows = seen_rows(reach[kv] if reach else 0, keys - tokens + t)[-window:]
            scores = (k[kv, rows].astype(real) @ q[t, head].astype(real)) / real(np.sqrt(width))
            scores = real(cap) * np.tanh(scores / real(cap)) if cap else scores
            weights = np.exp(scores - scores.max())
            total = weights.sum()
            mixed = (rounded(weights, kind) if kind else weights) @ v[kv, rows].astype(real) / total
            out[t, head] = rounded(mixed, kind) if kind else mixed
    return out


def inputs(tokens: int, keys: int, heads: int, kv_heads: int, dh: int, kind: str, spare: int = 0) -> tuple[Array, ...]:
    """q [T, H, Dh], k and v [Hkv, N + spare, Dh] in 16 bits; spare rows hold NaN, which must not be read."""
    q = half(noise((tokens, heads, dh), 1, 1.5), kind)
    layer = np.full((2, kv_heads, keys + spare, dh), np.nan, np.float32)
    layer[:, :, :keys] = noise((2, kv_heads, keys, dh), 2, 1.5)
    layer = half(layer, kind)
    return q, layer[0], layer[1]


PREFILL = [
    # tokens, keys, heads, kv_heads, dh, tile, stages, kind, reach
    (1, 1, 1, 1, 64, 64, 1, "f16", None),
    (17, 17, 2, 1, 64, 128, 2, "f16", None),
    (130, 130, 3, 1, 128, 128, 2, "f16", None),
    (65, 200, 2, 2, 128, 64, 1, "f16", None),
    (70, 333, 4, 2, 64, 128, 2, "bf16", None),
    (129, 193, 2, 1, 64, 64, 1, "bf16", None),
    (100, 130, 2, 1, 128, 128, 2, "bf16", None),
    (90, 700, 4, 2, 64, 128, 2, "f16", (0, 128)),
    (390, 390, 2, 2, 64, 64, 1, "f16", (64, 192)),
    (40, 420, 2, 2, 128, 64, 2, "f16", (64, 128)),
]


@pytest.mark.parametrize(("tokens", "keys", "heads", "kv_heads", "dh", "tile", "stages", "kind", "reach"), PREFILL)
def test_prefill(
    tokens: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dh: int,
    tile: int,
    stages: int,
    kind: str,
    reach: tuple[int, ...] | None,
) -> None:
    q, k, v = inputs(tokens, keys, heads, kv_heads, dh, kind, spare=5)
    joint = np.zeros((tokens, heads + 1, dh), q.dtype)  # q is part of a wider row
    joint[:, :heads] = q
    out = np.empty((tokens, heads, dh), q.dtype)
    launch(
        "attention_prefill.cu",
        {"T": kind, "DH": dh, "TILE": tile, "STAGES": stages},
        "attention_prefill",
        (heads, (keys - 1) // tile - (keys - tokens) // tile + 1),
        128,
        [
            *(joint, k, v, out, NULL if reach is None else np.array(reach, np.int32)),
            *(tokens, keys, heads, kv_heads, (heads + 1) * dh, k[0].size, NULL, 0.0),
        ],
        shared=2 * dh * (tile + 128 * stages),
    )
    arrays = full(q), full(k[:, :keys]), full(v[:, :keys])
    assert_as_exact(full(out), attention(*arrays, reach, kind), attention(*arrays, reach))


def anywhere(per_block: int) -> tuple[Array, Array]:
    """Places among 520 keys, and ``spans`` of their tiles: far apart, ragged, two within one tile of keys, and one
    alone in a block of ``per_block``."""
    tiles = [(0, 64), (64, 10), (200, 64), (264, 64), (511, 1)]
    places = np.concatenate([np.arange(first, first + count) for first, count in tiles])
    begins = np.cumsum([0, *(count for _, count in tiles)]).tolist()
    spans = [(begin, first) for begin, (first, _) in zip(begins, tiles, strict=False)]
    spans += [(len(places), 511)] * (-len(tiles) % per_block + 1)
    return places, np.array(spans, np.int32)


@pytest.mark.parametrize(("tile", "stages", "dh"), [(64, 1, 64), (128, 2, 128)])
def test_tiles_of_rows_anywhere(tile: int, stages: int, dh: int) -> None:
    """With the bits that a pass of all rows gives them."""
    q, k, v = inputs(520, 520, 2, 1, dh, "f16", spare=5)
    places, spans = anywhere(tile // 64)
    results = []
    for rows, blocks, more, how in (
        (q, -(-520 // tile), [], {}),
        (q[places], (len(spans) - 1) * 64 // tile, [spans], {"PLACED": 1}),
    ):
        out = half(np.full(rows.shape, np.nan, np.float32))
        launch(
            "attention_prefill.cu", {"T": "f16", "DH": dh, "TILE": tile, "STAGES": stages, **how}, "attention_prefill",
            (2, blocks), 128,
            [rows, k, v, out, NULL, len(rows), 520, 2, 1, 2 * dh, k[0].size, NULL, 0.0, *more],
            shared=2 * dh * (tile + 128 * stages),
        )  # fmt: skip
        results.append(full(out))
    assert np.array_equal(results[1], results[0][places])


def test_prefill_survives_scores_far_apart() -> None:
    """Scores of thousands that grow with every key: the running maximum moves all the time, nothing may overflow."""
    q, k, v = noise((96, 1, 64), 1), noise((1, 96, 64), 2), noise((1, 96, 64), 3)
    q[..., 0] = 120
    k[..., 0] = 200 + np.arange(96) / 2
    q, k, v = half(q), half(k), half(v)
    out = np.empty_like(q)
    launch(
        "attention_prefill.cu",
        {"T": "f16", "DH": 64, "TILE": 64, "STAGES": 1},
        "attention_prefill",
        (1, 2),
        128,
        [q, k, v, out, NULL, 96, 96, 1, 1, 64, 96 * 64, NULL, 0.0],
        shared=128 * (64 + 128),
    )
    arrays = full(q), full(k), full(v)
    naive, exact = (attention(*arrays, None, kind) for kind in ("f16", None))
    assert_as_exact(full(out), naive, exact)
    for splits, row in ((1, 63), (2, 95)):  # decode: the last warp, then the last split has the greatest
        partial, last = np.full((1, splits, 66), np.nan, np.float32), np.empty_like(q[:1])
        args = [q[row : row + 1], k, v, NULL, np.array([row + 1], np.int32), NULL, partial, 1, 1, 96 * 64, 1, NULL, 0.0]
        launch("attention_decode.cu", {"T": "f16", "DH": 64}, "attention_decode", (1, splits), 128, args, 512 * 64)
        launch("attention_decode.cu", {"T": "f16", "DH": 64}, "attention_combine", (1,), 64, [partial, last, splits])
        assert_as_exact(full(last), naive[row : row + 1], exact[row : row + 1])


DECODE = [
    # length, heads, kv_heads, dh, block (0: no table), splits, kind, reach
    (1, 2, 1, 64, 0, 1, "f16", None),
    (17, 3, 1, 128, 0, 2, "f16", None),
    (200, 8, 2, 64, 16, 3, "f16", None),
    (333, 16, 1, 128, 64, 4, "bf16", None),
    (70, 4, 4, 64, 16, 7, "f16", None),
    (700, 4, 2, 64, 16, 3, "f16", (0, 128)),
    (640, 2, 2, 128, 0, 2, "f16", (192, 64)),  # the query is the last of a run
]


@pytest.mark.parametrize(("length", "heads", "kv_heads", "dh", "block", "splits", "kind", "reach"), DECODE)
def test_decode(
    length: int,
    heads: int,
    kv_heads: int,
    dh: int,
    block: int,
    splits: int,
    kind: str,
    reach: tuple[int, ...] | None,
) -> None:
    q, k, v = inputs(1, length, heads, kv_heads, dh, kind)
    held_k, held_v, table = k, v, None
    if block:  # blocks lie scattered over a larger cache that holds NaN elsewhere
        blocks = -(-length // block)
        table = np.random.default_rng(3).permutation(blocks + 3)[:blocks].astype(np.int32)
        rows = (table[:, None] * block + np.arange(block)).reshape(-1)[:length]
        held_k = half(np.full((kv_heads, (blocks + 3) * block, dh), np.nan, np.float32), kind)
        held_v = held_k.copy()
        held_k[:, rows], held_v[:, rows] = k, v
    partial = np.full((heads, splits, dh + 2), np.nan, np.float32)
    out = np.empty((1, heads, dh), q.dtype)
    defines = {"T": kind, "DH": dh}
    launch(
        "attention_decode.cu",
        defines,
        "attention_decode",
        (kv_heads, splits),
        128,
        [
            *(q, held_k, held_v, NULL if table is None else table, np.array([length], np.int32)),
            *(NULL if reach is None else np.array(reach, np.int32), partial),
            *(heads, kv_heads, held_k[0].size, block, NULL, 0.0),
        ],
        shared=512 * dh,
    )
    launch("attention_decode.cu", defines, "attention_combine", (heads,), dh, [partial, out, splits])
    arrays = full(q), full(k), full(v)
    assert_as_exact(full(out), attention(*arrays, reach, kind), attention(*arrays, reach))


def starts_of(tokens: int, keys: int, window: int) -> Array:
    return np.maximum(0, np.arange(keys - tokens, keys) + 1 - window).astype(np.int32)


WINDOWS = [
    # tokens, keys, heads, kv_heads, dh, tile, stages, window, cap
    (70, 333, 2, 1, 96, 128, 2, 100, 0.0),  # Phi-3's heads
    (200, 200, 2, 2, 256, 64, 1, 40, 2.0),  # Gemma's: a window that ends within a tile, and scores beyond the cap
    (90, 90, 2, 1, 256, 64, 1, 0, 2.0),
]


@pytest.mark.parametrize(("tokens", "keys", "heads", "kv_heads", "dh", "tile", "stages", "window", "cap"), WINDOWS)
def test_windows_caps_and_heads(
    tokens: int, keys: int, heads: int, kv_heads: int, dh: int, tile: int, stages: int, window: int, cap: float
) -> None:
    """Prefill, and decode of its last token."""
    q, k, v = inputs(tokens, keys, heads, kv_heads, dh, "f16", spare=5)
    arrays = full(q), full(k[:, :keys]), full(v[:, :keys])
    exact, naive = (attention(*arrays, None, kind, window, cap) for kind in (None, "f16"))
    starts = starts_of(tokens, keys, window) if window else NULL
    capped, out = {"CAPPED": 1} if cap else {}, np.empty_like(q)
    launch(
        "attention_prefill.cu",
        {"T": "f16", "DH": dh, "TILE": tile, "STAGES": stages, "WINDOWED": 1, **capped},
        "attention_prefill",
        (heads, (keys - 1) // tile - (keys - tokens) // tile + 1),
        128,
        [q, k, v, out, NULL, tokens, keys, heads, kv_heads, heads * dh, k[0].size, starts, cap],
        shared=2 * dh * (tile + 128 * stages),
    )
    assert_as_exact(full(out), naive, exact)
    splits, warps, last = 3, 2 if dh > 128 else 4, np.empty((1, heads, dh), q.dtype)
    partial = np.full((heads, splits, dh + 2), np.nan, np.float32)
    defines = {"T": "f16", "DH": dh, "WINDOWED": 1, **capped}
    args = [q[-1:], k, v, NULL, np.array([keys], np.int32), NULL, partial, heads, kv_heads, k[0].size, 1]
    args += [starts[-1:].copy() if window else NULL, cap]
    launch("attention_decode.cu", defines, "attention_decode", (kv_heads, splits), 32 * warps, args, 128 * warps * dh)
    launch("attention_decode.cu", defines, "attention_combine", (heads,), dh, [partial, last, splits])
    assert_as_exact(full(last), naive[-1:], exact[-1:])
