"""What the chat reads of a document while it waits for a message."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import slimrt
from slimrt.context import Progress
from slimrt.llm import LLM
from slimrt.session import Session
from slimrt.terminal import reading_on
from slimrt.terminal.chat import Chat
from slimrt.terminal.screen import Screen
from tests.terminal_notes import Lines, settings
from tests.tiny_gguf import write_tiny_llama

CUTS = slimrt.PrunePlan(
    stages=(slimrt.Stage(1, 0.5), slimrt.Stage(2, 0.25)), block=8, unit=4, query_window=4, min_tokens=32, questions=9
)  # fmt: skip


class Thinking(Lines):
    """A user who writes the next message when ``until`` says so."""

    def __init__(self, until: Callable[[], bool], *lines: str | type[BaseException]) -> None:
        super().__init__(*lines)
        self._until = until

    def read(self, prompt: str) -> str:
        end = time.monotonic() + 60
        while not self._until() and time.monotonic() < end:
            time.sleep(0.005)
        return super().read(prompt)


@pytest.fixture
def cutting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr(reading_on, "LEAST", 100)
    path = write_tiny_llama(tmp_path / "tiny.gguf", n_layers=4, ctx=1024)
    return slimrt.load(path, device="numpy", prune=CUTS, threads=1)


def test_the_rest_of_a_document_is_read_while_the_chat_waits(cutting: LLM) -> None:
    chat: Chat

    def rested() -> bool:
        return not chat._talk.incomplete

    document = "the world hello there " * 30
    chat = Chat(cutting, settings(), Thinking(rested, document, "and", "then"), Screen(), None, reads_on=True)
    chat.run()
    first, *later = (answer.timings for answer in chat.answers)
    assert len(first.stages) == 2 and not any(timings.stages for timings in later) and len(later) == 2
    assert all("read whole before" in timings.dense_note for timings in later)
    assert cutting.engine.turn is None
    plain = Chat(cutting, settings(), Lines(document, "and"), Screen(), None)
    plain.run()
    assert plain.answers[1].timings.stages  # not so where nobody said that it may


@pytest.mark.parametrize("ends", [KeyboardInterrupt, None], ids=["ctrl-c", "a message"])
def test_a_message_ends_it_at_once_and_costs_nothing(
    cutting: LLM, monkeypatch: pytest.MonkeyPatch, ends: type[BaseException] | None
) -> None:
    at, complete, ended = threading.Event(), Session.complete, []

    def completes(session: Session, progress: Progress) -> int:
        def slowly(done: int, total: int) -> None:
            at.set()
            while done == 3:  # the second cut is passed: nothing but a message ends this
                progress(done, total)
                time.sleep(0.001)

        try:
            return complete(session, slowly)
        finally:
            ended.append(len(session.tokens))

    monkeypatch.setattr(Session, "complete", completes)
    document = "the world hello there " * 30
    lines = [document, *([ends] if ends else []), "and", "/quit"]
    screen = Screen(interactive=False)
    screen.interactive = ends is not None  # where Ctrl-C is a remark, not the end
    monkeypatch.setattr("slimrt.terminal.chat.quiet_keyboard", contextlib.nullcontext)
    chat = Chat(
        cutting, settings(), Thinking(lambda: at.is_set() or not chat.answers, *lines), screen, None, reads_on=True
    )
    chat.run()
    assert len(ended) == (3 if ends else 2) and chat.failures == 0
    found = chat.answers[1].timings
    assert len(found.stages) == 1 and "read the document whole before" in found.doubts[0]
    assert not any(one.name == "slimrt reads on" for one in threading.enumerate())


def test_what_fails_meanwhile_is_a_line_and_the_chat_goes_on(cutting: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fails(session: Session, progress: Progress) -> int:
        tried.append(1)
        raise MemoryError("no room")

    monkeypatch.setattr(Session, "complete", fails)
    lines = ["the world hello there " * 30, "and", "then"]
    chat = Chat(
        cutting, settings(), Thinking(lambda: bool(tried) or not chat.answers, *lines), Screen(), None, reads_on=True
    )
    chat.run()
    assert len(chat.answers) == 3 and chat.failures == 1 and len(tried) == 1
