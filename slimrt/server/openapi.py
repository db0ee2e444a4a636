"""The OpenAPI description, made from the fields that requests are checked by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimrt import __version__
from slimrt.llm import LLM
from slimrt.server.anthropic import COUNT, MESSAGES
from slimrt.server.documents import DOCUMENT
from slimrt.server.embeddings import EMBEDDINGS
from slimrt.server.fields import Field, schema
from slimrt.server.openai import CHAT, COMPLETION
from slimrt.server.responses import RESPONSES

__all__ = ["DETOKENIZE", "TOKENIZE", "description"]

TOKENIZE: dict[str, Field] = {
    "content": Field(("string",), "the text", required=True),
    "add_special": Field(("boolean",), "with the begin token, if the model wants one", False),
    "parse_special": Field(("boolean",), "control tokens spelt in the text count as such", False),
}
DETOKENIZE: dict[str, Field] = {"tokens": Field(("array",), "token ids", required=True)}

_POSTS: tuple[tuple[str, str, Mapping[str, Field], bool], ...] = (
    ("/v1/chat/completions", "Answer messages (OpenAI's chat completions)", CHAT, True),
    ("/v1/completions", "Continue text (OpenAI's completions)", COMPLETION, True),
    ("/v1/responses", "Answer messages (OpenAI's responses)", RESPONSES, True),
    ("/v1/messages", "Answer messages (Anthropic's messages)", MESSAGES, True),
    ("/v1/messages/count_tokens", "Count a prompt's tokens (Anthropic's)", COUNT, False),
    ("/v1/embeddings", "Texts as vectors (OpenAI's embeddings)", EMBEDDINGS, False),
    ("/tokenize", "Text to token ids", TOKENIZE, False),
    ("/detokenize", "Token ids to text", DETOKENIZE, False),
    ("/document", "A file (text, PDF, Word, HTML) to text", DOCUMENT, False),
)
_GETS = (
    ("/", "A page to chat with the model", "text/html"),
    ("/health", "Whether the server is up, and what it is doing", "application/json"),
    ("/metrics", "Counters and histograms for Prometheus", "text/plain"),
    ("/openapi.json", "This description", "application/json"),
    ("/v1/models", "The model that is served", "application/json"),
    ("/v1/models/{name}", "The same by its name", "application/json"),
)
_EVENT = {  # of a stream, each
    "type": "object", "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON, or [DONE]"}},
}  # fmt: skip
_ERRORS = {
    "400": "a field is wrong, or the prompt exceeds the context",
    "401": "a wrong or missing key",
    "413": "the body is too large",
    "429": "too many requests wait; Retry-After says for how long",
    "500": "the model or the server failed",
    "504": "the request took too long",
}


def description(llm: LLM) -> dict[str, Any]:
    """The description of a server of ``llm``."""
    error = {"application/json": {"schema": {"type": "object"}}}
    errors = {status: {"description": about, "content": error} for status, about in _ERRORS.items()}
    paths: dict[str, Any] = {}
    for path, about, fields, streams in _POSTS:
        content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if streams:
            content["text/event-stream"] = {"schema": _EVENT}
        body = {"required": True, "content": {"application/json": {"schema": schema(fields)}}}
        answers = {"200": {"description": "the answer", "content": content}, **errors}
        paths[path] = {"post": {"summary": about, "requestBody": body, "responses": answers}}
    for path, about, kind in _GETS:
        answers = {"200": {"description": "OK", "content": {kind: {"schema": {}}}}, "401": errors["401"]}
        one: dict[str, Any] = {"summary": about, "responses": answers}
        if "{name}" in path:
            one["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
            one["responses"]["404"] = {"description": "another model", "content": error}
        paths[path] = {"get": one}
    return {
        "openapi": "3.1.0",
        "info": {"title": "slimrt", "version": __version__, "description": f"{llm.config.name}, {llm.ctx:,} tokens"},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
