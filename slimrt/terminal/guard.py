"""Whatever goes wrong in a command becomes one line on stderr and an exit status."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NoReturn

import click

from slimrt.errors import SlimrtError
from slimrt.terminal.progress import COMPILER, say

__all__ = ["GuardedGroup", "columns", "dim", "fail", "note", "one_line", "print_error", "standard_streams", "wrapped"]

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE
_UNIT = re.compile(r"(?<=\d) (?=[KMG]iB\b|s\b|tokens\b)")
_LISTED = re.compile(r"\S+(?: \S+)*? {2,}(?=\S)")  # the first column of a list


class OneLineError(click.ClickException):
    """A failure that is the input's or the system's, not the program's: ``error: ...`` and status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        print_error(self.message)


class GuardedGroup(click.Group):
    """A group of commands that never shows a traceback for bad input, a full disk, Ctrl-C or a closed pipe.

    Mistakes in the command line look like every other error, and end with status 2.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run: Any = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        try:
            status = run(*args, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx is not None else "slimrt"
            print_error(f"{_mistake(error)}; see {command} --help")
            sys.exit(error.exit_code)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(INTERRUPTED)
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        with _no_traceback(), _warnings_as_notes():
            return super().invoke(ctx)


def _mistake(error: click.UsageError) -> str:
    """A mistake in the command line in the words of all other errors."""
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{_name_of(error.param)} is missing"
    if isinstance(error, click.BadParameter) and error.param is not None:
        return f"{_name_of(error.param)}: {error.message.rstrip('.')}"
    text = one_line(error).rstrip(".?").replace(". Did you mean ", "; perhaps ")
    return text[:1].lower() + text[1:]


def _name_of(param: click.Parameter) -> str:
    return param.opts[0] if isinstance(param, click.Option) else param.make_metavar(click.Context(click.Command("")))


def note(text: str) -> None:
    """Something worth knowing, on stderr."""
    say(dim(wrapped(f"note: {text}")))


def print_error(text: str) -> None:
    """What went wrong, on stderr: one line, which a terminal shows broken between words."""
    shown = wrapped(f"error: {' '.join(text.split())}")
    if not os.environ.get("NO_COLOR"):
        shown = click.style("error:", fg="red", bold=True) + shown.removeprefix("error:")
    click.echo(shown, err=True)


def dim(text: str) -> str:
    """``text`` in grey, unless the user wants no colours (https://no-color.org)."""
    return text if os.environ.get("NO_COLOR") else click.style(text, dim=True)


def wrapped(text: str) -> str:
    """``text`` broken between words where stderr is a terminal; in a pipe a line stays a line.

    A number stays with its unit, and what stands between two dots in a line of figures together. What a list explains
    behind two or more blanks goes on below its own beginning.
    """
    if not sys.stderr.isatty():
        return text
    return "\n".join(part for line in text.split("\n") for part in _broken(line, columns()))


def _broken(line: str, width: int) -> list[str]:
    figures = " · ".join(part.replace(" ", "\xa0") for part in line.split(" · ")) if " · " in line else line
    joined = _UNIT.sub("\xa0", figures)
    listed = _LISTED.match(line)
    indent = " " * listed.end() if listed and listed.end() < width // 2 else ""
    parts = textwrap.wrap(
        joined, width, subsequent_indent=indent, drop_whitespace=True, break_long_words=False, break_on_hyphens=False
    )
    return [part.replace("\xa0", " ") for part in parts] or [""]


def columns() -> int:
    """How wide text may be. The last column stays free: some terminals move on to a new line once it is filled."""
    return max(20, shutil.get_terminal_size().columns - 1)


def one_line(error: BaseException) -> str:
    """``error`` as the user reads it: file, what the system said, and on one line whatever it contains."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else f"cannot write the output: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = f"out of memory{f' ({error})' if str(error) else ''}; use a smaller --ctx or a smaller model"
    else:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error) or type(error).__name__
    return " ".join(text.split())


@contextmanager
def _no_traceback() -> Iterator[None]:
    try:
        yield
        # Here and not at the interpreter's end, where a full disk would print a traceback.
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        raise click.exceptions.Exit(PIPE_CLOSED) from None
    except KeyboardInterrupt:
        click.echo(err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except (SlimrtError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and not error.filename:
            _drop_output()
        raise OneLineError(one_line(error)) from None


def _drop_output() -> None:
    """What is still buffered for a stdout that takes no more must not be tried again at exit."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # a stdout that is no file, as under a test runner
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    logger, waited_for, handler = logging.getLogger("slimrt"), logging.getLogger(COMPILER), _Notes()
    # The compiler's remark is shown too, for a person waits.
    handler.addFilter(lambda record: record.levelno >= (logging.INFO if record.name == COMPILER else logging.WARNING))
    logger.addHandler(handler)
    before = waited_for.level
    waited_for.setLevel(logging.INFO)
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *where: note(" ".join(str(message).split()))
    try:
        yield
    finally:
        warnings.showwarning = shown
        logger.removeHandler(handler)
        waited_for.setLevel(before)


def fail(message: str) -> NoReturn:
    """End the command with ``error: message`` and status 1."""
    raise OneLineError(message)


def standard_streams() -> None:
    """Make sure that the three standard streams are there, whatever the caller closed.

    Without stdin there is nothing to read, without stderr nobody to tell. Without stdout a result would be lost, which
    ends the program with status 1.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the free number: else the next file opened would be stdout
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        print_error("standard output is closed; leave it open, or send it to a file or to /dev/null")
        sys.exit(1)
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding shows escapes; text in UTF-8 is not touched by this.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
