"""The engine against llama.cpp and against the float64 reference, on the real model and on small random ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slimrt
from slimrt.errors import ComputeError, ContextError, SettingError
from tests import reference
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import logprobs_apart

GOLDEN = Path(__file__).parent / "goldens" / "logits" / "llama_cpp.npz"

# A blocked float32 sum may err this many times as much as the naive float32 reference does against float64. The two
# differ in the order of summation only, so their errors are of one size; 4 covers the worst element of a large row.
SLACK = 4


@pytest.fixture(scope="module")
def llm(default_model: Path) -> slimrt.LLM:
    return slimrt.load(default_model, ctx=2048, prune="off", device="numpy")


@pytest.fixture(scope="module")
def quick(default_model: Path) -> slimrt.LLM:
    """Where it does not matter how a token is computed."""
    return slimrt.load(default_model, ctx=2048, prune="off", draft=None)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as data:
        return dict(data)


def test_tokens_are_llama_cpps(llm: slimrt.LLM, golden: dict[str, np.ndarray]) -> None:
    for number, text in enumerate(golden["texts"]):
        assert llm.tokenize(str(text), special=True) == golden[f"{number}.ids"].tolist()


def test_logits_against_float64_and_llama_cpp(llm: slimrt.LLM, golden: dict[str, np.ndarray]) -> None:
    prompts = [golden[f"{number}.ids"].tolist() for number in range(len(golden["texts"]))]
    exact, naive = (reference.logits_of_each(llm.file, llm.config, prompts, kind) for kind in (np.float64, np.float32))
    for number, ids in enumerate(prompts):
        truth = exact[number][-1]
        unit = np.abs(naive[number][-1] - truth).max()
        ours = llm.logits(ids)
        assert np.abs(ours - truth).max() <= SLACK * unit
        # llama.cpp in float32 errs like any float32 computation; both errors together bound the distance.
        assert np.abs(ours[::16] - golden[f"{number}.f32.every16"]).max() <= 2 * SLACK * unit
        # On the quantised file llama.cpp rounds activations to int8; we are no farther from it than its own float32 is.
        own = np.abs(golden[f"{number}.f32.every16"] - golden[f"{number}.q4_1.every16"]).max()
        assert np.abs(ours[::16] - golden[f"{number}.q4_1.every16"]).max() <= own + 2 * SLACK * unit


def test_greedy_text_is_llama_cpps(llm: slimrt.LLM, golden: dict[str, np.ndarray]) -> None:
    for number in range(len(golden["texts"])):
        expected, gaps = golden[f"{number}.f32.tokens"], golden[f"{number}.f32.gaps"]
        assert gaps.min() > 1e-2  # no step is a matter of rounding, so the texts must be equal
        count = 64 if number == 0 else 16
        result = llm.generate(golden[f"{number}.ids"].tolist(), max_tokens=count, ignore_eos=True)
        assert result.tokens == expected.tolist()[:count]
        assert result.finish_reason == "length"
        assert result.usage.completion_tokens == count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"arch": "qwen2"},
        {"n_heads": 6, "n_kv_heads": 1, "d_model": 96},
        {"n_heads": 2, "n_kv_heads": 2, "type": "Q8_0"},
    ],
)
def test_small_models_against_float64(tmp_path: Path, options: dict) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path, **options)
    small = slimrt.load(path, ctx=1024, rope_scaling="none", prune="off", device="numpy")
    rng = np.random.default_rng(7)
    ids = rng.integers(0, small.config.vocab_size, 700).tolist()  # several query tiles, two key tiles, a ragged end
    truth = reference.logits(small.file, small.config, ids, np.float64)
    unit = np.abs(reference.logits(small.file, small.config, ids, np.float32) - truth).max()
    for length in (1, 2, 16, 17, 65, 130, 513, 700):
        assert np.abs(small.logits(ids[:length]) - truth[length - 1]).max() <= SLACK * unit
    # The same through decode, and in two pieces.
    session = small.session()
    session.prefill(ids[:600])
    for index in range(600, 620):
        session.extend([ids[index]])
        assert np.abs(session.logits - truth[index]).max() <= SLACK * unit
    session.extend(ids[620:])
    assert np.abs(session.logits - truth[-1]).max() <= SLACK * unit


def test_packed_weights_give_the_same_logits(
    default_model: Path, llm: slimrt.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So little memory is free that the unpacked weights (513 MiB) would take more than half of it.
    monkeypatch.setattr("slimrt.memory.plan.available_memory", lambda: 800 << 20)
    packed = slimrt.load(default_model, ctx=512, prune="off", device="numpy")
    assert any("packed" in note for note in packed.notes)
    ids = packed.tokenize("The quick brown fox jumps over the lazy dog. " * 4)
    unit = np.abs(
        reference.logits(llm.file, llm.config, ids, np.float32)[-1]
        - reference.logits(llm.file, llm.config, ids, np.float64)[-1]
    ).max()
    # Each of the two may err by SLACK units.
    assert np.abs(packed.logits(ids) - llm.logits(ids)).max() <= 2 * SLACK * unit
    assert np.abs(packed.logits(ids[:3]) - llm.logits(ids[:3])).max() <= 2 * SLACK * unit


def test_logprobs_are_those_of_the_logits(llm: slimrt.LLM) -> None:
    ids = llm.tokenize("One two three four five six seven eight nine ten eleven twelve.")
    start = len(ids) - 6
    result = llm.logprobs(ids, start)
    assert result.shape == (len(ids) - start,)
    apart = logprobs_apart(llm, ids)  # prefill and decode sum in different orders
    for offset, index in enumerate(range(start, len(ids))):
        row = llm.logits(ids[:index]).astype(np.float64)
        expected = row[ids[index]] - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert abs(result[offset] - expected) <= apart
    assert llm.continuation_logits(ids, start).shape == (len(ids) - start, llm.config.vocab_size)
    assert llm.logprobs(ids, len(ids)).shape == (0,)


def test_reuse_gives_the_same_text_and_says_why(llm: slimrt.LLM) -> None:
    llm.reset()
    document = llm.tokenize("A list of animals: cat, dog, horse, cow, sheep, goat, pig, hen, duck and goose. " * 8)
    first = llm.generate(document, max_tokens=8)
    assert first.timings.reused_tokens == 0
    longer = document + first.tokens + llm.tokenize(" Then came the")
    again = llm.generate(longer, max_tokens=8)
    assert again.timings.reused_tokens >= len(document) + len(first.tokens) - 1
    assert "continues" in again.timings.reuse_note
    llm.reset()
    assert llm.generate(longer, max_tokens=8).tokens == again.tokens
    departing = [*longer[:20], *llm.tokenize(" something else")]
    other = llm.generate(departing, max_tokens=4)
    assert other.timings.reused_tokens == 20
    assert "after token 20" in other.timings.reuse_note


def test_bad_calls(llm: slimrt.LLM) -> None:
    with pytest.raises(ContextError, match="2049 tokens, the context holds 2048"):
        llm.generate([1] * 2049)
    with pytest.raises(ContextError, match="no tokens"):
        llm.generate("")
    with pytest.raises(SettingError, match="token id 49152"):
        llm.generate([49152])
    with pytest.raises(SettingError, match="start 0"):
        llm.logprobs([1, 2], 0)
    with pytest.raises(SettingError, match="unknown option 'temprature'"):
        llm.generate("x", temprature=1)
    with pytest.raises(SettingError, match="max_tokens -1"):
        llm.generate("x", max_tokens=-1)


def test_context_full_ends_with_length(default_model: Path) -> None:
    small = slimrt.load(default_model, ctx=16, prune="off")
    result = small.generate([504, 3575, 282], max_tokens=None, ignore_eos=True)
    assert result.finish_reason == "length"
    assert result.usage.completion_tokens == 16 - 3 + 1  # the token drawn after the last place needs none itself


def test_stop_strings_and_streams(quick: slimrt.LLM) -> None:
    whole = quick.generate("Count: one, two, three,", max_tokens=24)
    assert "," in whole.text
    head = whole.text[: whole.text.index(",")]
    stopped = quick.generate("Count: one, two, three,", max_tokens=24, stop=[",", "never"])
    assert (stopped.text, stopped.finish_reason) == (head, "stop")
    stream = quick.stream("Count: one, two, three,", max_tokens=24)
    assert "".join(stream) == whole.text
    assert stream.completion.tokens == whole.tokens
    early = quick.stream("Count: one, two, three,", max_tokens=24)
    piece = next(iter(early))
    early.close()
    assert early.completion.text == piece


def test_two_streams_need_two_sessions(quick: slimrt.LLM) -> None:
    first = quick.stream("Once upon a time", max_tokens=8)
    next(first)
    quick.generate("Another prompt", max_tokens=1)
    with pytest.raises(SettingError, match=r"read something else .*; use a session for each"):
        first.finished()
    one = quick.stream("Once upon a time", max_tokens=8, session=quick.session())
    two = quick.stream("Another prompt", max_tokens=8, session=quick.session())
    mixed = [text for pair in zip(one, two, strict=False) for text in pair]
    assert mixed
    assert one.finished().text == quick.generate("Once upon a time", max_tokens=8).text


def test_seed_repeats_the_text(quick: slimrt.LLM) -> None:
    texts = {
        quick.generate("My favourite food is", max_tokens=12, temperature=1.0, seed=seed).text for seed in (1, 1, 2)
    }
    assert len(texts) == 2


def test_a_plan_that_does_not_fit_is_refused(default_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimrt.memory.plan.available_memory", lambda: 400 << 20)
    with pytest.raises(SettingError, match=r"needs .* GiB at a context of 8192 .*; a context of \d+ fits") as refused:
        slimrt.load(default_model, prune="off", device="numpy")
    fitting = int(str(refused.value).rsplit("--ctx ", 1)[1].rstrip(")"))
    assert slimrt.load(default_model, ctx=fitting, prune="off", device="numpy").memory.fits()
    monkeypatch.setattr("slimrt.memory.plan.available_memory", lambda: 50 << 20)
    with pytest.raises(SettingError, match="smaller model"):
        slimrt.load(default_model, prune="off", device="numpy")


def test_nan_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path)
    raw = bytearray(path.read_bytes())
    raw[-64:] = np.full(16, np.nan, "<f4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(ComputeError, match=r"not finite|NaN"):
        slimrt.load(path).logits([1, 2, 3])
