"""Prompts: exactly as long as asked for, the same for the same seed, and what the answer needs is really in them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimrt.errors import SettingError
from slimrt.eval.ruler import FREQUENT, NOISE, RULER
from slimrt.eval.sample import Sample, Source
from slimrt.eval.tasks import RECALL_TOKENS, TASKS, resolve, samples
from slimrt.eval.text import Corpus, corpus_from_text, load_corpus, windows
from slimrt.eval.words import ADJECTIVES, NOUNS
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="module")
def source(default_model: Path) -> Source:
    """The default model's real vocabulary, the text that Python ships."""
    tokenizer = Tokenizer.from_gguf(GGUFFile(default_model))
    return Source(tokenizer, load_corpus(tokenizer))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """All but bytes as tokens, with a begin token in front and an end token behind."""
    flags: dict[str, Any] = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    path = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", **flags)
    tokenizer = Tokenizer.from_gguf(GGUFFile(path))
    return Source(tokenizer, load_corpus(tokenizer))


def text_of(source: Source, sample: Sample) -> str:
    return source.tokenizer.decode(sample.prompt)


@pytest.mark.parametrize("length", [700, 1023, 4096, 4500])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_exactly_the_length_asked_for(source: Source, task: str, length: int) -> None:
    drawn = samples(TASKS[task], source, length, 3, seed=1)
    assert [len(sample.prompt) for sample in drawn] == [length] * 3
    assert [sample.index for sample in drawn] == [0, 1, 2]
    assert len({sample.prompt for sample in drawn}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_other_vocabularies_and_begin_tokens(tiny: Source, task: str) -> None:
    for sample in samples(TASKS[task], tiny, 9001, 2, seed=1):
        assert len(sample.prompt) == 9001
        assert sample.prompt[0] == tiny.tokenizer.bos_id and tiny.tokenizer.bos_id not in sample.prompt[1:]
        assert sample.prompt[-1] != tiny.tokenizer.eos_id


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_and_nothing_else(source: Source, task: str) -> None:
    once = samples(TASKS[task], source, 900, 2, seed=7)
    assert samples(TASKS[task], source, 900, 2, seed=7) == once
    assert samples(TASKS[task], source, 900, 2, seed=8) != once


@pytest.mark.parametrize("task", [task.name for task in RULER])
def test_ruler_prompts_end_half_way_through_the_answer(source: Source, task: str) -> None:
    for sample in samples(TASKS[task], source, 1500, 3, seed=2):
        text = text_of(source, sample)
        assert re.search(r"(is|are|are:|be:)$", text)
        assert sample.references and 0 < sample.max_tokens <= TASKS[task].extra


@pytest.mark.parametrize(
    ("task", "key", "value", "others"),
    [
        ("niah_single_1", r"[a-z]+-[a-z]+", r"\d{7}", False),
        ("niah_multikey_2", r"[a-z]+-[a-z]+", r"\d{7}", True),
        ("niah_multikey_3", r"[0-9a-f-]{36}", r"[0-9a-f-]{36}", True),
    ],
)
def test_needles(source: Source, task: str, key: str, value: str, others: bool) -> None:
    depths = []
    for sample in samples(TASKS[task], source, 2000, 12, seed=3):
        text = text_of(source, sample)
        pattern = rf"One of the special magic (?:number|uuid)s for ({key}) is: ({value})\."
        needles = re.findall(pattern, text)
        asked = re.search(rf"for ({key}) mentioned in the provided text is$", text)
        assert asked
        assert [found for name, found in needles if name == asked[1]] == list(sample.references)
        assert len({name for name, _ in needles}) == len(needles)
        assert (len(needles) > 5) == others and (text.count(NOISE) > 20) != others
        depths.append(text.index(sample.references[0]) / len(text))
    assert min(depths) < 0.35 and max(depths) > 0.65  # twelve uniform draws miss a third in one of 130 cases


def test_variable_tracking_can_be_followed(source: Source) -> None:
    for sample in samples(TASKS["vt"], source, 1500, 4, seed=4):
        text = text_of(source, sample)
        question = text.index("Memorize", 10)
        value = re.search(r"assigned the value (\d{5}), they are:$", text)
        assert value
        known: list[str] = []
        for name, source_name, number in re.findall(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))", text[question:]):
            if number == value[1] or source_name in known:
                known.append(name)
        assert tuple(known) == sample.references and len(known) == 5
        example = text[:question]
        answer = re.search(r"they are: ((?:[A-Z]{3} ?){5})", example)
        assert answer and set(answer[1].split()) == set(re.findall(r"VAR ([A-Z]{3}) =", example))


@pytest.mark.parametrize(("length", "common", "other"), [(1200, 6, 1), (6000, 30, 3)])
def test_common_words_are_the_most_common(source: Source, length: int, common: int, other: int) -> None:
    for sample in samples(TASKS["cwe"], source, length, 2, seed=5):
        listing = text_of(source, sample).split("Memorize")[2]
        counts = Counter(re.findall(r"\d+\. ([a-z]+)", listing))
        assert {counts[word] for word in sample.references} == {common}
        assert {count for word, count in counts.items() if word not in sample.references} == {other}
        assert len(set(sample.references)) == 10


def test_frequent_codes_are_the_most_frequent(source: Source) -> None:
    for sample in samples(TASKS["fwe"], source, 1500, 3, seed=6):
        context = text_of(source, sample).removeprefix(FREQUENT.split("{context}")[0]).split("\n")[0]
        counts = Counter(context.split())
        ranked = counts.most_common(5)
        assert ranked[0][0] == "..."
        assert [word for word, _ in ranked[1:4]] == list(sample.references)
        assert ranked[3][1] > ranked[4][1]


def test_recall_quotes_the_text_and_expects_it_to_go_on(source: Source) -> None:
    for sample in samples(TASKS["recall"], source, 800, 6, seed=7):
        text, cue = sample.prompt[:-RECALL_TOKENS], sample.prompt[-RECALL_TOKENS:]
        wanted = cue + sample.continuation
        assert len(wanted) == 2 * RECALL_TOKENS
        assert any(text[at : at + len(wanted)] == wanted for at in range(len(text)))


def test_continuations_follow_the_prompt_and_do_not_overlap(source: Source) -> None:
    # A text in which every token tells its own place.
    numbered = Source(source.tokenizer, Corpus("numbers", "", np.arange(3000)))
    targets: list[int] = []
    for sample in samples(TASKS["continuation"], numbered, 500, 30, seed=8):
        first = sample.prompt[0]
        assert [*sample.prompt, *sample.continuation] == list(range(first, first + 564))
        targets += sample.continuation
    assert len(set(targets)) == len(targets) == 30 * 64


def test_windows_use_up_a_text_that_is_just_long_enough(source: Source) -> None:
    corpus = corpus_from_text(source.tokenizer, "word " * 2000)
    length = len(corpus.tokens)
    rng = np.random.default_rng(0)
    for fresh, count in ((10, 5), (64, 1), (7, 30)):
        size = length - (count - 1) * fresh
        assert [len(window.tokens) for window in windows(corpus, size, fresh, count, rng)] == [size] * count
        with pytest.raises(SettingError, match=f"has {length} tokens, {count} samples of {size + 1} need at least"):
            windows(corpus, size + 1, fresh, count, rng)


def test_no_word_is_part_of_another() -> None:
    words = [*ADJECTIVES, *NOUNS]
    assert len(set(words)) == len(words)
    assert [(a, b) for a in words for b in words if a != b and a in b] == []


def test_names_and_groups() -> None:
    assert [task.name for task in resolve(["ruler"])] == [task.name for task in RULER]
    assert [task.name for task in resolve(["fwe", "text", "recall"])] == ["recall", "continuation", "fwe"]
    assert resolve(["all"]) == tuple(TASKS.values())
    for names, said in ((["niah"], "task 'niah': known are recall, .*, ruler"), ([], "none was named")):
        with pytest.raises(SettingError, match=said):
            resolve(names)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "continuation"])
def test_a_prompt_too_short_for_its_task_says_how_long_it_must_be(source: Source, task: str) -> None:
    with pytest.raises(SettingError, match=rf"task {task}: .*\b20\b.*its shortest (prompt )?has \d+") as caught:
        samples(TASKS[task], source, 20, 1, seed=0)
    least = int(re.findall(r"has (\d+)", str(caught.value))[0])
    if task == "recall":
        assert len(samples(TASKS[task], source, least, 1, seed=0)[0].prompt) == least
        with pytest.raises(SettingError):
            samples(TASKS[task], source, least - 1, 1, seed=0)
    # RULER's shortest differs a little from sample to sample.
    assert len(samples(TASKS[task], source, least + 30, 1, seed=0)[0].prompt) == least + 30


def test_a_continuation_may_follow_a_single_token(source: Source) -> None:
    assert len(samples(TASKS["continuation"], source, 1, 1, seed=0)[0].prompt) == 1
    with pytest.raises(SettingError, match="prompt of 0 tokens; ask for at least 1"):
        samples(TASKS["continuation"], source, 0, 1, seed=0)


def test_texts_that_cannot_be_used(source: Source, tmp_path: Path) -> None:
    for name, content, said in (
        ("empty", b"", "is empty"),
        ("latin", "caf\xe9 au lait".encode("latin-1"), "byte 3 is not valid UTF-8"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(SettingError, match=said) as caught:
            load_corpus(source.tokenizer, path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(SettingError, match=r"text '.*': (No such file|Is a directory)"):
            load_corpus(source.tokenizer, path)


def test_a_byte_order_mark_is_no_text(source: Source, tmp_path: Path) -> None:
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfHello")
    assert load_corpus(source.tokenizer, tmp_path / "bom").tokens.tolist() == source.tokenizer.encode("Hello")
