"""OpenAI's responses: what they take, and what they answer with."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator
from typing import Any

from slimrt.generation import GenerationRequest
from slimrt.llm import LLM
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
from slimrt.session import Reading

__all__ = ["RESPONSES", "ResponseReply", "response_prompt"]

RESPONSES: dict[str, Field] = {
    "model": Field(STRING, "any name: there is one model"),
    "input": Field(("string", "array"), "a text, or items of type message", required=True),
    "instructions": Field(STRING, "the system prompt"),
    "max_output_tokens": Field(
        INTEGER, "most tokens of the answer; none: up to the end of the context", None, 1, 1 << 31
    ),
    "temperature": Field(NUMBER, "0: the likeliest token", 1.0, 0, 2),
    "top_p": Field(NUMBER, "draw from the likeliest tokens with this probability in sum", 1.0, 0, 1),
    "stream": Field(BOOLEAN, "send the answer as events", False),
    "text": Field(OBJECT, "{format: {type: text | json_object | json_schema, schema}}"),
    "tools": Field(ARRAY, "tools of unknown kinds are skipped; functions are not supported yet"),
    "tool_choice": Field(ANY, "none or auto"),
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
}


def response_prompt(llm: LLM, data: Any) -> tuple[dict[str, Any], list[int], GenerationRequest]:
    """A request's fields, its prompt, and how it is answered. Raises ApiError."""
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
    if any(isinstance(tool, dict) and tool.get("type") == "function" for tool in values["tools"] or []):
        raise ApiError(400, "'tools' of type function are not supported by this server; leave them out", param="tools")
    messages = [{"role": "system", "content": values["instructions"]}] if values["instructions"] else []
    given = values["input"]
    for at, item in enumerate([{"role": "user", "content": given}] if isinstance(given, str) else given):
        if not isinstance(item, dict):
            raise ApiError(400, f"input[{at}]: must be an object", param="input")
        if item.get("type", "message") == "reasoning":
            continue
        role = item.get("role")
        if item.get("type", "message") != "message" or role not in ("user", "assistant", "system", "developer"):
            raise ApiError(
                400,
                f"input[{at}]: type {str(item.get('type'))[:40]!r}, role {str(role)[:40]!r}; only messages are read",
                param="input",
            )  # fmt: skip
        role = "system" if role == "developer" else role
        messages.append({"role": role, "content": text_of(item.get("content"), f"input[{at}]")})
    if not messages:
        raise ApiError(400, "'input' is empty; give some text", param="input")
    return (
        values,
        chat_ids(llm, messages),
        generation_request(llm, values, max_tokens=values["max_output_tokens"], grammar=grammar),
    )


class ResponseReply:
    """An answer of /v1/responses."""

    progress = False

    def __init__(self, llm: LLM, values: dict[str, Any], prompt_tokens: int) -> None:
        self._llm, self._values, self.prompt_tokens = llm, values, prompt_tokens
        self._id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created, self._numbers = int(time.time()), itertools.count()
        self.reading: Reading | None = None
        self.text, self.written, self._reason, self._status = "", 0, "stop", "in_progress"

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def _message(self) -> dict[str, Any]:
        content = [self._part()] if self._status != "in_progress" else []
        return {
            "type": "message", "id": self._item, "status": self._status, "role": "assistant", "content": content,
        }  # fmt: skip

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
            "output": [self._message()] if done else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": v["temperature"],
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
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
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        if isinstance(event, Read):
            self.reading = event.reading
            yield {"type": "response.created", "response": self.whole()}
            yield {"type": "response.in_progress", "response": self.whole()}
            yield {"type": "response.output_item.added", "output_index": 0, "item": self._message()}
            yield {"type": "response.content_part.added", **place, "part": self._part()}
        elif isinstance(event, Piece):
            self.written += event.step.token is not None
            self.text += event.step.text
            if event.step.text:
                yield {"type": "response.output_text.delta", **place, "delta": event.step.text, "logprobs": []}
            self._reason = event.step.finish_reason or self._reason
        elif isinstance(event, Ended):
            self._status = "incomplete" if self._reason == "length" else "completed"
            yield {"type": "response.output_text.done", **place, "text": self.text, "logprobs": []}
            yield {"type": "response.content_part.done", **place, "part": self._part()}
            yield {"type": "response.output_item.done", "output_index": 0, "item": self._message()}
            yield {"type": f"response.{self._status}", "response": self.whole()}
