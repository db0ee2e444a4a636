"""Processes of steps that end with the run: however it ends, nothing of them goes on using the card.

Each step leads a process group of its own, so that what it starts ends with it (compute-sanitizer, pytest's workers),
and holds one end of a pipe: when the run is gone, even by SIGKILL, the other end is closed, and the step ends its
group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["Forked", "Processes", "end", "end_with_the_run"]


class Forked:
    """A step of a dry run: a fork of this process, which imports once for all of them. A card's steps are processes
    from scratch, for one that has touched a card cannot be forked."""

    def __init__(self, work: Callable[[], None], log: BinaryIO) -> None:
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid:
            with suppress(ProcessLookupError):  # whoever of the two is first
                os.setpgid(self.pid, self.pid)
            return
        status = 1
        try:
            os.setpgid(0, 0)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            work()
            status = 0
        except BaseException:  # SystemExit too: a step that fails says why with it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, or None while it runs; as ``subprocess.Popen`` has it."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


class Processes:
    """Starts the steps of one run."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()  # nothing is ever written

    def start(self, command: Sequence[str], folder: Path, log: BinaryIO) -> subprocess.Popen[bytes]:
        """``command``, which calls ``end_with_the_run``, in ``folder``."""
        return subprocess.Popen(command, cwd=folder, stdin=self._read, stdout=log, stderr=log, process_group=0)

    def fork(self, work: Callable[[], None], log: BinaryIO) -> Forked:
        def tied() -> None:
            os.close(self._write)
            os.dup2(self._read, 0)
            end_with_the_run()
            work()

        return Forked(tied, log)

    def close(self) -> None:
        """What still runs ends."""
        os.close(self._write)
        os.close(self._read)


def end_with_the_run() -> None:
    """In a step: from now on its group ends when the run has closed the pipe that is this process's standard input."""
    pipe = os.dup(0)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)

    def watch() -> None:
        os.read(pipe, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end(process: subprocess.Popen[bytes] | Forked) -> int:
    """End a step and all that it has started; its exit status."""
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
