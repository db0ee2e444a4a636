"""Threads of the NumPy backend: interrupted anywhere, forked, without a thread to be had; how many cores there are."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest

from slimrt.errors import ComputeError
from slimrt.ops.numpy.tasks import Tasks
from slimrt.ops.numpy.workers import Workers, available_cores
from tests.interrupts import interrupted, moments, spread

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def forked(call: object) -> int:
    """Run ``call`` in a forked child; returns its exit status: 0 for True, 9 where it did not end within a minute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which is the point here
        child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if call() else 1  # type: ignore[operator]
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return 9


def test_interrupted_anywhere_the_next_calls_are_whole() -> None:
    """A wait that never ends would be the failure: the next map would hang."""

    def work(workers: Workers) -> np.ndarray:
        done = np.zeros(9, np.int64)

        def add(item: int) -> None:
            done[item] += 1

        workers.map(add, range(9))
        return done

    fresh = Workers(3)
    total = moments(lambda: work(fresh))
    for at in spread(total, 80):
        workers = Workers(3)
        interrupted(lambda workers=workers: work(workers), at)
        assert (work(workers) == 1).all(), at


def test_interrupted_copies_stay_in_order() -> None:
    """One thread serves the queue, however often starting it was interrupted."""

    def copy(tasks: Tasks, seen: list[int], number: int) -> None:
        def work() -> None:
            time.sleep(0.001 if number % 2 else 0)
            seen.append(number)

        tasks.submit(work).result()

    first = Tasks(1)
    for at in range(moments(lambda: copy(first, [], 0))):
        tasks, seen = Tasks(1), list[int]()
        interrupted(lambda tasks=tasks, seen=seen: copy(tasks, seen, 0), at)
        ends = [tasks.submit(lambda seen=seen, n=n: (time.sleep(0.002 * (n % 2)), seen.append(n))) for n in range(1, 5)]
        for end in ends:
            end.result()
        assert seen in ([0, 1, 2, 3, 4], [1, 2, 3, 4]), at


@needs_fork
def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    workers, tasks, done = Workers(2), Tasks(1), np.zeros(8, np.int64)

    def add(item: int) -> None:
        done[item] += 1

    def work() -> bool:
        workers.map(add, range(8))
        tasks.submit(lambda: add(0)).result()
        return done.tolist() == [4] + [2] * 7

    workers.map(add, range(8))
    tasks.submit(lambda: add(0)).result()
    assert forked(work) == 0


@needs_fork
def test_what_another_thread_had_not_finished_is_an_error_in_the_child() -> None:
    tasks, gate = Tasks(1), threading.Event()
    blocked, queued = tasks.submit(gate.wait), tasks.submit(lambda: None)

    def raises() -> bool:
        for task in (blocked, queued):
            with pytest.raises(ComputeError, match="forked while another thread computed"):
                task.result()
        tasks.submit(lambda: None).result()
        return True

    assert forked(raises) == 0
    gate.set()
    queued.result()


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = Tasks(1)

    def refused(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("_thread.start_new_thread", refused)
        with pytest.raises(ComputeError, match=r"no thread can be started .*--threads 1"):
            tasks.submit(lambda: None)
    tasks.submit(lambda: None).result()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "10000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/gone\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "3200000 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n0::/\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        ({}, 8),
    ],
)
def test_cores_are_those_that_the_quota_pays_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cores(tmp_path) == cores


def test_a_cancelled_call_holds_nothing() -> None:
    """Its task stays in the queue until a thread comes to it."""

    class Held:
        pass

    tasks, gate, held = Tasks(1), threading.Event(), Held()
    busy = tasks.submit(gate.wait)
    waiting = tasks.submit(lambda held=held: held)
    alive = weakref.ref(held)
    del held
    before = alive() is not None
    cancelled = waiting.cancel()
    gone = alive() is None
    assert (before, cancelled, gone) == (True, True, True)
    gate.set()
    busy.result()
    tasks.close()
