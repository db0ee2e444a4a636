"""OpenAI's responses: what they take, and what they answer with."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator
from typing import Any, cast

from slimrt.llm import LLM
from slimrt.request import GenerationRequest
from slimrt.reuse import Reading
from slimrt.server.calling import Reader, bound, calling_of, functions_only
from slimrt.server.errors import ApiError
from slimrt.server.fields import Field, checked
from slimrt.server.generation import (
    ANY,
    ARRAY,
    BOOLEAN,
    IGNORED,
    INTEGER,
    NUMBER,
    OBJECT,
    STRING,
    bound_grammar,
    chat_ids,
    generation_request,
    text_of,
)
from slimrt.server.scheduler import Ended, Event, Piece, Read
from slimrt.tools.calling import Calling
from slimrt.tools.parser import Arguments, CallStarted, Delta, TextDelta

__all__ = ["RESPONSES", "ResponseReply", "response_prompt"]

RESPONSES: dict[str, Field] = {
    "model": Field(STRING, "any name: there is one model"),
    "input": Field(
        ("string", "array"), "a text, or items of type message, function_call and function_call_output", required=True
    ),
    "instructions": Field(STRING, "the system prompt"),
    "max_output_tokens": Field(
        INTEGER, "most tokens of the answer; none: up to the end of the context", None, 1, 1 << 31
    ),
    "temperature": Field(NUMBER, "0: the likeliest token", 1.0, 0, 2),
    "top_p": Field(NUMBER, "draw from the likeliest tokens with this probability in sum", 1.0, 0, 1),
    "stream": Field(BOOLEAN, "send the answer as events", False),
    "text": Field(OBJECT, "{format: {type: text | json_object | json_schema, schema}}"),
    "tools": Field(ARRAY, "[{type: function, name, description, parameters}]; tools of other kinds are skipped"),
    "tool_choice": Field(ANY, "none, auto, required or {type: function, name}"),
    "previous_response_id": Field(STRING, "not supported: send the whole conversation"),
    "conversation": Field(ANY, "not supported: send the whole conversation"),
    "background": Field(BOOLEAN, "not supported: false", False),
    "reasoning": Field(OBJECT, "accepted, without effect"),
    "context_management": Field(ANY, "accepted, without effect"),
    "include": Field(ARRAY, "accepted, without effect"),
    "truncation": Field(STRING, "disabled: a prompt that is too long is refused", "disabled", choices=("disabled",)),
    "max_tool_calls": Field(INTEGER, "accepted, without effect"),
    "top_logprobs": Field(INTEGER, "not supported: 0", 0, 0, 0),
    "stream_options": Field(OBJECT, "accepted, without effect"),
    **IGNORED,
    "parallel_tool_calls": Field(BOOLEAN, "whether an answer may hold several calls"),
}


def response_prompt(llm: LLM, data: Any) -> tuple[dict[str, Any], list[int], GenerationRequest, Calling | None]:
    """A request's fields, its prompt, how it is answered, and what it may call. Raises ApiError."""
    values = checked(RESPONSES, data)
    for name in ("previous_response_id", "conversation", "background"):
        if values[name]:
            raise ApiError(
                400, f"'{name}' is not supported: nothing is stored; send the whole conversation", param=name
            )
    form = (values["text"] or {}).get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": form}  # as chat completions nest it
    grammar = bound_grammar(llm, form)
    functions = functions_only(values["tools"], ("function",))
    calling = calling_of(llm, functions, values["tool_choice"], values["parallel_tool_calls"])
    messages: list[dict[str, Any]] = []
    if values["instructions"]:
        messages.append({"role": "system", "content": values["instructions"]})
    given = values["input"]
    for at, item in enumerate([{"role": "user", "content": given}] if isinstance(given, str) else given):
        _add_item(messages, item, f"input[{at}]")
    if not messages:
        raise ApiError(400, "'input' is empty; give some text", param="input")
    ids = chat_ids(llm, messages, calling)
    request = generation_request(llm, values, max_tokens=values["max_output_tokens"], grammar=grammar)
    return values, ids, bound(request, calling), calling


def _add_item(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """Add what an item of the input says: a message, a call, which belongs to the answer before it, or its result."""
    if not isinstance(item, dict):
        raise ApiError(400, f"{where}: must be an object", param="input")
    kind, role = item.get("type", "message"), item.get("role")
    if kind == "reasoning":
        return
    if kind == "function_call":
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        messages[-1].setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})
        return
    if kind == "function_call_output":
        text = text_of(item.get("output"), where)
        messages.append({"role": "tool", "content": text, "tool_call_id": item.get("call_id")})
        return
    if kind != "message" or role not in ("user", "assistant", "system", "developer"):
        raise ApiError(
            400,
            f"{where}: type {str(kind)[:40]!r}, role {str(role)[:40]!r}; messages, function calls and their outputs "
            "are read",
            param="input",
        )
    role = "system" if role == "developer" else role
    messages.append({"role": role, "content": text_of(item.get("content"), where)})


class ResponseReply:
    """An answer of /v1/responses: its text is a message, each call an item of its own."""

    progress = False

    def __init__(self, llm: LLM, values: dict[str, Any], prompt_tokens: int, calling: Calling | None = None) -> None:
        self._llm, self._values, self.prompt_tokens = llm, values, prompt_tokens
        self._id, self._created, self._numbers = f"resp_{uuid.uuid4().hex}", int(time.time()), itertools.count()
        self._reader, self.reading = Reader(calling), cast("Reading | None", None)
        self._items: list[dict[str, Any]] = []  # the last one may be open
        self.written, self._reason, self._status = 0, "stop", "in_progress"

    def whole(self) -> dict[str, Any]:
        """The answer so far."""
        v, reused = self._values, self.reading.reused if self.reading else 0
        done = self._status != "in_progress"
        usage = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": reused},
            "output_tokens": self.written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.written,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": v["instructions"],
            "max_output_tokens": v["max_output_tokens"],
            "model": self._llm.config.name,
            "output": self._items if done else [],
            "parallel_tool_calls": v["parallel_tool_calls"] is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": v["temperature"],
            "text": {"format": {"type": "text"}},
            "tool_choice": v["tool_choice"] or "auto",
            "tools": functions_only(v["tools"], ("function",)),
            "top_p": v["top_p"],
            "truncation": "disabled",
            "usage": usage if done else None,
            "metadata": {},
        }

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        """The events that this makes in a stream; the answer is kept as well."""
        for one in self._events(event):
            yield {**one, "sequence_number": next(self._numbers)}

    def _events(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Read):
            self.reading = event.reading
            yield {"type": "response.created", "response": self.whole()}
            yield {"type": "response.in_progress", "response": self.whole()}
        elif isinstance(event, Piece):
            step = event.step
            self.written += step.token is not None
            for delta in self._reader.push(step.text, last=step.finish_reason is not None):
                yield from self._told(delta)
            self._reason = step.finish_reason or self._reason
        elif isinstance(event, Ended):
            if not self._items:
                yield from self._open_text()
            self._status = "incomplete" if self._reason == "length" else "completed"
            yield from self._close(self._status)
            yield {"type": f"response.{self._status}", "response": self.whole()}

    def _told(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if isinstance(delta, TextDelta):
            if not self._items or self._items[-1]["type"] != "message" or self._items[-1]["status"] != "in_progress":
                yield from self._open_text()
            self._items[-1]["content"][0]["text"] += delta.text
            yield {"type": "response.output_text.delta", **self._place(), "delta": delta.text, "logprobs": []}
        elif isinstance(delta, CallStarted):
            call = {
                "type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "status": "in_progress", "call_id": delta.id,
                "name": delta.name, "arguments": "",
            }  # fmt: skip
            yield from self._add(call)
        elif isinstance(delta, Arguments):
            self._items[-1]["arguments"] += delta.text
            place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
            yield {"type": "response.function_call_arguments.delta", **place, "delta": delta.text}
        else:
            yield from self._close("completed" if delta.broken is None else "incomplete")

    def _open_text(self) -> Iterator[dict[str, Any]]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        message: dict[str, Any] = {
            "type": "message", "id": f"msg_{uuid.uuid4().hex}", "status": "in_progress", "role": "assistant",
            "content": [],
        }  # fmt: skip
        yield from self._add(message)
        message["content"] = [part]
        yield {"type": "response.content_part.added", **self._place(), "part": dict(part)}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _add(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close("completed")
        self._items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": dict(item)}

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """The last item, if it is open, is over."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item, index = self._items[-1], len(self._items) - 1
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield {"type": "response.output_text.done", **self._place(), "text": part["text"], "logprobs": []}
            yield {"type": "response.content_part.done", **self._place(), "part": part}
        else:
            done = {"item_id": item["id"], "output_index": index, "name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **done}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
