"""The running context of ``slimrt.Llama``: what ``eval``, ``sample``, scores and states make of it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimrt
from slimrt.errors import ContextError, SettingError
from tests.tolerance import logits_apart


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["text"]


def test_eval_and_sample_by_hand_write_what_a_completion_writes(tiny: slimrt.Llama) -> None:
    expected = text_of(tiny("hello world", max_tokens=8, temperature=0))
    tiny.reset()
    tiny.eval(tiny.tokenize(b"hello world"))
    tokens = []
    while len(tokens) < 8 and (token := tiny.sample(temp=0)) != tiny.token_eos():
        tokens.append(token)
        tiny.eval([token])
    assert tiny.detokenize(tokens).decode() == expected
    assert tiny.n_tokens == len(tiny.tokenize(b"hello world")) + len(tokens)
    assert list(tiny.eval_tokens)[-len(tokens) :] == tokens


def test_generate_reads_what_is_sent(tiny: slimrt.Llama) -> None:
    plain = tiny.generate([70, 71], temp=0)
    first = next(plain)
    tokens = tiny.generate([70, 71], temp=0)
    assert next(tokens) == first
    assert tokens.send([72, 73]) == next(tiny.generate([70, 71, first, 72, 73], temp=0))
    tiny.reset()
    tiny.eval([70])
    assert next(tiny.generate([71], temp=0, reset=False)) == first
    assert list(tiny.generate([70, 71], temp=0, stopping_criteria=lambda ids, logits: len(ids) >= 5))[:1] == [first]


@pytest.fixture
def numpy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """For comparisons of tokens read one by one with tokens read together: elsewhere the two differ in precision."""
    monkeypatch.setattr("slimrt.ops.backend.fast_features", lambda: (None, "NumPy: for this test"))


def test_scores_of_single_tokens_are_their_logits(scored: slimrt.Llama) -> None:
    """On whatever computes here, which may have a way of its own to read one token."""
    scored.eval([70, 71, 72])
    for count, token in enumerate([73, 74, 75], 4):
        scored.eval([token])
        assert np.array_equal(scored._scores[-1], scored._current.logits)
        assert scored.sample(temp=0) == scored.sample(temp=0, idx=count - 1) == int(scored.scores[count - 1].argmax())
    assert np.abs(scored.scores[:6]).max(axis=1).min() > 0
    scored.n_tokens = 4
    scored.eval([90])
    assert np.array_equal(scored._scores[-1], scored._current.logits)


@pytest.mark.usefixtures("numpy_only")
def test_scores_are_the_logits_after_every_token(scored: slimrt.Llama, tiny_path: Path) -> None:
    ids = [70, 71, 72, 73, 74]
    scored.eval(ids[:3])
    scored.eval(ids[3:])
    assert scored.scores.shape == (64, scored.n_vocab()) and scored._scores.shape == (5, scored.n_vocab())
    llm = slimrt.load(tiny_path, ctx=64, prune="off")
    for length in range(1, 6):
        assert np.abs(scored._scores[length - 1] - llm.logits(ids[:length])).max() <= logits_apart(llm, ids)
    assert len(scored.eval_logits) == 5
    assert scored.sample(temp=0, idx=1) == int(scored.scores[1].argmax())


def test_without_logits_all_only_the_last_logits_are_kept(tiny: slimrt.Llama) -> None:
    assert len(tiny.eval_logits) == 0
    tiny.eval([70, 71])
    assert len(tiny.eval_logits) == 1 and len(tiny.eval_logits[0]) == tiny.n_vocab()
    with pytest.raises(SettingError, match="logits_all=True"):
        tiny.scores  # noqa: B018


@pytest.mark.usefixtures("numpy_only")
def test_going_back_and_states(tiny: slimrt.Llama, scored: slimrt.Llama, tiny_path: Path) -> None:
    for llama in (tiny, scored):
        llama.eval([70, 71, 72, 73])
        kept, after = llama.save_state(), list(llama.eval_logits)[-1]
        llama.n_tokens = 2
        assert llama._input_ids.tolist() == [70, 71] and llama.input_ids.shape == (64,)
        with pytest.raises(SettingError, match="eval before sample"):
            llama.sample()
        llama.eval([80])
        assert list(llama.eval_logits)[-1] != after
        for state in (kept, pickle.loads(pickle.dumps(kept))):
            llama.load_state(state)
            assert llama.n_tokens == 4 and list(llama.eval_logits)[-1] == after
            llama.eval([75])  # must not reach into the state
        llama.n_tokens = 3
        llama.eval([73])
        again = np.array(list(llama.eval_logits)[-1])
        assert np.abs(again - after).max() <= logits_apart(llama._model, [70, 71, 72, 73])
        with pytest.raises(SettingError, match=r"0\.\.4"):
            llama.n_tokens = 9


def test_a_state_too_long_is_refused(tiny: slimrt.Llama, tiny_path: Path) -> None:
    tiny.eval(range(70, 100))
    with pytest.raises(ContextError, match="30 tokens, the context 16"):
        slimrt.Llama(tiny_path, n_ctx=16).load_state(tiny.save_state())


def test_the_context_does_not_overflow(tiny: slimrt.Llama) -> None:
    tiny.eval([70] * 60)
    with pytest.raises(ValueError, match="the context holds 64"):
        tiny.eval([70] * 5)
    assert tiny.n_tokens == 60
    tiny.eval([])
    with pytest.raises(ContextError):
        list(tiny.generate([70] * 62, temp=0, logits_processor=None))
