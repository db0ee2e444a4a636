"""A chat whose lines come from a list, and what a command says on stderr, the same on every processor."""

from __future__ import annotations

from typing import TypeVar

from slimrt.config import SamplingConfig
from slimrt.llm import LLM
from slimrt.ops.backend import fast_features
from slimrt.terminal.chat import Chat
from slimrt.terminal.options import AnswerSettings
from slimrt.terminal.screen import Screen

__all__ = ["Lines", "settings", "talk", "without_backend_note"]

Text = TypeVar("Text", str, bytes)


def without_backend_note(said: Text) -> Text:
    """``said`` without the line that a model says where compiled kernels cannot run, and NumPy computes. Elsewhere no
    line is left out: there it would be a mistake."""
    features, why = fast_features()
    if features is not None:
        return said
    line = f"note: computing with {why}\n"
    return said.replace(line, "", 1) if isinstance(said, str) else said.replace(line.encode(), b"", 1)


class Lines:
    """Input from a list; an exception in it is raised."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines: list[str | type[BaseException]] = list(lines)
        self.prompts: list[str] = []

    def read(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = self._lines.pop(0) if self._lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    def close(self) -> None:
        pass


def settings(max_tokens: int | None = 8, *, temperature: float = 0.0) -> AnswerSettings:
    return AnswerSettings(SamplingConfig(temperature=temperature), max_tokens, ())


def talk(
    llm: LLM,
    *lines: str | type[BaseException],
    screen: Screen | None = None,
    system: str | None = None,
    temperature: float = 0.0,
) -> Chat:
    """The chat after these lines."""
    chat = Chat(llm, settings(temperature=temperature), Lines(*lines), screen or Screen(), system)
    chat.run()
    return chat
