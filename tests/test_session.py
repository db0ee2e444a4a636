"""Conversations: asking again, saving and restoring bit for bit, damaged files, and a context that fills up."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import slimrt
from slimrt.conversation import Conversation
from slimrt.errors import ContextError, SessionFileError, SettingError, SlimrtError
from slimrt.prune.schedule import schedule
from slimrt.session_file import MAGIC, VERSION, model_fingerprint
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import logits_apart

PLAN = slimrt.PrunePlan(
    stages=(slimrt.Stage(1, 0.5), slimrt.Stage(2, 0.25)), block=8, unit=4, query_window=4, min_tokens=32
)
DOCUMENT = "the world hello there " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", n_layers=4)


@pytest.fixture(scope="module")
def llm(model: Path) -> slimrt.LLM:
    return slimrt.load(model, prune=PLAN)


@pytest.fixture
def saved(llm: slimrt.LLM, tmp_path: Path) -> Path:
    path = tmp_path / "talk.session"
    with llm.session(system="be brief") as s:
        s.ask(DOCUMENT + "what?", max_tokens=6, ignore_eos=True)
        s.save(path)
    return path


def held(s: Conversation) -> list[np.ndarray]:
    """All that the model remembers."""
    arrays = [array for layer in range(s.engine.config.n_layers) for array in s.context.cache.rows(layer)]
    assert s.logits is not None
    return (
        [*arrays, s.context.boundary.on_host(s.engine.ops, len(s.tokens)), s.logits]
        if s.context.boundary
        else [*arrays, s.logits]
    )


def assert_same_logits(llm: slimrt.LLM, one: Conversation, other: Conversation, ids: list[int]) -> None:
    """Compiled kernels give the same bits in whatever parts a prompt is read, NumPy the same but for its rounding."""
    assert one.logits is not None and other.logits is not None
    if one.engine.ops.name == "fast":
        assert np.array_equal(one.logits, other.logits)
    else:
        assert np.abs(one.logits - other.logits).max() <= logits_apart(llm, ids)


# -- asking -----------------------------------------------------------------------------------------------------------


def test_ask_goes_through_the_template_and_keeps_the_turns(llm: slimrt.LLM) -> None:
    with llm.session(system="be brief") as s:
        first = s.ask(DOCUMENT + "what?", max_tokens=5, ignore_eos=True)
        turns = [{"role": "user", "content": DOCUMENT + "what?"}, {"role": "assistant", "content": first.text}]
        assert s.messages == turns
        second = s.ask("and why?", max_tokens=5, ignore_eos=True)
        asked = [{"role": "system", "content": "be brief"}, *turns, {"role": "user", "content": "and why?"}]
        fresh = llm.chat(asked, session=llm.session(), max_tokens=5, ignore_eos=True)
        assert second.tokens == fresh.tokens
        assert second.usage == fresh.usage
        assert second.timings.stages == fresh.timings.stages != ()
        assert second.timings.reused_tokens >= len(llm.chat_tokens(asked[:2])) - PLAN.query_window
        assert len(s.messages) == 4
    assert s.tokens == [] and s.kv_bytes == 0 and len(s.messages) == 4


def test_a_streamed_answer_joins_when_it_ends_or_is_closed_with_text(llm: slimrt.LLM) -> None:
    s = llm.session()
    stream = s.ask("hello", stream=True, max_tokens=8, ignore_eos=True)
    assert s.messages == []
    text = "".join(stream)
    assert s.messages[-1] == {"role": "assistant", "content": text}
    stopped = s.ask("again", stream=True, max_tokens=50, ignore_eos=True)
    piece = next(stopped)
    third = s.ask("third", max_tokens=2, ignore_eos=True)  # closes the one before
    assert [m["content"] for m in s.messages] == ["hello", text, "again", piece, "third", third.text]
    s.ask("never begun", stream=True, max_tokens=5).close()
    assert len(s.messages) == 6


def test_a_failed_question_is_not_kept(llm: slimrt.LLM) -> None:
    s = llm.session()
    s.ask("hello", max_tokens=4, ignore_eos=True)
    before, tokens = list(s.messages), list(s.tokens)

    def fails(ids: object, logits: np.ndarray) -> np.ndarray:
        raise RuntimeError("no")

    for text, options, error in (
        ("the " * 600, {}, ContextError),
        (" ", {}, SettingError),
        ("x", {"temperature": -1}, SettingError),
        ("x", {"prune": "nothing.json"}, SettingError),
        ("x", {"overflow": "wrap"}, SettingError),
        ("x", {"n_keep": -1}, SettingError),
        ("x", {"n_keep": 512}, SettingError),
    ):
        with pytest.raises(error):
            s.ask(text, **options)
        assert s.messages == before and s.tokens == tokens
    with pytest.raises(RuntimeError):
        s.ask("x", logits_processors=[fails])
    assert s.messages == before
    again = s.ask("more", max_tokens=4, ignore_eos=True)
    fresh = llm.chat(
        [*before, {"role": "user", "content": "more"}], session=llm.session(), max_tokens=4, ignore_eos=True
    )
    assert again.tokens == fresh.tokens


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", [PLAN, "off"])
def test_a_restored_session_is_the_saved_one_bit_for_bit(
    llm: slimrt.LLM, model: Path, tmp_path: Path, prune: slimrt.PrunePlan | str
) -> None:
    path = tmp_path / "talk.session"
    s = llm.session(system="be brief", prune=prune)
    s.ask(DOCUMENT + "what?", max_tokens=6, ignore_eos=True)
    s.save(path)
    other = slimrt.load(model)  # another load of the same file, with no plan of its own
    again = other.restore(path)
    assert (again.tokens, again.messages, again.system, again.plan) == (s.tokens, s.messages, s.system, s.plan)
    for mine, theirs in zip(held(again), held(s), strict=True):
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    one, two = (x.ask("and why?", max_tokens=6, ignore_eos=True) for x in (s, again))
    assert (one.tokens, one.timings.stages) == (two.tokens, two.timings.stages)
    assert (one.timings.reused_tokens, one.timings.reuse_note) == (two.timings.reused_tokens, two.timings.reuse_note)
    assert one.timings.reused_tokens > 0 and bool(one.timings.stages) == (prune is PLAN)
    for mine, theirs in zip(held(again), held(s), strict=True):
        assert np.array_equal(mine, theirs)


def test_a_session_under_a_kv_budget_is_restored_too(model: Path, tmp_path: Path) -> None:
    tight = slimrt.load(model, prune=PLAN, kv_budget=256)
    s = tight.session()
    s.ask(DOCUMENT * 5, max_tokens=6, ignore_eos=True)
    s.save(tmp_path / "talk")
    again = tight.restore(tmp_path / "talk")
    assert s.context.cache.nbytes_host > 0
    for mine, theirs in zip(held(again), held(s), strict=True):
        assert np.array_equal(mine, theirs)
    assert (
        again.ask("why?", max_tokens=6, ignore_eos=True).tokens == s.ask("why?", max_tokens=6, ignore_eos=True).tokens
    )


def test_a_prompt_that_grows_long_enough_for_cuts_is_read_on_from(llm: slimrt.LLM) -> None:
    """What was read whole serves when the prompt is cut; what was cut does not serve when it is to be read whole."""
    ids = np.random.default_rng(1).integers(3, 200, 90).tolist()
    s = llm.session()
    assert s.prefill(ids[:30], PLAN).stages == ()
    s.extend([5, 6])
    grown = [*ids[:30], 5, 6, *ids[32:]]
    reading = s.prefill(grown, PLAN)
    assert reading.reused == 32 and len(reading.stages) == 2
    fresh = llm.session()
    fresh.prefill(grown, PLAN)
    assert s.logits is not None and fresh.logits is not None
    assert_same_logits(llm, s, fresh, grown)
    reading = s.prefill(ids[:31], PLAN)
    assert (reading.reused, reading.note, reading.stages) == (0, "the last conversation was pruned otherwise", ())
    fresh.reset()
    fresh.prefill(ids[:31], PLAN)
    assert np.array_equal(s.logits, fresh.logits)


@pytest.mark.parametrize("budget", [None, 96])
@pytest.mark.parametrize("plan", ["off", PLAN])
def test_a_fork_goes_on_as_the_original_and_neither_minds_the_other(
    model: Path, plan: str | slimrt.PrunePlan, budget: int | None
) -> None:
    llm = slimrt.load(model, prune=plan, kv_budget=budget)
    s = llm.session(system="be brief")
    s.ask(DOCUMENT + "what?", max_tokens=5, ignore_eos=True)
    forks = [s.fork(), s.fork()]
    asked = {"max_tokens": 5, "ignore_eos": True}
    found = [one.ask("and why?", **asked) for one in (*forks, s)]
    assert found[0].tokens == found[1].tokens == found[2].tokens
    assert all(one.timings.reused_tokens == found[2].timings.reused_tokens > 40 for one in found)
    assert forks[0].messages == s.messages and forks[0].messages is not s.messages
    before = list(s.tokens)
    forks[0].ask("something else", **asked)
    forks[1].close()
    assert s.tokens == before and s.ask("go on", **asked).timings.reused_tokens >= len(before) - 40
    fresh = llm.session().fork()  # of nothing
    assert fresh.tokens == [] and fresh.ask("hello", **asked).usage.completion_tokens == 5


def test_who_asks_again_and_again_gets_the_document_read_whole(llm: slimrt.LLM) -> None:
    """After as many cut prompts as the plan says, the layers behind the cut read everything, once."""
    windows = (slimrt.Window(0, (64,) * llm.config.n_kv_heads), slimrt.Window(1, (64,) * llm.config.n_kv_heads))
    plan = dataclasses.replace(PLAN, questions=2, windows=windows, full_rows=16)
    document = np.random.default_rng(4).integers(3, 200, 300).tolist()
    s, layers = llm.session(), llm.config.n_layers
    readings = []
    for question in range(5):
        ids = [*document, *range(20 + question, 30 + question)]
        readings.append(s.prefill(ids, plan))
        s.extend([7, 8])
        if question >= 2:
            assert [s.context.cache.length(layer) for layer in range(layers)] == [len(ids) + 2] * layers
            fresh = llm.session()
            fresh.prefill(ids, plan.without_cuts)
            fresh.extend([7, 8])
            assert s.logits is not None and fresh.logits is not None
            assert_same_logits(llm, s, fresh, [*ids, 7, 8])
    assert [len(reading.stages) for reading in readings] == [2, 2, 0, 0, 0]
    assert all(reading.reused > 250 for reading in readings[1:])
    assert "after 2 questions" in readings[2].dense and "read whole before" in readings[4].dense
    other = np.random.default_rng(5).integers(3, 200, 300).tolist()
    assert len(s.prefill(other, plan).stages) == 2  # another document is cut again


def test_a_document_that_grows_beyond_the_first_cut_is_not_cut_for_a_question(llm: slimrt.LLM) -> None:
    """It was short enough to be read whole; a few more tokens are no reason to read the layers behind a cut again."""
    plan = dataclasses.replace(PLAN, questions=2, min_keep=130)
    document = np.random.default_rng(4).integers(3, 200, 300).tolist()
    s = llm.session()
    assert not schedule(plan, 250).cuts and not s.prefill(document[:250], plan).stages
    grown = s.prefill(document, plan)
    assert not grown.stages and grown.reused > 200 and "read whole before" in grown.dense
    assert llm.session().prefill(document, plan).stages
    fresh = llm.session()
    fresh.prefill(document)
    assert s.logits is not None and fresh.logits is not None
    assert_same_logits(llm, s, fresh, document)


def test_an_empty_session_and_a_truncated_one_are_saved(llm: slimrt.LLM, tmp_path: Path) -> None:
    s = llm.session()
    s.save(tmp_path / "empty")
    assert llm.restore(tmp_path / "empty").tokens == []
    s.prefill(list(range(3, 90)), PLAN)
    s.truncate(40)
    s.save(tmp_path / "empty")
    again = llm.restore(tmp_path / "empty")
    ids = [*range(3, 43), *range(100, 150)]
    assert again.prefill(ids, PLAN).reused == s.prefill(ids, PLAN).reused == 40
    for mine, theirs in zip(held(again), held(s), strict=True):
        assert np.array_equal(mine, theirs)


def test_another_model_or_other_settings_are_refused(llm: slimrt.LLM, saved: Path, tmp_path: Path) -> None:
    same_sizes = slimrt.load(write_tiny_llama(tmp_path / "other.gguf", n_layers=4, seed=1))
    assert same_sizes.file.metadata.keys() == llm.file.metadata.keys()
    with pytest.raises(SessionFileError, match="another model"):
        same_sizes.restore(saved)
    with pytest.raises(SessionFileError, match=r"scaling none, here yarn.*ctx=512"):
        slimrt.load(llm.file.path, ctx=1024).restore(saved)
    with pytest.raises(SessionFileError, match=r"holds \d+ tokens, the context 64"):
        slimrt.load(llm.file.path, ctx=64).restore(saved)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(llm.file.path.read_bytes())
    assert model_fingerprint(slimrt.load(renamed).file) == model_fingerprint(llm.file)
    assert slimrt.load(renamed).restore(saved).messages


def test_every_damage_is_one_line(llm: slimrt.LLM, saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    bad = tmp_path / "bad.session"
    rng = np.random.default_rng(3)
    header = struct.unpack_from("<I", whole, 12)[0] + 48
    cases = [whole[:cut] for cut in (0, 7, 8, 15, 16, 100, header, header + 10, len(whole) - 1)] + [whole + b"x"]
    for at in [*range(0, header, 37), *rng.integers(header, len(whole), 40).tolist(), len(whole) - 1]:
        cases.append(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
    s = llm.session()
    s.ask("hello", max_tokens=2, ignore_eos=True)
    before, tokens = list(s.messages), list(s.tokens)
    for case in cases:
        bad.write_bytes(case)
        with pytest.raises(SessionFileError) as error:
            s.load(bad)
        assert "\n" not in str(error.value) and str(bad) in str(error.value)
        assert s.messages == before and s.tokens == tokens


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 10**15}, {"tokens": -1}, {"tokens": "9"}, {"rows": [10**15] * 4}, {"rows": []}, {"rows": None},
        {"boundary": 9}, {"boundary": True}, {"boundary": 3}, {"messages": "x"}, {"messages": [1]}, {"system": 5},
        {"logits": 1}, {"plan": {"stages": 7}}, {"plan": {"stages": [{"layer": 99, "keep": 0.5}]}}, {"plan": [1]},
        {"plan": {"block": "x"}}, {"rope": 3}, {"extra": 1},
        {"windows": 3}, {"windows": [{"layer": 99, "reach": [64, 64]}]}, {"windows": [{"layer": 0, "reach": [64]}]},
        {"windowed": -1}, {"windowed": None},
    ],
)  # fmt: skip
def test_a_forged_header_is_refused_before_anything_is_allocated(
    llm: slimrt.LLM, saved: Path, change: dict[str, object]
) -> None:
    whole = saved.read_bytes()
    length = struct.unpack_from("<I", whole, 12)[0]
    text = json.dumps(json.loads(whole[16 : 16 + length]) | change).encode()
    head = MAGIC + struct.pack("<II", 1, len(text)) + text
    saved.write_bytes(head + hashlib.sha256(head).digest() + whole[48 + length :])
    with pytest.raises(SessionFileError):
        llm.restore(saved)


def test_files_that_cannot_be_sessions(llm: slimrt.LLM, saved: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    newer.write_bytes(saved.read_bytes()[:8] + struct.pack("<I", VERSION + 1) + saved.read_bytes()[12:])
    os.mkfifo(tmp_path / "pipe")
    for path in (newer, tmp_path, tmp_path / "none", llm.file.path, tmp_path / "pipe", "a\0b"):
        with pytest.raises(SessionFileError):
            llm.restore(path)
    s = llm.session()
    for path in (llm.file.path, tmp_path, tmp_path / "no" / "folder", tmp_path / "pipe", "a\0b"):
        with pytest.raises(SlimrtError):
            s.save(path)
    s.messages.append({"role": "user", "content": {1, 2}})
    with pytest.raises(SessionFileError, match="JSON"):
        s.save(saved)


def test_a_killed_save_leaves_the_old_file(model: Path, saved: Path) -> None:
    before = saved.read_bytes()
    program = (
        "import os, signal, sys, slimrt\n"
        "s = slimrt.load(sys.argv[1]).session()\n"
        "s.ask('something else', max_tokens=2)\n"
        "os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)\n"
        "s.save(sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(model), str(saved)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert saved.read_bytes() == before


def test_a_full_disk_leaves_the_old_file(llm: slimrt.LLM, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    before, names = saved.read_bytes(), sorted(saved.parent.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SessionFileError, match="No space left"):
        llm.session().save(saved)
    assert saved.read_bytes() == before and sorted(saved.parent.iterdir()) == names


# -- a full context ---------------------------------------------------------------------------------------------------


def test_without_shift_a_full_context_is_an_error(model: Path) -> None:
    small = slimrt.load(model, ctx=96, prune="off")
    s = small.session()
    with pytest.raises(ContextError, match="--ctx"):
        for _ in range(20):
            s.ask("hello there", max_tokens=8, ignore_eos=True)


def test_shift_drops_the_oldest_turns_keeps_the_system_message_and_says_so(model: Path) -> None:
    small = slimrt.load(model, ctx=160, prune="off", overflow="shift")
    s = small.session(system="keep me")
    notes = []
    for number in range(12):
        done = s.ask(f"hello {number}", max_tokens=8, ignore_eos=True)
        assert done.usage.prompt_tokens + 8 <= 160
        notes.append(done.timings.reuse_note)
        assert s.messages[0]["role"] == "user" and s.messages[-2]["content"] == f"hello {number}"
        asked = [{"role": "system", "content": "keep me"}, *s.messages[:-1]]
        assert s.tokens[: done.usage.prompt_tokens] == small.chat_tokens(asked)
        assert done.tokens == small.chat(asked, session=small.session(), max_tokens=8, ignore_eos=True).tokens
    assert any("messages were dropped" in note for note in notes)
    assert not all("messages were dropped" in note for note in notes)  # a quarter is freed at a time
    with pytest.raises(ContextError):  # the last question is never cut
        s.ask("the " * 200)


def test_shift_while_writing_keeps_the_first_tokens_and_reads_the_rest_anew(model: Path) -> None:
    # NumPy: elsewhere a token that is decoded and one that is read again differ in precision.
    small = slimrt.load(model, ctx=32, prune="off", device="numpy")
    ids = list(range(10, 30))
    plain = small.generate(ids, max_tokens=60, ignore_eos=True)
    assert plain.finish_reason == "length" and len(plain.tokens) < 60 and "dropped" not in plain.timings.reuse_note
    shifted = small.generate(ids, max_tokens=60, ignore_eos=True, overflow="shift", n_keep=6)
    assert len(shifted.tokens) == 60 and shifted.tokens[: len(plain.tokens)] == plain.tokens
    window, expected, dropped = list(ids), [], 0
    for _ in range(60):  # the same by hand, every token from a fresh prefill
        expected.append(int(small.logits(window).argmax()))
        if len(window) == 32:
            window = window[:6] + window[-13:]
            dropped += 13
        window.append(expected[-1])
    assert shifted.tokens == expected
    assert f"{dropped} tokens of it were dropped" in shifted.timings.reuse_note


def test_shift_in_a_context_of_one_token(model: Path) -> None:
    smallest = slimrt.load(model, ctx=1, prune="off", overflow="shift")
    assert len(smallest.generate([5], max_tokens=4, ignore_eos=True).tokens) == 4


# -- the default model ------------------------------------------------------------------------------------------------


def test_the_default_model_answers_on_after_a_restore(default_model: Path, tmp_path: Path) -> None:
    llm = slimrt.load(default_model, ctx=512)
    s = llm.session()
    s.ask("Remember: the code of the blue box is 4711.", max_tokens=12)
    s.save(tmp_path / "talk")
    again = llm.restore(tmp_path / "talk")
    assert all(np.array_equal(a, b) for a, b in zip(held(again), held(s), strict=True))
    one, two = (x.ask("What is the code of the blue box?", max_tokens=12) for x in (s, again))
    assert one.tokens == two.tokens and "4711" in one.text
    assert one.timings.reused_tokens == two.timings.reused_tokens > 0
    assert all(np.array_equal(a, b) for a, b in zip(held(again), held(s), strict=True))
