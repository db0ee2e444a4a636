"""Anthropic's messages: what they take, and what they answer with."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from slimrt.errors import SlimrtError
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
    INTEGER,
    NUMBER,
    OBJECT,
    STRING,
    chat_ids,
    generation_request,
    messages_schema,
    text_of,
)
from slimrt.server.scheduler import Ended, Event, Piece, Read
from slimrt.tools.calling import Calling
from slimrt.tools.parser import Arguments, CallStarted, Delta, TextDelta

__all__ = ["COUNT", "MESSAGES", "MessageReply", "counted_tokens", "message_prompt"]

COUNT: dict[str, Field] = {
    "model": Field(STRING, "any name: there is one model"),
    "messages": Field(
        ARRAY, "[{role, content}, ...]", required=True, inside=messages_schema("user", "assistant", "system")
    ),
    "system": Field(("string", "array"), "the system prompt"),
    "tools": Field(ARRAY, "[{name, description, input_schema}]; what the provider runs itself is skipped"),
    "tool_choice": Field(OBJECT, "{type: auto | any | none}, or {type: tool, name}; disable_parallel_tool_use"),
    "thinking": Field(OBJECT, "{type: disabled}"),
    "mcp_servers": Field(ARRAY, "not supported: none"),
    "cache_control": Field(OBJECT, "accepted, without effect: what was read is kept anyway"),
    "output_config": Field(OBJECT, "{format: none}; effort is accepted, without effect"),
    "speed": Field(ANY, "accepted, without effect"),
    "user_profile_id": Field(ANY, "accepted, without effect"),
    "workspace_id": Field(ANY, "accepted, without effect"),
}
MESSAGES: dict[str, Field] = {
    **COUNT,
    "max_tokens": Field(INTEGER, "most tokens of the answer", required=True, low=1, high=1 << 31),
    "stop_sequences": Field(ARRAY, "texts before which the answer ends"),
    "stream": Field(BOOLEAN, "send the answer as it comes", False),
    "temperature": Field(NUMBER, "0: the likeliest token", 1.0, 0, 1),
    "top_p": Field(NUMBER, "draw from the likeliest tokens with this probability in sum", 1.0, 0, 1),
    "top_k": Field(INTEGER, "draw from so many of the likeliest tokens", 0, 0, 1 << 31),
    "metadata": Field(ANY, "accepted, without effect"),
    "service_tier": Field(ANY, "accepted, without effect"),
    "container": Field(ANY, "accepted, without effect"),
    "diagnostics": Field(ANY, "accepted, without effect"),
    "inference_geo": Field(ANY, "accepted, without effect"),
    "context_management": Field(ANY, "accepted, without effect"),
}


def _calling(llm: LLM, values: dict[str, Any]) -> Calling | None:
    tools = [
        {**{key: one[key] for key in ("name", "description") if key in one}, "parameters": one.get("input_schema")}
        if isinstance(one, dict) and "function" not in one
        else one
        for one in functions_only(values["tools"], (None, "custom"))
    ]
    choice = values["tool_choice"] or {}
    parallel = False if choice.get("disable_parallel_tool_use") else None
    return calling_of(llm, tools, choice or None, parallel)


def _messages(values: dict[str, Any]) -> list[dict[str, Any]]:
    if values["mcp_servers"]:
        raise ApiError(400, "'mcp_servers' is not supported by this server; leave it out")
    if (values["output_config"] or {}).get("format"):
        raise ApiError(400, "'output_config.format' is not supported by this server; leave it out")
    if (values["thinking"] or {}).get("type") == "enabled":
        raise ApiError(400, "'thinking' is not supported by this model; leave it out")
    messages = []
    if values["system"]:
        messages.append({"role": "system", "content": text_of(values["system"], "system")})
    if not values["messages"]:
        raise ApiError(400, "messages: at least one message is required")
    for at, message in enumerate(values["messages"]):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system"):
            raise ApiError(400, f"messages.{at}: role {str(role)[:40]!r}; it must be user or assistant")
        messages += _turns(role, message.get("content"), f"messages.{at}")
    return messages


def _turns(role: str, content: Any, where: str) -> list[dict[str, Any]]:
    """A message as chat templates have it: results go before what the user says, calls behind what the model does."""
    blocks = content if isinstance(content, list) else []
    results = [one for one in blocks if isinstance(one, dict) and one.get("type") == "tool_result"]
    calls = [one for one in blocks if isinstance(one, dict) and one.get("type") == "tool_use"]
    rest = [one for one in blocks if one not in results and one not in calls] if blocks else content
    turns: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": one.get("tool_use_id"), "content": text_of(one.get("content"), where)}
        for one in results
    ]
    if rest or not (results or calls):
        turns.append({"role": role, "content": text_of(rest, where)})
    if calls:
        if not rest:
            turns.append({"role": role, "content": ""})
        turns[-1]["tool_calls"] = [
            {"id": one.get("id"), "function": {"name": one.get("name"), "arguments": one.get("input")}} for one in calls
        ]
    return turns


def counted_tokens(llm: LLM, data: Any) -> dict[str, int]:
    """What /v1/messages/count_tokens answers. Raises ApiError."""
    values = checked(COUNT, data)
    return {"input_tokens": len(_ids(llm, values, _calling(llm, values)))}


def _ids(llm: LLM, values: dict[str, Any], calling: Calling | None) -> list[int]:
    """The prompt. A last message of the assistant is the beginning of the answer, which goes on from there."""
    *before, last = messages = _messages(values)
    begins = last["role"] == "assistant" and "tool_calls" not in last and any(one["role"] == "user" for one in before)
    ids = chat_ids(llm, before if begins else messages, calling)
    try:
        return ids + llm.tokenizer.encode_within(last["content"]) if begins else ids
    except SlimrtError as error:
        raise ApiError(400, f"messages: {error}") from None


def message_prompt(llm: LLM, data: Any) -> tuple[dict[str, Any], list[int], GenerationRequest, Calling | None]:
    """A request's fields, its prompt, how it is answered, and what it may call. Raises ApiError."""
    values = checked(MESSAGES, data)
    stops = values["stop_sequences"] or []
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(400, "stop_sequences: each must be a text, and not empty")
    calling = _calling(llm, values)
    ids = _ids(llm, values, calling)
    request = generation_request(llm, values, max_tokens=values["max_tokens"], stop=tuple(stops))
    return values, ids, bound(request, calling), calling


class MessageReply:
    """An answer of /v1/messages: a block of text, and one for each call."""

    progress = False

    def __init__(self, llm: LLM, prompt_tokens: int, calling: Calling | None = None) -> None:
        self._llm, self.prompt_tokens = llm, prompt_tokens
        self._id = f"msg_{uuid.uuid4().hex}"
        self.reading: Reading | None = None
        self._reader, self.written, self._reason = Reader(calling), 0, "end_turn"
        self._blocks, self._open = 0, ""  # how many there are in the stream, and of which kind the open one is

    def _usage(self) -> dict[str, int]:
        reused = self.reading.reused if self.reading else 0
        return {
            "input_tokens": self.prompt_tokens - reused,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": reused,
            "output_tokens": self.written,
        }

    def whole(self) -> dict[str, Any]:
        """The answer so far."""
        answer = self._reader.answer
        content: list[dict[str, Any]] = [{"type": "text", "text": answer.text}] if answer.text else []
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
            for call in answer.calls
        ]
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._llm.config.name,
            "content": content,
            "stop_reason": self._reason,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        """The events that this makes in a stream; the answer is kept as well."""
        if isinstance(event, Read):
            self.reading = event.reading
            yield {"type": "message_start", "message": {**self.whole(), "stop_reason": None}}
        elif isinstance(event, Piece):
            step = event.step
            self.written += step.token is not None
            for delta in self._reader.push(step.text, last=step.finish_reason is not None):
                yield from self._told(delta)
            if step.finish_reason is not None:
                reason = self._reader.reason(step.finish_reason)
                self._reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(reason, self._reason)
        elif isinstance(event, Ended):
            if not self._blocks:
                yield from self._begin("text", {"type": "text", "text": ""})
            yield from self._end()
            ended = {"stop_reason": self._reason, "stop_sequence": None}
            yield {"type": "message_delta", "delta": ended, "usage": self._usage()}
            yield {"type": "message_stop"}

    def _told(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if isinstance(delta, TextDelta):
            if self._open != "text":
                yield from self._begin("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": delta.text})
        elif isinstance(delta, CallStarted):
            block = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
            yield from self._begin("tool_use", block)
        elif isinstance(delta, Arguments):
            yield self._delta({"type": "input_json_delta", "partial_json": delta.text})
        else:
            yield from self._end()

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._end()
        self._blocks, self._open = self._blocks + 1, kind
        yield {"type": "content_block_start", "index": self._blocks - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}

    def _end(self) -> Iterator[dict[str, Any]]:
        if self._open:
            self._open = ""
            yield {"type": "content_block_stop", "index": self._blocks - 1}
