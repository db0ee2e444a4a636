"""Ctrl-C wherever it may come: what was read before is kept, and what is read after it is right to the bit."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import slimrt
from slimrt.ops.numpy.memory import NumpyMemory
from slimrt.prune.plan import PrunePlan, Stage
from slimrt.session import Session
from tests.interrupts import interrupted, moments, spread
from tests.tiny_gguf import write_tiny_llama

CUTS = PrunePlan(stages=(Stage(1, 0.5),), block=32, query_window=8)
POINTS = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("interrupts") / "tiny.gguf", n_layers=3, ctx=2048)


def ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 200, length).tolist()


DOCUMENT, ASKED, AGAIN = ids(0, 640), ids(1, 40), ids(2, 30)


def loaded(path: Path, device: str, budget: int | None) -> slimrt.LLM:
    return slimrt.load(path, ctx=2048, rope_scaling="none", device=device, kv_budget=budget, prune="off", threads=1)


def went_on(session: Session, tokens: list[int]) -> np.ndarray:
    for token in tokens:
        session.extend([token])
    assert session.logits is not None
    return session.logits


@pytest.mark.parametrize("plan", [None, CUTS], ids=["dense", "cuts"])
@pytest.mark.parametrize("budget", [None, 384])
@pytest.mark.parametrize("device", ["cpu", "numpy"])
def test_in_a_further_question(path: Path, device: str, budget: int | None, plan: PrunePlan | None) -> None:
    llm = loaded(path, device, budget)

    def read() -> Session:
        session = Session(llm.engine, llm.ctx)
        session.prefill(DOCUMENT, plan)
        return session

    whole = read()
    whole.prefill(DOCUMENT + AGAIN, plan)
    expected = went_on(whole, AGAIN[:9])
    probe = read()
    total = moments(lambda: probe.prefill(DOCUMENT + ASKED, plan))
    for at in spread(total, POINTS):
        session = read()
        interrupted(lambda session=session: session.prefill(DOCUMENT + ASKED, plan), at)
        reading = session.prefill(DOCUMENT + AGAIN, plan)
        if at < total - POINTS:  # else it may have been read
            assert reading.reused == len(DOCUMENT), (at, total)
        assert np.array_equal(went_on(session, AGAIN[:9]), expected), (at, total)


@pytest.mark.parametrize("budget", [None, 384])
@pytest.mark.parametrize("device", ["cpu", "numpy"])
def test_in_decode(path: Path, device: str, budget: int | None) -> None:
    """Tokens that complete a block and swap others among them."""
    llm = loaded(path, device, budget)
    start = 64 * 10 - 3

    def read() -> Session:
        session = Session(llm.engine, llm.ctx)
        session.prefill(DOCUMENT[:start])
        return session

    whole = read()
    rows = [all_rows(whole)]
    for token in AGAIN:
        whole.extend([token])
        rows.append(all_rows(whole))
    probe = read()
    total = moments(lambda: went_on(probe, AGAIN[:6]))
    for at in spread(total, POINTS):
        session = read()
        interrupted(lambda session=session: went_on(session, AGAIN[:6]), at)
        session.truncate(len(session.tokens))
        done = len(session.tokens) - start
        assert session.tokens == DOCUMENT[:start] + AGAIN[:done]
        assert session.context.length == len(session.tokens) and session.context.cache.intact
        for ours, expected in zip(all_rows(session), rows[done], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours, expected, strict=True)), (at, total)
        last = went_on(session, AGAIN[done:])
        if budget is None:
            assert np.array_equal(last, whole.logits), (at, total)
        else:  # which blocks are read may differ, as earlier wishes are forgotten; what is read may not
            assert resident_rows_are_right(session), (at, total)


def all_rows(session: Session) -> list[tuple[np.ndarray, ...]]:
    """Keys, values and positions of every layer."""
    layers = range(session.engine.config.n_layers)
    return [tuple(np.array(part) for part in session.context.cache.rows(layer)) for layer in layers]


def resident_rows_are_right(session: Session) -> bool:
    """Whether what decode reads of each layer is what the layer holds at those positions."""
    for (keys, values, _), layer in zip(all_rows(session), session.context.cache._layers, strict=True):  # type: ignore[attr-defined]
        assert layer.spilled
        layer.settle()
        block = layer._config.block
        read = len(layer.slots) * block - (-len(layer)) % block
        at = layer._slot_positions[:read]
        if len(set(at.tolist())) != read:
            return False
        if not np.array_equal(layer.resident[:, :, :read], np.stack([keys, values])[:, :, at]):
            return False
    return True


@pytest.mark.parametrize("budget", [None, 384])
def test_what_an_interrupted_question_cut_away_is_not_read_on_from(path: Path, budget: int | None) -> None:
    llm = loaded(path, "numpy", budget)
    session = Session(llm.engine, llm.ctx)
    session.prefill(DOCUMENT, CUTS)

    def stop(done: int, layers: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.prefill(DOCUMENT + ASKED, CUTS, progress=stop)
    assert session.tokens == DOCUMENT
    with pytest.raises(slimrt.errors.ContextError, match="read a prompt before you go on"):
        session.extend([5])
    session.prefill(DOCUMENT)  # dense: from the start
    fresh = Session(llm.engine, llm.ctx)
    fresh.prefill(DOCUMENT)
    assert np.array_equal(went_on(session, AGAIN), went_on(fresh, AGAIN))


def test_a_mark_is_whole_wherever_it_is_asked() -> None:
    """What asks a fence of compute may be interrupted anywhere: the copies behind it come all the same."""
    memory, copied = NumpyMemory(), np.zeros(3)

    def asked() -> None:
        fence = memory.mark()
        assert fence.done() and fence.exception() is None
        memory.wait(fence)

    def everywhere() -> None:
        for at in range(moments(asked)):
            interrupted(asked, at)
        memory.wait(memory.copy([(copied, np.ones(3))], memory.mark()))

    thread = threading.Thread(target=everywhere, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and copied.all()
