"""The whole engine on the fast backend: against NumPy on the default model, and with itself where bits must agree."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimrt
from slimrt import PrunePlan, Stage
from slimrt.errors import ComputeError
from slimrt.memory.plan import plan
from slimrt.models import read_config
from slimrt.weights.gguf import GGUFFile
from tests.tiny_gguf import write_tiny_llama

pytest.importorskip("numba")

from slimrt.ops.fast.features import detect
from slimrt.ops.numpy.numpy_ops import NumpyOps
from tests.rounded_ops import SLACK, RoundedOps, errors, read_and_decoded, session_on

pytestmark = pytest.mark.skipif(not detect().avx2, reason="this processor has no fast path")

SIZES: dict[str, Any] = {"d_model": 128, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32, "d_ff": 160, "type": "Q8_0"}
KEEP_ALL = PrunePlan(stages=(Stage(1, 1.0), Stage(2, 1.0)), block=32)
HALVES = PrunePlan(stages=(Stage(1, 0.5), Stage(2, 0.25)), block=32, query_window=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fast") / "tiny.gguf"
    return write_tiny_llama(path, n_layers=4, **SIZES)


@pytest.fixture(scope="module")
def llm(tiny: Path) -> slimrt.LLM:
    llm = slimrt.load(tiny, ctx=2048, rope_scaling="none", prune="off")
    assert llm.backend.ops.name == "fast"
    return llm


@pytest.fixture(scope="module")
def ids(llm: slimrt.LLM) -> list[int]:
    return np.random.default_rng(0).integers(3, llm.config.vocab_size, 900).tolist()


def agrees(llm: slimrt.LLM, path: Path, ids: list[int], start: int) -> bool:
    """Whether prompt and decode err no more than ``SLACK`` times as much as a naive computation of their precision."""
    assert llm.backend.ops.name == "fast"
    ours, naive = errors(path, llm.session(), ids, start)
    return bool(ours[0] <= SLACK * naive[0] and ours.max() <= SLACK * naive.max())


def test_the_default_model_agrees_with_numpy(default_model: Path) -> None:
    """Prefill multiplies bfloat16 where the processor can, decode rounds activations to int8."""
    llm = slimrt.load(default_model, ctx=1024, prune="off", device="cpu")
    ids = llm.tokenize("".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())))[:304]
    assert agrees(llm, default_model, ids, 300)


@pytest.mark.parametrize(
    "options", [{}, {"arch": "qwen2"}, {"head_dim": 10}, {"n_heads": 6, "n_kv_heads": 1, "type": "F16"}]
)
def test_small_models_agree_with_numpy(tmp_path: Path, options: dict) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", **{"d_model": 96, **options})
    ids = np.random.default_rng(7).integers(0, 200, 700).tolist()
    llm = slimrt.load(path, ctx=1024, rope_scaling="none", prune="off")
    for start in (1, 2, 16, 130, 660):
        assert agrees(llm, path, ids[: start + 40], start)


class _Attending(RoundedOps):
    """Rounds factors to bfloat16, those of attention as ``precise`` says, whatever the engine asks for."""

    def __init__(self, precise: bool) -> None:
        super().__init__(1, bf16=True)
        self._precise = precise

    def attend(self, *args: Any, **how: Any) -> np.ndarray:
        return super().attend(*args, **{**how, "precise": self._precise})


def test_large_key_biases_are_not_rounded_to_bfloat16(tmp_path: Path) -> None:
    """As in Qwen2.5: rounded to eight bits, keys of some hundreds would choose other tokens."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", arch="qwen2", k_bias=300, **SIZES)
    ids = np.random.default_rng(7).integers(0, 200, 170).tolist()
    truth, engine, precise, coarse = (
        read_and_decoded(session_on(ops, path, 1024), ids, 150)
        for ops in (NumpyOps(1), RoundedOps(1, bf16=True), _Attending(True), _Attending(False))
    )
    assert np.array_equal(engine, precise)
    assert np.abs(coarse[0] - truth[0]).max() > 4 * np.abs(precise[0] - truth[0]).max()  # so it matters
    assert agrees(slimrt.load(path, ctx=1024, rope_scaling="none", prune="off"), path, ids, 150)


def test_keys_beyond_float16_are_not_the_files_fault(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", arch="qwen2", k_bias=70000, **SIZES)
    ids = list(range(3, 30))
    with pytest.raises(ComputeError, match=r"too large for float16 .use device 'numpy'"):
        slimrt.load(path, rope_scaling="none", prune="off").logits(ids)
    assert np.isfinite(slimrt.load(path, rope_scaling="none", prune="off", device="numpy").logits(ids)).all()


def test_keeping_everything_is_dense_bit_for_bit(llm: slimrt.LLM, ids: list[int]) -> None:
    for length in (40, 129, 900):
        assert np.array_equal(llm.logits(ids[:length], prune=KEEP_ALL), llm.logits(ids[:length]))
    one = llm.generate(ids, max_tokens=8, prune=KEEP_ALL, temperature=1.0, seed=3)
    other = llm.generate(ids, max_tokens=8, prune="off", temperature=1.0, seed=3)
    assert one.tokens == other.tokens


def test_parts_of_a_prompt_give_the_bits_of_the_whole(llm: slimrt.LLM, ids: list[int]) -> None:
    whole = llm.logits(ids)
    session = llm.session()
    for end in (100, 102, 500, 900):
        session.prefill(ids[:end])
    assert session.logits is not None and np.array_equal(session.logits, whole)
    session.prefill(ids)  # the same again
    assert np.array_equal(session.logits, whole)


def test_threads_and_lesser_processors(tiny: Path, llm: slimrt.LLM, ids: list[int]) -> None:
    for threads in (1, 3):
        other = slimrt.load(tiny, ctx=2048, rope_scaling="none", prune="off", threads=threads)
        assert np.array_equal(other.logits(ids), llm.logits(ids))
        assert np.array_equal(other.logits(ids, prune=HALVES), llm.logits(ids, prune=HALVES))


@pytest.mark.skipif(not detect().avx512, reason="this processor has none: all other tests are of that code")
def test_code_for_a_processor_without_avx512(tiny: Path, llm: slimrt.LLM, ids: list[int]) -> None:
    """Not just other words but other instructions: Numba itself is told that this is a Haswell."""
    code = (
        "import sys, json, slimrt\n"
        "llm = slimrt.load(sys.argv[1], ctx=2048, rope_scaling='none', prune='off', threads=1)\n"
        "session = llm.session(); session.prefill(json.loads(sys.argv[2])); session.extend([5])\n"
        "print(json.dumps([llm.backend.why, session.logits.tolist()]))\n"
    )
    features = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+sse4.2,+movbe"
    environment = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny), json.dumps(ids)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    why, logits = json.loads(done.stdout)
    assert why.endswith("for AVX2")
    truth, naive = (
        read_and_decoded(session_on(ops, tiny, 2048), [*ids, 5], len(ids))[1]
        for ops in (NumpyOps(1), RoundedOps(bf16=False))
    )
    assert np.abs(np.array(logits) - truth).max() <= SLACK * np.abs(naive - truth).max()


@pytest.mark.parametrize("budget", [None, 128])
def test_a_saved_session_continues_with_the_same_bits(
    tiny: Path, ids: list[int], tmp_path: Path, budget: int | None
) -> None:
    def loaded() -> slimrt.LLM:
        return slimrt.load(tiny, ctx=2048, rope_scaling="none", prune=HALVES, kv_budget=budget)

    with loaded().session() as talk:
        first = talk.ask("hello world " * 40, max_tokens=6, temperature=0, ignore_eos=True)
        talk.save(tmp_path / "talk.session")
        expected = talk.ask("and then?", max_tokens=12, temperature=0, ignore_eos=True)
    restored = loaded().restore(tmp_path / "talk.session")
    again = restored.ask("and then?", max_tokens=12, temperature=0, ignore_eos=True)
    assert again.tokens == expected.tokens and again.usage == expected.usage
    assert first.timings.kv_bytes_device > 0


def test_the_cache_is_counted_as_it_lies(llm: slimrt.LLM, ids: list[int]) -> None:
    timings = llm.generate(ids, max_tokens=1).timings
    assert timings.kv_bytes_device == 900 * llm.engine.kv_bytes_per_token
    assert llm.engine.kv_bytes_per_token == 4 * 2 * 2 * 32 * 2  # layers, keys and values, heads, their width, float16
    assert llm.engine.kv_bytes_per_token * 2 == llm.config.kv_bytes_per_token


def test_plan_is_what_load_and_prefill_allocate(tmp_path: Path) -> None:
    path = write_tiny_llama(
        tmp_path / "m.gguf", n_layers=3, d_model=256, n_heads=8, n_kv_heads=2, d_ff=512, type="Q8_0", ctx=3072
    )
    planned = plan(read_config(GGUFFile(path)), GGUFFile(path), 3072, threads=1, fast=True)
    assert planned.packed and "float16" in planned.rows()[1].note
    ids = np.random.default_rng(0).integers(3, 200, 3072).tolist()
    slimrt.load(path, ctx=3072, threads=1).logits(ids[:100])  # kernels are compiled
    llm = slimrt.load(path, ctx=3072, threads=1)
    tracemalloc.start()
    try:
        llm.logits([1])
        loaded = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        llm.logits(ids)
        peak = tracemalloc.get_traced_memory()[1] - loaded
    finally:
        tracemalloc.stop()
    assert 0.6 * (planned.kv + planned.scratch) <= peak <= 1.15 * (planned.kv + planned.scratch)
