"""From logits to the next token: penalties, filters, temperature, draw, in the order of llama.cpp's default chain.

logit bias -> processors -> penalties -> DRY -> top-n-sigma -> top-k -> typical -> top-p -> min-p -> XTC -> temperature
(fixed or dynamic) -> draw. Mirostat takes the place of what stands between DRY and the draw, but for the temperature.

The meaning is that of llama.cpp's ``src/llama-sampler.cpp``; ``slimrt.sampling`` has the steps.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from slimrt.config import SamplingConfig
from slimrt.errors import ComputeError, SettingError
from slimrt.results import TokenLogprob
from slimrt.sampling import filters
from slimrt.sampling.dry import Breakers, penalise_repetition
from slimrt.sampling.filters import LARGEST, Candidates, largest
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
        biases: Mapping[Any, Any] = config.logit_bias
        for token, bias in biases.items():
            if not isinstance(token, (int, np.integer)) or not 0 <= token < vocab_size:
                raise SettingError(f"logit_bias for token {token!r}: ids lie in 0..{vocab_size - 1}")
            number = isinstance(bias, numbers.Real) and not isinstance(bias, bool)
            if not number or not (abs(bias) <= LARGEST or bias == -math.inf):
                raise SettingError(
                    f"logit_bias {bias!r} of token {token}: must be a number from -{LARGEST:g} to {LARGEST:g}, or "
                    "-inf, which bans a token"
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
        tokens, shares = self._candidates(scores, exclude=chance > 0 and self._rng.random() < chance)
        place, probability = filters.draw(shares, self._rng.random())
        if self.mirostat is not None:
            self.mirostat.drawn(probability)
        return tokens.id(place)

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

    def _candidates(self, scores: np.ndarray, *, exclude: bool = False) -> tuple[Candidates, np.ndarray]:
        """The tokens that may be drawn, and what their probabilities are in proportion to."""
        config, tokens = self.config, filters.finite(scores)
        if self.mirostat is not None:
            temperature = self._temperature(tokens)
            shares = filters.weights(tokens.logits, temperature)
            kept = self.mirostat.kept(tokens.logits, temperature, shares, self._vocab_size)
            return tokens.at(kept), shares[kept]
        if config.top_n_sigma > 0:
            tokens = filters.top_n_sigma(tokens, config.top_n_sigma)
        if config.top_k > 0:
            tokens = filters.top_k(tokens, config.top_k)
        if config.typical_p < 1:
            tokens = filters.typical(tokens, config.typical_p)
        if config.top_p < 1:
            tokens = filters.top_p(tokens, config.top_p)
        if config.min_p > 0:
            tokens = filters.min_p(tokens, config.min_p)
        if exclude:
            tokens = filters.without_top(tokens, config.xtc_threshold)
        return tokens, filters.weights(tokens.logits, self._temperature(tokens))

    def _temperature(self, tokens: Candidates) -> float:
        """That of the draw among ``tokens``: fixed, or by their entropy.

        Tokens at -inf are no candidates; llama.cpp counts them until a filter drops them.
        """
        config = self.config
        if config.dynatemp_range == 0 or len(tokens.logits) < 2:
            return config.temperature
        low, high = max(0.0, config.temperature - config.dynatemp_range), config.temperature + config.dynatemp_range
        return filters.temperature_by_entropy(tokens.logits, low, high, config.dynatemp_exponent)


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
