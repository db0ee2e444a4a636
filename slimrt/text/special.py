"""Tokens that stand for themselves in a text: control tokens where they are asked for, user-defined ones always."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

__all__ = ["SpecialTokens"]

# White_Space of Unicode, which is what the tokenizers library drops.
_BLANKS = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
)
_KEY = 4  # characters of a token by which texts are looked through for many tokens at once
_FEW = 512  # so many tokens are looked for one by one, which takes a text of 100 KB some 5 microseconds each


class SpecialTokens:
    """Finds special tokens in texts, as llama.cpp does: the longest first, in bytes, wherever it stands; where two
    overlap the longer one counts."""

    def __init__(
        self, tokens: Sequence[str], control: Sequence[int], user: Sequence[int], *,
        strip_right: Collection[int] = (), strip_left: Collection[int] = (),
    ) -> None:  # fmt: skip
        """``tokens``: the vocabulary; ``control``, ``user``: ids. ``strip_*``: ids of tokens behind or before which
        blanks are dropped."""
        self._strip_right, self._strip_left = frozenset(strip_right), frozenset(strip_left)
        order = sorted([*control, *user], key=lambda id: (-len(tokens[id].encode()), id))
        self._ids = {tokens[id]: id for id in order}  # in the order of their claims to a text
        self._rank = {token: rank for rank, token in enumerate(self._ids)}
        self._user = {tokens[id] for id in user}
        self._control = [token for token in self._ids if token not in self._user]
        self._sorted_control = sorted(self._control)
        self._longest_control = max(map(len, self._control), default=0)
        self._lengths: dict[str, list[int]] = {}  # first characters -> lengths of the tokens that begin so
        for token in self._ids if len(self._ids) > _FEW else ():
            lengths = self._lengths.setdefault(token[:_KEY], [])
            if len(token) not in lengths:
                lengths.append(len(token))

    def cut_out(self, text: str, *, control: bool, literal: str | None) -> list[str | int]:
        """``text`` as ids of special tokens and the texts between them, none of them empty.

        ``control``: control tokens count. ``literal``: a character; control tokens right behind it do not count, and
        it is left out itself.
        """
        spans = self._claimed(text, control, literal)
        parts: list[str | int] = []
        at = 0
        for begin, end, id in [*spans, (len(text), len(text), -1)]:
            between = text[at:begin]
            if literal is not None:
                between = between.replace(literal, "")
            if between:
                parts.append(between)
            if id >= 0:
                parts.append(id)
            at = end
        return parts

    def marked(self, text: str, mark: str, *, whole: bool) -> str:
        """``text`` with ``mark`` in front of every control token in it, so that ``cut_out`` takes them for text.

        Not ``whole``: more may follow, so the beginning of a control token at the end of ``text`` is marked too.
        """
        places = {at for at, token in self._occurrences(text) if token not in self._user}
        if not whole:
            places |= set(self._begun(text))
        if not places:
            return text
        cuts = [0, *sorted(places), len(text)]
        return mark.join(text[begin:end] for begin, end in pairwise(cuts))

    def _begun(self, text: str) -> Iterator[int]:
        """Where an end of ``text`` begins that is the beginning of a control token."""
        for at in range(max(0, len(text) - self._longest_control + 1), len(text)):
            end = text[at:]
            place = bisect.bisect_left(self._sorted_control, end)
            if place < len(self._sorted_control) and self._sorted_control[place].startswith(end):
                yield at

    def _claimed(self, text: str, control: bool, literal: str | None) -> list[tuple[int, int, int]]:
        """(begin, end, id) of what counts in ``text``, from left to right."""
        found = [
            (self._rank[token], at, token)
            for at, token in self._occurrences(text)
            if token in self._user or (control and not (literal is not None and text[at - 1 : at] == literal))
        ]
        if not found:
            return []
        taken = bytearray(len(text))
        spans = []
        for _, begin, token in sorted(found):
            end = begin + len(token)
            if taken.find(1, begin, end) >= 0:
                continue
            id = self._ids[token]
            if id in self._strip_right:
                while end < len(text) and text[end] in _BLANKS and not taken[end]:
                    end += 1
            if id in self._strip_left:
                while begin and text[begin - 1] in _BLANKS and not taken[begin - 1]:
                    begin -= 1
            taken[begin:end] = b"\1" * (end - begin)
            spans.append((begin, end, id))
        return sorted(spans)

    def _occurrences(self, text: str) -> Iterator[tuple[int, str]]:
        """Every place of every special token in ``text``, those that overlap too."""
        if not self._lengths:
            for token in self._ids:
                at = text.find(token)
                while at >= 0:
                    yield at, token
                    at = text.find(token, at + 1)
            return
        for size in range(1, _KEY + 1):
            for at in range(len(text) - size + 1):
                lengths = self._lengths.get(text[at : at + size])
                # Keys shorter than _KEY are whole tokens.
                for length in lengths or ():
                    token = text[at : at + length]
                    if token in self._ids:
                        yield at, token
