"""Completions in the shape of OpenAI's API, as dictionaries that ``json`` can write.

Keys, nesting and chunk order are those of llama-cpp-python's ``llama_types.py``, which programs for either API expect.
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from slimrt.results import FinishReason, TokenLogprob
from slimrt.text.tokenizer import Tokenizer
from slimrt.tools.calling import Calling
from slimrt.tools.openai_form import legacy, message_of, stream_deltas
from slimrt.tools.parser import Answer

__all__ = ["CompletionFormat", "LogprobFormat", "chat_chunks", "chat_completion"]


class CompletionFormat:
    """One answer's envelope: every dictionary made by it carries the same id, time and model name."""

    def __init__(self, model: str) -> None:
        self._envelope = {
            "id": f"cmpl-{uuid.uuid4()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, text: str, logprobs: dict[str, Any] | None, reason: FinishReason | None) -> dict[str, Any]:
        """A piece of a stream; the last one has no text and tells the ``reason``."""
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}
        return {**self._envelope, "choices": [choice]}

    def whole(
        self, text: str, logprobs: dict[str, Any] | None, reason: FinishReason, read: int, written: int
    ) -> dict[str, Any]:
        """A whole completion; ``read`` and ``written`` are counts of tokens."""
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {**self.chunk(text, logprobs, reason), "usage": usage}


class LogprobFormat:
    """The ``logprobs`` part of completions; ``text_offset`` counts characters from ``start`` on, token after token."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        self._tokenizer, self._at = tokenizer, start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def __call__(self, entries: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        """For (token, its log-probability or None where nothing comes before it), in the order of the text."""
        result: dict[str, list[Any]] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
        for token, logprob in entries:
            text = self._text(token)
            result["tokens"].append(text)
            result["text_offset"].append(self._at)
            result["token_logprobs"].append(None if logprob is None else logprob.logprob)
            result["top_logprobs"].append(None if logprob is None else self._top(logprob) | {text: logprob.logprob})
            self._at += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return result

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="ignore")

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        return {self._text(token): value for token, value in logprob.top}


def chat_completion(
    completion: dict[str, Any], calling: Calling | None = None, *, older: bool = False
) -> dict[str, Any]:
    """A whole completion as a chat answer; ``calling``: what it may call, told (``older``) as a function call."""
    (choice,) = completion["choices"]
    message, reason = {"role": "assistant", "content": choice["text"]}, choice["finish_reason"]
    if calling is not None:
        answer = calling.answer(choice["text"])
        message, reason = message_of(answer), calling.finish_reason(reason, answer)
        message = legacy(message) if older else message
    return {
        "id": "chat" + completion["id"],
        "object": "chat.completion",
        "created": completion["created"],
        "model": completion["model"],
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": _chat_logprobs(choice["logprobs"]),
                "finish_reason": _named(reason, older),
            }
        ],
        "usage": completion["usage"],
    }


def chat_chunks(
    chunks: Iterable[dict[str, Any]], calling: Calling | None = None, *, older: bool = False
) -> Iterator[dict[str, Any]]:
    """A stream of completion chunks as chat chunks: the role, then pieces of content and calls, last the reason."""
    parser, answer = None if calling is None else calling.parser(), Answer()
    for number, chunk in enumerate(chunks):
        if number == 0:
            yield _chat_chunk(chunk, {"role": "assistant"}, None, None)
        (choice,) = chunk["choices"]
        reason, logprobs = choice["finish_reason"], _chat_logprobs(choice["logprobs"])
        deltas: list[dict[str, Any]] = [] if reason is not None else [{"content": choice["text"]}]
        if calling is not None and parser is not None:
            found = parser.push(choice["text"]) + (parser.finish() if reason is not None else [])
            answer.take(found)
            deltas = [legacy(delta) if older else delta for delta in stream_deltas(found)]
            deltas = deltas or ([{"content": ""}] if logprobs else [])
            reason = None if reason is None else calling.finish_reason(reason, answer)
        for delta in deltas:
            yield _chat_chunk(chunk, delta, logprobs, None)
            logprobs = None
        if reason is not None:
            yield _chat_chunk(chunk, {}, logprobs, _named(reason, older))


def _named(reason: FinishReason, older: bool) -> str:
    return "function_call" if older and reason == "tool_calls" else reason


def _chat_chunk(
    chunk: dict[str, Any], delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {
        "id": "chat" + chunk["id"],
        "object": "chat.completion.chunk",
        "created": chunk["created"],
        "model": chunk["model"],
        "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}],
    }


def _chat_logprobs(logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    columns = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    content = [
        {
            "token": token,
            "bytes": None,
            "logprob": logprob,
            "top_logprobs": [{"token": text, "logprob": value, "bytes": None} for text, value in top.items()],
        }
        for token, logprob, top in columns
    ]
    return {"content": content, "refusal": None}
