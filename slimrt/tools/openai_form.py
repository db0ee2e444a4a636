"""Calls in the shape of OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from slimrt.tools.parser import Answer, Arguments, CallEnded, CallStarted, Delta, TextDelta

__all__ = ["message_of", "stream_deltas"]


def stream_deltas(deltas: Iterable[Delta]) -> list[dict[str, Any]]:
    """The ``delta`` of each chunk of a stream."""
    found: list[dict[str, Any]] = []
    for delta in deltas:
        if isinstance(delta, TextDelta):
            found.append({"content": delta.text})
        elif isinstance(delta, CallStarted):
            function = {"name": delta.name, "arguments": ""}
            one = {"index": delta.index, "id": delta.id, "type": "function", "function": function}
            found.append({"tool_calls": [one]})
        elif isinstance(delta, Arguments):
            found.append({"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]})
        else:
            assert isinstance(delta, CallEnded)  # of which the reason for the end tells
    return found


def message_of(answer: Answer) -> dict[str, Any]:
    """The ``message`` of a whole answer; no text is null beside calls."""
    if not answer.calls:
        return {"role": "assistant", "content": answer.text}
    return {
        "role": "assistant",
        "content": answer.text or None,
        "tool_calls": [call.as_openai() for call in answer.calls],
    }


def legacy(found: dict[str, Any]) -> dict[str, Any]:
    """A delta or a message as the interface had it before tools: one function call."""
    calls = found.pop("tool_calls", None)
    return {**found, "function_call": calls[0]["function"]} if calls else found


def tools_and_choice(tools: Any, tool_choice: Any, functions: Any, function_call: Any) -> tuple[Any, Any, bool]:
    """What may be called, and how, of a request that may ask in the older words; whether it does."""
    if not functions:
        return tools, tool_choice, False
    if not isinstance(functions, list):
        return functions, tool_choice, True
    if isinstance(function_call, dict):
        function_call = {"type": "function", "function": function_call}
    return [{"type": "function", "function": one} for one in functions], function_call, True
