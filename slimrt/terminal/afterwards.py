"""What a command leaves to a process in the background: reading the rest of a document, for further questions."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from slimrt.generation import first_words
from slimrt.llm import LLM
from slimrt.memory.plan import available_memory
from slimrt.session import Session

if sys.platform != "win32":
    import fcntl

__all__ = ["read_on"]

_NICER = 19  # than what people wait for
_OF_FREE = 2  # the process's own memory may take no more than this part of what is free


def read_on(llm: LLM, session: Session) -> bool:
    """Let a process of its own read what the cuts of the last prompt of ``session`` left unread, and give it to the
    library; this one goes on, or ends. Whether there is one.

    It takes the memory of this process, which it shares until either changes it, and ends by itself: when it is done,
    where another one is at work already, or on an error, which it leaves in the library's file ``.completing``. Linux
    alone: elsewhere a process with threads, or a GPU, cannot be copied.
    """
    library = llm.engine.library
    if sys.platform != "linux" or llm.backend.ops.name == "cuda" or library is None or not session.incomplete:
        return False
    free, needed = available_memory(), llm.memory.kv + 3 * llm.memory.boundary + llm.memory.scratch
    if free is not None and _OF_FREE * needed > free:
        return False
    if not library.books() or library.has_whole(llm.engine, session.tokens, session.context.windows):
        return False
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads in a process that is copied: slimrt.ops.forks sees to ours
        child = os.fork()
    if child:
        return True
    status = 1
    try:
        _alone()
        with _lock(library.folder / ".completing") as notes:
            try:
                begins = first_words(llm.tokenizer, session.tokens)
                if count := session.complete(begins=begins):
                    session.keep(count, begins)
            except Exception:
                traceback.print_exc(file=notes)  # nobody hears it: whoever looks for the reason finds it there
                raise
        status = 0
    finally:
        os._exit(status)


def _alone() -> None:
    """Let go of the terminal, and of every file and pipe that somebody may wait for."""
    os.setsid()
    os.nice(_NICER)
    with contextlib.suppress(
        OSError
    ):  # where the kernel shares the processor out by sessions, that alone changes nothing
        Path("/proc/self/autogroup").write_text(str(_NICER))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.closerange(3, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") > 0 else 1 << 16)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[TextIO]:
    """The file at ``path``, emptied. Raises BlockingIOError where another process has it; the system gives it back when
    its holder dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        yield file
