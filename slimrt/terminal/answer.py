"""One answer, streamed: shared by ``generate`` and the chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from slimrt.llm import LLM
from slimrt.output import human_bytes
from slimrt.results import Completion
from slimrt.streaming import CompletionStream
from slimrt.terminal.options import AnswerSettings
from slimrt.terminal.progress import noting_compilation, progress_bar
from slimrt.terminal.screen import Screen

__all__ = ["Answer", "cut_note", "kept_note", "larger_context", "stream_answer"]


class Begin(Protocol):
    """``LLM.stream`` or another way to a stream, with its prompt filled in."""

    def __call__(self, **options: Any) -> CompletionStream: ...


@dataclass(frozen=True)
class Answer:
    """A finished answer, or what there was of it when the user stopped it. ``compiled``: kernels were, meanwhile."""

    completion: Completion
    stopped: bool = False
    compiled: bool = False


def stream_answer(begin: Begin, tokens: int, settings: AnswerSettings, screen: Screen) -> Answer:
    """Read a prompt of ``tokens`` tokens, write the answer to ``screen`` as it comes.

    ``begin`` takes the options of ``LLM.stream`` and returns the stream. Ctrl-C while the prompt is read raises
    KeyboardInterrupt; while the answer is written it ends the answer.
    """
    stopped = False
    with noting_compilation() as compiled:
        with progress_bar(f"reading {tokens:,} tokens") as progress:
            stream = begin(progress=progress, **settings.keywords())
            stream.read_prompt()
        try:
            for piece in stream:
                screen.answer(piece)
        except KeyboardInterrupt:
            stream.close()
            stopped = True
    completion = stream.completion
    screen.end_answer(completion.text)
    return Answer(completion, stopped, bool(compiled))


def kept_note(llm: LLM) -> str | None:
    """What this program has written to the library of documents, to be said once; None for nothing."""
    library = llm.engine.library
    if library is None or not library.written:
        return None
    size, library.written = library.written, 0
    return (
        f"what was read is kept for next time ({human_bytes(size)} in {library.folder}; slimrt cache list, --no-cache)"
    )


def cut_note(llm: LLM, completion: Completion, settings: AnswerSettings) -> str | None:
    """Which limit ended an answer before the model did, and what to do; None if none did."""
    if completion.complete is False and completion.finish_reason == "stop":
        return "not whole by its schema or grammar: --stop cut it"
    if completion.finish_reason != "length":
        return None
    if completion.complete is False:
        return "not whole by its schema or grammar: " + str(_limit(llm, completion, settings))
    return _limit(llm, completion, settings)


def _limit(llm: LLM, completion: Completion, settings: AnswerSettings) -> str:
    if settings.max_tokens is not None and completion.usage.completion_tokens >= settings.max_tokens:
        return f"cut by --max-tokens {settings.max_tokens:,} (-1: no limit)"
    shift = " or --overflow shift" if llm.overflow != "shift" else ""
    return f"cut: the context of {llm.ctx:,} tokens is full ({larger_context(llm, 2 * llm.ctx)}{shift} goes on)"


def larger_context(llm: LLM, tokens: int) -> str:
    """The advice to load ``llm`` with a context of at least ``tokens``, as --ctx takes it; it says where that is more
    than the model was trained on."""
    size = -(-tokens // 1024)
    trained = llm.config.ctx_train
    beyond = f", beyond the {trained:,} that the model was trained on" if size * 1024 > trained else ""
    return f"--ctx {size}k{beyond}"
