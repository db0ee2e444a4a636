"""Where the chat's messages come from: prompt_toolkit, readline, or a pipe, with one rule for several lines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import platformdirs

from slimrt.terminal.guard import note, one_line
from slimrt.terminal.text_input import decode

__all__ = ["LineInput", "PipeInput", "open_input", "read_message"]

PROMPT, CONTINUATION = "> ", ". "
_HISTORY_LINES = 1000
_FENCE = '"""'


class LineInput(Protocol):
    """One source of lines. ``read`` raises EOFError at the end, KeyboardInterrupt for Ctrl-C."""

    def read(self, prompt: str) -> str: ...
    def close(self) -> None: ...


def read_message(read: Callable[[str], str]) -> str:
    r'''One message from ``read`` (prompt -> line).

    A line that ends in a backslash goes on in the next one; text between """ and """ may hold anything.
    Raises EOFError if there is no line at all; the end of the input ends a message that was begun.
    '''
    text = read(PROMPT)
    if text.lstrip().startswith(_FENCE):
        text = text.lstrip()[len(_FENCE) :]
        with contextlib.suppress(EOFError):
            while not text.rstrip().endswith(_FENCE):
                text += "\n" + read(CONTINUATION)
        return text.rstrip().removesuffix(_FENCE).strip("\n")
    with contextlib.suppress(EOFError):
        while text.endswith("\\"):
            text = text[:-1] + "\n"
            text += read(CONTINUATION)
    return text


def open_input(interactive: bool) -> LineInput:
    """The best source there is: prompt_toolkit, else readline, on a terminal; lines of stdin otherwise."""
    if not interactive:
        return PipeInput()
    history = _history_folder()
    try:
        return PromptToolkitInput(history)
    except ImportError:
        return ReadlineInput(history)


def _history_folder() -> Path | None:
    """The folder of the input history, made if need be; None (and a note) if it cannot be written."""
    folder = platformdirs.user_state_path("slimrt")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "chat_history").open("a").close()
    except OSError as error:
        note(f"input history is not kept ({one_line(error)})")
        return None
    return folder


class PipeInput:
    """Lines of stdin, undecorated. Raises SettingError for a line that is not UTF-8; the next one can be read."""

    def __init__(self) -> None:
        self._number = 0

    def read(self, prompt: str) -> str:
        del prompt
        raw = sys.stdin.buffer.readline()
        if not raw:
            raise EOFError
        self._number += 1
        return decode(raw, f"line {self._number} of the input").rstrip("\r\n")

    def close(self) -> None:
        """Nothing is held."""


class ReadlineInput:
    """``input()`` with line editing and history where the system has readline."""

    def __init__(self, folder: Path | None) -> None:
        self._file = folder and folder / "chat_history.readline"
        self._readline: Any = None
        try:
            import readline
        except ImportError:  # Windows
            return
        self._readline = readline
        readline.set_history_length(_HISTORY_LINES)
        if self._file and self._file.exists():
            self._try(readline.read_history_file)

    def read(self, prompt: str) -> str:
        sys.stdout.flush()
        return input(prompt)

    def close(self) -> None:
        """Write the history."""
        if self._readline and self._file:
            self._file.touch(mode=0o600)
            self._try(self._readline.write_history_file)

    def _try(self, action: Callable[[str], None]) -> None:
        try:
            action(str(self._file))
        except OSError as error:
            note(f"input history is not kept ({one_line(error)})")


class PromptToolkitInput:
    """Editing over several lines (Alt-Enter starts a new one), pasting, history, completion of commands."""

    def __init__(self, folder: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def new_line(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("enter")
        def send(event: Any) -> None:
            event.current_buffer.validate_and_handle()

        self._session: PromptSession[str] = PromptSession(
            history=_history(folder), key_bindings=keys, multiline=True, prompt_continuation=CONTINUATION
        )

    def read(self, prompt: str) -> str:
        return self._session.prompt(prompt)

    def close(self) -> None:
        """The history is written line by line."""


def _history(folder: Path | None) -> Any:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if folder is None:
        return InMemoryHistory()

    class Tolerant(FileHistory):
        """A history whose file may fill the disk without ending the chat."""

        def store_string(self, string: str) -> None:
            try:
                super().store_string(string)
            except OSError as error:
                note(f"input history is not kept ({one_line(error)})")

    return Tolerant(str(folder / "chat_history"))
