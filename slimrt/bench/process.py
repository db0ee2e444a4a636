"""A contender in a process of its own, so that neither memory nor BLAS settings of one touch the other.

The process keeps its model loaded and answers one request at a time over a pipe.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from slimrt.bench.contenders import Measurement, Setup, open_contender
from slimrt.errors import ComputeError, SlimrtError

__all__ = ["ContenderProcess"]

_GOODBYE_S = 10  # how long a process may take to free its model


class ContenderProcess:
    """The program ``name`` with the model of ``setup``; a context manager, so that no process outlives its use.

    Every call raises what the program raised if that was a SlimrtError, else ComputeError with one line about it.
    """

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        # spawn: a forked child would inherit the parent's BLAS threads as locks without owners.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, setup), name=f"bench {name}", daemon=True)
        self._process.start()
        theirs.close()
        self.about: dict[str, Any] = self._answer()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def measure(
        self, ids: Sequence[int], decode_tokens: int, plan: str, further: Sequence[Sequence[int]] = ()
    ) -> Measurement:
        """See ``Contender.measure``."""
        return self._answer((list(ids), decode_tokens, plan, [list(question) for question in further]))

    def _answer(self, *request: Any) -> Any:
        try:
            for message in request:
                self._pipe.send(message)
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(_GOODBYE_S)
            raise ComputeError(
                f"{self.name}: its process ended with exit code {self._process.exitcode} and no answer "
                "(out of memory?); try shorter prompts or a smaller model"
            ) from None
        if isinstance(answer, SlimrtError):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(_GOODBYE_S)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> ContenderProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # it may be in the middle of a long prompt
            self._process.terminate()
        self.close()


def _serve(pipe: Connection, name: str, setup: Setup) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends this process
    try:
        contender = open_contender(name, setup)
        pipe.send(contender.about())
        while True:
            pipe.send(contender.measure(*pipe.recv()))
    except (EOFError, BrokenPipeError):  # the parent has closed its end, or is gone
        return
    except SlimrtError as error:
        pipe.send(error)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        pipe.send(ComputeError(f"{name}: {type(error).__name__}: {lines[0]}"))
