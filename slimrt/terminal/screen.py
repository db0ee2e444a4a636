"""Answers on stdout; remarks on stderr, dim where a person watches."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from slimrt.memory.resident import resident_bytes
from slimrt.output import human_bytes
from slimrt.results import Completion
from slimrt.terminal.guard import columns, dim, print_error, wrapped
from slimrt.terminal.wrap import WordWrap

__all__ = ["Screen", "printable", "quiet_keyboard", "stats_line"]

# Control characters that a terminal obeys: a model's answer must not move the cursor or rename the window.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """``text`` with its control characters, line ends and tabs excepted, replaced by U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


class Screen:
    """``interactive``: a person sits at both ends. ``quiet``: answers are not written (``--json`` collects them)."""

    def __init__(self, *, interactive: bool = False, quiet: bool = False) -> None:
        self.interactive, self.quiet = interactive, quiet
        self._on_terminal = sys.stdout.isatty()
        self._wrap = WordWrap(columns) if interactive else None

    def answer(self, piece: str) -> None:
        """A piece of an answer, as it comes."""
        self._write(self._wrap.push(piece) if self._wrap else piece)

    def end_answer(self, text: str) -> None:
        """The answer ``text`` is over: the next output starts on a line of its own."""
        self._write(self._wrap.flush() if self._wrap else "")
        if not text.endswith("\n"):
            self._write("\n")

    def _write(self, text: str) -> None:
        if not self.quiet:
            sys.stdout.write(printable(text) if self._on_terminal else text)
            sys.stdout.flush()

    def remark(self, text: str) -> None:
        """Numbers, hints and confirmations."""
        click.echo(dim(wrapped(text)), err=True)

    def error(self, text: str) -> None:
        """What went wrong, on one line."""
        print_error(text)


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """What is typed meanwhile is not shown in the answer but waits for the next prompt; stdin must be a terminal."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    during = before.copy()
    during[3] &= ~termios.ECHO
    termios.tcsetattr(number, termios.TCSANOW, during)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


def stats_line(completion: Completion, *, compiled: bool = False) -> str:
    """What an answer cost: time to first token, speed, tokens, memory; whether kernels were compiled in that time."""
    usage, timings = completion.usage, completion.timings
    parts = [f"TTFT {timings.ttft_s:.2f} s"]
    if timings.decode_tok_s:
        parts.append(f"{timings.decode_tok_s:.1f} tokens/s")
    reused = f" ({timings.reused_tokens:,} reused)" if timings.reused_tokens else ""
    parts.append(f"prompt {usage.prompt_tokens:,}{reused}")
    if timings.stages:
        parts.append(f"kept {' > '.join(f'{kept:,}' for kept in timings.stages)}")
    if timings.dense_note:
        parts.append("dense")
    guessed = f" ({timings.accepted_tokens:,} guessed)" if timings.accepted_tokens else ""
    parts.append(f"answer {usage.completion_tokens:,}{guessed}")
    if timings.kv_bytes_fetched:
        share = timings.kv_bytes_in_time / timings.kv_bytes_fetched
        parts.append(f"KV fetched {human_bytes(timings.kv_bytes_fetched)} ({share:.0%} in time)")
    memory = resident_bytes()
    if memory is not None:
        parts.append(f"memory {human_bytes(memory)}")
    if compiled:
        parts.append("kernels were compiled meanwhile, once")
    return " · ".join(parts)
