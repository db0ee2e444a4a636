"""The chat on a terminal: Ctrl-C, its history, and how its text is broken into lines."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slimrt.output import human_bytes
from slimrt.terminal.wrap import WordWrap
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", ctx=1024)


class Terminal:
    """A chat in a pseudo-terminal of 80 columns."""

    def __init__(self, master: int) -> None:
        self._master = master
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def press(self, key: str, pattern: str) -> str:
        """Press ``key`` until it has worked: readline misses a signal that comes just before it waits for input."""
        for _ in range(20):
            self.type(key)
            with contextlib.suppress(AssertionError):
                return self.wait(pattern, timeout=3)
        raise AssertionError(f"{key!r} did not bring {pattern!r}: {self.screen!r}")

    def wait(self, pattern: str, timeout: float = 60) -> str:
        """Read until ``pattern`` is on the screen, and take off what led to it."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.screen)):
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.screen!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                self.screen += os.read(self._master, 65536).decode(errors="replace")
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before


@contextmanager
def terminal(
    model: Path, state: Path, *flags: str, toolkit: bool = True
) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    master, slave = pty.openpty()
    hide = "" if toolkit else "sys.modules['prompt_toolkit'] = None; "
    code = f"import sys; {hide}import click_cli; click_cli.main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "chat", "-m", str(model), "-c", "64k", "--prune", "off", *flags],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=_own_terminal,
        env=os.environ
        | {"TERM": "xterm", "COLUMNS": "80", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(state)},
    ) as process:  # fmt: skip
        os.close(slave)
        try:
            yield Terminal(master), process
        finally:
            process.kill()
            os.close(master)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches the chat as a signal


@pytest.mark.parametrize("toolkit", [True, False], ids=["prompt_toolkit", "readline"])
def test_ctrl_c_stops_the_answer_and_not_the_program(tiny: Path, tmp_path: Path, toolkit: bool) -> None:
    if toolkit:
        pytest.importorskip("prompt_toolkit")
    endless = ["-n", "-1", "--logit-bias", "36=1000"]  # "!" for ever
    with terminal(tiny, tmp_path, *endless, toolkit=toolkit) as (screen, process):
        start = screen.wait("/quit leaves")
        assert "memory up to" in start
        screen.wait(">")
        screen.press("\x03", "Ctrl-D or /quit leaves")
        screen.type("hello \\\rthere\r")
        screen.wait("!!!!")
        screen.type("/help\r\x03")  # the line typed meanwhile is not shown among the answer
        assert "/help" not in screen.wait("stopped")
        screen.wait(">")
        screen.type("/stats\r")
        screen.wait("messages  2")
        screen.wait(">")
        screen.type("\x04")
        assert process.wait(timeout=30) == 0
    history = (tmp_path / "slimrt" / ("chat_history" if toolkit else "chat_history.readline")).read_text()
    assert "hello \\" in history and "there" in history


def test_a_state_folder_that_cannot_be_made_costs_the_history_only(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with terminal(tiny, tmp_path / "file", "-n", "4") as (screen, process):
        screen.wait("input history is not kept")
        screen.type("hello\r")
        screen.wait("TTFT")
        screen.wait(">")
        screen.type("/quit\r")
        assert process.wait(timeout=30) == 0


# -- the screen --------------------------------------------------------------------------------------------------------


def test_long_lines_break_between_words_whatever_the_pieces() -> None:
    code = "```\na very long line of code stays\n```\n"
    text = f"The quick brown fox\n\n{code}jumps  over 東京東京東京 the lazy-bones-of-a-dog  "
    expected = f"The quick\nbrown fox\n\n{code}jumps\nover 東京\n東京東京\nthe\nlazy-bones-of-a-dog  "
    for size in (1, 2, 3, 7, 100):
        wrap = WordWrap(lambda: 10)
        out = "".join(wrap.push(text[at : at + size]) for at in range(0, len(text), size)) + wrap.flush()
        assert out == expected, size


def test_text_without_blanks_is_not_held_back() -> None:
    for text in ("!" * 50, "東京" * 20):
        wrap = WordWrap(lambda: 10)
        shown = "".join(wrap.push(character) for character in text)
        assert len(shown.replace("\n", "")) >= len(text) - 10


def test_sizes_are_written_for_people() -> None:
    assert [human_bytes(n) for n in (5, 2048, 98_362_432, 513 << 20, 24 << 30, 5 << 40)] == [
        "5 B", "2.0 KiB", "93.8 MiB", "513 MiB", "24.0 GiB", "5.0 TiB"
    ]  # fmt: skip
