"""Measures against torch-free definitions in plain Python and against figures from the literature."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimrt.eval.metrics import accuracy, bootstrap_interval, kl, nll, substring_score
from slimrt.eval.report import front

EPS64 = np.finfo(np.float64).eps


def slow_log_softmax(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(value - max(row)) for value in row)
    return [value - max(row) - math.log(total) for value in row]


def logits(rows: int, vocab: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (rows, vocab)).astype(np.float32)


def test_kl_and_nll_agree_with_their_definitions() -> None:
    # 40 rows: more than the block that is converted to float64 at a time.
    p, q, vocab = logits(40, 37, 1), logits(40, 37, 2), 37
    tokens = np.random.default_rng(3).integers(0, vocab, 40)
    for row in range(40):
        log_p, log_q = slow_log_softmax(p[row].tolist()), slow_log_softmax(q[row].tolist())
        wanted = math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        # Sums of `vocab` terms, each of about ten roundings of magnitudes up to 40.
        assert abs(kl(p, q)[row] - wanted) < 10 * vocab * 40 * EPS64
        assert abs(nll(p, tokens)[row] + log_p[tokens[row]]) < 10 * vocab * 40 * EPS64


def test_kl_of_two_coins() -> None:
    fair, biased = np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.25, 0.75]]))
    assert kl(fair, biased)[0] == pytest.approx(0.5 * math.log(4 / 3), rel=8 * EPS64)
    assert kl(biased, fair)[0] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=8 * EPS64)


def test_kl_is_exactly_zero_between_equals_and_ignores_a_shift() -> None:
    p = logits(5, 1000, 4)
    assert (kl(p, p) == 0).all()
    # The shift itself is rounded to float32, by half a unit of the largest sum at most: logits that differ by no more
    # than r either way have a KL of at most r^2 / 2 (Hoeffding's lemma), and float64 adds its own, as above.
    shifted = p + np.float32(8)
    off = np.abs(shifted).max() * np.finfo(np.float32).eps / 2
    assert (kl(p, shifted) <= off**2 / 2 + 10 * 1000 * 40 * EPS64).all()


def test_kl_where_tokens_are_ruled_out() -> None:
    some, none = np.array([[0.0, 0.0, -np.inf]]), np.array([[0.0, -np.inf, 0.0]])
    assert kl(some, np.zeros((1, 3)))[0] == pytest.approx(math.log(1.5), rel=8 * EPS64)
    assert kl(some, none)[0] == math.inf


def test_accuracy_counts_the_highest_logit() -> None:
    assert accuracy(np.array([[1.0, 2, 3], [3, 2, 1], [0, 0, 0]]), [2, 1, 0]).tolist() == [1, 0, 1]


@pytest.mark.parametrize("call", [lambda p: kl(p, p[:, :3]), lambda p: nll(p, [1]), lambda p: accuracy(p, [1, 2, 3])])
def test_shapes_that_do_not_belong_together(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError):
        call(np.zeros((2, 4)))


def test_substring_score_is_rulers() -> None:
    assert substring_score("The numbers are 17 and ALPHA.", ["17", "alpha", "beta", "Alpha"]) == 0.75
    with pytest.raises(ValueError):
        substring_score("anything", [])


def test_bootstrap_interval_is_about_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(5).normal(3, 2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    # A quantile at 2.5 % of 10,000 resamples is known to about 2 % of the half-width; 10 % is five of that.
    assert abs(low - (values.mean() - half)) < 0.1 * half and abs(high - (values.mean() + half)) < 0.1 * half


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(rng.normal(0, 1, 40), resamples=500, seed=trial)
        covered += low <= 0 <= high
    # Nominal 285 of 300, a little less at n = 40; four binomial deviations (3.8) about 94 %.
    assert 267 <= covered <= 297


def test_bootstrap_interval_is_repeatable_and_exact_without_spread() -> None:
    assert bootstrap_interval([0.0] * 5) == (0.0, 0.0)
    assert bootstrap_interval([2.5]) == (2.5, 2.5)
    assert bootstrap_interval([1.0, 2, 3]) == bootstrap_interval([1.0, 2, 3])
    with pytest.raises(ValueError):
        bootstrap_interval([])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_front_holds_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    kept = front([(float(x), float(y)) for x, y in points])
    for (x, y), is_kept in zip(points, kept, strict=True):
        beaten = any((a < x and b <= y) or (a <= x and b < y) for a, b in points)
        assert is_kept == (not beaten)
