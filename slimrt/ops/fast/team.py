"""The threads that run kernels, without the interpreter's lock.

A kernel is a compiled ``void kernel(int64 item, int64 thread, int64 args)``. A *job* is a kernel, how many items it
has, and the address of its arguments; a *program* is a list of jobs, each begun when the one before has ended. The
caller's thread leads: it opens a job, and whoever is there, itself included, claims items one by one. It waits for
items that are claimed and for nobody else, so a helper that the system does not run, or that sleeps, or that a fork
left behind, delays nothing.

Helpers look for work in a spin that yields the core (``sched_yield``), for some milliseconds after the last job;
then they sleep, and the next program wakes them. Measured on two cores: opening a job costs about a
microsecond, where Numba's ``prange`` takes fifty.
"""

from __future__ import annotations

import _thread
import ctypes
import struct
import sys
import threading
import weakref
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np

from slimrt.errors import ComputeError
from slimrt.ops.fast.atomics import (
    atomic_add,
    atomic_load,
    atomic_store,
    call_kernel,
    call_void,
    compare_and_swap,
    cycles,
    pause,
)
from slimrt.ops.fast.kernels import Kernel, compile_kernel, inline
from slimrt.ops.fast.vectors import argument
from slimrt.ops.forks import after_fork

__all__ = ["Program", "Team"]

# The shared state, as bytes from its address; what different threads write lies on cache lines of its own.
_TICKET = 0  # which job is open (upper half) and its next item (lower half)
_DONE = 64  # items finished
_FUNCTION, _COUNT, _ARGS, _YIELD, _STOP = 128, 136, 144, 152, 160
_STATE_BYTES = 192
_ITEM = 0xFFFFFFFF
_CLOSED = 0x7FFFFFFF  # as the next item: nothing to claim
_SPINS = 32  # looks between two yields
# Cycles of looking in vain, 30 to 100 us, before the first yield: on a busy machine a thread that yields is away for
# some milliseconds, and the pauses between the jobs of a token are shorter than this.
_PATIENCE = 200_000
_IDLE_CYCLES = 10_000_000  # of looking in vain, 3 to 5 ms, before a helper goes to sleep

_CALL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)  # releases the interpreter's lock


@inline
def _claim_items(state, thread):
    """Work on the open job as long as there are items to claim; returns how many this thread did."""
    done = 0
    while True:
        ticket = atomic_load(state + _TICKET)
        item = ticket & _ITEM
        # The leader closes the ticket before it changes these, so a claim succeeds only if they belong to the ticket.
        function = atomic_load(state + _FUNCTION)
        count = atomic_load(state + _COUNT)
        args = atomic_load(state + _ARGS)
        if item >= count:
            return done
        if compare_and_swap(state + _TICKET, ticket, ticket + 1):
            call_kernel(function, item, thread, args)
            atomic_add(state + _DONE, 1)
            done += 1


def _lead(state, program, jobs):
    """Run the jobs of the program at an address, one after the other."""
    for number in range(jobs):
        job = number * 3
        count = argument(program, job + 1)
        if count == 0:
            continue
        ticket = atomic_load(state + _TICKET)
        atomic_store(state + _TICKET, ticket | _CLOSED)
        atomic_store(state + _FUNCTION, argument(program, job))
        atomic_store(state + _COUNT, count)
        atomic_store(state + _ARGS, argument(program, job + 2))
        atomic_store(state + _DONE, 0)
        atomic_store(state + _TICKET, ((ticket >> 32) + 1) << 32)
        _claim_items(state, 0)
        since = cycles()
        spins = 0
        while atomic_load(state + _DONE) < count:
            spins += 1
            pause()
            if spins % _SPINS == 0 and cycles() - since > _PATIENCE:
                call_void(atomic_load(state + _YIELD))


def _help(state, thread, unused):
    """What a helper does until it has found nothing to do for a while."""
    since = cycles()
    spins = 0
    while atomic_load(state + _STOP) == 0:
        if _claim_items(state, thread) > 0:
            since = cycles()
        spins += 1
        pause()
        if spins % _SPINS == 0 and cycles() - since > _PATIENCE:
            call_void(atomic_load(state + _YIELD))
            if cycles() - since > _IDLE_CYCLES:
                return


@cache
def _compiled() -> tuple[Any, Any, Kernel, Kernel]:
    lead, help_ = compile_kernel(_lead, "lead"), compile_kernel(_help, "help")
    return _CALL(lead.address), _CALL(help_.address), lead, help_


@cache
def _yield_address() -> int:
    """The address of the system's call that lets another thread have the core."""
    if sys.platform == "win32":
        function = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


def word(value: int | float) -> int:
    """A kernel's argument as the int64 that carries it: a float's bits as float64."""
    return struct.unpack("<q", struct.pack("<d", value))[0] if isinstance(value, float) else int(value)


class Program:
    """Jobs to be run in order. The arguments are addresses: their owner keeps what lies there alive."""

    def __init__(self) -> None:
        self._jobs: list[int] = []
        self._arguments: list[np.ndarray] = []
        self._table: np.ndarray | None = None

    def add(self, kernel: Kernel, items: int, *args: int | float) -> np.ndarray:
        """Add a job; returns its arguments [len(args)] int64, which may be changed between two runs.

        The kernel reads integers with ``argument(args, i)`` and floats with ``argument_float(args, i)``.
        """
        words = np.array([word(arg) for arg in args], np.int64)
        self._arguments.append(words)
        self._jobs += [kernel.address, items, address(words)]
        self._table = None
        return words

    def __len__(self) -> int:
        """How many jobs."""
        return len(self._jobs) // 3

    def hold(self, array: np.ndarray) -> None:
        """Keep ``array``, whose address is among the arguments, as long as the program."""
        self._arguments.append(array)

    @property
    def table(self) -> np.ndarray:
        """[jobs, 3]: kernel, items, address of the arguments; the items may be changed between two runs."""
        if self._table is None:
            self._table = np.array(self._jobs, np.int64).reshape(-1, 3)
        return self._table


def address(array: np.ndarray) -> int:
    """Where an array's first element lies."""
    return int(array.__array_interface__["data"][0])


class _Shared:
    """What the helpers of a team hold: not the team, so that it can be dropped while they sleep.

    An interrupt may come between any two steps of the caller's thread, so each of its steps may be done again: a bell
    is rung once more than needed, never once less.
    """

    def __init__(self) -> None:
        self._memory = np.zeros(_STATE_BYTES + 64, np.uint8)
        self.state = -(-address(self._memory) // 64) * 64
        words = np.frombuffer(self._memory, np.int64, _STATE_BYTES // 8, self.state - address(self._memory))
        words[_TICKET // 8] = _CLOSED
        words[_YIELD // 8] = _yield_address()
        self.words = words
        self.sleeping: set[SimpleQueue[None]] = set()  # the bells of the helpers that sleep

    def start(self, threads: int) -> None:
        """Start the helpers 1 to ``threads`` - 1. Raises ComputeError where the system has no thread for one."""
        for thread in range(1, threads):
            try:
                # threading.Thread.start waits for the thread's answer, and is left in pieces by a Ctrl-C meanwhile.
                _thread.start_new_thread(self.help, (thread,))
            except RuntimeError as error:
                raise ComputeError(
                    f"{threads} threads: the system starts no more than {thread} ({error}); raise its limit of "
                    "processes or memory, or use fewer (threads=1, --threads 1)"
                ) from error

    def help(self, thread: int) -> None:
        """A helper's life."""
        spin, bell = _compiled()[1], SimpleQueue[None]()
        while not self.words[_STOP // 8]:
            spin(self.state, thread, 0)
            while not bell.empty():  # rung more than once
                bell.get()
            self.sleeping.add(bell)
            if not self.words[_STOP // 8]:  # looked at after its bell is there to be rung
                bell.get()
            self.sleeping.discard(bell)

    def wake(self) -> None:
        """Wake all who sleep."""
        for bell in tuple(self.sleeping):
            bell.put(None)

    def stop(self) -> None:
        """End all helpers."""
        self.words[_STOP // 8] = 1
        self.wake()


class Team:
    """``threads`` threads that run programs, the caller's among them.

    Programs of one team run one at a time. Ctrl-C takes effect between two programs: a kernel is never broken off.
    After a fork the child's team begins again, without the helpers that only the parent has.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._lead = _compiled()[0]
        self._shared: _Shared | None = None  # from the first program on
        self._finalizer: Any = None
        after_fork(self, Team._forked)

    def _forked(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
        self._lock = threading.Lock()
        self._shared = None

    def _begin(self) -> _Shared:
        """Start the helpers. They count once all are there: an interrupted start leaves none of them."""
        shared = _Shared()
        try:
            shared.start(self.threads)
            self._finalizer = weakref.finalize(self, shared.stop)
            self._shared = shared
        except BaseException:
            self._shared = None
            shared.stop()
            raise
        return shared

    def run(self, program: Program, first: int = 0, last: int | None = None) -> None:
        """Run the jobs ``first`` to ``last`` (exclusive; None: the end) of ``program``; returns when all are done.

        Raises ComputeError where the threads cannot be started; the next call tries again.
        """
        table = program.table[first:last]
        with self._lock:
            shared = self._shared or self._begin()
            if shared.sleeping:
                shared.wake()
            self._lead(shared.state, address(table), len(table))
