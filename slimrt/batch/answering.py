"""One request of a batch -> its answer, on one session; in this process or in another one of a cluster."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimrt.batch.lines import LineError
from slimrt.errors import SlimrtError
from slimrt.llm import LLM
from slimrt.request import GenerationRequest
from slimrt.server.embeddings import embeddings
from slimrt.server.errors import ApiError
from slimrt.server.openai import ChatReply, CompletionReply, chat_prompt, completion_prompts, whole_completion
from slimrt.server.scheduler import Read, answers
from slimrt.session import Session
from slimrt.session_file import model_fingerprint

__all__ = ["Answerer", "Counts", "Work", "is_error", "model_mark", "prompt_key", "work_of"]

_KEY = 1 << 16  # bytes of a prompt's tokens that it is sorted by: 16k tokens


@dataclass(frozen=True)
class Work:
    """A line as a request: its ``id``, number and custom_id; ``url`` and ``body``, or in ``error`` why it is none."""

    id: str
    number: int
    custom_id: str | None
    url: str = ""
    body: Mapping[str, Any] | None = None
    error: str = ""


@dataclass
class Counts:
    """Of answers: those with an error, tokens of prompts, how many of these were not read again, tokens written."""

    failed: int = 0
    prompt: int = 0
    reused: int = 0
    written: int = 0

    def add(self, other: Counts) -> None:
        self.failed += other.failed
        self.prompt += other.prompt
        self.reused += other.reused
        self.written += other.written


def model_mark(llm: LLM) -> int:
    """A number of 32 bits for all of a loaded model that decides what it answers: its weights, adapters, RoPE, the plan
    that prunes, a budget, the chat template, and what happens when the context is full. Not what computes it."""
    template = llm.chat_template.source if llm.has_chat_template else ""
    told = (
        model_fingerprint(llm.file, llm.engine.adapters), llm.config.rope, llm.plan.plan, llm.kv_budget, template,
        llm.overflow,
    )  # fmt: skip
    return zlib.crc32(repr(told).encode())


def work_of(
    id: str, number: int, custom_id: str | None, data: Callable[[], tuple[str, dict[str, Any]]]
) -> Work:  # fmt: skip
    """The request that ``data`` returns (url, body); what it raises as LineError is told in the answer."""
    try:
        url, body = data()
    except LineError as why:
        return Work(id, number, custom_id, error=str(why))
    if url not in _URLS:
        return Work(id, number, custom_id, error=f"url {url[:80]!r}: must be one of {', '.join(_URLS)}")
    return Work(id, number, custom_id, url, body)


def prompt_key(llm: LLM, work: Work) -> bytes:
    """Prompts that begin alike lie side by side when sorted by it."""
    try:
        if work.url == "/v1/chat/completions":
            ids = chat_prompt(llm, work.body)[1]
        elif work.url == "/v1/completions":
            ids = completion_prompts(llm, work.body)[1][0]
        else:
            return b""
    except ApiError:  # told when its turn comes: at once
        return b""
    return np.asarray(ids[: _KEY // 4], ">u4").tobytes()


def is_error(answer: Mapping[str, Any]) -> bool:
    """Whether a line of the result says what went wrong."""
    return answer.get("error") is not None or (answer.get("response") or {}).get("status_code") != 200


class Answerer:
    """Answers requests one after the other; what two have in common at their beginnings is read once."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self.counts = llm, Counts()
        self._session = Session(llm.engine, llm.ctx, llm.asking)

    def close(self) -> None:
        """Let go of what was read."""
        self._session.release()

    def answer(self, work: Work) -> dict[str, Any]:
        """The line of the result."""
        response, error = None, None
        if work.body is None:
            error = {"code": "invalid_request", "message": f"line {work.number}: {work.error}"}
        else:
            try:
                done = _URLS[work.url](self, {**work.body, "stream": False})
                response = {"status_code": 200, "request_id": work.id, "body": done}
            except ApiError as why:
                response = {"status_code": why.status, "request_id": work.id, "body": why.body()}
            except SlimrtError as why:
                response = {"status_code": 500, "request_id": work.id, "body": ApiError(500, str(why)).body()}
        answer = {"id": work.id, "custom_id": work.custom_id, "response": response, "error": error}
        self.counts.failed += is_error(answer)
        return answer

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        values, ids, request, calling = chat_prompt(self._llm, body)
        reply = ChatReply(
            self._llm, len(ids), choices=values["n"], usage=False, progress=False, calling=calling,
            older=values["older"],
        )  # fmt: skip
        self._write(reply, ids, request, values["n"])
        return reply.whole(logprobs=values["logprobs"])

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        values, prompts, request = completion_prompts(self._llm, body)
        replies = []
        for number, ids in enumerate(prompts):
            echo = self._llm.detokenize(ids) if values["echo"] else ""
            reply = CompletionReply(
                self._llm, len(ids), choices=values["n"], usage=False, progress=False, first=number * values["n"],
                echo=echo,
            )  # fmt: skip
            self._write(reply, ids, request, values["n"])
            replies.append(reply)
        return whole_completion(replies, logprobs=values["logprobs"] is not None)

    def _embed(self, body: dict[str, Any]) -> dict[str, Any]:
        body.pop("stream")
        answer = embeddings(self._llm, body)
        self.counts.prompt += answer["usage"]["prompt_tokens"]
        return answer

    def _write(self, reply: Any, ids: list[int], request: GenerationRequest, choices: int) -> None:
        if len(ids) >= self._llm.ctx:
            raise ApiError(
                400, f"the prompt has {len(ids)} tokens, the context holds {self._llm.ctx} with the answer; give a "
                "larger --ctx", code="context_length_exceeded",
            )  # fmt: skip
        for event in answers(self._llm, self._session, ids, request, choices):
            if isinstance(event, Read):
                self.counts.prompt += len(ids)
                self.counts.reused += event.reading.reused
            for _ in reply.take(event):
                pass
        self.counts.written += reply.written


_URLS: dict[str, Callable[[Answerer, dict[str, Any]], dict[str, Any]]] = {
    "/v1/chat/completions": Answerer._chat,
    "/v1/completions": Answerer._complete,
    "/v1/embeddings": Answerer._embed,
}


def line_of(answer: Mapping[str, Any]) -> bytes:
    """A line of the result, with its end."""
    try:
        content = json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, in a custom_id or an unknown field's name: as it came, escaped
        content = json.dumps(answer).encode()
    return content + b"\n"
