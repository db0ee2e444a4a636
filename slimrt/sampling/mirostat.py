"""Mirostat 1 and 2 (arXiv 2007.14966): the surprise of the text is held at a target, token by token.

The meaning of both is that of llama.cpp's ``src/llama-sampler.cpp``; ``m`` there is 100, as everywhere.
"""

from __future__ import annotations

import math

import numpy as np

from slimrt.sampling.filters import largest

__all__ = ["Mirostat"]

_ESTIMATED = 100  # likeliest tokens that version 1 estimates Zipf's exponent from
_MOST_BITS = 1000.0  # of mu: 2 to it is finite
_TINY, _FURTHEST = np.finfo(np.float64).tiny, np.finfo(np.float64).max / 2  # at temperatures near 0


class Mirostat:
    """``mu`` is the largest surprise, in bits, that a token may have; it starts at twice the target ``tau``.

    ``version`` 1 estimates from the exponent of Zipf's law how many tokens are left, 2 compares each token's surprise.
    """

    def __init__(self, version: int, tau: float, eta: float) -> None:
        self.version, self.tau, self.eta = version, tau, eta
        self.mu = 2 * tau

    def kept(self, logits: np.ndarray, temperature: float, shares: np.ndarray, vocab_size: int) -> np.ndarray:
        """The places, ascending, of the tokens that stay of those with ``logits`` [N], whose probabilities at
        ``temperature`` are in proportion to ``shares`` [N]; at least one."""
        if self.version == 2:
            bits = max(-_MOST_BITS, min(self.mu, _MOST_BITS))
            places = np.flatnonzero(shares >= shares.sum(dtype=np.float64) * 2.0**-bits)
            return places if len(places) else largest(logits, 1)
        best = logits[largest(logits, min(_ESTIMATED, len(logits)))].astype(np.float64)
        with np.errstate(over="ignore"):
            best = np.maximum((best - best[0]) / max(temperature, _TINY), -_FURTHEST)
        kept = max(1, self._top_k(best, len(logits), vocab_size))
        return np.sort(largest(logits, kept)) if kept < len(logits) else np.arange(len(logits))

    def _top_k(self, scores: np.ndarray, count: int, vocab_size: int) -> int:
        """How many of ``count`` tokens stay, the best of which have ``scores``, best first."""
        steps = len(scores) - 1
        if steps < 1:
            return 1
        ranks = np.arange(steps)
        t = np.log((ranks + 2) / (ranks + 1))
        exponent = float((t * (scores[:steps] - scores[1 : steps + 1])).sum() / (t * t).sum())
        if exponent <= 0:  # all are alike: only mu tells
            return count if self.mu >= math.log2(count) else 1
        epsilon = exponent - 1
        # (1 - V^-epsilon) / epsilon, whose limit at 0 is log V
        total = math.log(vocab_size) if epsilon == 0 else -math.expm1(-epsilon * math.log(vocab_size)) / epsilon
        bits = min(self.mu, _MOST_BITS)
        log_k = (bits * math.log(2) - math.log(total)) / exponent
        return int(math.exp(min(log_k, math.log(count) + 1)))

    def drawn(self, probability: float) -> None:
        """A token of ``probability`` among those that stayed was drawn: move ``mu`` towards the target."""
        self.mu -= self.eta * (-math.log2(probability) - self.tau)
