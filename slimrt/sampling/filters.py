"""Which tokens may be drawn: the filters of llama.cpp's ``src/llama-sampler.cpp``, and the draw itself.

A vocabulary has 50,000 to 250,000 tokens and a filter runs for each token of the text, so nothing here sorts them all
or copies what it leaves whole. Exponentials are float32, as llama.cpp's; sums run in float64, so that a token at the
very edge of a probability mass may fall on the other side than with llama.cpp's float32 sums.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

__all__ = [
    "LARGEST", "Candidates", "draw", "finite", "largest", "min_p", "temperature_by_entropy", "top_k", "top_n_sigma",
    "top_p", "typical", "weights", "without_top",
]  # fmt: skip

_FIRST_GUESS = 256  # a probability mass nearly always lies on so many tokens
_GUESSES = 16  # times as many, where it does not
_BLOCK = 256  # tokens whose weights are summed first: a running sum over all of them is ten times slower
LARGEST = float(np.finfo(np.float32).max)  # number of a logit


class Candidates(NamedTuple):
    """Tokens with their ``logits`` float32 [N], none of them -inf; ``ids`` int64 [N], ascending, None: all, N = V."""

    ids: np.ndarray | None
    logits: np.ndarray

    def at(self, places: np.ndarray) -> Candidates:
        """Those at ``places`` [M], ascending."""
        return Candidates(places if self.ids is None else self.ids[places], self.logits[places])

    def id(self, place: int) -> int:
        """The token at ``place``."""
        return place if self.ids is None else int(self.ids[place])


def finite(logits: np.ndarray) -> Candidates:
    """All tokens whose ``logits`` [V] are above -inf."""
    if logits.min() > -np.inf:
        return Candidates(None, logits)
    ids = np.flatnonzero(logits > -np.inf)
    return Candidates(ids, logits[ids])


def weights(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """What the probabilities of ``logits`` [N] are in proportion to, float32 [N], the largest 1; at temperature 0 the
    largest logits alone, alike."""
    peak = logits.max()
    if temperature == 0:
        return (logits == peak).astype(np.float32)
    below = logits - peak
    if temperature != 1:
        with np.errstate(over="ignore"):  # -inf is right: exp makes it 0
            below *= np.float32(min(1 / temperature, LARGEST))
    return np.exp(below, out=below)


def draw(shares: np.ndarray, point: float) -> tuple[int, float]:
    """The place among ``shares`` [N] where their running sum passes ``point``, in [0, 1), of all; its probability."""
    sums = np.add.reduceat(shares, np.arange(0, len(shares), _BLOCK), dtype=np.float64).cumsum()
    block, left = _passing(sums, point * sums[-1])
    some = shares[block * _BLOCK : (block + 1) * _BLOCK]
    place = block * _BLOCK + _passing(some.cumsum(dtype=np.float64), left)[0]
    return place, float(shares[place] / sums[-1])


def _passing(sums: np.ndarray, target: float) -> tuple[int, float]:
    """The first place where running ``sums`` [N] are above ``target``, and how far before it that lies; where rounding
    has put it behind the last of them, the last that adds anything."""
    place = int(np.searchsorted(sums, min(target, np.nextafter(sums[-1], 0)), side="right"))
    return place, target - float(sums[place - 1]) if place else target


def largest(keys: np.ndarray, k: int) -> np.ndarray:
    """Places of the ``k`` largest of ``keys`` [N], best first, equal ones by place; 1 <= k <= N."""
    near = _at_least(keys, k)
    some = keys[near]
    edge = np.partition(some, len(some) - k)[len(some) - k]
    above, level = np.flatnonzero(some > edge), np.flatnonzero(some == edge)
    return near[np.concatenate([above[np.argsort(-some[above], kind="stable")], level[: k - len(above)]])]


def _at_least(keys: np.ndarray, k: int) -> np.ndarray:
    """Places, ascending, of the ``k`` largest of ``keys`` [N], of all that equal the last of them, and of few more.

    Where the largest of ``k`` of some groups are at least ``edge``, so are ``k`` keys.
    """
    size = len(keys) // (16 * k)  # so many groups that hardly two of the ``k`` meet in one
    if size < 2:
        return np.flatnonzero(keys >= np.partition(keys, len(keys) - k)[len(keys) - k])
    groups = len(keys) // size
    whole = size * groups
    table = keys[:whole].reshape(size, groups)
    peaks = table.max(axis=0)
    edge = np.partition(peaks, groups - k)[groups - k]
    columns = np.flatnonzero(peaks >= edge)  # all others are below it
    rows, at = np.nonzero(table[:, columns] >= edge)
    return np.concatenate([rows * groups + columns[at], whole + np.flatnonzero(keys[whole:] >= edge)])


def _holding(mass: float, keys: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Places, ascending, of so many of the largest ``keys`` [N], with all that equal them, that their ``shares``
    add up to more than ``mass``; all, where all of them do not."""
    guess = _FIRST_GUESS
    while guess < len(keys):
        places = _at_least(keys, guess)
        if shares[places].sum(dtype=np.float64) > mass:
            return places
        guess *= _GUESSES
    return np.arange(len(keys))


def top_n_sigma(tokens: Candidates, n: float) -> Candidates:
    """Without those more than ``n`` standard deviations below the largest (arXiv 2411.07641)."""
    logits = tokens.logits
    return tokens.at(np.flatnonzero(logits >= np.float64(logits.max()) - n * logits.std(dtype=np.float64)))


def top_k(tokens: Candidates, k: int) -> Candidates:
    """The ``k`` likeliest, equal ones by id."""
    return tokens.at(np.sort(largest(tokens.logits, k))) if k < len(tokens.logits) else tokens


def top_p(tokens: Candidates, p: float) -> Candidates:
    """The likeliest whose probabilities add up to ``p`` or more (arXiv 1904.09751), equal ones by id; at least one."""
    of_all = weights(tokens.logits)
    mass = p * of_all.sum(dtype=np.float64)
    near = _holding(mass, tokens.logits, of_all)
    order = near[np.argsort(-tokens.logits[near], kind="stable")]
    kept = int(np.searchsorted(of_all[order].cumsum(dtype=np.float64), mass, side="left")) + 1
    return tokens.at(np.sort(order[:kept]))


def typical(tokens: Candidates, p: float) -> Candidates:
    """Locally typical sampling (arXiv 2202.00666): the tokens of a surprise nearest to the entropy, up to mass ``p``.

    log p and -entropy are as far apart as the logit and its mean under the probabilities.
    """
    of_all = weights(tokens.logits)
    total = of_all.sum(dtype=np.float64)
    wide = tokens.logits.astype(np.float64)
    off = np.abs(wide - (of_all * wide).sum() / total)
    near = _holding(p * total, -off, of_all)
    order = near[np.lexsort((-tokens.logits[near], off[near]))]
    kept = int(np.searchsorted(of_all[order].cumsum(dtype=np.float64), p * total, side="right")) + 1
    return tokens.at(np.sort(order[:kept]))


def min_p(tokens: Candidates, p: float) -> Candidates:
    """Those at least ``p`` times as likely as the likeliest (arXiv 2407.01082)."""
    return tokens.at(np.flatnonzero(tokens.logits >= tokens.logits.max() + np.float32(math.log(p))))


def without_top(tokens: Candidates, threshold: float) -> Candidates:
    """XTC (exclude top choices): of the tokens of at least ``threshold`` only the least likely stays."""
    of_all = weights(tokens.logits)
    above = np.flatnonzero(of_all >= threshold * of_all.sum(dtype=np.float64))
    if len(above) < 2:
        return tokens
    last = above[np.argsort(-tokens.logits[above], kind="stable")[-1]]
    stays = np.ones(len(of_all), bool)
    stays[above] = False
    stays[last] = True
    return tokens.at(np.flatnonzero(stays))


def temperature_by_entropy(logits: np.ndarray, low: float, high: float, exponent: float) -> float:
    """Between ``low`` and ``high``, by the entropy of ``logits`` [N] over the largest that so many tokens can have."""
    if len(logits) < 2:
        return low
    of_all = weights(logits)
    total = of_all.sum(dtype=np.float64)
    mean = (of_all * (logits - logits.max())).sum(dtype=np.float64) / total
    entropy = max(0.0, math.log(total) - mean) / math.log(len(logits))
    return low + (high - low) * min(entropy, 1.0) ** exponent
