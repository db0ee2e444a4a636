"""What a generation returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ToolCall:
    """A call that a model made: of the tool ``name``, with ``arguments``, JSON text of an object."""

    id: str
    name: str
    arguments: str

    def as_openai(self) -> dict[str, Any]:
        """The call as OpenAI's messages have it, which ``chat`` takes back."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token, its log-probability, and the ``top`` likeliest (id, log-probability), best first.

    Log-probabilities are those of the model's own distribution, before penalties, filters and temperature.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Where the time and the memory went.

    ``ttft_s``: seconds from the call to the first token. ``decode_tok_s``: tokens a second after the first (0 if there
    was none). ``stages``: tokens kept after each cut of the plan, ``windowed_tokens``: how many first tokens of the
    prompt its windows held for, ``dense_note``: why the prompt ran dense although there is a plan, empty if it did not,
    ``doubts``: in words, what was in doubt about a prompt, so that more of it was kept or it was cut later.
    ``kv_bytes_device`` and ``kv_bytes_host``: bytes of keys and values at the end. Under a budget, while the text was
    written: ``kv_bytes_fetched`` from host memory, of which ``kv_bytes_in_time`` were there when compute came for them;
    for the others it waited ``kv_waits`` times. ``reused_tokens``: prompt tokens whose work an earlier call had
    done, ``reuse_note`` says why. ``drafted_tokens``: guessed while the text was written (``draft``), of which
    ``accepted_tokens`` were right.
    """

    ttft_s: float = 0.0
    decode_tok_s: float = 0.0
    stages: tuple[int, ...] = ()
    kv_bytes_device: int = 0
    kv_bytes_host: int = 0
    kv_bytes_fetched: int = 0
    kv_bytes_in_time: int = 0
    kv_waits: int = 0
    reused_tokens: int = 0
    reuse_note: str = ""
    windowed_tokens: int = 0
    dense_note: str = ""
    doubts: tuple[str, ...] = ()
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """A finished generation: ``text``, its ``tokens`` (the end token excluded), why it ended, and what it cost.

    ``complete``: whether the text is whole by the schema or grammar that it was bound to (False where ``max_tokens``,
    the context or a stop string cut it); None without one. ``tool_calls``: what it called of the tools that it was
    given; then ``finish_reason`` is "tool_calls", and ``text`` what stands beside the calls.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprob] | None = field(default=None)
    complete: bool | None = None
    tool_calls: tuple[ToolCall, ...] = ()
