"""From logits to the next token: penalties, filters, temperature, draw, in the order of llama.cpp's default chain.

logit bias -> processors -> penalties -> DRY -> top-n-sigma -> top-k -> typical -> top-p -> min-p -> XTC -> temperature
(fixed or dynamic) -> draw. Mirostat takes the place of what stands between DRY and the draw, but for the temperature.

The meaning of every filter is that of llama.cpp's ``src/llama-sampler.cpp``. Sums run in float64, so a token at the
very edge of a probability mass may fall on the other side than with llama.cpp's float32 sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from slimrt.config import SamplingConfig
from slimrt.errors import ComputeError, SettingError
from slimrt.results import TokenLogprob
from slimrt.sampling.dry import Breakers, penalise_repetition
from slimrt.sampling.mirostat import Mirostat

__all__ = ["Bound", "LogitsProcessor", "Sampler", "apply_penalties", "log_softmax", "top_logprobs"]

LogitsProcessor = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(ids so far [N] int32, logits [V] float32) -> logits [V]; it may change the array that it is given."""


class Bound(Protocol):
    """What an answer is bound to."""

    def allows(self, token: int) -> bool:
        """Whether ``token`` may come next."""

    def allowed(self) -> np.ndarray:
        """bool [V]: the tokens that may come next."""


_FIRST_GUESS = 256  # top-p nearly always ends within so many tokens; sorting them is 50 times cheaper than sorting V


class Sampler:
    """Draws tokens by one configuration; the state is the random generator (PCG64), and mirostat's.

    The same seed and the same logits give the same tokens. Ties go to the lowest id.
    """

    def __init__(
        self,
        config: SamplingConfig,
        vocab_size: int,
        processors: Sequence[LogitsProcessor] = (),
        breakers: Breakers | None = None,
    ) -> None:
        """``breakers``: DRY's sequence breakers in the model's tokens (``dry_breakers``).

        Raises SettingError for a seed that is not a natural number and for biases outside the vocabulary or NaN.
        """
        self.config, self.processors, self._breakers = config, tuple(processors), breakers or {}
        self.mirostat = Mirostat(config.mirostat, config.mirostat_tau, config.mirostat_eta) if config.mirostat else None
        seed = config.seed
        if seed is not None and (not isinstance(seed, (int, np.integer)) or seed < 0):
            raise SettingError(f"seed {seed!r}: must be a whole number from 0, or None for a fresh one")
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._vocab_size = vocab_size
        for token, bias in config.logit_bias.items():
            if not isinstance(token, (int, np.integer)) or not 0 <= token < vocab_size:
                raise SettingError(f"logit_bias for token {token!r}: ids lie in 0..{vocab_size - 1}")
            if not isinstance(bias, (int, float)) or math.isnan(bias) or bias == math.inf:
                raise SettingError(
                    f"logit_bias {bias!r} of token {token}: must be a number below infinity; -inf bans a token"
                )
        self._bias_ids = np.fromiter(config.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(config.logit_bias.values(), np.float32)

    def __call__(self, logits: np.ndarray, context: Sequence[int], bound: Bound | None = None) -> int:
        """Draw the token after ``context`` (the ids of prompt and text so far) from ``logits`` [V], left as they are.

        ``bound``: only tokens that it allows are drawn; filters see no others.
        Raises ComputeError for NaN, +inf or nothing but -inf among the logits (of the tokens that may be drawn).
        """
        scores = self._scores(logits, context)
        if self.config.greedy:
            token = int(scores.argmax())
            if bound is None or bound.allows(token):
                return token
        if bound is not None:
            scores = np.where(bound.allowed(), scores, np.float32(-np.inf))
            if scores.max() == -np.inf:
                raise ComputeError(
                    "every token that the grammar or schema allows has a logit of -inf; "
                    "let one of them pass the processors and biases"
                )
        if self.config.greedy:
            return int(scores.argmax())
        chance = 0.0 if self.mirostat else self.config.xtc_probability
        ids, probs = self._candidates(scores, exclude=chance > 0 and self._rng.random() < chance)
        cumulated = probs.cumsum()
        drawn = int(np.searchsorted(cumulated, self._rng.random() * cumulated[-1], side="right"))
        drawn = min(drawn, len(ids) - 1)
        if self.mirostat is not None:
            self.mirostat.drawn(float(probs[drawn]))
        return int(ids[drawn])

    def _scores(self, logits: np.ndarray, context: Sequence[int]) -> np.ndarray:
        """Logits after bias, processors and penalties, checked; a copy wherever something changes."""
        config, scores = self.config, logits
        if len(self._bias_ids):
            scores = scores.copy()
            scores[self._bias_ids] += self._bias
        if self.processors:
            scores = self._processed(scores.copy() if scores is logits else scores, context)
        scores = apply_penalties(scores, context, config)
        if config.dry_multiplier > 0:
            scores = penalise_repetition(scores, context, config, self._breakers)
        peak = scores.max()
        if not np.isfinite(peak):
            raise ComputeError(_why_not_finite(peak, bool(self.processors)))
        return scores

    def _processed(self, scores: np.ndarray, context: Sequence[int]) -> np.ndarray:
        ids = np.asarray(context, np.int32)
        for processor in self.processors:
            scores = np.asarray(processor(ids, scores), np.float32)
            if scores.shape != (self._vocab_size,):
                raise SettingError(
                    f"logits processor {getattr(processor, '__name__', type(processor).__name__)} returned shape "
                    f"{scores.shape}; it must return the logits [{self._vocab_size}]"
                )
        return scores

    def _candidates(self, scores: np.ndarray, *, exclude: bool = False) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        if self.mirostat is not None:
            return self._by_mirostat(scores, self.mirostat)
        if config.top_n_sigma > 0:
            scores = _top_n_sigma(scores, config.top_n_sigma)
        ids = largest(scores, config.top_k) if 0 < config.top_k < len(scores) else np.arange(len(scores))
        ids = ids[scores[ids] > -np.inf]
        if config.typical_p < 1:
            ids = _typical(ids, scores[ids], config.typical_p)
        if config.top_p < 1:
            ids = _top_p(ids, scores[ids], config.top_p)
        if config.min_p > 0:
            kept = scores[ids]
            ids = ids[kept >= kept.max() + np.float32(math.log(config.min_p))]
        if exclude:
            ids = _without_top(ids, scores[ids], config.xtc_threshold)
        return ids, _softmax(scores[ids], self._temperature(scores[ids]))

    def _by_mirostat(self, scores: np.ndarray, mirostat: Mirostat) -> tuple[np.ndarray, np.ndarray]:
        ids = np.flatnonzero(scores > -np.inf)
        ids = ids[np.argsort(-scores[ids], kind="stable")]
        wide = scores[ids].astype(np.float64)
        temperature = max(self._temperature(scores[ids]), np.finfo(np.float64).tiny)
        with np.errstate(over="ignore"):
            wide = np.maximum((wide - wide[0]) / temperature, np.finfo(np.float64).min / 2)
        ids = ids[: mirostat.kept(wide, self._vocab_size)]
        return ids, _softmax(scores[ids], temperature)

    def _temperature(self, scores: np.ndarray) -> float:
        """That of the draw among candidates whose logits are ``scores`` [N]: fixed, or by their entropy.

        Tokens at -inf are no candidates; llama.cpp counts them until a filter drops them.
        """
        config = self.config
        if config.dynatemp_range == 0 or len(scores) < 2:
            return config.temperature
        low, high = max(0.0, config.temperature - config.dynatemp_range), config.temperature + config.dynatemp_range
        probs = _softmax(scores, 1.0)
        probs = probs[probs > 0]
        entropy = max(0.0, -float((probs * np.log(probs)).sum())) / math.log(len(scores))
        return low + (high - low) * min(entropy, 1.0) ** config.dynatemp_exponent


def apply_penalties(scores: np.ndarray, context: Sequence[int], config: SamplingConfig) -> np.ndarray:
    """``scores`` [V] with the penalties of ``config`` for the last ``penalty_last_n`` ids of ``context`` (-1: all).

    Positive scores of a token that occurs there are divided by ``repeat_penalty``, others multiplied; then
    ``presence_penalty`` and, for each occurrence, ``frequency_penalty`` are subtracted. Returns a new array where
    anything changes.
    """
    none = config.repeat_penalty == 1 and config.frequency_penalty == 0 and config.presence_penalty == 0
    if none or config.penalty_last_n == 0:
        return scores
    recent = context if config.penalty_last_n < 0 else context[-config.penalty_last_n :]
    ids, counts = np.unique(np.asarray(recent, np.int64), return_counts=True)
    seen = scores[ids]
    repeat = np.float32(config.repeat_penalty)
    seen = np.where(seen <= 0, seen * repeat, seen / repeat)
    scores = scores.copy()
    scores[ids] = seen - (counts.astype(np.float32) * np.float32(config.frequency_penalty) + config.presence_penalty)
    return scores


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Ids of the ``k`` largest of ``scores`` [V], best first, equal ones by id; 1 <= k <= V."""
    edge = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > edge)
    level = np.flatnonzero(scores == edge)[: k - len(above)]
    return np.concatenate([above[np.argsort(-scores[above], kind="stable")], level])


def _top_n_sigma(scores: np.ndarray, n: float) -> np.ndarray:
    """``scores`` [V] with -inf for those more than ``n`` standard deviations below the largest (arXiv 2411.07641)."""
    finite = scores[scores > -np.inf].astype(np.float64)
    return np.where(scores < finite.max() - n * finite.std(), np.float32(-np.inf), scores)


def _without_top(ids: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """XTC (exclude top choices): of the tokens of at least ``threshold`` only the least likely stays."""
    above = np.flatnonzero(_softmax(scores, 1.0) >= threshold)
    if len(above) < 2:
        return ids
    last = above[np.lexsort((ids[above], -scores[above]))[-1]]
    return np.delete(ids, above[above != last])


def _typical(ids: np.ndarray, scores: np.ndarray, p: float) -> np.ndarray:
    """Locally typical sampling (arXiv 2202.00666): the tokens of a surprise nearest to the entropy, up to mass p."""
    order = np.lexsort((ids, -scores))
    ids, logs = ids[order], log_softmax(scores[order]).astype(np.float64)
    probs = np.exp(logs)
    entropy = -(probs * logs).sum()
    nearest = np.argsort(np.abs(-logs - entropy), kind="stable")
    kept = int(np.searchsorted(probs[nearest].cumsum(), p, side="right")) + 1
    return ids[nearest[:kept]]


def _top_p(ids: np.ndarray, scores: np.ndarray, p: float) -> np.ndarray:
    """The likeliest tokens whose probabilities add up to ``p`` or more (arXiv 1904.09751), best first; at least one."""
    probs = _softmax(scores, 1.0)
    if len(ids) > 4 * _FIRST_GUESS:
        # Equal scores must be cut by id, also where an earlier filter has put the ids into another order.
        by_id = np.argsort(ids)
        ids, scores, probs = ids[by_id], scores[by_id], probs[by_id]
        guess = _FIRST_GUESS
        order = largest(scores, guess)
        while guess < len(ids) and probs[order].sum() < p:
            guess = min(16 * guess, len(ids))
            order = largest(scores, guess)
    else:
        order = np.lexsort((ids, -scores))
    kept = int(np.searchsorted(probs[order].cumsum(), p, side="left")) + 1
    return ids[order[:kept]]


def _softmax(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities float64 of finite ``scores`` at a temperature however small; at 0 the largest, equal ones alike."""
    if temperature == 0:
        return (scores == scores.max()) / np.count_nonzero(scores == scores.max())
    with np.errstate(over="ignore"):  # -inf is right: exp makes it 0
        weights = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    return weights / weights.sum()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log p of every token: logits [V] -> float32 [V]. Raises ComputeError for NaN, +inf or nothing but -inf."""
    return (logits - _log_total(logits)).astype(np.float32)


def top_logprobs(logits: np.ndarray, token: int, n: int) -> TokenLogprob:
    """log p of ``token`` and of the ``n`` likeliest under the softmax of ``logits`` [V]; raises as log_softmax."""
    total = _log_total(logits)
    best = largest(logits, min(n, len(logits))) if n > 0 else np.empty(0, np.int64)
    top = tuple((int(id), float(np.float32(logits[id] - total))) for id in best)
    return TokenLogprob(token, float(np.float32(logits[token] - total)), top)


def _log_total(logits: np.ndarray) -> np.float64:
    """log of the sum of exp(logits), in float64."""
    peak = logits.max()
    if not np.isfinite(peak):
        raise ComputeError(_why_not_finite(peak, False))
    return np.float64(peak) + np.log(np.exp(logits - peak).sum(dtype=np.float64))


def _why_not_finite(peak: np.floating, processed: bool) -> str:
    if peak == -np.inf:
        return "every logit is -inf, so no token can be drawn; let at least one token pass the processors and biases"
    source = "a logits processor's result" if processed else "the model's weights"
    return f"the largest logit is {peak}; logits must be finite or -inf; check {source}"
