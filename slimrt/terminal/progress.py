"""Progress bars for long work: on stderr, and only where a person watches it."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click

__all__ = ["COMPILER", "noting_compilation", "progress_bar"]

COMPILER = "slimrt.ops.fast.kernels"  # the logger that tells of kernels being compiled
_PATIENCE_S = 0.4  # work that is over sooner shows no bar


class Report(Protocol):
    """What library code calls: done, total, and perhaps what is being worked on."""

    def __call__(self, done: int, total: int, what: str = "", /) -> None: ...


@contextmanager
def progress_bar(label: str, *, unit: str = "", wanted: bool = True) -> Iterator[Report | None]:
    """A bar called ``label`` while the block runs; yields its callback, or None where stderr is not a terminal.

    ``unit`` "bytes" counts in bytes, otherwise a percentage is shown. The bar appears once the work has taken a moment,
    and vanishes at the end.
    """
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    bar = _Bar(label, unit)
    _shown.append(bar)
    try:
        with _hearing_the_compiler(_Compiling(bar)):
            yield bar
    finally:
        _shown.remove(bar)
        bar.stop()


@contextmanager
def noting_compilation() -> Iterator[list[str]]:
    """The names of the kernels that are compiled while the block runs, for what it takes says little then."""
    names: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: names.append(record.getMessage())  # type: ignore[method-assign]
    with _hearing_the_compiler(handler):
        yield names


@contextmanager
def _hearing_the_compiler(handler: logging.Handler) -> Iterator[None]:
    """Let ``handler`` have what the compiler of kernels tells, all of it."""
    logger = logging.getLogger(COMPILER)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


_shown: list[_Bar] = []


def say(text: str) -> None:
    """Write ``text`` to stderr, above a bar that is shown there."""
    if not (_shown and _shown[-1].say(text)):
        click.echo(text, err=True)


class _Compiling(logging.Handler):
    """Says so in the bar while kernels are compiled: no work is done meanwhile, and the bar stands."""

    def __init__(self, bar: _Bar) -> None:
        super().__init__(logging.DEBUG)
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self._bar.describe("compiling kernels, once")


class _Bar:
    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._lock = threading.Lock()
        self._bar: Any = None
        self._task: Any = None
        self._over = False
        self._state: dict[str, Any] = {"total": None, "completed": 0, "what": "", "description": label}
        # Shown after a moment even if nothing was reported yet: the first step may be a long one.
        self._timer = threading.Timer(_PATIENCE_S, self._start)
        self._timer.daemon = True
        self._timer.start()

    def __call__(self, done: int, total: int, what: str = "", /) -> None:
        self._show(completed=done, total=total, what=what, description=self._label)

    def describe(self, text: str) -> None:
        """Show ``text`` in place of the label until the next report."""
        self._show(description=text)

    def say(self, text: str) -> bool:
        """Write ``text`` above the bar; False if none is shown."""
        from rich.text import Text

        with self._lock:
            if self._bar is None:
                return False
            self._bar.console.print(Text.from_ansi(text), soft_wrap=True)
            return True

    def _show(self, **state: Any) -> None:
        with self._lock:
            self._state |= state
            if self._bar is not None:
                self._bar.update(self._task, **self._state)

    def _start(self) -> None:
        with self._lock:
            if not self._over:
                self._open()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        count = DownloadColumn(binary_units=True) if self._unit == "bytes" else TaskProgressColumn()
        console = Console(stderr=True)
        columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), count, TimeRemainingColumn()]
        if console.width >= 100:
            columns.append(TextColumn("{task.fields[what]}", style="dim", markup=False))
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task(self._label, total=None, what="")
        self._bar.update(self._task, **self._state)
        self._bar.start()

    def stop(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._over = True
            if self._bar is not None:
                self._bar.stop()
