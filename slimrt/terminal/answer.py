"""One answer, streamed: shared by ``generate`` and the chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from slimrt.generation import CompletionStream
from slimrt.llm import LLM
from slimrt.results import Completion
from slimrt.terminal.options import AnswerSettings
from slimrt.terminal.progress import progress_bar
from slimrt.terminal.screen import Screen

__all__ = ["Answer", "cut_note", "stream_answer"]


class Begin(Protocol):
    """``LLM.stream`` or another way to a stream, with its prompt filled in."""

    def __call__(self, **options: Any) -> CompletionStream: ...


@dataclass(frozen=True)
class Answer:
    """A finished answer, or what there was of it when the user stopped it."""

    completion: Completion
    stopped: bool = False


def stream_answer(begin: Begin, tokens: int, settings: AnswerSettings, screen: Screen) -> Answer:
    """Read a prompt of ``tokens`` tokens, write the answer to ``screen`` as it comes.

    ``begin`` takes the options of ``LLM.stream`` and returns the stream. Ctrl-C while the prompt is read raises
    KeyboardInterrupt; while the answer is written it ends the answer.
    """
    with progress_bar(f"reading {tokens:,} tokens") as progress:
        stream = begin(progress=progress, **settings.keywords())
    stopped = False
    try:
        for piece in stream:
            screen.answer(piece)
    except KeyboardInterrupt:
        stream.close()
        stopped = True
    completion = stream.completion
    screen.end_answer(completion.text)
    return Answer(completion, stopped)


def cut_note(llm: LLM, completion: Completion, settings: AnswerSettings) -> str | None:
    """Why an answer ended before the model wanted it to, and what to do; None if it did not."""
    if completion.finish_reason != "length":
        return None
    if completion.usage.total_tokens >= llm.ctx:
        return f"cut: the context of {llm.ctx:,} tokens is full (a larger --ctx or --overflow shift goes on)"
    if settings.max_tokens is None:
        return None
    return f"cut after {settings.max_tokens:,} tokens (--max-tokens)"
