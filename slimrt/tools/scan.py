"""What is needed to read a call that is not whole yet: where it ends, whether it still may be one, where it fails."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from slimrt.tools.formats import ARGS, ID, NAME, PARAMETERS

__all__ = ["Failed", "JsonEnd", "More", "held_back", "json_object", "literal_end", "match_head", "match_tail"]

_NAME = re.compile(r"[A-Za-z0-9_.-]*")


class More(Exception):
    """What is there may be the beginning of what is looked for."""


class Failed(Exception):
    """What is there is something else."""


class JsonEnd:
    """Finds the end of a JSON object that comes in pieces; each character is looked at once."""

    def __init__(self) -> None:
        self._depth, self._in_text, self._escaped = 0, False, False

    def feed(self, text: str, at: int = 0) -> int | None:
        """The place in ``text`` behind the object's end, looked for from ``at`` on; None where it is not there yet."""
        for place in range(at, len(text)):
            char = text[place]
            if self._in_text:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_text = False
            elif char == '"':
                self._in_text = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


def json_object(text: str) -> dict[str, Any] | None:
    """``text`` as a JSON object, None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def after_blanks(text: str, at: int) -> int:
    """The place of the next character that is no blank. Raises More at the end of ``text``."""
    while at < len(text) and text[at].isspace():
        at += 1
    if at == len(text):
        raise More
    return at


def literal_end(text: str, at: int, literal: str) -> int:
    """The place behind ``literal`` in ``text`` from ``at`` on, where blanks do not count. Raises More and Failed."""
    for char in literal:
        if not char.isspace():
            at = after_blanks(text, at)
            if text[at] != char:
                raise Failed
            at += 1
    return at


def match_head(text: str, at: int, call: Sequence[str]) -> tuple[str, int, int]:
    """A call up to its arguments: the name, their place in ``text``, and that of their slot in ``call``.

    Raises More and Failed."""
    name = ""
    for slot, part in enumerate(call):
        if part == PARAMETERS:
            return name, at, slot
        if part == ARGS:
            at = after_blanks(text, at)
            if text[at] != "{":
                raise Failed
            return name, at, slot
        if part == NAME:
            name, at = _word(text, at)
        elif part == ID:
            _, at = _word(text, at)
        else:
            at = literal_end(text, at, part)
    raise AssertionError("a call has a slot for its arguments")


def match_tail(text: str, at: int, tail: Sequence[str]) -> int:
    """The place behind a call's ``tail``, what follows its arguments. Raises More and Failed."""
    for part in tail:
        at = _word(text, at)[1] if part == ID else literal_end(text, at, part)
    return at


def _word(text: str, at: int) -> tuple[str, int]:
    found = _NAME.match(text, at)
    assert found is not None
    if found.end() == len(text):
        raise More
    if not found[0]:
        raise Failed
    return found[0], found.end()


def held_back(text: str, marks: Sequence[str]) -> int:
    """How many last characters of ``text`` may be the beginning of one of ``marks``."""
    longest = max((len(mark) - 1 for mark in marks), default=0)
    for length in range(min(len(text), longest), 0, -1):
        end = text[-length:]
        if any(mark.startswith(end) for mark in marks):
            return length
    return 0
