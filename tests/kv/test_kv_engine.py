"""The cache under a budget beneath an engine, sessions and the Python interface."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

import slimrt
from slimrt import PrunePlan, Stage
from slimrt.config import CacheConfig
from slimrt.context import Context
from slimrt.engine import Engine
from slimrt.errors import SettingError
from slimrt.kv.cache import KVCache
from slimrt.kv.offload import OffloadedKVCache
from slimrt.models import build, read_config
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.session import Session
from slimrt.weights.gguf import GGUFFile
from tests.deferred_ops import DeferredOps
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kv") / "tiny.gguf"
    write_tiny_llama(path, n_layers=4)
    return path


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return np.random.default_rng(3).integers(0, 270, 700).tolist()


PLAN = PrunePlan(stages=(Stage(1, 0.5), Stage(2, 0.25)), block=32, unit=8)


def talk(session: Session, ids: list[int], plan: PrunePlan | None) -> list[np.ndarray]:
    """The logits of a conversation: a prompt, decoding, a second question, decoding, another turn."""
    logits = []
    for end in (500, 560, 540, 700):
        session.prefill(ids[:end], plan)
        logits.append(session.logits)
        for token in ids[:5]:
            session.extend([token])
            logits.append(session.logits)
    return [row for row in logits if row is not None]


@pytest.mark.parametrize("plan", [None, PLAN])
def test_a_budget_that_holds_everything_changes_nothing(tiny: Path, ids: list[int], plan: PrunePlan | None) -> None:
    full = slimrt.load(tiny, ctx=1024, rope_scaling="none", prune="off", device="numpy")
    roomy = slimrt.load(tiny, ctx=1024, rope_scaling="none", prune="off", device="numpy", kv_budget=1024)
    for one, other in zip(talk(full.session(), ids, plan), talk(roomy.session(), ids, plan), strict=True):
        assert np.array_equal(one, other)
    assert roomy.generate(ids, max_tokens=2).timings.kv_bytes_host == 0


@pytest.mark.parametrize("plan", [None, PLAN])
def test_prompts_are_read_exactly_under_a_budget(tiny: Path, ids: list[int], plan: PrunePlan | None) -> None:
    """Whatever decode left out, a prompt that continues is computed over all rows (here decode writes no row)."""
    full = slimrt.load(tiny, ctx=1024, rope_scaling="none", prune="off").session()
    small = slimrt.load(tiny, ctx=1024, rope_scaling="none", prune="off", kv_budget=128).session()
    for end in (500, 560, 540, 700):
        full.prefill(ids[:end], plan)
        small.prefill(ids[:end], plan)
        assert np.array_equal(full.logits, small.logits)
    assert small.kv_bytes_host > 0
    assert small.kv_bytes_device < full.kv_bytes_device


@pytest.mark.parametrize("plan", [None, PLAN])
def test_the_engine_waits_for_every_copy(tiny: Path, ids: list[int], plan: PrunePlan | None) -> None:
    """The engine on the backend that is as late as it may be computes what it computes with a copying thread."""
    file = GGUFFile(tiny)
    config = read_config(file)
    cache = CacheConfig(1024, 128, lookahead=2)
    results = []
    for ops in (NumpyOps(1), DeferredOps()):
        session = Session(Engine(build(config, file, ops), ops, cache), 1024)
        results.append(talk(session, ids, plan))
    for one, other in zip(*results, strict=True):
        assert np.array_equal(one, other)


def test_nothing_of_a_prompt_waits_for_compute_before_the_attention_is_queued(tiny: Path, ids: list[int]) -> None:
    """A score comes to the host, so it waits for what is queued: a layer's attention must be part of that by then."""
    done: list[str] = []

    class Noting(NumpyOps):
        def attend(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            done.append("attend")
            return super().attend(*args, **kwargs)

        def score_blocks(self, *args):  # type: ignore[no-untyped-def]
            if done[-1:] != ["score"]:  # of groups, then of the blocks of the best ones
                done.append("score")
            return super().score_blocks(*args)

    file, ops = GGUFFile(tiny), Noting(1)
    config = read_config(file)
    session = Session(Engine(build(config, file, ops), ops, CacheConfig(1024, 128)), 1024)
    for end in (500, 560):
        done.clear()
        session.prefill(ids[:end])
        assert done == ["attend", "score"] * config.n_layers


def test_a_session_recovers_from_a_failed_copy(tiny: Path, ids: list[int]) -> None:
    file = GGUFFile(tiny)
    config = read_config(file)
    ops = NumpyOps(1)
    engine = Engine(build(config, file, ops), ops, CacheConfig(1024, 128))
    session = Session(engine, 1024)
    session.prefill(ids[:300])
    ops.copy = lambda pairs, after=None: NumpyOps.copy(ops, [(np.empty(2), np.empty(3))], after)  # type: ignore
    with pytest.raises(ValueError, match="could not broadcast"):
        session.prefill(ids[:500])
    del ops.copy
    assert session.tokens == []  # what it held is lost, and it knows
    session.prefill(ids[:500])
    fresh = Session(engine, 1024)
    fresh.prefill(ids[:500])
    assert np.array_equal(session.logits, fresh.logits)


def test_a_copied_context_goes_its_own_way(tiny: Path, ids: list[int]) -> None:
    file = GGUFFile(tiny)
    config = read_config(file)
    ops = NumpyOps(1)
    for cache in (CacheConfig(1024), CacheConfig(1024, 128)):
        engine = Engine(build(config, file, ops), ops, cache)
        context = engine.new_context()
        engine.prefill(context, ids[:400])
        other: Context = copy.deepcopy(context)
        one = engine.logits(engine.prefill(context, ids[400:450])[0])
        two = engine.logits(engine.prefill(other, ids[400:450])[0])
        assert np.array_equal(one, two)
        assert isinstance(other.cache, KVCache if cache.budget is None else OffloadedKVCache)


def test_logprobs_measure_the_budget(tiny: Path, ids: list[int]) -> None:
    small = slimrt.load(tiny, ctx=1024, rope_scaling="none", prune="off", kv_budget=128)
    session = small.session()
    session.prefill(ids[:600])
    rows = []
    for token in ids[600:640]:
        rows.append(session.logits)
        session.extend([token])
    assert np.array_equal(small.continuation_logits(ids[:640], 600), np.array(rows))
    full = slimrt.load(tiny, ctx=1024, rope_scaling="none", prune="off")
    assert not np.allclose(full.logprobs(ids[:640], 600), small.logprobs(ids[:640], 600))


def test_bytes_in_timings(tiny: Path, ids: list[int]) -> None:
    small = slimrt.load(tiny, ctx=1024, rope_scaling="none", prune="off", kv_budget=128)
    timings = small.generate(ids[:512], max_tokens=1).timings
    row = small.engine.kv_bytes_per_token
    assert timings.kv_bytes_host == 512 * row
    # Means are of keys only, in their type: one a unit of 8 rows, one a group of 8 blocks of 16 rows.
    means = (512 // 8 + 512 // 128) * row // 2
    assert timings.kv_bytes_device == 128 * row + means


def test_bad_budgets(tiny: Path) -> None:
    with pytest.raises(
        SettingError, match="KV budget 95: must be a whole number of at least 96 rows a layer"
    ) as refused:
        slimrt.load(tiny, kv_budget=95)
    assert "\n" not in str(refused.value)
    for budget in (0, -1, 15, 200.0, "200"):
        with pytest.raises(SettingError, match=f"KV budget {budget!r}: must be a whole number"):
            slimrt.load(tiny, kv_budget=budget)  # type: ignore[arg-type]
    huge = slimrt.load(tiny, ctx=64, kv_budget=1 << 50)  # takes what the context can fill
    assert huge.generate([1, 2, 3], max_tokens=2).timings.kv_bytes_host == 0
    with pytest.raises(SettingError, match="block 10 must be a multiple of unit 8"):
        CacheConfig(1, 1000, block=10)
    with pytest.raises(SettingError, match=r"overlap 1\.5"):
        CacheConfig(1, overlap=1.5)
