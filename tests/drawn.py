"""What a sampler draws, as a distribution: what is drawn many times is held against it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimrt.sampler import Sampler

__all__ = ["distribution"]


def distribution(sampler: Sampler, logits: np.ndarray, context: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn and their probabilities: ids [N] int64, probs [N] float64 with sum 1."""
    scores = sampler._scores(logits, context)
    if sampler.config.greedy:
        return np.array([scores.argmax()]), np.ones(1)
    ids, probs = _shared(sampler, scores)
    chance = 0.0 if sampler.mirostat else sampler.config.xtc_probability
    if chance > 0:
        left, shares = _shared(sampler, scores, exclude=True)
        probs = probs * (1 - chance)
        place = {int(id): at for at, id in enumerate(ids)}
        probs[[place[int(id)] for id in left]] += chance * shares
    return ids, probs


def _shared(sampler: Sampler, scores: np.ndarray, *, exclude: bool = False) -> tuple[np.ndarray, np.ndarray]:
    tokens, weights = sampler._candidates(scores, exclude=exclude)
    return np.arange(len(scores)) if tokens.ids is None else tokens.ids, weights / weights.sum(dtype=np.float64)
