"""A team of threads that share a list of NumPy tasks, each with a single BLAS thread.

Two Python threads with one BLAS thread each beat one Python thread with two BLAS threads by 1.6-2x on prefill: NumPy
releases the GIL in products and ``exp``, the element-wise work between the products is then spread too, and each
thread keeps its tile in its own L2 cache.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")


def available_cores() -> int:
    """The cores that this process may use (its affinity mask, where the system has one)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


class _SingleThreadedBlas:
    """A context in which BLAS libraries run one thread, as deep as it is nested and whichever threads are in it.

    The setting belongs to the process: it is changed by the first to enter and put back by the last to leave.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._controller: ThreadpoolController | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                if self._controller is None:  # looks through all loaded libraries, so once and not at import
                    self._controller = ThreadpoolController().select(user_api="blas")
                self._limit = self._controller.limit(limits=1)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.restore_original_limits()


single_threaded_blas = _SingleThreadedBlas()


class Workers:
    """``threads`` threads, the caller's among them.

    The caller takes tasks like the others and waits for nobody who has not begun: on a busy machine, where the system
    lets a helper wait, it does all the work itself.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="slimrt") if threads > 1 else None

    def map(self, task: Callable[[Item], object], items: Iterable[Item]) -> None:
        """Call ``task`` once for each item, in any order, on all threads; the first exception is raised here.

        Items are handed out one by one, so put the longest first. An exception (Ctrl-C too) drops the items that no
        thread has begun, and waits for those that are under way: they may be writing into the caller's arrays.
        """
        left = deque(items)
        floating_point = np.geterr()  # the caller's; threads would start with NumPy's own

        def work() -> None:
            with np.errstate(**floating_point):
                while left:
                    try:
                        item = left.popleft()
                    except IndexError:  # another thread took the last one
                        return
                    try:
                        task(item)
                    except BaseException:
                        left.clear()
                        raise

        with single_threaded_blas:
            if self._pool is None or len(left) < 2:
                work()
                return
            helpers = [self._pool.submit(work) for _ in range(min(self.threads, len(left)) - 1)]
            try:
                work()
            finally:
                errors = [helper.exception() for helper in helpers if not helper.cancel()]
        for error in errors:
            if error is not None:
                raise error
