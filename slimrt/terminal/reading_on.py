"""What a chat does while its user reads and writes: the layers behind a cut read the rest of the document."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from slimrt.generation import first_words
from slimrt.library.store import LEAST
from slimrt.llm import LLM
from slimrt.session import Session

__all__ = ["ReadingOn"]

log = logging.getLogger(__name__)


class _Sent(BaseException):
    """The user has sent a message; not an Exception, so that nobody takes it for a failure of the model."""


class ReadingOn:
    """Lets ``session`` of ``llm`` read what its cuts left unread, in a thread, as long as somebody waits for input.

    The next message ends that within a part of a layer, and what later layers did until then serves it
    (``Session.complete``). After one that failed there is no other.
    """

    def __init__(self, llm: LLM, session: Session) -> None:
        self._llm, self._session = llm, session
        self._sent = False
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._gave_up = False

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Read on within the ``with`` block, if there is anything left to read."""
        # Passes of a GPU cannot be stopped for a message, and take little time.
        takes_turns = self._llm.backend.ops.name != "cuda"
        wanted = takes_turns and not self._gave_up and self._session.incomplete
        if not wanted or len(self._session.tokens) < LEAST:
            yield
            return
        engine, self._sent = self._llm.engine, False
        thread = self._thread = threading.Thread(target=self._read, name="slimrt reads on", daemon=True)
        before, engine.turn = engine.turn, self._turn
        thread.start()
        try:
            yield
        finally:
            self._sent = True
            try:
                thread.join()
            finally:  # also where a second Ctrl-C comes; the thread then ends behind its layer
                engine.turn = before

    def failed(self) -> Exception | None:
        """Why the last one failed, if it did; said once."""
        error, self._error = self._error, None
        return error

    def _read(self) -> None:
        try:
            begins = first_words(self._llm.tokenizer, self._session.tokens)
            if count := self._session.complete(lambda done, total: self._turn()):
                self._session.keep(count, begins)
        except _Sent:
            log.info("reading on ended for a message")
        except Exception as error:
            log.info("what the cuts left unread could not be read", exc_info=True)
            self._error, self._gave_up = error, True

    def _turn(self) -> None:
        """Between the parts of a layer."""
        if self._sent and threading.current_thread() is self._thread:
            raise _Sent
