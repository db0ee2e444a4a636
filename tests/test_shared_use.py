"""One model used from several threads, from an event loop and after a fork: right answers or a clear error, always."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import slimrt
from slimrt.errors import ContextError, SettingError
from slimrt.prune.plan import PrunePlan, Stage
from tests.ops.numpy.test_tasks import forked, needs_fork
from tests.tiny_gguf import write_tiny_llama

ASK = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
DEVICES = pytest.mark.parametrize("device", ["cpu", "numpy"])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("shared") / "tiny.gguf", n_layers=3, ctx=2048)


def prompt(seed: int, length: int = 60) -> list[int]:
    return np.random.default_rng(seed).integers(3, 200, length).tolist()


def together(*calls: object) -> None:
    """Run ``calls`` on a thread each; the first exception is raised here."""
    errors: list[BaseException] = []

    def run(call: object) -> None:
        try:
            call()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


@DEVICES
def test_generate_is_right_while_another_thread_streams(path: Path, device: str) -> None:
    llm = slimrt.load(path, device=device, prune="off", threads=2)
    expected = [llm.generate(prompt(seed), **ASK).tokens for seed in range(4)]
    told: list[str] = []

    def stream() -> None:
        for _ in range(15):
            stream = llm.stream(prompt(9), max_tokens=40, temperature=0, ignore_eos=True)
            try:
                list(stream)
            except SettingError as error:
                told.append(str(error))

    def generate() -> None:
        for round in range(20):
            seed = round % 4
            assert llm.generate(prompt(seed), **ASK).tokens == expected[seed]

    together(stream, generate)
    assert set(told) <= {told[0]} if told else True
    assert all("use a session for each" in line for line in told)


@DEVICES
def test_two_streams_of_one_conversation_are_right_or_say_so(path: Path, device: str) -> None:
    llm = slimrt.load(path, device=device, prune="off")
    expected = {seed: llm.generate(prompt(seed), **ASK).text for seed in (1, 2)}
    first = llm.stream(prompt(1), **ASK)
    pieces = [next(first)]
    second = llm.stream(prompt(2), **ASK)  # nothing is read yet
    pieces.append(next(first))
    assert "".join(second) == expected[2]
    with pytest.raises(SettingError, match="use a session for each"):
        list(first)
    assert expected[1].startswith("".join(pieces))


@DEVICES
def test_sessions_of_their_own_run_side_by_side(path: Path, device: str) -> None:
    llm = slimrt.load(path, device=device, prune="off", threads=2)
    expected = [llm.generate(prompt(seed), **ASK).tokens for seed in range(3)]

    def work(seed: int) -> None:
        with llm.session() as session:
            for _ in range(5):
                assert llm.generate(prompt(seed), session=session, **ASK).tokens == expected[seed]

    together(*(lambda seed=seed: work(seed) for seed in range(3)))


def test_several_threads_share_a_stream(path: Path) -> None:
    llm = slimrt.load(path, device="numpy", prune="off")
    expected = llm.generate(prompt(3), **ASK)
    stream = llm.stream(prompt(3), **ASK)
    pieces: list[str] = []
    together(*(lambda: pieces.extend(stream) for _ in range(3)))
    assert sorted(pieces) == sorted(llm.stream(prompt(3), **ASK)) and stream.completion.tokens == expected.tokens


def test_a_stream_begins_when_it_is_read(path: Path) -> None:
    llm = slimrt.load(path, device="numpy", prune="off")
    llm.generate(prompt(1), **ASK)
    held = list(llm.current.tokens)
    stream = llm.stream(prompt(2), **ASK)
    assert llm.current.tokens == held and stream.completion.tokens == []
    with pytest.raises(ContextError, match="the context holds"):  # what is wrong is said at once
        llm.stream(prompt(2, 5000), **ASK)
    stream.read_prompt()
    assert llm.current.tokens == prompt(2)
    assert "".join(stream) == llm.generate(prompt(2), **ASK).text
    assert stream.completion.timings.ttft_s > 0
    stream.close()


def test_an_event_loop_stays_free(path: Path) -> None:
    llm = slimrt.load(path, device="numpy", prune="off")
    expected = llm.generate(prompt(5, 400), **ASK).text
    gate = threading.Event()

    def slow(done: int, layers: int) -> None:
        assert gate.wait(60)  # set by the loop, which would stand still otherwise

    async def main() -> str:
        stream = llm.stream(prompt(5, 400), progress=slow, prune="off", **ASK)
        llm.reset()
        pieces = asyncio.ensure_future(collect(stream))
        await asyncio.sleep(0.01)
        assert not pieces.done()
        gate.set()
        return await pieces

    async def collect(stream: slimrt.streaming.CompletionStream) -> str:  # type: ignore[name-defined]
        text = "".join([piece async for piece in stream])
        await stream.aclose()
        return text

    assert asyncio.run(main()) == expected


# -- forks -----------------------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("budget", [None, 384])
def test_a_fork_while_another_thread_generates(path: Path, budget: int | None) -> None:
    """On compiled kernels: OpenBLAS's own handler of forks may not return while another thread multiplies."""
    pytest.importorskip("numba")
    llm = slimrt.load(path, ctx=2048, device="cpu", prune="off", kv_budget=budget, threads=2)
    if llm.backend.ops.name == "numpy":
        pytest.skip("this processor has no fast path")
    question = prompt(1, 600)
    expected = llm.generate(question, **ASK).tokens
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            llm.generate(prompt(2, 700), **ASK)
            llm.generate(prompt(3, 50), **ASK)

    busy = threading.Thread(target=keep_busy, daemon=True)
    busy.start()
    try:
        for _ in range(4):
            assert forked(lambda: all(llm.generate(question, **ASK).tokens == expected for _ in range(2))) == 0
    finally:
        stop.set()
        busy.join(60)
    assert llm.generate(question, **ASK).tokens == expected


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@DEVICES
@pytest.mark.usefixtures("no_collector")
def test_a_dropped_model_is_freed_at_once(path: Path, device: str) -> None:
    llm = slimrt.load(path, device=device, prune=PrunePlan(stages=(Stage(1, 0.5),), block=32), kv_budget=384, ctx=1024)
    llm.generate(prompt(1, 500), **ASK)
    next(llm.stream(prompt(2), **ASK))  # dropped halfway
    unread = llm.stream(prompt(2), **ASK)
    talk = llm.session()
    talk.ask("hello", **ASK)
    answer = talk.ask("hello", stream=True, **ASK)
    next(answer)
    alive = [weakref.ref(thing) for thing in (llm, llm.engine, llm.backend.ops, talk)]
    del llm, unread, talk, answer
    assert [reference() for reference in alive] == [None] * 4


@DEVICES
@pytest.mark.usefixtures("no_collector")
def test_close_frees_what_others_still_hold(path: Path, device: str) -> None:
    with slimrt.load(path, device=device, prune="off") as llm:
        llm.generate(prompt(1), **ASK)
        talk = llm.session()
        talk.prefill(prompt(1))
        model = weakref.ref(llm.engine.model)
    assert model() is None
    llm.close()
    for use in (lambda: llm.generate(prompt(1)), lambda: talk.prefill(prompt(2)), lambda: llm.logits([3])):
        with pytest.raises(SettingError, match="closed"):
            use()


@pytest.mark.usefixtures("no_collector")
def test_a_closed_llama_frees_its_model(path: Path) -> None:
    for options in ({}, {"logits_all": True}):
        llama = slimrt.Llama(path, n_ctx=64, **options)
        llama.eval([70, 71])
        llama.eval([72])
        model = weakref.ref(llama._session.engine.model)
        llama.close()
        assert model() is None
        llama.close()
        with pytest.raises(SettingError, match="closed"):
            llama.eval([70])
