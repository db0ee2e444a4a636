"""Whatever goes wrong in a command becomes one line on stderr and an exit status."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NoReturn

import click

from slimrt.errors import SlimrtError

__all__ = ["GuardedGroup", "note"]

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE


class OneLineError(click.ClickException):
    """A failure that is the input's or the system's, not the program's: ``error: ...`` and status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {self.message}", err=True)


class GuardedGroup(click.Group):
    """A group of commands that never shows a traceback for bad input, a full disk, Ctrl-C or a closed pipe."""

    def invoke(self, ctx: click.Context) -> Any:
        with _no_traceback(), _warnings_as_notes():
            return super().invoke(ctx)


def note(text: str) -> None:
    """Something worth knowing, on stderr."""
    click.echo(click.style(f"note: {text}", dim=True), err=True)


def one_line(error: BaseException) -> str:
    """``error`` as the user reads it: file, what the system said, and on one line whatever it contains."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else f"cannot write the output: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = f"out of memory ({error or 'no more to be had'}); take a smaller --ctx or a smaller model"
    else:
        text = str(error) or type(error).__name__
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
    logger, handler = logging.getLogger("slimrt"), _Notes(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def fail(message: str) -> NoReturn:
    """End the command with ``error: message`` and status 1."""
    raise OneLineError(message)
