"""Where the chat's messages come from: prompt_toolkit, readline, or a pipe, with one rule for several lines."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import platformdirs

from slimrt.documents import plain_text
from slimrt.terminal.guard import note, one_line

__all__ = ["COMMANDS", "LineInput", "PipeInput", "completions", "open_input", "read_message"]

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


COMMANDS = ("help", "load", "system", "retry", "clear", "save", "restore", "stats", "quit")
_FILE_COMMANDS = ("load", "save", "restore")


def completions(line: str) -> list[tuple[str, int]]:
    """What Tab offers at the end of ``line``: texts, each with how many last characters of the line it replaces.

    Names of commands, and names of files after those that take one; blanks in a name are escaped with a backslash.
    """
    if not line.startswith("/"):
        return []
    command, blank, argument = line[1:].partition(" ")
    if not blank:
        return [(f"/{name} ", len(line)) for name in COMMANDS if name.startswith(command)]
    if command not in _FILE_COMMANDS:
        return []
    written = argument.lstrip()
    quote = written[:1] if written[:1] in ("'", '"') else ""
    typed = written[len(quote) :] if quote else re.sub(r"\\(.)", r"\1", written)
    folder, _, begin = typed.rpartition("/")
    try:
        place = Path(folder + "/" if folder or typed.startswith("/") else ".").expanduser()
        found = sorted(entry for entry in place.iterdir() if entry.name.startswith(begin))
    except (OSError, RuntimeError):
        return []
    offered = []
    for entry in found:
        if entry.name.startswith(".") and not begin.startswith("."):
            continue
        path = (f"{folder}/" if folder or typed.startswith("/") else "") + entry.name
        shown = f"{quote}{path}" if quote else re.sub(r"([\s\\'\"])", r"\\\1", path)
        offered.append((shown + ("/" if entry.is_dir() else quote), len(written)))
    return offered


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
        return plain_text(raw, f"line {self._number} of the input").rstrip("\r\n")

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
        readline.set_completer(self._complete)
        readline.set_completer_delims("")  # the whole line is completed, names with blanks too
        readline.parse_and_bind("tab: complete")
        readline.set_history_length(_HISTORY_LINES)
        if self._file and self._file.exists():
            self._try(readline.read_history_file)

    def read(self, prompt: str) -> str:
        sys.stdout.flush()
        return input(prompt)

    def _complete(self, line: str, number: int) -> str | None:
        offers = completions(line)
        return line[: len(line) - offers[number][1]] + offers[number][0] if number < len(offers) else None

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
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.key_binding import KeyBindings

        class Commands(Completer):
            def get_completions(self, document: Any, event: Any) -> Iterator[Completion]:
                for text, replaced in completions(document.text_before_cursor):
                    yield Completion(text, start_position=-replaced)

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def new_line(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("enter")
        def send(event: Any) -> None:
            event.current_buffer.validate_and_handle()

        self._session: PromptSession[str] = PromptSession(
            history=_history(folder),
            key_bindings=keys,
            multiline=True,
            prompt_continuation=CONTINUATION,
            completer=Commands(),
            complete_while_typing=False,
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
