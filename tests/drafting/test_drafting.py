"""Guesses change nothing but the time: the same tokens, log-probabilities, text and conversation as without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimrt
from slimrt.drafting.lookup import Lookup
from slimrt.drafting.pace import MOST, Costs, best_count
from slimrt.errors import ComputeError, SettingError
from slimrt.llama_cpp import Llama, LlamaPromptLookupDecoding
from slimrt.ops.backend import fast_features
from slimrt.prune.plan import PrunePlan, Stage
from tests.families import CASES, write_checkpoint
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import doubles

fast = pytest.mark.skipif(fast_features()[0] is None, reason="this processor has no fast path")

SHAPE: dict[str, Any] = {"arch": "qwen2", "d_model": 224, "n_heads": 7, "n_kv_heads": 1, "d_ff": 288, "type": "Q8_0"}
REPEATS = [5, 9, 30, 31, 32, 33, 34, 7, 8, 60, 61, 5, 9, 30, 31]


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes cost is not measured, so that as many tokens are guessed on a busy machine."""
    monkeypatch.setattr(Costs, "note", lambda self, tokens, seconds: None)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", n_layers=3, ctx=1024, **SHAPE)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[slimrt.LLM]:
    with slimrt.load(path, prune="off", threads=2) as llm:
        yield llm


def prompts(count: int, length: int = 60) -> Iterator[list[int]]:
    """Random prompts with passages that come again."""
    rng = np.random.default_rng(length)
    for _ in range(count):
        ids = rng.integers(3, 200, length).tolist()
        yield ids + ids[10:40] + ids[:12]


class Knowing:
    """Guesses the ``truth``, but for a wrong token now and then, and more or less of it."""

    def __init__(self, truth: list[int], tokens: list[int]) -> None:
        self._left, self._rng = list(truth), np.random.default_rng(len(tokens))

    def guess(self, most: int, costs: Costs) -> list[int]:
        guesses = [*self._left, 5, 6, 7][: self._rng.integers(0, most + 1)]
        if guesses and self._rng.random() < 0.3:
            guesses[self._rng.integers(len(guesses))] = 9
        return guesses

    def wrote(self, tokens: list[int]) -> None:
        known = self._left[: len(tokens)]  # a text may end, by a stop string, before what was drawn
        assert known == tokens[: len(known)]
        del self._left[: len(tokens)]


@contextmanager
def knowing(truth: list[int]) -> Iterator[None]:
    """Texts are guessed by one who knows them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimrt.drafting.drawing.Lookup", partial(Knowing, truth))
        yield


def check(llm: slimrt.LLM, ids: list[int], **options: Any) -> slimrt.Completion:
    """One text without guesses, by lookup, and with guesses of which most are right: all that is seen of it is the
    same. Returns the last one."""
    looked_up = compare(llm, ids, **options)
    with knowing(looked_up.tokens):
        return compare(llm, ids, **options)


def compare(llm: slimrt.LLM, ids: list[int], **options: Any) -> slimrt.Completion:
    results = []
    for draft in (None, "auto"):
        with llm.session() as session:
            done = llm.generate(ids, session=session, draft=draft, **options)
            results.append((done, list(session.tokens), None if session.logits is None else session.logits.copy()))
            assert session.context.length == len(session.tokens)
    (plain, tokens, logits), (ours, our_tokens, our_logits) = results
    assert (ours.tokens, ours.text, ours.finish_reason, ours.logprobs, ours.complete) == (
        plain.tokens, plain.text, plain.finish_reason, plain.logprobs, plain.complete,
    )  # fmt: skip
    assert our_tokens == tokens
    assert np.array_equal(our_logits, logits)
    assert plain.timings.drafted_tokens == 0
    assert ours.timings.accepted_tokens <= ours.timings.drafted_tokens
    return ours


# -- what is guessed -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), max_size=40))
def test_longest_match(tokens: list[int]) -> None:
    best: tuple[int, int] = (0, 0)
    for end in range(1, len(tokens)):  # the text up to ``end`` against all of it
        length = 0
        while length < min(end, 24) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        best = max(best, (length, end))
    found = Lookup(tokens).match()
    if best[0] == 0:
        assert found is None
    else:
        assert found is not None
        assert (found[0].tolist(), found[1]) == (tokens[best[1] :], best[0])


def test_text_that_grows_is_looked_up_as_if_it_were_new() -> None:
    rng, text = np.random.default_rng(0), [1, 2, 3]
    growing = Lookup(text)
    for _ in range(60):
        more = rng.integers(0, 3, rng.integers(1, 4)).tolist()
        growing.guess(MOST, Costs())
        growing.wrote(more)
        text += more
        ours, fresh = growing.match(), Lookup(text).match()
        assert (ours is None) == (fresh is None)
        assert ours is None or fresh is None or (ours[0].tolist(), ours[1]) == (fresh[0].tolist(), fresh[1])


def test_chances_follow_what_was_seen() -> None:
    lookup = Lookup([1, 2, 3, 4])
    for token in (1, 2, 3, 4) * 20:
        lookup.guess(0, Costs())
        lookup.wrote([token])
    assert lookup.chance(20) > 0.97
    assert len(lookup.guess(MOST, Costs())) == MOST
    before = lookup.chance(1)
    for token in range(100, 160):  # each stood before, and something else came next
        lookup.wrote([50])
        lookup.guess(0, Costs())
        lookup.wrote([token])
    assert lookup.chance(1) < min(0.05, before)
    lookup.wrote([50])
    assert lookup.guess(MOST, Costs()) == []


def test_how_many_pay() -> None:
    costs = Costs()
    costs.each = 0.25
    assert best_count([], costs) == 0
    assert best_count([0.2, 0.04, 0.01], costs) == 0  # 1.2 tokens in the time of 1.25
    assert best_count([0.9, 0.81, 0.1], costs) == 2
    assert best_count([0.99**n for n in range(1, 16)], costs) == 15
    costs.each = 1.0  # a pass of two costs two
    assert best_count([0.99**n for n in range(1, 16)], costs) == 0


def test_costs_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    costs = Costs()
    before = costs.each
    costs.note(4, 1.0)  # nothing to compare with yet
    for _ in range(60):
        costs.note(1, 0.010)
        costs.note(5, 0.018)
    costs.note(5, 3.0)  # kernels were compiled
    assert costs.one == 0.010
    each = 0.2 + (before - 0.2) * 0.9**60  # a running mean of sixty, from what was taken for granted
    assert costs.each == doubles(each) and costs.of(5) == doubles(1 + 5 * each)


# -- the same text ---------------------------------------------------------------------------------------------------


@fast
def test_greedy_text_is_the_same(llm: slimrt.LLM) -> None:
    for ids in prompts(6):
        assert check(llm, ids, max_tokens=60, ignore_eos=True).timings.accepted_tokens > 20
    looked_up = [compare(llm, ids, max_tokens=60, ignore_eos=True) for ids in prompts(4)]
    assert sum(one.timings.accepted_tokens for one in looked_up) > 20


SAMPLING: dict[str, dict[str, Any]] = {
    "drawn": {"temperature": 0.7, "seed": 3},
    "filters": {"temperature": 1.1, "seed": 4, "top_p": 0.6, "min_p": 0.02, "xtc_probability": 0.3},
    "penalties": {"repeat_penalty": 1.2, "frequency_penalty": 0.1, "penalty_last_n": 20},
    "logprobs": {"logprobs": 2, "temperature": 0.2, "seed": 5},
    "processors": {"logits_processors": [lambda ids, logits: logits + np.sin(ids.sum() + np.arange(len(logits)))]},
    "bias": {"logit_bias": {31: 5.0, 32: 4.0}, "temperature": 0.3, "seed": 1},
    "one": {"max_tokens": 1},
    "two": {"max_tokens": 2},
}


@fast
@pytest.mark.parametrize("name", SAMPLING)
def test_sampled_text_is_the_same(llm: slimrt.LLM, name: str) -> None:
    options = {"max_tokens": 40, "ignore_eos": True, **SAMPLING[name]}
    for ids in prompts(2):
        done = check(llm, ids, **options)
        assert done.timings.accepted_tokens or len(done.tokens) < 3


@fast
def test_ends_of_a_text(llm: slimrt.LLM) -> None:
    """Stop strings and end tokens within what was guessed: the conversation holds what it holds without guesses."""
    guessed = 0
    for ids in prompts(3):
        whole = llm.generate(ids, max_tokens=40, ignore_eos=True, draft=None)
        for at in (3, 17, 30):
            piece = llm.detokenize(whole.tokens[at : at + 2])
            if piece.strip():
                guessed += check(llm, ids, max_tokens=40, ignore_eos=True, stop=piece).timings.accepted_tokens > 1
        check(llm, ids, max_tokens=None if len(ids) < 5 else 80)
    assert guessed


@fast
def test_a_full_context(path: Path) -> None:
    with slimrt.load(path, ctx=128, prune="off", threads=2) as small:
        for ids in prompts(2):
            assert len(check(small, ids, max_tokens=90, ignore_eos=True).tokens) < 90
            shifted = check(small, ids, max_tokens=90, ignore_eos=True, overflow="shift")
            assert len(shifted.tokens) == 90 and "dropped" in shifted.timings.reuse_note


@fast
def test_pruned_prompts_and_a_budget(path: Path) -> None:
    """What was pruned, or lies outside of the budget, is known all the same."""
    plan = PrunePlan((Stage(1, 0.4),), block=16, min_tokens=64, query_window=8)
    ids = next(prompts(1, 200))
    with slimrt.load(path, prune=plan, threads=2) as pruned:
        done = check(pruned, ids, max_tokens=50, ignore_eos=True)
        assert done.timings.stages and done.timings.accepted_tokens
    with slimrt.load(path, prune="off", kv_budget=96, threads=2) as budget:
        done = check(budget, ids, max_tokens=50, ignore_eos=True)
        assert done.timings.accepted_tokens and done.timings.kv_bytes_host
    with pytest.raises(SettingError, match=r"draft lookup: under a KV budget .* on backend numpy"):
        slimrt.load(path, kv_budget=256, draft="lookup", device="numpy")


@fast
@pytest.mark.parametrize("name", ["gemma2"])
def test_native_windows(name: str, tmp_path: Path) -> None:
    from slimrt.convert import convert_checkpoint

    assert name in CASES
    convert_checkpoint(write_checkpoint(name, tmp_path / name), tmp_path / "model.gguf", "f32")
    for budget in (None, 96):
        with slimrt.load(tmp_path / "model.gguf", ctx=256, prune="off", threads=2, kv_budget=budget) as windowed:
            assert windowed.config.windows
            ids = (REPEATS * 6)[:80]
            assert check(windowed, ids, max_tokens=60, ignore_eos=True).timings.accepted_tokens


@fast
def test_answers_bound_to_a_schema(llm: slimrt.LLM) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {name: {"type": "string", "pattern": "^[ab]{1,6}$"} for name in ("first", "second", "third")},
        "required": ["first", "second", "third"],
        "additionalProperties": False,
    }
    document = llm.tokenize('{"first": "ab", "second": "abab", "third": "b"} ' * 4)
    for options in ({}, {"temperature": 1.0, "seed": 2}, {"logprobs": 1}):
        done = check(llm, document, max_tokens=200, schema=schema, **options)
        assert done.complete and set(json.loads(done.text)) == {"first", "second", "third"}
        assert done.timings.accepted_tokens


# -- the conversation ------------------------------------------------------------------------------------------------


@fast
def test_a_stream_that_is_left(llm: slimrt.LLM) -> None:
    ids = next(prompts(1))
    truth = llm.generate(ids, max_tokens=60, ignore_eos=True, draft=None).tokens
    for pieces in (1, 6, 7, 8, 13):
        held = []
        for draft in (None, "auto"):
            session = llm.session()
            with knowing(truth):
                stream = llm.stream(ids, max_tokens=60, ignore_eos=True, session=session, draft=draft)
                for _ in range(pieces):
                    next(stream)
                stream.close()
            twin = session.fork()
            held.append((session.tokens, stream.completion.tokens, twin.tokens, session.context.length))
            session.extend([3])
            held[-1] += (session.logits.tobytes(),)
            session.close()
            twin.close()
        assert held[0] == held[1]


@fast
def test_an_error_while_guesses_are_looked_at(llm: slimrt.LLM) -> None:
    """The conversation is left with the tokens that were drawn, and goes on as if nothing had been guessed."""
    ids, calls = next(prompts(1)), 0

    def fails(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise ComputeError("broken; mend it")
        return logits

    whole = llm.generate(ids, max_tokens=40, ignore_eos=True, draft=None)
    with llm.session() as session, knowing(whole.tokens):
        with pytest.raises(ComputeError, match="broken"):
            llm.generate(ids, max_tokens=40, ignore_eos=True, session=session, logits_processors=[fails])
        assert session.tokens == (ids + whole.tokens)[: len(session.tokens)]
        assert len(session.tokens) >= len(ids) + 10
        again = llm.generate(ids, max_tokens=40, ignore_eos=True, session=session)
        assert again.tokens == whole.tokens and again.timings.accepted_tokens


# -- where it is chosen ----------------------------------------------------------------------------------------------


def test_other_backends_guess_only_when_asked(path: Path) -> None:
    """NumPy's rows differ in rounding from one by one, so nothing is guessed by itself."""
    with slimrt.load(path, device="numpy", prune="off") as plain:
        ids = (REPEATS * 4)[:50]
        assert plain.generate(ids, max_tokens=30, ignore_eos=True).timings.drafted_tokens == 0
        asked = plain.generate(ids, max_tokens=30, ignore_eos=True, draft="lookup")
        assert asked.timings.drafted_tokens > 0
        assert asked.tokens[:5] == plain.generate(ids, max_tokens=5, ignore_eos=True).tokens
    with pytest.raises(SettingError, match="draft 'never'"):
        plain.generate([5], draft="never")


@fast
def test_a_second_model_guesses(llm: slimrt.LLM, path: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", n_layers=1, seed=7, ctx=1024, **SHAPE)
    ids = next(prompts(1))
    plain = llm.generate(ids, max_tokens=40, ignore_eos=True, draft=None)
    rights = []
    for draft in (path, other):  # itself, which is always right; and one that is not
        with slimrt.load(path, prune="off", threads=2, draft=draft) as drafted:
            for _ in range(2):  # its conversation goes on with the model's
                done = drafted.generate(ids, max_tokens=40, ignore_eos=True)
                assert done.tokens == plain.tokens
                assert done.timings.drafted_tokens
            rights.append(done.timings.accepted_tokens / done.timings.drafted_tokens)
            assert drafted.generate(ids, max_tokens=10, draft=None).timings.drafted_tokens == 0
    assert rights[0] == 1 > rights[1]


def test_a_second_model_of_another_vocabulary(path: Path, default_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"draft model .*vocabulary has \d+ tokens, the model's \d+; use a smaller"):
        slimrt.load(default_model, device="numpy", draft=path)


@fast
@pytest.mark.parametrize("name", ["qwen3moe", "mixtral"])
def test_experts(name: str, tmp_path: Path) -> None:
    """Each token of a pass reads the matrices of its own experts."""
    from slimrt.convert import convert_checkpoint

    convert_checkpoint(write_checkpoint(name, tmp_path / "x"), tmp_path / "model.gguf", "f32")
    with slimrt.load(tmp_path / "model.gguf", ctx=128, prune="off", threads=2) as experts:
        assert experts.config.experts and experts.engine.together == 4
        with knowing(experts.generate((REPEATS * 4)[:50], max_tokens=40, draft=None).tokens):
            assert compare(experts, (REPEATS * 4)[:50], max_tokens=40).timings.accepted_tokens


def test_llama_cpp_names(path: Path) -> None:
    guess = LlamaPromptLookupDecoding(num_pred_tokens=3)
    assert guess(np.array(REPEATS)).tolist() == [32, 33, 34]
    assert guess(np.array([1, 2, 3])).tolist() == []
    ours = Llama(str(path), n_ctx=256, draft_model=LlamaPromptLookupDecoding(), verbose=False, n_threads=2)
    plain = Llama(str(path), n_ctx=256, verbose=False, n_threads=2)
    assert ours.draft_model is not None
    ids = (REPEATS * 3)[:40]
    texts = [one.create_completion(ids, max_tokens=30, temperature=0)["choices"][0]["text"] for one in (ours, plain)]
    assert texts[0] == texts[1]
    with pytest.raises(SettingError, match="draft_model of type int"):
        Llama(str(path), draft_model=3)
