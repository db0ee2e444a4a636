"""NumPy operations against plain float64 formulas, at ragged sizes."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from slimrt.ops.numpy.attention import KEY_TILE, QUERY_TILE
from slimrt.ops.numpy.numpy_ops import NumpyOps, Weight
from slimrt.ops.numpy.workers import Workers, single_threaded_blas
from slimrt.prune import scores as block_scores
from tests import reference
from tests.tolerance import EPS32, SLACK


def random(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 80), (8, 1, 128)])
@pytest.mark.parametrize(
    ("tokens", "keys"), [(1, 1), (1, 700), (1, 5000), (7, 4099), (5, 5), (16, 900), (17, 17), (129, 129), (300, 1100)]
)
def test_attention(threads: int, heads: int, kv_heads: int, width: int, tokens: int, keys: int) -> None:
    q, k, v = random((tokens, heads, width)), random((kv_heads, keys, width), 1), random((kv_heads, keys, width), 2)
    rows = [x.transpose(1, 0, 2) for x in (k, v)]
    truth = reference.attention(q.astype(np.float64), *(x.astype(np.float64) for x in rows))
    unit = np.abs(reference.attention(q, *rows) - truth).max()
    ours = NumpyOps(threads).attend(q, k, v)
    assert ours.dtype == np.float32
    assert np.abs(ours - truth).max() <= SLACK * max(unit, EPS32)


def test_attention_where_the_diagonal_is_no_reference() -> None:
    """Early keys outscore the diagonal tile by more than exp can hold in float32: the running maximum must step in."""
    tokens, width = KEY_TILE + QUERY_TILE, 64
    q, k, v = random((tokens, 2, width)), random((1, tokens, width), 1, 0.01), random((1, tokens, width), 2)
    k[0, 3] = q[-1, 0] * 40
    rows = [x.transpose(1, 0, 2) for x in (k, v)]
    truth = reference.attention(q.astype(np.float64), *(x.astype(np.float64) for x in rows))
    assert (q[-1, 0] @ k[0, 3] / 8) - (q[-1, 0] @ k[0, -100:].T / 8).max() > 89
    with np.errstate(all="raise", under="ignore"):
        ours = NumpyOps(2).attend(q, k, v)
    assert np.abs(ours - truth).max() <= SLACK * np.abs(reference.attention(q, *rows) - truth).max()


@pytest.mark.parametrize("tokens", [1, 5, 16, 40, 129, 700, 1500])
@pytest.mark.parametrize("reach", [(64, 0, 256), (128, 128, 128), (1024, 512, 64)])
def test_attention_within_reach(tokens: int, reach: tuple[int, ...]) -> None:
    """Against the rule itself, row by row; a query's own row and the sink are always read."""
    keys, width = 1500, 64
    q, k, v = random((tokens, 6, width)), random((3, keys, width), 1), random((3, keys, width), 2)
    rows, columns = np.arange(keys - tokens, keys)[:, None], np.arange(keys)[None, :]
    truth, naive = np.empty((tokens, 6, width)), np.empty((tokens, 6, width), np.float32)
    for head in range(6):
        far = reach[head // 2]
        window = columns >= rows // 128 * 128 - far if far else True
        seen = (columns <= rows) & (window | (columns < 64))
        for result, dtype in ((truth, np.float64), (naive, np.float32)):
            scores = (q[:, head].astype(dtype) @ k[head // 2].T.astype(dtype)) / dtype(8)
            weights = np.exp(np.where(seen, scores - scores.max(axis=1, keepdims=True), -np.inf))
            result[:, head] = weights @ v[head // 2].astype(dtype) / weights.sum(axis=1, keepdims=True)
    unit = np.abs(naive - truth).max()
    for threads in (1, 2):
        ours = NumpyOps(threads).attend(q, k, v, reach=reach)
        assert np.abs(ours - truth).max() <= SLACK * max(unit, EPS32)


def test_swiglu_far_out() -> None:
    gate_up = np.array([[-200.0, -88.5, 0.0, 3.0, 200.0, 1.0, 1.0, 1.0, 2.0, 1.0]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        ours = NumpyOps(1).swiglu(gate_up)
    gate, up = gate_up[0, :5].astype(np.float64), gate_up[0, 5:]
    truth = gate / (1 + np.exp(-gate)) * up
    with np.errstate(over="ignore"):
        naive = gate_up[0, :5] / (1 + np.exp(-gate_up[0, :5])) * up
    rounding = EPS32 * np.abs(truth) + np.finfo(np.float32).tiny
    assert (np.abs(ours[0] - truth) <= SLACK * np.maximum(np.abs(naive - truth), rounding)).all()


def test_rows_cover_everything_once() -> None:
    for threads in (1, 2, 5):
        for count in (1, 63, 64, 65, 257, 1000):
            seen = np.zeros(count, int)

            def task(at: slice, seen: np.ndarray = seen) -> None:
                seen[at] += 1

            NumpyOps(threads).rows(task, count)
            assert (seen == 1).all()


def test_workers_raise_and_stop() -> None:
    done: list[int] = []

    def task(item: int) -> None:
        if item == 3:
            raise ZeroDivisionError("three")
        done.append(item)

    with pytest.raises(ZeroDivisionError, match="three"):
        Workers(2).map(task, range(10_000))
    assert len(done) < 10_000


def test_nobody_waits_for_a_helper_that_has_not_begun() -> None:
    """On a busy machine a helper may not get a core for long: the caller must do the work itself and go on."""
    team = Workers(2)
    release = threading.Event()
    assert team._pool is not None
    team._pool.submit(release.wait)  # the only helper is busy elsewhere
    done: list[int] = []
    team.map(done.append, range(100))
    assert done == list(range(100))
    release.set()


def test_blas_setting_is_put_back() -> None:
    blas = ThreadpoolController().select(user_api="blas")

    def threads() -> list[int]:
        return [library["num_threads"] for library in blas.info()]

    before = threads()
    with single_threaded_blas:
        with single_threaded_blas:
            assert set(threads()) == {1}
        assert set(threads()) == {1}
    assert threads() == before


def test_large_products_of_few_rows_are_shared() -> None:
    x, matrix = random((3, 64)), random((70_001, 64), 1)
    ours = NumpyOps(3).linear(x, Weight((), matrix))
    truth = x.astype(np.float64) @ matrix.T.astype(np.float64)
    naive = sum((x[:, i, None] * matrix[:, i] for i in range(64)), np.zeros(truth.shape, np.float32))
    assert np.abs(ours - truth).max() <= SLACK * np.abs(naive - truth).max()


def test_scores_agree_with_their_definitions() -> None:
    heads, kv_heads, width, keys, window, block, unit = 4, 2, 8, 150, 5, 32, 8
    q, k = random((window, heads, width)), random((kv_heads, keys, width), 1)
    blocks = -(-keys // block)
    spans = [slice(b * block, min(keys, (b + 1) * block)) for b in range(blocks)]

    def defined(kind: type) -> dict[str, np.ndarray]:
        """The definitions in plain lines, all arithmetic of ``kind``."""
        queries, rows, root = q.astype(kind), k.astype(kind), np.sqrt(kind(width))
        attention = np.zeros((heads, window, keys), kind)
        for head in range(heads):
            for row in range(window):
                seen = keys - window + row + 1
                scores = rows[head // 2, :seen] @ queries[row, head] / root
                weights = np.exp(scores - scores.max())
                attention[head, row, :seen] = weights / weights.sum()
        means = [[rows[g, u : u + unit].mean(axis=0) for u in range(0, keys, unit)] for g in range(kv_heads)]
        published = []
        for b in range(blocks):
            units = range(b * block // unit, -(-min(keys, (b + 1) * block) // unit))
            each = [[abs(queries[w, h] @ means[h // 2][u]) for h in range(heads) for w in range(window)] for u in units]
            published.append(max(np.mean(one, dtype=kind) / root for one in each))
        return {
            "token_mass": np.array([max(attention[h, :, s].sum() / window for h in range(heads)) for s in spans]),
            "token_max": np.array([attention[:, :, s].max() for s in spans]),
            "mean_qk": np.array(published),
        }

    truths, naives = defined(np.float64), defined(np.float32)
    for name, truth in truths.items():
        allowed = np.abs(naives[name] - truth).max()
        assert np.abs(block_scores.BLOCK_SCORES[name](q, k, block, unit) - truth).max() <= SLACK * allowed, name
    soft = block_scores.unit_softmax(q, k, block, unit)
    assert soft.shape == (blocks,)
    # The best head of each block takes at least what any one head gives in all: 1, but for a rounding a unit.
    assert soft.sum() >= 1 - -(-keys // unit) * EPS32
