"""Which tokens of a prompt ask for something: those behind the document, and those before it.

Told by structure alone, in no language in particular: control tokens stand between messages, blank lines between
paragraphs, a question mark makes a question. Where that does not tell, tokens count for less.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from slimrt.prune.asked import HEAD, TAIL, Asked
from slimrt.text.tokenizer import Tokenizer

__all__ = ["asking"]

_SHORT = 96  # tokens; a paragraph of more that has no question mark is rather part of the document
_LONGEST = 128  # tokens; in front of a document a paragraph of more is rather its beginning, whatever it asks
_WORDS = 8  # tokens; what is shorter at the end of a prompt is a template's own: an end mark, "assistant"
_FEWEST = 64  # of the last tokens; what they all attend to alike is taken off, so there must be some
_UNSURE = 0.5  # what a token counts that may belong to the document. Trials: .3 to .7 rank alike, 1 ranks worse
# Latin, full width, Arabic, Greek, Armenian, Ethiopic.
_QUESTION_MARKS = ("?", "\uff1f", "\u061f", "\u037e", "\u055e", "\u1367")
_BLANK = b" \t\r"


def asking(tokenizer: Tokenizer, ids: Sequence[int]) -> Asked:
    """What each of the first and the last tokens of the prompt ``ids`` counts.

    The first tokens' share depends on nothing behind them once the prompt has ``HEAD + TAIL`` tokens, so that a prompt
    that continues another one keeps it.
    """
    count = len(ids)
    first = max(0, count - TAIL)
    tail = [_UNSURE] * (count - first)
    spans = _paragraphs(tokenizer, ids[first:])
    for start, stop, asks in spans:
        if asks:
            tail[start:stop] = [1.0] * (stop - start)
    for start, stop, _ in reversed(spans):
        if stop - start <= _SHORT:
            tail[start:stop] = [1.0] * (stop - start)
        if stop - start > _WORDS:
            break
    sure = [start for start, _, _ in spans if tail[start] == 1.0]
    if sure:
        # One short paragraph before the first that surely asks may belong to it; what lies before that tells nothing.
        begins = [start for start, stop, _ in spans if stop - start <= _SHORT and start < sure[0]]
        tail = tail[min(max(0, len(tail) - _FEWEST), max(begins, default=sure[0])) :]
    head = [0.0] * min(HEAD, first)
    before = False
    for start, stop, asks in _paragraphs(tokenizer, ids[: len(head)]):
        if stop == len(head):  # it goes on behind the head
            break
        surely = asks and stop - start <= _LONGEST
        before |= surely
        if surely:
            head[start:stop] = [1.0] * (stop - start)
    return Asked(tuple(head), tuple(tail), before)


def _paragraphs(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, int, bool]]:
    """(start, stop, whether it has a question mark) of each paragraph, in order; a control token is one of its own."""
    ends, at_line_start = {0, len(ids)}, False
    for at, token in enumerate(ids):
        piece = tokenizer.token_bytes(token)
        if not piece:
            ends |= {at, at + 1}
            at_line_start = False
            continue
        lines = [line.strip(_BLANK) for line in piece.split(b"\n")]
        if len(lines) > 1 and ((at_line_start and not lines[0]) or not all(lines[1:-1])):
            ends.add(at + 1)
        if len(lines) > 1 or lines[0]:
            at_line_start = len(lines) > 1 and not lines[-1]
    borders = sorted(ends)
    texts = (tokenizer.decode(ids[start:stop]) for start, stop in pairwise(borders))
    return [
        (start, stop, any(mark in text for mark in _QUESTION_MARKS))
        for (start, stop), text in zip(pairwise(borders), texts, strict=True)
    ]
