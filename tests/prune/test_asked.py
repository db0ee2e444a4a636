"""The score ``asked``: which tokens of a prompt ask, what they want, and that nothing asked is lost."""

from __future__ import annotations

import dataclasses
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest

import slimrt
from slimrt.prune.asked import HEAD, TAIL, Asked, asked_by_place, wanted
from slimrt.prune.plan import PrunePlan, Stage, Window
from slimrt.prune.schedule import Cut, Schedule, schedule
from slimrt.prune.scores import block_mass
from slimrt.prune.select import select_rows
from tests.tolerance import SLACK

DOCUMENT = "The harbour was rebuilt in the spring, and the ferries ran again.\n\nMost of the work was done by hand. "
QUESTION = "What was the frame of the Juniper prototype built from?"
RULES = " Answer in one short sentence, in plain English, and do not mention anything that was not asked for."


@pytest.fixture(scope="module")
def llm(default_model: Path) -> slimrt.LLM:
    return slimrt.load(default_model, ctx=4096, prune="off")


def asked_text(llm: slimrt.LLM, asked: Asked, ids: list[int], sure: float = 1.0) -> tuple[str, str]:
    """The text of the first and of the last tokens that surely ask."""
    tail = ids[len(ids) - len(asked.tail) :]
    return tuple(  # type: ignore[return-value]
        llm.detokenize([token for token, weight in zip(part, weights, strict=False) if weight >= sure])
        for part, weights in ((ids, asked.head), (tail, asked.tail))
    )


@pytest.mark.parametrize("rules", ["", RULES, "\n\nUse these rules:\n1. Be brief.\n2. Be kind."])
def test_a_question_behind_the_document_asks_whatever_stands_behind_it(llm: slimrt.LLM, rules: str) -> None:
    ids = llm.chat_tokens([{"role": "user", "content": DOCUMENT * 40 + "\n\n" + QUESTION + rules}])
    asked = llm.asking(ids)
    head, tail = asked_text(llm, asked, ids)
    assert not head and not asked.before
    assert QUESTION in tail and rules.strip() in tail and "assistant" in tail
    assert "harbour" not in tail and 64 <= len(asked.tail) <= TAIL


def test_a_question_before_the_document_asks(llm: slimrt.LLM) -> None:
    ids = llm.chat_tokens([{"role": "user", "content": QUESTION + "\n\n" + DOCUMENT * 40}])
    asked = llm.asking(ids)
    assert asked.before and QUESTION in asked_text(llm, asked, ids)[0]
    assert "harbour" not in asked_text(llm, asked, ids)[0]
    # It does as long as the conversation goes on.
    longer = llm.chat_tokens(
        [
            {"role": "user", "content": QUESTION + "\n\n" + DOCUMENT * 40},
            {"role": "assistant", "content": "Of bamboo."},
            {"role": "user", "content": "And who built it?"},
        ]
    )
    assert llm.asking(longer).head == asked.head
    assert "And who built it?" in asked_text(llm, llm.asking(longer), longer)[1]


@pytest.mark.parametrize(
    "text", ["word " * 2000, "line\n" * 2000, "?" * 3000, "\n\n" * 2000, "Was it? " * 900, "一二三？" * 700, "x"]
)
def test_prompts_of_no_structure_are_taken_as_they_come(llm: slimrt.LLM, text: str) -> None:
    ids = llm.tokenize(text)
    asked = llm.asking(ids)
    assert min(64, len(ids)) <= len(asked.tail) <= TAIL and len(asked.head) == max(0, min(HEAD, len(ids) - TAIL))
    assert set(asked.head) <= {0.0, 1.0} and set(asked.tail) <= {0.5, 1.0}


def by_block(scores: np.ndarray) -> np.ndarray:
    """Scores [W, H, N] -> the weights of their softmax by blocks of 32, in the precision of the scores."""
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    return np.add.reduceat(weights, np.arange(0, 333, 32), axis=2)


def test_attention_by_block() -> None:
    rng = np.random.default_rng(5)
    q, k = rng.normal(size=(70, 6, 16)).astype(np.float32), rng.normal(size=(2, 333, 16)).astype(np.float32)
    for causal in (True, False):
        found = block_mass(q, k, 32, causal)
        scores = np.einsum("whd,hnd->whn", q.astype(np.float64), np.repeat(k, 3, axis=0).astype(np.float64)) / 4
        if causal:
            scores[np.arange(333) > np.arange(333 - 70, 333)[:, None, None] + np.zeros((1, 6, 1))] = -np.inf
        truth, naive = (by_block(scores.astype(kind)) for kind in (np.float64, np.float32))
        assert np.abs(found - truth).max() <= SLACK * np.abs(naive - truth).max()


def test_one_query_that_knows_outweighs_many_that_do_not() -> None:
    rng = np.random.default_rng(1)
    mass = rng.uniform(0.9, 1.1, (200, 3, 20)).astype(np.float32) / 40  # flat, and half of it on the sink
    mass[:, :, 4] += 0.3  # what every query looks at tells nothing
    mass[3, 1] = 0.001
    mass[3, 1, 11] = 0.05  # little attention, but all that falls on the blocks in question
    rivals = np.ones(20, bool)
    rivals[0] = rivals[19] = False
    scores, by = wanted([(mass, [1.0] * 200)], rivals)
    assert scores.argmax() == 11 and by[11] == 3 and scores[11] > 0.6
    assert scores[4] < 0.2 and scores[0] == scores[19] == 0
    halved, _ = wanted([(mass, [0.5] * 200)], rivals)
    assert np.array_equal(halved, scores / 2)
    both, by = wanted([(mass[:3], [1.0] * 3), (mass, [1.0] * 200)], rivals)
    assert both.argmax() == 11 and by[11] == 6  # counted through both groups


PLAN = PrunePlan(
    (Stage(2, 0.25), Stage(4, 0.125)), block=16, score="asked", windows=(Window(1, (64,)), Window(3, (64,))), late=4
)


def test_a_question_before_the_document_is_not_cut_early() -> None:
    tail = (1.0,) * 20
    plain = schedule(PLAN, 1000, Asked((0.5,) * 40, tail))
    assert [cut.layer for cut in plain.cuts] == [2, 4] and set(plain.windows.reach) == {1} and plain.boundary == 2
    late = schedule(PLAN, 1000, Asked((0.0,) * 20 + (1.0,) * 20, tail, before=True))
    assert [cut.layer for cut in late.cuts] == [4] and set(late.windows.reach) == {1, 3} and late.boundary == 4
    assert late.first_blocks == 3 and late.last_blocks(1000) == 2  # all that asks stays
    assert schedule(PLAN, 1000).asked == asked_by_place(1000)
    assert schedule(dataclasses.replace(PLAN, score="token_mass"), 1000, asked_by_place(1000)).asked is None


def test_doubt_keeps_more() -> None:
    plan = dataclasses.replace(PLAN, sure=0.8, most=0.5, follow=0.0)
    rule = Schedule(plan, asked=Asked(tail=(1.0,) * 16))
    cut = Cut(2, 10, 30)
    scores = np.zeros(60, np.float32)
    scores[5:20] = 0.9
    rows, why = select_rows(rule, cut, scores, 960)
    assert set(range(5, 20)) <= set(rows // 16) and "for sure" in why and len(set(rows // 16)) == 17
    rows, why = select_rows(rule, cut, np.where(scores > 0, 0.7, 0), 960)
    assert len(set(rows // 16)) == 30 and "no block" in why
    scores[5:] = 0.9
    assert len(set(select_rows(rule, cut, scores, 960)[0] // 16)) == 30
    scores[8:] = 0
    rows, why = select_rows(rule, cut, scores, 960)
    assert len(set(rows // 16)) == 10 and not why


FACT = "Note that the frame of the Juniper prototype was built from bamboo, not from steel."
SHAPES = {
    "an instruction behind the question": ("", QUESTION + RULES),
    "the question before the document": ("Answer this question: " + QUESTION + "\n\n", ""),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_answer_goes_on(llm: slimrt.LLM, shape: str) -> None:
    """One sentence among 1,200 tokens: all of it passes a cut to a quarter, which the published score loses."""
    before, behind = SHAPES[shape]
    text = "".join(pydoc_data.topics.topics[name] for name in ("typesseq", "specialnames"))
    at = text.index(". ", 2000) + 2
    text = text[:at] + FACT + " " + text[at:4500]
    ids = llm.chat_tokens([{"role": "user", "content": before + text + "\n\n" + behind}])
    place = next(i for i in range(len(ids), 0, -1) if llm.detokenize(ids[i:]).startswith(" Note that the frame"))
    rows = set(range(place, place + len(llm.tokenize(FACT))))
    plan = PrunePlan((Stage(18, 0.25),), score="asked")
    kept: dict[str, set[int]] = {}
    for score in ("asked", "token_mass") if behind else ("asked",):  # the loss is shown once: a prompt takes seconds
        session = llm.session()
        session.prefill(ids, dataclasses.replace(plan, score=score))
        kept[score] = set(session.context.cache.rows(20)[2].tolist())
        assert len(kept[score]) < 0.3 * len(ids)
    assert rows <= kept["asked"]
    assert not behind or not rows <= kept["token_mass"]


def test_a_cut_that_saves_next_to_nothing_is_not_made() -> None:
    plan = dataclasses.replace(PLAN, min_keep=900, windows=())
    asked = Asked(tail=(1.0,) * 20)
    assert not schedule(plan, 1000, asked).cuts and "keep all" in schedule(plan, 1000, asked).why_dense
    assert schedule(plan, 1100, asked).cuts == (Cut(2, 57),)
    assert schedule(dataclasses.replace(plan, score="token_mass"), 1000).cuts  # the published ones are what they are


def test_a_short_prompt_is_not_cut_where_further_questions_are_expected() -> None:
    """What ``min_keep`` leaves of it costs the next question more than the cut has saved; what was asked for is cut."""
    plan = dataclasses.replace(PLAN, min_keep=900, windows=(), questions=2)
    asked = Asked(tail=(1.0,) * 20)
    short = schedule(plan, 1700, asked)
    assert not short.cuts and "900 of 1,700 tokens would stay" in short.why_dense
    assert schedule(dataclasses.replace(plan, questions=0), 1700, asked).cuts
    assert schedule(plan, 2200, asked).cuts
    later = dataclasses.replace(plan, stages=(Stage(2, 0.5), Stage(3, 0.25)))  # what stays in the end is meant
    assert not schedule(later, 1700, asked).cuts and schedule(later, 2200, asked).cuts
    most = dataclasses.replace(plan, stages=(Stage(2, 0.7),), min_keep=0)
    assert schedule(most, 1400, asked).cuts == schedule(dataclasses.replace(most, questions=0), 1400, asked).cuts != ()


def test_a_conversation_is_not_cut_under_auto(default_model: Path) -> None:
    llm = slimrt.load(default_model, ctx=4096)
    auto = llm.plan.plan
    assert auto is not None and auto.stages and auto.score == "asked"
    with llm.session() as talk:
        assert talk.plan == dataclasses.replace(auto, stages=(), late=0) and talk.plan.windows
        text = "".join(pydoc_data.topics.topics[name] for name in ("typesseq", "specialnames"))
        first = talk.ask(text[:4600] + "\n\nWhat is a list?", max_tokens=2)
        windowed = first.timings.windowed_tokens
        assert not first.timings.stages and windowed > 100
        second = talk.ask("And a tuple?", max_tokens=2)
        # Nothing that was read runs again, not even what saw everything as the end of the first prompt.
        assert second.usage.prompt_tokens - second.timings.reused_tokens < 40
        assert second.timings.windowed_tokens == windowed
    assert llm.session(prune="fast").plan.stages  # type: ignore[union-attr]
    assert llm.session(prune=auto).plan == auto


def test_a_conversation_goes_on_from_a_file_and_after_decoding(llm: slimrt.LLM, tmp_path: Path) -> None:
    """What asks before the document is known again: from the file, and where it was decoded, by reading it again."""
    plan = PrunePlan((Stage(9, 0.6), Stage(20, 0.5)), block=16, score="asked")
    words = llm.tokenize("Is this read? " + DOCUMENT * 40)[:600]
    with llm.session(prune=plan) as talk:
        talk.prefill(words[:100], plan)
        for token in words[100:140]:
            talk.extend([token])
        reading = talk.prefill(words, plan)
        if llm.engine.ops.name == "fast":  # whose decode leaves no queries
            assert reading.reused == 100 and "nothing tells what was asked" in reading.note
        else:  # layer by layer they are kept
            assert reading.reused == 140 and "nothing tells what was asked" not in reading.note
        talk.save(tmp_path / "talk.slim")
        more = [*talk.tokens, *llm.tokenize(" And this?")]
        reading = talk.prefill(more, plan)
        assert reading.reused == len(more) - len(llm.asking(more).tail)
        again = llm.restore(tmp_path / "talk.slim")
        assert again.prefill(more, plan).reused == reading.reused
        assert np.array_equal(again.logits, talk.logits)
