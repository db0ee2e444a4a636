"""Progress bars for long work: on stderr, and only where a person watches it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["progress_bar"]

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
    try:
        yield bar
    finally:
        bar.stop()


class _Bar:
    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._begun = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int, what: str = "", /) -> None:
        if self._bar is None:
            if time.monotonic() - self._begun < _PATIENCE_S:
                return
            self._start(total)
        self._bar.update(self._task, completed=done, total=total, what=what)

    def _start(self, total: int) -> None:
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
        self._task = self._bar.add_task(self._label, total=total, what="")
        self._bar.start()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
