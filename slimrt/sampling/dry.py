"""DRY ("don't repeat yourself"): a token that would make a repetition longer is penalised, the longer the more.

The meaning is that of llama.cpp's ``src/llama-sampler.cpp``: the penalty is multiplier * base ** (length - allowed
length), where length counts the last tokens of the text that stand somewhere before, in front of that same token.
No repetition goes across a sequence breaker.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping, Sequence

import numpy as np

from slimrt.config import SamplingConfig
from slimrt.text.tokenizer import Tokenizer

__all__ = ["Breakers", "dry_breakers", "penalise_repetition"]

Breakers = Mapping[int, tuple[tuple[int, ...], ...]]
"""Token -> the tokens that complete a sequence breaker behind it; () where the token alone holds one."""

_MOST_BYTES, _MOST_TAIL = 40, 20  # of a breaker, and tokens of what completes one: as llama.cpp cuts them
_LOG_MAX = 88.7228391  # of float32
_KEPT = 16  # lists of breakers kept for each tokenizer


def penalise_repetition(
    scores: np.ndarray, context: Sequence[int], config: SamplingConfig, breakers: Breakers
) -> np.ndarray:
    """``scores`` [V] with the penalties for what ``context`` (the ids so far) repeats; a new array where any is."""
    last_n = config.dry_penalty_last_n
    recent = np.asarray(context[-last_n:] if last_n > 0 else context, np.int64)
    allowed = config.dry_allowed_length
    if last_n == 0 or len(recent) <= allowed:
        return scores
    limit = _since_breaker(recent, breakers)
    if limit < allowed:
        return scores
    base = float(np.float32(config.dry_base))
    # Longer repetitions are not told apart where the penalty would leave float32.
    most = int(_LOG_MAX / math.log(base)) if base > 1.000001 else 0
    lengths = _repeated(recent, min(limit, allowed + most) if most else limit)
    places = np.flatnonzero(lengths >= allowed)
    longest: dict[int, int] = {}
    for token, length in zip(recent[places + 1].tolist(), lengths[places].tolist(), strict=True):
        longest[token] = max(length, longest.get(token, 0))
    penalised = [token for token in longest if () not in breakers.get(token, ())]
    if not penalised:
        return scores
    scores = scores.copy()
    with np.errstate(over="ignore"):  # -inf forbids
        penalties = config.dry_multiplier * np.array([base ** (longest[token] - allowed) for token in penalised])
        scores[penalised] -= penalties.astype(np.float32)
    return scores


def _since_breaker(recent: np.ndarray, breakers: Breakers) -> int:
    """How many of the last tokens come behind the last sequence breaker."""
    count = len(recent)
    heads = np.flatnonzero(np.isin(recent, np.fromiter(breakers, np.int64, len(breakers))))
    for at in heads[::-1].tolist():
        behind = recent[at + 1 : at + 1 + _MOST_TAIL].tolist()
        found = [len(tail) for tail in breakers[int(recent[at])] if tuple(behind[: len(tail)]) == tail]
        if found:
            return count - 1 - at - max(found)
    return count


def _repeated(recent: np.ndarray, limit: int) -> np.ndarray:
    """For each token but the last: how many up to it, at most ``limit``, equal as many at the end of ``recent``."""
    lengths = np.zeros(len(recent) - 1, np.int64)
    ends = np.arange(len(recent) - 1)
    for length in range(limit):  # fewer places are left each time, most often none after a few
        ends = ends[ends >= length]
        ends = ends[recent[ends - length] == recent[len(recent) - 1 - length]]
        if not len(ends):
            break
        lengths[ends] = length + 1
    return lengths


_LOCK = threading.Lock()
_FOUND: weakref.WeakKeyDictionary[Tokenizer, dict[tuple[str, ...], Breakers]] = weakref.WeakKeyDictionary()


def dry_breakers(texts: Sequence[str], tokenizer: Tokenizer) -> Breakers:
    """Where a text of ``texts`` may begin in this vocabulary: within a token, or from the end of one on."""
    key = tuple(texts)
    with _LOCK:
        known = _FOUND.setdefault(tokenizer, {})
        if key not in known:
            if len(known) >= _KEPT:
                known.pop(next(iter(known)))
            known[key] = _overlapping(key, tokenizer)
        return known[key]


def _overlapping(texts: Sequence[str], tokenizer: Tokenizer) -> Breakers:
    words = [tokenizer.token_bytes(id, special=True) for id in range(tokenizer.vocab_size)]
    found: dict[int, list[tuple[int, ...]]] = {}
    for text in texts:
        breaker = text.encode()[:_MOST_BYTES]
        tails: dict[bytes, tuple[int, ...]] = {}
        for id, word in enumerate(words):
            if breaker in word:
                found.setdefault(id, []).append(())
                continue
            for size in range(min(len(word), len(breaker) - 1), 0, -1):
                if not word.endswith(breaker[:size]):
                    continue
                rest = breaker[size:]
                if rest not in tails:
                    ids = tokenizer.encode(rest.decode(errors="replace"), add_bos=False)
                    tails[rest] = tuple(ids[:_MOST_TAIL])
                if tails[rest] not in found.setdefault(id, []):
                    found[id].append(tails[rest])
    return {id: tuple(tails) for id, tails in found.items()}
