"""Chat templates rendered in a process of their own: started at the first template, kept warm, replaced when it ends.

A template out of a model file may take any time and memory, and no list of what it must not do is ever complete; a
process can be held to limits and ended from outside. Rendering costs some tenths of a millisecond more than in this
process, the first one a Python interpreter's start.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import marshal
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import Any

import slimrt
from slimrt.errors import SettingError

__all__ = ["render_apart"]

_PIPE_BYTES = 1 << 20  # a long document passes in one piece, without turns between the processes
_WALL_SECONDS = 20.0  # the last resort, where the system limits no processor time or the machine is very busy


class _Worker:
    """One process; ``ask`` sends it a request. Whatever goes wrong in between ends it."""

    def __init__(self) -> None:
        executable = get_executable()
        root = str(Path(slimrt.__file__).parent.parent)
        script = Path(__file__).with_name("template_worker.py")
        path = json.dumps([root, *(entry for entry in sys.path if isinstance(entry, str))])
        # -I -S: the modules are those that this process sees, without reading the site's configuration again.
        command = [os.fsdecode(executable or ""), "-I", "-S", str(script), path]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pipesize=_PIPE_BYTES,
                start_new_session=True,  # Ctrl-C in the terminal is not for it
            )
        except OSError as error:
            raise SettingError(
                f"chat templates run in a process of their own, and {command[0]!r} cannot be started "
                f"({error.strerror or error}); set the interpreter with multiprocessing.set_executable"
            ) from None

    def ask(self, request: bytes) -> dict[str, Any]:
        """The answer; {"problem": "ended", ...} where the process ended in the middle of it."""
        process, late = self._process, threading.Event()
        assert process.stdin is not None and process.stdout is not None

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(_WALL_SECONDS, end)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(len(request).to_bytes(8, "little"))
            process.stdin.write(request)
            process.stdin.flush()
            head = process.stdout.read(9)
            size = int.from_bytes(head[1:], "little")
            raw = process.stdout.read(size) if len(head) == 9 else b""
            if len(head) == 9 and len(raw) == size:
                return {"text": raw.decode(errors="surrogatepass")} if head[:1] == b"T" else json.loads(raw)
        except BrokenPipeError:
            pass
        except BaseException:  # interrupted: what it still answers would be taken for the next answer
            self.close()
            raise
        finally:
            timer.cancel()
        self.close()
        return {"problem": "ended", "why": _reason(process.returncode, late.is_set())}

    def close(self) -> None:
        """End the process, whatever it is doing."""
        process = self._process
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what was not sent yet
                pipe.close()  # type: ignore[union-attr]
        process.wait()


def _reason(status: int, late: bool) -> str:
    if late:
        return f"it took more than {_WALL_SECONDS:g} s"
    if hasattr(signal, "SIGXCPU") and status == -signal.SIGXCPU:
        return "it took more processor time than any chat needs"
    return f"its process ended with status {status}"


class _Shared:
    """The process's one worker and the lock that its users take."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: _Worker | None = None

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


_shared = _Shared()


def _forget() -> None:
    """In a forked child the worker is the parent's; it starts its own."""
    global _shared
    _shared = _Shared()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: _shared.close())


def render_apart(source: str, variables: dict[str, Any] | None, characters: int) -> dict[str, Any]:
    """``source`` rendered with ``variables`` (plain data, as JSON has it; None: only compiled) -> {"text": ...}, or
    {"problem": kind, "why": ...} with a kind of syntax (with "line"), compile, refused, stopped, memory, failed or
    ended. ``characters``: how many the messages have; what the template may take grows with them.

    Raises SettingError where no process can be started.
    """
    request = marshal.dumps((source, variables, characters))  # for the same interpreter; JSON is slow
    shared = _shared
    with shared.lock:
        if shared.worker is None:
            shared.worker = _Worker()
        worker, shared.worker = shared.worker, None  # nobody's while it works: an interrupted one is not used again
        answer = worker.ask(request)
        if answer.get("problem") in ("ended", "memory"):
            worker.close()
        else:
            shared.worker = worker
    return answer
