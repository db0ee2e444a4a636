"""OpenAI's chat completions and completions: what they take, and what they answer with."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from slimrt.drafting.drawing import Guesses
from slimrt.generation import Step
from slimrt.llama_cpp.openai_format import LogprobFormat
from slimrt.llm import LLM
from slimrt.request import GenerationRequest
from slimrt.results import FinishReason, TokenLogprob
from slimrt.reuse import Reading
from slimrt.server.calling import Reader, bound, calling_of
from slimrt.server.echo import Scored
from slimrt.server.errors import ApiError
from slimrt.server.fields import Field, checked
from slimrt.server.generation import (
    ANY,
    ARRAY,
    BOOLEAN,
    IGNORED,
    INTEGER,
    OBJECT,
    SAMPLING,
    STRING,
    TEXTS,
    bound_grammar,
    chat_ids,
    generation_request,
    messages_schema,
    text_of,
)
from slimrt.server.scheduler import Ended, Event, Failed, Piece, Progressed, Read
from slimrt.tools.calling import Calling
from slimrt.tools.openai_form import legacy, message_of, stream_deltas, tools_and_choice

__all__ = ["CHAT", "COMPLETION", "ChatReply", "CompletionReply", "chat_prompt", "completion_prompts"]

_MOST_CHOICES = 16
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TOOLS = ("tools", "tool_choice", "functions", "function_call")
_CALLS = ("tool_calls", "tool_call_id", "function_call", "name")  # keys of a message beside role and content
_COMMON: dict[str, Field] = {
    "model": Field(STRING, "any name: there is one model"),
    **SAMPLING,
    "response_format": Field(OBJECT, "{type: text}, {type: json_object} or {type: json_schema, json_schema: {schema}}"),
    "grammar": Field(STRING, "GBNF or Lark that the answer matches"),
    "stop": Field(("string", "array"), "a text, or up to 16, before which the answer ends"),
    "stream": Field(BOOLEAN, "send the answer as it comes", False),
    "stream_options": Field(OBJECT, "include_usage: a last chunk with the usage; include_progress: how far reading is"),
    "n": Field(INTEGER, "answers to one prompt", 1, 1, _MOST_CHOICES),
}
CHAT: dict[str, Field] = {
    "messages": Field(ARRAY, "[{role, content}, ...]", required=True, inside=messages_schema(*_ROLES)),
    **_COMMON,
    "max_tokens": Field(INTEGER, "most tokens of an answer; none: up to the end of the context", None, 1, 1 << 31),
    "max_completion_tokens": Field(INTEGER, "the newer name of max_tokens", None, 1, 1 << 31),
    "logprobs": Field(BOOLEAN, "log-probabilities of the answer's tokens", False),
    "top_logprobs": Field(INTEGER, "and of so many others in each place", None, 0, 20),
    "tools": Field(ARRAY, "what may be called: [{type: function, function: {name, description, parameters}}]"),
    "tool_choice": Field(ANY, "none, auto, required or {type: function, function: {name}}"),
    "functions": Field(ARRAY, "the older form of tools"),
    "function_call": Field(ANY, "the older form of tool_choice"),
    "modalities": Field(ARRAY, "[text]"),
    "prediction": Field(OBJECT, "accepted, without effect"),
    "reasoning_effort": Field(ANY, "accepted, without effect"),
    **IGNORED,
    "parallel_tool_calls": Field(BOOLEAN, "whether an answer may hold several calls"),
}
COMPLETION: dict[str, Field] = {
    "prompt": Field(("string", "array"), "a text, token ids, or a list of either", required=True, inside=TEXTS),
    **_COMMON,
    "max_tokens": Field(INTEGER, "most tokens of an answer", 16, 0, 1 << 31),
    "logprobs": Field(INTEGER, "alternatives in each place", None, 0, 20),
    "echo": Field(BOOLEAN, "the prompt before the answer", False),
    "suffix": Field(STRING, "not supported: none"),
    "best_of": Field(INTEGER, "n at most", None, 1, _MOST_CHOICES),
    **IGNORED,
}


def refuse(values: Mapping[str, Any], *names: str) -> None:
    """Raise ApiError where one of the fields asks for what there is not."""
    for name in names:
        if values.get(name):
            raise ApiError(400, f"'{name}' is not supported by this server; leave it out", param=name)


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else tuple(value or ())
    if len(stops) > 16 or not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(400, "'stop' must be a text or a list of at most 16 texts, none of them empty", param="stop")
    return stops


def messages_of(given: list[Any]) -> list[dict[str, Any]]:
    """Messages with roles that chat templates know and text as content. Raises ApiError."""
    if not given:
        raise ApiError(400, "'messages' is empty; give at least one message", param="messages")
    messages = []
    for at, message in enumerate(given):
        where = f"messages[{at}]"
        if not isinstance(message, dict):
            raise ApiError(
                400, f"{where} is {str(message)[:40]!r}; it must be an object with role and content", param="messages"
            )
        if message.get("role") not in _ROLES:
            raise ApiError(
                400,
                f"{where}: role {str(message.get('role'))[:40]!r}; it must be one of {', '.join(_ROLES)}",
                param="messages",
            )
        role = "system" if message["role"] == "developer" else message["role"]
        calls = {key: message[key] for key in _CALLS if message.get(key) is not None}
        messages.append({"role": role, "content": text_of(message.get("content"), where), **calls})
    return messages


def chat_prompt(llm: LLM, data: Any) -> tuple[dict[str, Any], list[int], GenerationRequest, Calling | None]:
    """A chat request's fields, its prompt, how it is answered, and what it may call. Raises ApiError."""
    values = checked(CHAT, data)
    tools, choice, older = tools_and_choice(*(values[name] for name in _TOOLS))
    values["older"] = older
    parallel = False if older else values["parallel_tool_calls"]
    calling = calling_of(llm, tools, choice, parallel, param="functions" if older else "tools")
    grammar = bound_grammar(llm, values["response_format"], values["grammar"])
    if values["modalities"] not in (None, ["text"]):
        raise ApiError(400, "'modalities': this model writes text only", param="modalities")
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise ApiError(400, "'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    ids = chat_ids(llm, messages_of(values["messages"]), calling)
    most = values["max_completion_tokens"] or values["max_tokens"]
    logprobs = (values["top_logprobs"] or 0) if values["logprobs"] else None
    request = generation_request(
        llm, values, max_tokens=most, stop=_stops(values["stop"]), logprobs=logprobs, grammar=grammar
    )
    return values, ids, bound(request, calling), calling


def completion_prompts(llm: LLM, data: Any) -> tuple[dict[str, Any], list[list[int]], GenerationRequest]:
    """A completion request's fields, its prompts, and how each is answered. Raises ApiError."""
    values = checked(COMPLETION, data)
    refuse(values, "suffix")
    if (values["best_of"] or values["n"]) > values["n"]:
        raise ApiError(400, f"'best_of' is {values['best_of']}; it must be at most n, {values['n']}", param="best_of")
    prompt = values["prompt"]
    lists = isinstance(prompt, list) and prompt and all(isinstance(one, list | str) for one in prompt)
    prompts = [_ids(llm, one) for one in (prompt if lists else [prompt])]
    if len(prompts) * values["n"] > _MOST_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts times n {values['n']}: at most {_MOST_CHOICES}", param="prompt")
    request = generation_request(
        llm,
        values,
        max_tokens=values["max_tokens"],
        stop=_stops(values["stop"]),
        logprobs=values["logprobs"],
        grammar=bound_grammar(llm, values["response_format"], values["grammar"]),
    )
    return values, prompts, request


def _ids(llm: LLM, prompt: Any) -> list[int]:
    try:
        ids = llm.token_ids(prompt)
    except ValueError as error:
        raise ApiError(400, f"'prompt': {error}", param="prompt") from None
    if not ids:
        raise ApiError(400, "'prompt' has no tokens; give some text", param="prompt")
    return ids


class _Reply:
    """One answer's envelope, and what has come of it."""

    kind = ""

    def __init__(self, llm: LLM, prompt_tokens: int, *, usage: bool, progress: bool, choices: int) -> None:
        prefix = "chatcmpl" if self.kind.startswith("chat") else "cmpl"
        self._envelope = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": llm.config.name,
            "system_fingerprint": None,
        }
        self._llm, self.prompt_tokens, self.usage_wanted, self.progress = llm, prompt_tokens, usage, progress
        self.texts = [""] * choices
        self.reasons: list[str | None] = [None] * choices
        self.entries: list[list[tuple[int, TokenLogprob]]] = [[] for _ in range(choices)]
        self.written = 0
        self.reading: Reading | None = None
        self.ttft = 0.0
        self.guesses = Guesses()

    def usage(self) -> dict[str, Any]:
        """Tokens read and written, and what of the prompt was there already."""
        reused = self.reading.reused if self.reading else 0
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.written,
            "total_tokens": self.prompt_tokens + self.written,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def timings(self) -> dict[str, Any]:
        """What pruning did and what it took: beyond OpenAI's fields, as llama.cpp's server does."""
        reading = self.reading or Reading(0, "")
        return {
            "ttft_s": round(self.ttft, 4),
            "reused_tokens": reading.reused,
            "reuse_note": reading.note,
            "kept_tokens": list(reading.stages),
            "kept_runs": [[list(run) for run in runs] for runs in reading.kept],
            "dense_note": reading.dense,
            "doubts": list(reading.doubts),
            "drafted_tokens": self.guesses.made,
            "accepted_tokens": self.guesses.right,
        }

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        """The chunks that an event makes in a stream; the answer is kept as well."""
        if isinstance(event, Read):
            self.reading, self.ttft, self.guesses = event.reading, event.seconds, event.guesses
            yield from self._begin()
        elif isinstance(event, Progressed):
            if self.progress:
                yield {**self._chunk([]), "slimrt_progress": {"layers_done": event.done, "layers": event.total}}
        elif isinstance(event, Piece):
            yield from self._piece(event)
        elif isinstance(event, Ended):
            last = {**self._chunk([]), "usage": self.usage(), "timings": self.timings()}
            if self.usage_wanted:
                yield last
        else:
            assert isinstance(event, Failed)

    def _piece(self, event: Piece) -> Iterator[dict[str, Any]]:
        step, index = event.step, event.index
        found = None
        if step.token is not None:
            self.written += 1
            if step.logprob is not None:
                self.entries[index].append((step.token, step.logprob))
                found = self._logprobs(index, self.entries[index][-1:])
        self.texts[index] += step.text
        for piece in self._pieces(index, step) or ([""] if found else []):
            yield self._chunk([self._delta(index, piece, found, None)])
            found = None
        if step.finish_reason is not None:
            self.reasons[index] = reason = self._reason(index, step.finish_reason)
            yield self._chunk([self._delta(index, "", None, reason)])

    def _pieces(self, index: int, step: Step) -> list[Any]:
        """What a step tells: texts, or parts of a message."""
        return [step.text] if step.text else []

    def _reason(self, index: int, reason: FinishReason) -> str:
        return reason

    def _begin(self) -> Iterator[dict[str, Any]]:
        yield from ()

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, index: int, piece: Any, found: Any, reason: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, index: int, entries: list[tuple[int, TokenLogprob]]) -> dict[str, Any]:
        """Some of an answer's tokens, in order, as this interface tells log-probabilities."""
        raise NotImplementedError


class ChatReply(_Reply):
    """An answer of /v1/chat/completions."""

    kind = "chat.completion"

    def __init__(self, *given: Any, calling: Calling | None = None, older: bool = False, **named: Any) -> None:
        """``calling``: what may be called; ``older``: which is told as a function call."""
        super().__init__(*given, **named)
        self._readers = [Reader(calling) for _ in self.texts]
        self._older = older

    def _pieces(self, index: int, step: Step) -> list[Any]:
        deltas = self._readers[index].push(step.text, last=step.finish_reason is not None)
        found = stream_deltas(deltas)
        return [legacy(one) for one in found] if self._older else found

    def _reason(self, index: int, reason: FinishReason) -> str:
        found = self._readers[index].reason(reason)
        return "function_call" if found == "tool_calls" and self._older else found

    def _message(self, index: int) -> dict[str, Any]:
        message = message_of(self._readers[index].answer)
        return {**(legacy(message) if self._older else message), "refusal": None}

    def whole(self, *, logprobs: bool) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {
                "index": index,
                "message": self._message(index),
                "logprobs": self._logprobs(index, self.entries[index]) if logprobs else None,
                "finish_reason": self.reasons[index],
            }
            for index in range(len(self.texts))
        ]
        return {
            **self._envelope, "object": self.kind, "choices": choices, "usage": self.usage(), "timings": self.timings(),
        }  # fmt: skip

    def _logprobs(self, index: int, entries: list[tuple[int, TokenLogprob]]) -> dict[str, Any]:
        content = [
            {**self._token(token, found.logprob), "top_logprobs": [self._token(*one) for one in found.top]}
            for token, found in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        """Whole characters as text; of a token that holds a part of one the bytes tell more."""
        data = self._llm.tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": logprob}

    def _begin(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self.texts)):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._envelope, "object": "chat.completion.chunk", "choices": choices, "usage": None}

    def _delta(self, index: int, piece: Any, found: Any, reason: str | None) -> dict[str, Any]:
        delta = {} if reason else piece or {"content": ""}
        return {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}


class CompletionReply(_Reply):
    """Answers of /v1/completions; ``first``: the number of this prompt's first choice, ``echo``: text before each,
    ``scored``: its tokens with their log-probabilities, where they are wanted."""

    kind = "text_completion"

    def __init__(self, *given: Any, first: int = 0, echo: str = "", scored: Scored | None = None, **named: Any) -> None:
        super().__init__(*given, **named)
        self._first, self._echo, self._scored = first, echo, scored or []
        self._formats = [self._format() for _ in self.texts]

    def _format(self) -> LogprobFormat:
        return LogprobFormat(self._llm.tokenizer, 0 if self._scored else len(self._echo))

    def _logprobs(self, index: int, entries: list[tuple[int, TokenLogprob]]) -> dict[str, Any]:
        return self._formats[index](entries)

    def choices(self, *, logprobs: bool) -> list[dict[str, Any]]:
        """The answers in one piece each."""
        return [
            {
                "index": self._first + index,
                "text": self._echo + text,
                "logprobs": self._format()([*self._scored, *found]) if logprobs else None,
                "finish_reason": self.reasons[index],
            }
            for index, (text, found) in enumerate(zip(self.texts, self.entries, strict=True))
        ]

    def _begin(self) -> Iterator[dict[str, Any]]:
        if self._echo:
            for index in range(len(self.texts)):
                found = self._formats[index](self._scored) if self._scored else None
                yield self._chunk([self._delta(index, self._echo, found, None)])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._envelope, "object": self.kind, "choices": choices}

    def _delta(self, index: int, piece: Any, found: Any, reason: str | None) -> dict[str, Any]:
        return {"index": self._first + index, "text": piece, "logprobs": found, "finish_reason": reason}


def whole_completion(replies: list[CompletionReply], *, logprobs: bool) -> dict[str, Any]:
    """The answer of /v1/completions in one piece."""
    usages = [reply.usage() for reply in replies]
    total = {
        name: sum(usage[name] for usage in usages) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    return {
        **replies[0]._envelope,
        "object": CompletionReply.kind,
        "choices": [choice for reply in replies for choice in reply.choices(logprobs=logprobs)],
        "usage": {**total, "prompt_tokens_details": {"cached_tokens": cached}},
        "timings": replies[0].timings(),
    }
