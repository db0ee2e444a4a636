"""Tools in a request, for the interfaces of OpenAI and Anthropic alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from slimrt.errors import SettingError
from slimrt.llm import LLM
from slimrt.request import GenerationRequest
from slimrt.results import FinishReason
from slimrt.server.errors import ApiError
from slimrt.tools.calling import Calling
from slimrt.tools.parser import Answer, CallParser, Delta, TextDelta

__all__ = ["Reader", "bound", "calling_of", "functions_only"]


def functions_only(tools: Sequence[Any] | None, kinds: tuple[str | None, ...]) -> list[Any]:
    """The tools of these kinds: what a provider runs itself is skipped, as a model that lacks it would."""
    return [one for one in tools or () if not isinstance(one, Mapping) or one.get("type") in kinds]


def calling_of(llm: LLM, tools: Any, choice: Any, parallel: Any = None, *, param: str = "tools") -> Calling | None:
    """How an answer may call ``tools``; None where it may not. Raises ApiError."""
    try:
        return llm.calling(tools, choice, parallel)
    except SettingError as error:
        at = "tool_choice" if str(error).startswith("tool_choice") else param
        raise ApiError(400, f"'{at}': {error}", param=at, code="invalid_value") from None


def bound(request: GenerationRequest, calling: Calling | None) -> GenerationRequest:
    """The ``request`` of a chat, its answer bound to ``calling``. Raises ApiError."""
    request = dataclasses.replace(request, chat=True)
    try:
        return request if calling is None else calling.bind(request)
    except SettingError as error:
        raise ApiError(400, f"'tools': {error}", param="tools") from None


class Reader:
    """Reads one answer as it comes; without tools everything is text. ``answer``: what came so far."""

    def __init__(self, calling: Calling | None) -> None:
        self._calling = calling
        self._parser: CallParser | None = None if calling is None else calling.parser()
        self.answer = Answer()

    def push(self, text: str, *, last: bool) -> list[Delta]:
        """What the next piece makes, and with the ``last`` one the end of the answer."""
        found: list[Delta] = [TextDelta(text)] if text and self._parser is None else []
        if self._parser is not None:
            found = self._parser.push(text) + (self._parser.finish() if last else [])
        self.answer.take(found)
        return found

    def reason(self, reason: FinishReason) -> FinishReason:
        """Why the answer ended."""
        return reason if self._calling is None else self._calling.finish_reason(reason, self.answer)
