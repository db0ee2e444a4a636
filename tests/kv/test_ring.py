"""Copies with fences on a thread, and the ring of staging slots."""

from __future__ import annotations

import _thread
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from slimrt.kv.ring import Ring, Transfers
from slimrt.ops.numpy.numpy_ops import NumpyOps
from tests.deferred_ops import DeferredOps


class CopyThreads:
    """The copying threads that run."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._running = 0
        self._lock = threading.Lock()
        start = _thread.start_new_thread

        def counted(function: Callable[[], object], args: tuple[()]) -> int:
            def life() -> None:
                function()
                with self._lock:
                    self._running -= 1

            with self._lock:
                self._running += 1
            return start(life, args)

        patch.setattr("slimrt.ops.numpy.tasks._thread", SimpleNamespace(start_new_thread=counted))

    def __len__(self) -> int:
        return self._running

    def become(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while len(self) != count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self) == count


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> CopyThreads:
    return CopyThreads(monkeypatch)


@pytest.fixture
def ops(threads: CopyThreads) -> Iterator[NumpyOps]:
    ops = NumpyOps(1)
    yield ops
    ops.close()
    threads.become(0)


def bad_pair() -> tuple[np.ndarray, np.ndarray]:
    return np.empty(2), np.empty(3)


def test_copies_run_in_order_after_their_fence(ops: NumpyOps, threads: CopyThreads) -> None:
    assert not len(threads)  # a program that copies nothing has no thread for it
    gate: Future[None] = Future()
    a, b, c = np.zeros(4), np.ones(4), np.zeros(4)
    first = ops.copy([(a, b), (c, a)], after=gate)
    assert not first.done()
    assert not a.any()
    gate.set_result(None)
    ops.wait(first)
    assert a.all()
    assert c.all()


def test_finish_ends_when_all_copies_have(ops: NumpyOps) -> None:
    target = np.zeros(4)
    gate: Future[None] = Future()
    ops.copy([(target, np.ones(4))], after=gate)
    threading.Timer(0.05, gate.set_result, (None,)).start()
    ops.finish()
    assert target.all()


def test_strided_copies(ops: NumpyOps) -> None:
    source = np.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    destination = np.zeros((4, 3, 2))
    ops.wait(ops.copy([(destination[::-1], source.transpose(2, 1, 0))]))
    assert np.array_equal(destination, source.transpose(2, 1, 0)[::-1])


def test_an_exception_is_raised_by_wait_and_by_what_comes_after(ops: NumpyOps) -> None:
    target = np.zeros(3)
    failed = ops.copy([bad_pair(), (target, np.ones(3))])
    later = ops.copy([(target, np.ones(3))], after=failed)
    independent = ops.copy([(np.zeros(3), np.ones(3))])
    for fence in (failed, later):
        with pytest.raises(ValueError, match="broadcast"):
            ops.wait(fence)
    ops.wait(independent)
    assert not target.any()


def test_the_thread_ends_with_close_and_with_the_backend(ops: NumpyOps, threads: CopyThreads) -> None:
    target = np.zeros(1000)
    gate: Future[None] = Future()
    ops.copy([(target, np.ones(1000))], after=gate)
    ops.copy([bad_pair()])
    assert len(threads) == 1
    threading.Timer(0.05, gate.set_result, (None,)).start()
    ops.close()  # waits for what was asked
    assert target.all()
    threads.become(0)
    ops.wait(ops.copy([(target, np.zeros(1000))]))  # and can be used again
    assert not target.any()
    dropped = NumpyOps(1)
    dropped.wait(dropped.copy([(target, np.ones(1000))]))
    assert len(threads) == 2
    del dropped
    gc.collect()
    threads.become(1)


def test_slots_go_round_and_are_allocated_once() -> None:
    class Counting(DeferredOps):
        allocations = 0

        def empty(self, shape, dtype=np.float32):  # type: ignore[no-untyped-def]
            self.allocations += 1
            return super().empty(shape, dtype)

    ops, transfers = Counting(), Transfers()
    ring = Ring(ops, (4,), 2, transfers)
    host = ops.pinned((10, 4))
    host[:] = np.arange(10)[:, None]
    back = ops.pinned((10, 4))
    ring.fetch(0, lambda slot: [(slot, host[0])])
    for layer in range(10):
        slot = ring.take(layer)
        assert (slot == layer).all()
        if layer < 9:
            assert ring.fetch(layer + 1, lambda slot, layer=layer: [(slot, host[layer + 1])])  # type: ignore[misc]
            assert not ring.fetch(layer + 1, lambda slot: [])  # it is on its way
        slot += 100
        ring.leave(layer, lambda slot, layer=layer: [(back[layer], slot)])  # type: ignore[misc]
    ring.close()
    assert np.array_equal(back, host + 100)
    assert ops.allocations == 2
    assert ring.nbytes == 2 * 4 * 4
    assert (transfers.bytes_to_device, transfers.bytes_to_host) == (160, 160)
    assert transfers.waits > 0


def test_a_full_ring_holds_both_queues_back(ops: NumpyOps) -> None:
    transfers = Transfers()
    ring = Ring(ops, (4,), 2, transfers)
    gate: Future[None] = Future()
    host = np.zeros((4, 4), np.float32)
    stalled = threading.Event()

    def spill(slot: np.ndarray, layer: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(host[layer], slot)]

    for layer in range(2):
        ring.take(layer)[:] = layer + 1
        if layer == 0:
            ops.copy([], after=gate)  # the copy queue stands still from here on
        ring.leave(layer, lambda slot, layer=layer: spill(slot, layer))  # type: ignore[misc]
    assert not host.any()
    # Copies may be asked for, as the slot's own fence keeps them in order; a third has no slot.
    assert ring.fetch(2, lambda slot: [(slot, np.full(4, 7, np.float32))])
    assert ring.fetch(3, lambda slot: [(slot, np.full(4, 8, np.float32))])
    assert not ring.fetch(4, lambda slot: [])

    def compute() -> None:
        stalled.set()
        assert (ring.take(2) == 7).all()

    thread = threading.Thread(target=compute)
    thread.start()
    stalled.wait()
    thread.join(0.1)
    assert thread.is_alive()  # compute waits for the slot
    gate.set_result(None)
    thread.join(10)
    assert not thread.is_alive()
    assert host[0].tolist() == [1] * 4  # spilled before the slot was filled again
    ring.close()
    assert host[1].tolist() == [2] * 4
    assert transfers.waits >= 1


def test_compute_waits_for_a_slot_that_is_being_spilled(ops: NumpyOps) -> None:
    ring = Ring(ops, (4,), 1, Transfers())
    gate: Future[None] = Future()
    host = np.zeros(4, np.float32)
    ring.take(0)[:] = 1
    ops.copy([], after=gate)
    ring.leave(0, lambda slot: [(host, slot)])
    threading.Timer(0.05, gate.set_result, (None,)).start()
    ring.take(1)[:] = 2
    ring.leave(1, lambda slot: [])
    ring.close()
    assert host.tolist() == [1] * 4


def test_what_is_discarded_leaves_its_slot_usable() -> None:
    ops = DeferredOps()
    ring = Ring(ops, (4,), 2, Transfers())
    host = ops.pinned((2, 4))
    host[:] = [[1] * 4, [2] * 4]
    ring.fetch(3, lambda slot: [(slot, host[0])])
    ring.fetch(4, lambda slot: [(slot, host[0])])
    ring.discard(4)
    assert ring.fetch(5, lambda slot: [(slot, host[1])])
    assert (ring.take(5) == 2).all()
    assert (ring.take(3) == 1).all()
    ring.close()


def test_an_exception_surfaces_in_the_call_that_needs_the_copy(ops: NumpyOps) -> None:
    ring = Ring(ops, (4,), 2, Transfers())
    host = np.ones(4, np.float32)
    ring.fetch(0, lambda slot: [bad_pair()])
    ring.fetch(1, lambda slot: [(slot, host)])
    assert (ring.take(1) == 1).all()
    with pytest.raises(ValueError, match="broadcast"):
        ring.take(0)
    ring.leave(1, lambda slot: [bad_pair()])
    with pytest.raises(ValueError, match="broadcast"):
        ring.close()
