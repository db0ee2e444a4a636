"""One answer, streamed: shared by ``generate`` and the chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimrt.llm import LLM
from slimrt.results import Completion
from slimrt.terminal.options import AnswerSettings
from slimrt.terminal.progress import progress_bar
from slimrt.terminal.screen import Screen

__all__ = ["Answer", "cut_note", "stream_answer"]


@dataclass(frozen=True)
class Answer:
    """A finished answer, or what there was of it when the user stopped it."""

    completion: Completion
    stopped: bool = False


def stream_answer(llm: LLM, ids: Sequence[int], settings: AnswerSettings, screen: Screen) -> Answer:
    """Read ``ids``, write the answer to ``screen`` as it comes.

    Ctrl-C while the prompt is read raises KeyboardInterrupt; while the answer is written it ends the answer.
    """
    with progress_bar(f"reading {len(ids):,} tokens") as progress:
        stream = llm.stream(ids, progress=progress, **settings.keywords())
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
        return f"cut: the context of {llm.ctx:,} tokens is full (a larger --ctx leaves more room)"
    if settings.max_tokens is None:
        return None
    return f"cut after {settings.max_tokens:,} tokens (--max-tokens)"
