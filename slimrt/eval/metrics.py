"""Measures of one output, or of one output against another. Pure functions; sums run in float64."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

__all__ = ["CONFIDENCE", "RESAMPLES", "accuracy", "bootstrap_interval", "kl", "nll", "substring_score"]

CONFIDENCE = 0.95
RESAMPLES = 10_000
_BLOCK = 16  # rows in float64 at a time: 16 x 128k logits are 16 MiB


def kl(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) of the distributions that two logit matrices [T, V] stand for -> float64 [T], nats.

    Zero exactly where the rows are equal; infinite where ``other`` rules out what ``reference`` allows.
    """
    if reference.shape != other.shape:
        raise ValueError(f"logits {reference.shape} and {other.shape}: must have the same shape [T, V]")
    result = np.empty(len(reference))
    for rows in _blocks(len(reference)):
        p, q = _log_softmax(reference[rows]), _log_softmax(other[rows])
        # A token without any probability adds nothing, although its logarithm is -inf.
        terms = np.subtract(p, q, out=np.zeros_like(p), where=p > -np.inf)
        result[rows] = (np.exp(p) * terms).sum(axis=1)
    # Rounding can leave -1e-17 where the distributions all but agree.
    return np.maximum(result, 0.0)


def nll(logits: np.ndarray, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """-log p(tokens[t]) under row t of ``logits`` [T, V] -> float64 [T], nats."""
    picked = _tokens(logits, tokens)
    result = np.empty(len(picked))
    for rows in _blocks(len(picked)):
        block = _log_softmax(logits[rows])
        result[rows] = -block[np.arange(len(block)), picked[rows]]
    return result


def accuracy(logits: np.ndarray, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """1.0 where row t of ``logits`` [T, V] peaks at tokens[t], else 0.0 -> float64 [T]. Ties go to the lower id."""
    return (logits.argmax(axis=1) == _tokens(logits, tokens)).astype(np.float64)


def substring_score(text: str, references: Sequence[str]) -> float:
    """The share of ``references`` that occur in ``text``, whatever the case (RULER, arXiv 2404.06654)."""
    if not references:
        raise ValueError("a substring score needs at least one reference")
    lower = text.lower()
    return sum(reference.lower() in lower for reference in references) / len(references)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values`` (Efron, Tibshirani 1993, ch. 13).

    Of paired differences it is the paired bootstrap. ``clusters`` names each value's cluster: those of a cluster are
    drawn together, for they are not independent (Davison, Hinkley 1997, section 3.8). With fewer than about ten
    clusters it is too narrow, and a single one gives an interval without width. Raises ValueError if there are none.
    """
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError("a bootstrap interval needs at least one value")
    rng = np.random.default_rng(seed)
    names = range(len(sample)) if clusters is None else clusters
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    member = np.array([numbers[name] for name in names])
    sums, sizes = np.bincount(member, sample), np.bincount(member)
    drawn = rng.integers(0, len(sums), (resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _tokens(logits: np.ndarray, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    picked = np.asarray(tokens, np.int64)
    if picked.shape != logits.shape[:1]:
        raise ValueError(f"{len(picked)} tokens for logits {logits.shape}: one row [V] a token")
    return picked


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(low, low + _BLOCK) for low in range(0, rows, _BLOCK))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """[T, V] -> [T, V] float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
