"""Decode under a KV budget by captured graphs: the blocks, and bit for bit the answers, of decode layer by layer."""

from __future__ import annotations

import dataclasses
import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimrt.config import CacheConfig
from slimrt.engine import Engine
from slimrt.errors import ComputeError
from slimrt.kv.offload import OffloadedKVCache
from slimrt.models import build, read_config
from slimrt.ops.cuda.budget_decode import BudgetedDecode
from slimrt.ops.cuda.cupy_ops import CupyOps
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.session import Session
from slimrt.weights.gguf import GGUFFile
from tests import emulation
from tests.fake_cupy import FakeCupy
from tests.half_ops import HalfOps
from tests.ops.cuda.test_cupy_engine import SLACK, ids, tiny

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="running CUDA sources on the CPU needs g++")

BUDGET = CacheConfig(512, 128, block=16, unit=8, local_blocks=2, overlap=0.75)
EAGER = dataclasses.replace(BUDGET, overlap=1.0, choose_every=1)  # blocks move with every token


def talk(file: GGUFFile, ops: Any, cache: CacheConfig) -> tuple[np.ndarray, Session]:
    """A prompt within the budget that grows beyond it, a follow-up, and one that departs from it; decode past blocks
    that are full. Now and then somebody looks at the cache."""
    session = Session(Engine(build(read_config(file), file, ops), ops, cache), cache.ctx)
    first, found = ids(file, 120), []
    for prompt, count in ((first, 26), (first + ids(file, 60, 2), 15), (first[:100] + ids(file, 90, 3), 4)):
        session.prefill(prompt)
        for number, token in enumerate(ids(file, count, 5)):
            session.extend([token])
            found.append(session.logits)
            if number == 12:
                assert session.kv_bytes_device > 0
    return np.array(found), session


def test_graphs_choose_what_layers_choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, found, sessions = tiny(tmp_path, type="Q8_0"), [], []
    monkeypatch.setattr("slimrt.ops.cuda.cupy_ops._as_llama", lambda c: False)  # the same kernels, so the same bits
    lend = OffloadedKVCache.lend
    for graphs, how in ((False, {}), (True, {}), (True, {"copies": "late", "compute": "late"})):
        fake = FakeCupy(monkeypatch, **how)  # type: ignore[arg-type]
        monkeypatch.setattr(OffloadedKVCache, "lend", lend if graphs else lambda self, scores: None)
        logits, session = talk(file, CupyOps(budget_graphs=True), BUDGET)
        found.append(logits)
        sessions.append(session)
        assert bool(fake.graphs) == graphs
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[1], found[2])
    plain, graph = (session.context.cache for session in sessions[:2])
    for layer in range(2):
        for one, two in zip(plain.rows(layer), graph.rows(layer), strict=True):
            assert np.array_equal(one, two)
        assert np.array_equal(plain._layers[layer].slots, graph._layers[layer].slots)  # type: ignore[attr-defined]
    one, two = (cache.transfers for cache in (plain, graph))  # type: ignore[attr-defined]
    assert one.bytes_to_host == two.bytes_to_host and one.fetched.nbytes > 0
    # In a graph a block that became full, three of each layer, comes back from the host as well.
    assert two.fetched.nbytes - one.fetched.nbytes == 2 * 3 * (2 * 2 * 16 * 64 * 2)


def test_two_conversations_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What one has lent stays its own while the other decodes, also where its means move to larger memory."""
    file, found = tiny(tmp_path, type="Q8_0"), []
    for together in (False, True):
        FakeCupy(monkeypatch)
        ops = CupyOps(budget_graphs=True)
        engine = Engine(build(read_config(file), file, ops), ops, EAGER)
        sessions = [Session(engine, BUDGET.ctx) for _ in range(2)]
        for number, session in enumerate(sessions):
            session.prefill(ids(file, 170, number))
        logits: list[list[Any]] = [[], []]
        turns = [0, 1, 0, 0, 1, 1] if together else [0, 0, 0, 1, 1, 1]
        for number, which in enumerate(turns):
            for rows in sessions[which].context.cache._layers if together and number == 3 else ():  # type: ignore[attr-defined]
                rows.means = rows._room(rows.means, rows.means.shape[1], rows.means.shape[1] + 1, 1)
            sessions[which].extend([7 + len(logits[which])])
            logits[which].append(sessions[which].logits)
        found.append(np.array(logits))
    assert np.array_equal(*found)


def test_a_block_that_is_read_before_its_copy_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tiny(tmp_path, type="Q8_0")
    FakeCupy(monkeypatch)
    right, _ = talk(file, CupyOps(budget_graphs=True), BUDGET)
    FakeCupy(monkeypatch, copies="late")
    monkeypatch.setattr(OffloadedKVCache, "settled", lambda self: None)
    try:
        wrong, _ = talk(file, CupyOps(budget_graphs=True), BUDGET)
    except ComputeError:  # NaN in the logits
        return
    assert not np.array_equal(wrong, right)


@pytest.mark.parametrize("change", [{"score": "unit_softmax", "decay": 0.0}, {"overlap": 1.0, "choose_every": 1}])
def test_fused_kernels_under_other_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any]
) -> None:
    fake, file, cache = FakeCupy(monkeypatch), tiny(tmp_path, type="Q8_0"), dataclasses.replace(BUDGET, **change)
    found, session = talk(file, CupyOps(budget_graphs=True), cache)
    truth, half = (talk(file, ops, cache)[0] for ops in (NumpyOps(1), HalfOps()))
    assert np.abs(found - truth).max() <= SLACK * np.abs(half - truth).max()
    assert fake.graphs and "gemv_heads" in fake.launches and "choose_blocks" in fake.launches
    assert session.context.cache.transfers.bytes_to_device > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("cache", [None, BUDGET], ids=["all rows", "budget"])
def test_a_conversation_that_is_gone_leaves_no_rows_with_the_decoder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: CacheConfig | None
) -> None:
    """The plan counts one cache: the next prompt must not find the last one's beside its own."""
    fake, file = FakeCupy(monkeypatch), tiny(tmp_path, type="Q8_0")
    ops = CupyOps(budget_graphs=True)
    engine = Engine(build(read_config(file), file, ops), ops, cache)
    left = []
    for closed in (True, False, True):
        session = Session(engine, BUDGET.ctx)
        session.prefill(ids(file, 170))
        session.extend([7])
        assert fake.graphs
        rows, inside = session.context.cache.nbytes_device, fake.used
        if closed:
            session.context.cache.close()
        del session
        gc.collect()
        assert inside - fake.used >= rows
        left.append(fake.used)
    assert len(set(left)) == 1


def test_an_interrupt_while_rows_are_taken_back_leaves_them_on_loan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor may another conversation get the tables while one is still asked what they hold."""
    FakeCupy(monkeypatch)
    file = tiny(tmp_path, type="Q8_0")
    ops, found = CupyOps(budget_graphs=True), []
    engine = Engine(build(read_config(file), file, ops), ops, EAGER)
    to_host = CupyOps.to_host

    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    for interrupted in (False, True):
        session, other = (Session(engine, BUDGET.ctx) for _ in range(2))
        for number, each in enumerate((session, other)):
            each.prefill(ids(file, 170, number))
        for token in (7, 8, 9):
            session.extend([token])
        cache: Any = session.context.cache
        asked = 0

        def broken(self: CupyOps, x: Any) -> np.ndarray:
            nonlocal asked
            asked += 1
            if asked == 2:
                raise KeyboardInterrupt
            return to_host(self, x)

        if interrupted:
            monkeypatch.setattr(CupyOps, "to_host", broken)
            with pytest.raises(KeyboardInterrupt):
                _ = cache.fetched
            monkeypatch.setattr(CupyOps, "to_host", to_host)
            with monkeypatch.context() as patched:  # the other has borrowed, and captured nothing
                patched.setattr(BudgetedDecode, "_is_stale", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    other.extend([10])
        session.extend([10])
        found.append((session.logits, cache.rows(1)[0], cache._layers[1].slots))
    assert all(np.array_equal(one, two) for one, two in zip(*found, strict=True))


def test_rows_on_loan_that_are_forgotten_are_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A conversation whose GPU is lost can be forgotten and closed."""
    fake, file = FakeCupy(monkeypatch), tiny(tmp_path, type="Q8_0")
    ops = CupyOps(budget_graphs=True)
    engine = Engine(build(read_config(file), file, ops), ops, BUDGET)
    session = Session(engine, BUDGET.ctx)
    session.prefill(ids(file, 170))
    session.extend([7])
    fake.lost = "cudaErrorIllegalAddress: an illegal memory access was encountered"
    session.context.cache.truncate(0)
    session.context.cache.close()


def test_a_pass_in_which_another_conversation_decodes_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between the parts of a prompt others have their turn in the same thread, while a third waits for the GPU."""
    FakeCupy(monkeypatch)
    file, ops = tiny(tmp_path, type="Q8_0"), CupyOps()
    engine = Engine(build(read_config(file), file, ops), ops)
    one, other = (Session(engine, 64) for _ in range(2))
    for session in (one, other):
        session.prefill(ids(file, 20))
    inside, waiting = threading.Event(), threading.Event()

    def passing() -> None:
        with ops.computing():
            inside.set()
            waiting.wait()
            one.extend([5])

    def decoding() -> None:
        inside.wait()
        other.extend([5])

    threads = [threading.Thread(target=task, daemon=True) for task in (passing, decoding)]
    for thread in threads:
        thread.start()
    threads[1].join(0.1)  # it has come to where it has to wait
    waiting.set()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert np.array_equal(one.logits, other.logits)
