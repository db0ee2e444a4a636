"""Prompt lookup: what stood behind the same words before is likely to stand there again.

The idea is that of prompt lookup decoding (Apoorv Saxena, https://github.com/apoorvumang/prompt-lookup-decoding) and of
LLMA (arXiv 2304.04487). All tokens that were read or written count, also those whose states were pruned, lie outside of
a budget or have left a full context. Here the longest match wins, and how often a match of its length was right decides
how many tokens are guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimrt.drafting.pace import Costs, best_count

__all__ = ["Lookup"]

_LONGEST = 24  # tokens of a match that are compared: longer ones are no surer
_LENGTHS = (1, 2, 3, 4, 6, 10, 16)  # lengths that share a chance begin here
_PRIOR = (0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95)  # that the next token is right, before anything was seen
_WEIGHT = 4.0  # observations that the prior counts as
_MEMORY = 32.0  # observations that count at most: what was long ago fades


class Lookup:
    """Follows one text. ``tokens``: what was read before it is written."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._buffer = np.array(tokens, np.int32)
        self._length = len(self._buffer)
        self._right, self._seen = [p * _WEIGHT for p in _PRIOR], [_WEIGHT] * len(_PRIOR)
        self._found: tuple[np.ndarray, int] | None = None  # what follows the match, the match's length

    def guess(self, most: int, costs: Costs) -> list[int]:
        """The next tokens, as many as pay, at most ``most``."""
        self._found = self.match()
        if self._found is None or most < 1:
            return []
        following, length = self._found
        chances, chance = [], 1.0
        for at in range(most):
            chance *= self.chance(length + at)
            chances.append(chance)
        count = best_count(chances, costs)
        # A text that repeats a few tokens goes on with them.
        return np.resize(following, count).tolist()

    def wrote(self, tokens: Sequence[int]) -> None:
        """``tokens`` came next. Learns from each whether the match was right, guessed or not."""
        if self._found is not None:
            following, length = self._found
            for at, token in enumerate(tokens):
                right = token == following[at % len(following)]
                self._learn(length + at, right)
                if not right:
                    break
            self._found = None
        self._append(tokens)

    def chance(self, length: int) -> float:
        """How likely the token behind a match of ``length`` tokens is right."""
        group = _group(length)
        return self._right[group] / self._seen[group]

    def _learn(self, length: int, right: bool) -> None:
        group = _group(length)
        fade = min(1.0, _MEMORY / (self._seen[group] + 1))
        self._right[group] = (self._right[group] + right) * fade
        self._seen[group] = (self._seen[group] + 1) * fade

    def _append(self, tokens: Sequence[int]) -> None:
        end = self._length + len(tokens)
        if end > len(self._buffer):
            grown = np.empty(end + max(1024, self._length // 2), np.int32)
            grown[: self._length] = self._buffer[: self._length]
            self._buffer = grown
        self._buffer[self._length : end] = tokens
        self._length = end

    def match(self) -> tuple[np.ndarray, int] | None:
        """What stood behind the longest run of tokens that ends the text and stood before as well, the latest of them;
        and its length."""
        text = self._buffer[: self._length]
        if len(text) < 2:
            return None
        ends = np.flatnonzero(text[:-1] == text[-1])  # where the last token stood before
        length = 0
        while len(ends):
            latest, length = int(ends[-1]), length + 1
            if length == _LONGEST:
                break
            ends = ends[ends >= length]
            ends = ends[text[ends - length] == text[-1 - length]]
        return (text[latest + 1 :], length) if length else None


def _group(length: int) -> int:
    return sum(length >= first for first in _LENGTHS) - 1
