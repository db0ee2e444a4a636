"""Calls on threads of our own, whole after a Ctrl-C and in a forked child.

The executor of ``concurrent.futures`` counts its idle threads in steps: a Ctrl-C between two of them leaves a task to a
thread that does not exist, and whoever waits for it waits for ever; so does a forked child, which has none of its
parent's threads. Here every step may be repeated or left out: what threads share is a queue, and tokens that say how
many of them may serve it.
"""

from __future__ import annotations

import _thread
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue

from slimrt.errors import ComputeError
from slimrt.ops.forks import after_fork

__all__ = ["Task", "Tasks"]

_LOOK_S = 0.5  # between two looks at whether a task can still end


class _Served:
    """A queue and the threads that serve it."""

    def __init__(self, threads: int) -> None:
        self.queue: SimpleQueue[Task | None] = SimpleQueue()
        self.tokens: SimpleQueue[None] = SimpleQueue()  # a thread without one goes away
        for _ in range(threads):
            self.tokens.put(None)
        self.lost = False  # the threads stayed behind in another process

    def serve(self) -> None:
        """A thread's life."""
        try:
            self.tokens.get_nowait()
        except Empty:
            return
        while (task := self.queue.get()) is not None:
            task.run()
            del task  # with the arrays that it holds
        self.queue.put(None)  # for the next thread


class Task:
    """A call that a thread makes; ``result`` waits for it."""

    def __init__(self, call: Callable[[], object], served: _Served) -> None:
        self._call: Callable[[], object] | None = call
        self._served = served
        self._error: BaseException | None = None
        self._claim, self._end = threading.Lock(), threading.Lock()
        self._ended = False
        self._end.acquire()

    def run(self) -> None:
        """Make the call, unless it was cancelled."""
        if not self._claim.acquire(blocking=False):
            return
        assert self._call is not None
        try:
            self._call()
        except BaseException as error:
            self._error = error
        self._call = None
        self._ended = True
        self._end.release()

    def cancel(self) -> bool:
        """Whether the call will never be made: no thread has begun it."""
        if not self._claim.acquire(blocking=False):
            return False
        self._call = None  # a thread that has not come yet holds the task, not what it would have used
        return True

    def done(self) -> bool:
        """Whether the call has ended, well or badly."""
        return self._ended

    def exception(self) -> BaseException | None:
        """What the call raised, once it has ended."""
        while not self._ended:
            if self._served.lost:
                return ComputeError(
                    "this process was forked while another thread computed, and that thread's work is not finished "
                    "here; read the prompt again"
                )
            if self._end.acquire(timeout=_LOOK_S):
                self._end.release()
        return self._error

    def result(self) -> None:
        """Wait until the call has ended; raises what it raised. Raises ComputeError in a child that was forked
        meanwhile."""
        error = self.exception()
        if error is not None:
            raise error


class Tasks:
    """At most ``threads`` threads that make calls in the order in which they were submitted; none before the first."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._begin()
        after_fork(self, Tasks._forked)

    def _begin(self) -> None:
        served = _Served(self._threads)
        self._finalizer = weakref.finalize(self, served.queue.put, None)
        self._started, self.served = 0, served

    def _forked(self) -> None:
        self._finalizer.detach()
        self.served.lost = True
        self._begin()

    def submit(self, call: Callable[[], object]) -> Task:
        """Make ``call`` on a thread. Raises ComputeError where the system has no thread for it."""
        served = self.served
        if self._started < self._threads:
            try:
                _thread.start_new_thread(served.serve, ())
            except RuntimeError as error:
                raise ComputeError(
                    f"no thread can be started ({error}); raise the system's limit of processes or memory, "
                    "or use fewer threads (threads=1, --threads 1)"
                ) from error
            self._started += 1
        task = Task(call, served)
        served.queue.put(task)
        return task

    def close(self) -> None:
        """Wait for all calls and end the threads; a later call starts others."""
        if self._started:
            self.submit(_nothing).result()
        self._finalizer()
        self._begin()


def _nothing() -> None:
    """A call that ends when those before it have."""
