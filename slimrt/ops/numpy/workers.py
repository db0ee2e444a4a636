"""A team of threads that share a list of NumPy tasks, each with a single BLAS thread.

Two Python threads with one BLAS thread each beat one Python thread with two BLAS threads by 1.6-2x on prefill: NumPy
releases the GIL in products and ``exp``, the element-wise work between the products is then spread too, and each
thread keeps its tile in its own L2 cache.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from slimrt.ops import control_groups
from slimrt.ops.forks import after_fork
from slimrt.ops.numpy.tasks import Task, Tasks

Item = TypeVar("Item")


def available_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: those of its affinity mask, no more than the quota of its control groups
    pays for (rounded up). ``root``: where /proc and /sys lie."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(share) for share in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each control group grants."""
    for version, folder in control_groups.folders("cpu", root):
        if version == 2:
            words = control_groups.read(folder / "cpu.max").split()  # "150000 100000": microseconds of each 100 ms
        else:
            words = [control_groups.read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() and int(word) > 0 for word in words):  # else "max", -1 or nothing
            yield int(words[0]) / int(words[1])


class _SingleThreadedBlas:
    """A context in which BLAS libraries run one thread, as deep as it is nested and whichever threads are in it.

    The setting belongs to the process: it is changed by the first to enter and put back by the last to leave.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._controller: ThreadpoolController | None = None
        after_fork(self, _SingleThreadedBlas._forked)

    def _forked(self) -> None:
        self._lock, inside, self._inside = threading.Lock(), self._inside, 0
        if inside:  # for threads that are not here
            self._limit.restore_original_limits()

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
        self._pool = Tasks(threads - 1) if threads > 1 else None

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
            helpers: list[Task] = []
            try:
                for _ in range(min(self.threads, len(left)) - 1):
                    helpers.append(self._pool.submit(work))
                work()
            finally:
                left.clear()  # also where an interrupt came between two items
                errors = [helper.exception() for helper in helpers if not helper.cancel()]
        for error in errors:
            if error is not None:
                raise error
