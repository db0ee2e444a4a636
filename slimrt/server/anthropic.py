"""Anthropic's messages: what they take, and what they answer with."""

from __future__ import annotations

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
from slimrt.session import Reading

__all__ = ["COUNT", "MESSAGES", "MessageReply", "counted_tokens", "message_prompt"]

COUNT: dict[str, Field] = {
    "model": Field(STRING, "any name: there is one model"),
    "messages": Field(
        ARRAY, "[{role, content}, ...]", required=True, inside=messages_schema("user", "assistant", "system")
    ),
    "system": Field(("string", "array"), "the system prompt"),
    "tools": Field(ARRAY, "not supported yet: none"),
    "tool_choice": Field(OBJECT, "without effect where there are no tools"),
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


def _messages(values: dict[str, Any]) -> list[dict[str, Any]]:
    if values["tools"]:
        raise ApiError(400, "'tools' is not supported by this server; leave it out")
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
        messages.append({"role": role, "content": text_of(message.get("content"), f"messages.{at}")})
    return messages


def counted_tokens(llm: LLM, data: Any) -> dict[str, int]:
    """What /v1/messages/count_tokens answers. Raises ApiError."""
    return {"input_tokens": len(chat_ids(llm, _messages(checked(COUNT, data))))}


def message_prompt(llm: LLM, data: Any) -> tuple[dict[str, Any], list[int], GenerationRequest]:
    """A request's fields, its prompt, and how it is answered. Raises ApiError."""
    values = checked(MESSAGES, data)
    stops = values["stop_sequences"] or []
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(400, "stop_sequences: each must be a text, and not empty")
    ids = chat_ids(llm, _messages(values))
    return values, ids, generation_request(llm, values, max_tokens=values["max_tokens"], stop=tuple(stops))


class MessageReply:
    """An answer of /v1/messages."""

    progress = False

    def __init__(self, llm: LLM, prompt_tokens: int) -> None:
        self._llm, self.prompt_tokens = llm, prompt_tokens
        self._id = f"msg_{uuid.uuid4().hex}"
        self.reading: Reading | None = None
        self.text, self.written, self._reason = "", 0, "end_turn"

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
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._llm.config.name,
            "content": [{"type": "text", "text": self.text}] if self.text else [],
            "stop_reason": self._reason,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        """The events that this makes in a stream; the answer is kept as well."""
        if isinstance(event, Read):
            self.reading = event.reading
            yield {"type": "message_start", "message": {**self.whole(), "stop_reason": None}}
            yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        elif isinstance(event, Piece):
            self.written += event.step.token is not None
            self.text += event.step.text
            if event.step.text:
                delta = {"type": "text_delta", "text": event.step.text}
                yield {"type": "content_block_delta", "index": 0, "delta": delta}
            if event.step.finish_reason == "length":
                self._reason = "max_tokens"
        elif isinstance(event, Ended):
            yield {"type": "content_block_stop", "index": 0}
            ended = {"stop_reason": self._reason, "stop_sequence": None}
            yield {"type": "message_delta", "delta": ended, "usage": self._usage()}
            yield {"type": "message_stop"}
