"""The kernels that score blocks, run on the CPU, against ``prune.scores``."""

from __future__ import annotations

import numpy as np
import pytest

from slimrt.prune import scores as block_scores
from slimrt.prune.scores import BLOCK_SCORES, unit_means
from tests.kernel_cases import NULL, Array, assert_as_exact, full, half, launch, mode, needs_compiler, noise, rounded

__all__ = ["mode"]
pytestmark = needs_compiler


def means_of(k: Array, keys: int, unit: int, kind: str) -> Array:
    """The kernel's unit means [Hkv, U, Dh] of k [Hkv, N + spare, Dh]."""
    kv_heads, _, dh = k.shape
    units = -(-keys // unit)
    means = half(np.full((kv_heads, units, dh), np.nan, np.float32), kind)
    launch(
        "unit_means.cu",
        {"T": kind},
        "unit_means",
        (units, kv_heads),
        64,
        [k, means, keys, unit, dh, k[0].size, means[0].size],
    )
    return means


@pytest.mark.parametrize(("keys", "unit", "dh", "kind"), [(1, 8, 64, "f16"), (67, 8, 128, "f16"), (64, 16, 64, "bf16")])
def test_unit_means(keys: int, unit: int, dh: int, kind: str) -> None:
    k = half(noise((2, keys + 3, dh)), kind)
    exact = unit_means(full(k[:, :keys]).astype(np.float64), unit)
    naive = rounded(unit_means(full(k[:, :keys]), unit), kind)
    assert_as_exact(full(means_of(k, keys, unit, kind)), naive, exact)


def kernel_scores(name: str, q: Array, k: Array, keys: int, block: int, unit: int, kind: str) -> Array:
    """The launches that make one score; q [W, H + 1, Dh] of which the first H heads count, k [Hkv, N + spare, Dh]."""
    window, heads, dh = q.shape[0], q.shape[1] - 1, q.shape[2]
    kv_heads = len(k)
    defines = {"T": kind, "DH": dh}
    shared = 128 * dh + 16640
    count, per_block, source = keys, block, k
    if name in ("mean_qk", "unit_softmax"):
        source = means_of(k, keys, unit, kind)
        count, per_block = source.shape[1], block // unit
    blocks = -(-count // per_block)
    scores = np.full(blocks, np.nan, np.float32)
    products = [window, count, heads, kv_heads, (heads + 1) * dh, source[0].size]
    row_grid = (-(-blocks // 128),)
    if name == "mean_qk":
        sums = np.full((kv_heads, count), np.nan, np.float32)
        grid = (-(-count // 64), kv_heads)
        launch("block_scores.cu", defines, "score_products", grid, 128, [q, source, sums, *products], shared)
        args = [sums, scores, count, blocks, kv_heads, per_block, 1 / (heads * window)]
        launch("block_scores.cu", defines, "score_mean", row_grid, 128, args)
        return scores
    # As a captured graph has it: the arguments and the grid leave room, the number is in memory.
    room, counted = (2 * per_block, np.array([count], np.int32)) if window < 5 else (0, NULL)
    products[1] += room
    stats = np.full((heads * window, blocks, 2), np.nan, np.float32)
    norms = np.full((heads * window, 2), np.nan, np.float32)
    grid = (-(-(blocks + 2) // max(1, 64 // per_block)), kv_heads)
    causal = int(name.startswith("token"))
    args = [q, source, stats, *products, per_block, causal, 0.0, counted]
    launch("block_scores.cu", defines, "score_stats", grid, 128, args, shared)
    blocks += room // per_block
    args = [stats, norms, blocks, per_block, counted]
    launch("block_scores.cu", defines, "score_norms", (heads * window,), 128, args)
    args = [stats, norms, scores, window, heads, blocks, int(name != "token_max"), per_block, counted]
    launch("block_scores.cu", defines, "score_softmax", row_grid, 128, args)
    return scores


@pytest.mark.parametrize("name", BLOCK_SCORES)
@pytest.mark.parametrize(
    ("window", "keys", "heads", "kv_heads", "dh", "block", "unit", "kind"),
    [
        (1, 1, 1, 1, 64, 64, 8, "f16"),
        (4, 333, 6, 2, 64, 64, 8, "f16"),
        (16, 200, 8, 2, 128, 16, 8, "f16"),
        (5, 130, 3, 3, 64, 24, 8, "bf16"),
        (70, 150, 2, 1, 64, 32, 32, "f16"),
        (3, 500, 2, 1, 128, 160, 8, "f16"),
        (2, 700, 2, 2, 64, 600, 2, "f16"),
    ],
)
def test_block_scores(
    name: str,
    window: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dh: int,
    block: int,
    unit: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    softmax = block_scores._softmax
    q = half(noise((window, heads + 1, dh), 1), kind)
    k = half(noise((kv_heads, keys + 2, dh), 2), kind)
    k[:, keys:] = half(np.array(np.nan, np.float32), kind)
    got = kernel_scores(name, q, k, keys, block, unit, kind)
    queries, seen = full(q[:, :heads]), full(k[:, :keys])
    exact = BLOCK_SCORES[name](queries.astype(np.float64), seen.astype(np.float64), block, unit)
    if name in ("mean_qk", "unit_softmax"):  # the means are kept in 16 bits
        naive = BLOCK_SCORES[name](queries, rounded(unit_means(seen, unit), kind), block // unit, 1)
    else:  # naively, attention's weights are
        monkeypatch.setattr(block_scores, "_softmax", lambda scores: rounded(softmax(scores), kind))
        naive = BLOCK_SCORES[name](queries, seen, block, unit)
    assert_as_exact(got, naive, exact)
