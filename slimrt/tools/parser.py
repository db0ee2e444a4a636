"""Calls read from an answer as it comes. What is no call is text, and none of it is lost."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from slimrt.results import ToolCall
from slimrt.tools.formats import PARAMETERS, Format, parts
from slimrt.tools.parameters import argument, next_element
from slimrt.tools.scan import (
    Failed,
    JsonEnd,
    More,
    after_blanks,
    held_back,
    json_object,
    literal_end,
    match_head,
    match_tail,
)
from slimrt.tools.tool import Tool

__all__ = ["Answer", "Arguments", "CallEnded", "CallParser", "CallStarted", "Delta", "TextDelta", "Thinking", "call_id"]

Thinking = Literal["no", "may", "open"]
THINK, THOUGHT = "<think>", "</think>"
_KEYS = ("name", "tool_name"), ("arguments", "parameters")  # of a call that is one JSON object


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """Call number ``index`` begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of call ``index``'s arguments, which in sum are a JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """Call ``index`` is over. ``broken``: all that was written of one that is not whole, which makes it text."""

    index: int
    broken: str | None = None


Delta = TextDelta | CallStarted | Arguments | CallEnded


def call_id() -> str:
    """An id for a call: nine letters and digits, as Mistral's templates demand."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class CallParser:
    """Reads one answer. ``tools``: what may be called; a call of another name is text. ``thinking``: whether the answer
    may begin with a <think> block, or begins within one; what looks like a call in it is a thought."""

    def __init__(self, form: Format, tools: Sequence[Tool], thinking: Thinking = "no") -> None:
        self._form, self._tools = form, {tool.name: tool for tool in tools}
        self._calls = [parts(call) for call in form.calls]
        self._left = ""  # what came and was not looked at
        self._raw = ""  # what was taken of the call that is being read
        self._prefix = form.begin
        self._tails: list[Sequence[str]] = []  # what may follow the arguments
        self._index, self._name = -1, ""
        self._arguments: list[str] = []
        self._json, self._scanned = JsonEnd(), 0
        self._out: list[Delta] = []
        self._final = False
        begins = {"no": self._first, "may": self._may_think, "open": self._thought}
        self._state: Callable[[], bool] = begins[thinking]

    def push(self, text: str) -> list[Delta]:
        """What the answer's next piece makes."""
        self._left += text
        return self._run()

    def finish(self) -> list[Delta]:
        """What the end of the answer makes of the rest."""
        self._final = True
        return self._run()

    # -- states: each takes from what is left, and returns whether the next one may go on ------------------------------

    def _run(self) -> list[Delta]:
        while self._state():
            pass
        out, self._out = self._out, []
        return out

    def _to(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _take(self, count: int) -> str:
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def _tell(self, text: str) -> None:
        if text:
            self._out.append(TextDelta(text))

    def _may_think(self) -> bool:
        if self._left.startswith(THINK):
            return self._to(self._thought)
        return (self._final or not THINK.startswith(self._left)) and self._to(self._first)

    def _thought(self) -> bool:
        at = self._left.find(THOUGHT)
        if at >= 0:
            self._tell(self._take(at + len(THOUGHT)))
            return self._to(self._first)
        self._tell(self._take(len(self._left) - (0 if self._final else held_back(self._left, [THOUGHT]))))
        return False

    def _first(self) -> bool:
        """Where the text begins; some forms have their calls, or a sign of text, there alone."""
        form, text = self._form, self._left
        if form.given:
            mark = form.text_mark.removeprefix(form.given)
            if text.startswith(mark):
                self._take(len(mark))
                return self._to(self._text)
            if mark.startswith(text) and not self._final:
                return False
            return self._enter(self._first_head)
        if form.triggers:
            return self._to(self._text)
        self._tell(self._take(len(text) - len(text.lstrip())))
        if self._left.startswith(form.lead):
            self._raw = self._take(len(form.lead))
        elif form.lead.startswith(self._left) and not self._final:
            return False
        return self._enter(self._head)

    def _text(self) -> bool:
        text, triggers = self._left, self._form.triggers
        places = [at for at in (text.find(trigger) for trigger in triggers) if at >= 0]
        self._raw = ""
        if places:
            self._tell(self._take(min(places)))
            self._prefix = self._form.begin
            return self._enter(self._head)
        self._tell(self._take(len(text) - (0 if self._final else held_back(text, triggers))))
        return False

    def _enter(self, head: Callable[[], bool]) -> bool:
        self._json, self._scanned = JsonEnd(), 0
        return self._to(head)

    def _first_head(self) -> bool:
        """As _head; the prompt has given the call's beginning."""
        given = self._form.given
        self._left = given + self._left
        gone = self._head()
        if gone:
            self._raw = self._raw.removeprefix(given)
        else:
            self._left = self._left.removeprefix(given)
        return gone

    def _head(self) -> bool:
        """A call up to its arguments."""
        waits = False
        try:
            at = literal_end(self._left, 0, self._prefix)
            if self._prefix.endswith("[") and self._left[after_blanks(self._left, at)] == "]":
                self._take(at)  # an empty list says that there are none
                return self._to(self._between)
        except More:
            return self._no_call() if self._final else False
        except Failed:
            return self._no_call()
        for call in self._calls:
            try:
                name, place, slot = match_head(self._left, at, call)
            except More:
                waits = True
                continue
            except Failed:
                continue
            if name in self._tools:
                alike = [other for other in self._calls if other[: slot + 1] == call[: slot + 1]]
                self._start(name, place, [other[slot + 1 :] for other in alike])
                return self._to(self._elements if call[slot] == PARAMETERS else self._object)
        if waits and not self._final:
            return False
        found = self._other_order(at)
        if found is None and not self._final:
            return False
        return bool(found) or self._no_call()

    def _start(self, name: str, place: int, tails: list[Sequence[str]]) -> None:
        self._index, self._name, self._tails = self._index + 1, name, tails
        self._raw += self._take(place)
        self._arguments = []
        self._json, self._scanned = JsonEnd(), 0
        self._out.append(CallStarted(self._index, call_id(), name))

    def _no_call(self) -> bool:
        form, text = self._form, self._left
        if not form.triggers:  # nothing further on is a call
            self._tell(self._raw + self._take(len(text)))
            self._raw = ""
            return self._to(self._text)
        if form.given and self._state == self._first_head:
            self._left = text.removeprefix(form.given)
            return self._to(self._text)
        trigger = next((trigger for trigger in form.triggers if text.startswith(trigger)), text[:1])
        self._tell(self._raw + self._take(len(trigger)))
        return self._to(self._text)

    def _other_order(self, at: int) -> bool | None:
        """A call that is one JSON object with its keys in another order; None where its end has not come."""
        before, brace, _ = self._calls[0][0].partition("{")
        if not brace or not self._form.triggers:
            return False
        try:
            at = after_blanks(self._left, literal_end(self._left, at, before))
        except More:
            return None
        except Failed:
            return False
        if self._left[at] != "{":
            return False
        end = self._json.feed(self._left, max(at, self._scanned))
        self._scanned = len(self._left)
        if end is None:
            return None
        call = json_object(self._left[at:end]) or {}
        name, given = (next((call[key] for key in keys if key in call), None) for keys in _KEYS)
        arguments = json_object(given) if isinstance(given, str) else given
        if name not in self._tools or not isinstance(arguments, dict):
            return False
        self._start(name, end, [[self._calls[0][-1].partition("}")[2]]])
        return self._whole(json.dumps(arguments, ensure_ascii=False))

    def _whole(self, last: str) -> bool:
        """The last piece of the arguments."""
        self._argue(last)
        if json_object("".join(self._arguments)) is None:
            return self._break()
        self._out.append(CallEnded(self._index))
        return self._to(self._close)

    def _argue(self, piece: str) -> None:
        if piece:
            self._arguments.append(piece)
            self._out.append(Arguments(self._index, piece))

    def _break(self) -> bool:
        self._out.append(CallEnded(self._index, self._raw))
        return self._to(self._text)

    def _object(self) -> bool:
        """Arguments that are a JSON object."""
        end = self._json.feed(self._left)
        piece = self._take(len(self._left) if end is None else end)
        self._raw += piece
        if end is not None:
            return self._whole(piece)
        self._argue(piece)
        return self._final and self._break()

    def _elements(self) -> bool:
        """Arguments that are elements, one after the other."""
        try:
            found = next_element(self._left)
        except More:
            if not self._final:
                return False
            self._raw += self._take(len(self._left))
            return self._break()
        except Failed:
            return self._break()
        if found is None:
            return self._whole("}" if self._arguments else "{}")
        name, text, end = found
        self._raw += self._take(end)
        value = json.dumps(argument(self._tools[self._name], name, text), ensure_ascii=False)
        self._argue(("{" if not self._arguments else ", ") + json.dumps(name, ensure_ascii=False) + f": {value}")
        return True

    def _close(self) -> bool:
        """What is behind a call's arguments. Where it is missing the call is whole nevertheless."""
        waits = False
        for tail in self._tails:
            try:
                self._take(match_tail(self._left, 0, tail))
                return self._to(self._between)
            except More:
                waits = True
            except Failed:
                continue
        if waits and not self._final:
            return False
        if waits:
            self._take(len(self._left))
        return self._to(self._between)

    def _between(self) -> bool:
        """A further call, the end of them, or text."""
        form, self._raw = self._form, ""
        try:
            at = after_blanks(self._left, 0)
            if form.is_list and self._left[at] == ",":
                self._raw, self._prefix = self._take(at + 1), ""
                return self._enter(self._head)
            if form.end:
                self._take(literal_end(self._left, 0, form.end))
                return self._to(self._text)
        except More:
            if self._final:
                self._take(len(self._left))
            return False
        except Failed:
            return self._to(self._text)
        rest = self._left[at:]
        if any(rest.startswith(trigger) for trigger in form.triggers):
            self._raw, self._prefix = self._take(at), form.begin
            return self._enter(self._head)
        if any(trigger.startswith(rest) for trigger in form.triggers) and not self._final:
            return False
        return self._to(self._text)


@dataclass
class Answer:
    """An answer put together from its deltas: its text, with what was written of calls that are not whole, and its
    calls. ``cut``: whether there was such a one."""

    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    cut: bool = False
    _open: CallStarted | None = None
    _arguments: str = ""

    def take(self, deltas: Iterable[Delta]) -> None:
        """Add what came."""
        for delta in deltas:
            if isinstance(delta, TextDelta):
                self.text += delta.text
            elif isinstance(delta, CallStarted):
                self._open, self._arguments = delta, ""
            elif isinstance(delta, Arguments):
                self._arguments += delta.text
            elif delta.broken is not None:
                self.text, self.cut = self.text + delta.broken, True
            else:
                assert self._open is not None
                self.calls.append(ToolCall(self._open.id, self._open.name, self._arguments))
