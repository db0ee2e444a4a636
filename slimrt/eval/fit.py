"""Prompts of an exact number of tokens: as much context as fits, then a line of filler for what is left."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from slimrt.errors import SettingError
from slimrt.text.tokenizer import Tokenizer

__all__ = ["Fitted", "fit"]

_FEWER = 8  # units to give up, one by one, where no filler makes the length exact


class Fitted(NamedTuple):
    """The prompt's token ids, and how many units of context it holds."""

    ids: tuple[int, ...]
    units: int


def fit(
    tokenizer: Tokenizer, length: int, compose: Callable[[int, str], str], filler: str, fewest: int, name: str
) -> Fitted:
    """``compose(units, padding)`` with the most ``units`` that fit ``length`` tokens.

    ``padding`` is a prefix of ``filler``, which makes the length exact. ``compose`` must be a pure function whose
    text grows by at least a token a unit; ``filler`` must be worth more than one unit.

    Raises SettingError if ``fewest`` units do not fit, or if no padding makes the length exact.
    """

    def ids(units: int, padding: str = "") -> list[int]:
        # Not what the file says about an end token: a prompt goes on.
        return tokenizer.encode(compose(units, padding), add_bos=tokenizer.add_bos)

    least = len(ids(fewest))
    if least > length:
        raise SettingError(f"task {name}: length {length}; its shortest prompt has {least} tokens, ask for as many")
    units = _most(lambda count: len(ids(count)) <= length, fewest, length)
    for count in range(units, max(fewest, units - _FEWER) - 1, -1):
        found = _padded(partial(ids, count), length, filler)
        if found is not None:
            return Fitted(tuple(found), count)
    raise SettingError(f"task {name}: length {length}; no prompt of just so many tokens was found, ask for a few more")


def _most(fits: Callable[[int], bool], low: int, limit: int) -> int:
    """The largest count under ``limit`` that fits, as ``low`` does: doubled until too large, then bisected."""
    high = low + 1
    while high < limit and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _padded(ids: Callable[[str], list[int]], length: int, filler: str) -> list[int] | None:
    """``ids(padding)`` of exactly ``length`` tokens, or None: as many whole words as fit, then letters of the next."""
    cuts = [0, *(at for at, letter in enumerate(filler) if letter == " "), len(filler)]
    last = bisect_right(cuts, length, key=lambda cut: len(ids(filler[:cut]))) - 1
    if last < 0:
        return None
    following = cuts[min(last + 1, len(cuts) - 1)]
    for end in range(cuts[last], following + 1):
        found = ids(filler[:end])
        if len(found) == length:
            return found
    return None
