"""The library of documents: a later process reads nothing twice, and nothing that lies on a disk can mislead it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import slimrt
from click_cli import cli
from slimrt.library import store
from slimrt.library.store import Library
from slimrt.models import read_config
from slimrt.prune.presets import fingerprint, preset_path
from slimrt.weights.gguf import GGUFFile
from tests.tiny_gguf import write_tiny_llama

PLAN = slimrt.PrunePlan(
    stages=(slimrt.Stage(1, 0.5), slimrt.Stage(2, 0.25)), block=8, unit=4, query_window=4, min_tokens=32,
    windows=(slimrt.Window(0, (64, 64)),), full_rows=16,
)  # fmt: skip
DOCUMENT = np.random.default_rng(0).integers(3, 200, 300).tolist()
ASKED = {"max_tokens": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", n_layers=4, ctx=1024)


@pytest.fixture(autouse=True)
def short_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LEAST", 100)
    monkeypatch.setattr(store, "_FIRST", 32)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


@pytest.mark.parametrize("device", ["numpy", "cpu"])
@pytest.mark.parametrize("prune", ["off", PLAN])
def test_a_later_process_starts_from_it_and_answers_as_from_a_fresh_prompt(
    model: Path, tmp_path: Path, device: str, prune: str | slimrt.PrunePlan
) -> None:
    first, other = ([*DOCUMENT, *question] for question in (range(5, 25), range(60, 75)))
    one = slimrt.load(model, device=device, prune=prune, cache=tmp_path / "read", threads=1)
    before = one.generate(first, **ASKED)
    (kept,) = files(tmp_path / "read")
    assert kept.stat().st_mode & 0o077 == 0 and one.engine.library.written == kept.stat().st_size
    later = slimrt.load(model, device=device, prune=prune, cache=tmp_path / "read", threads=1)
    again = later.generate(first, session=later.session(), **ASKED)
    assert again.tokens == before.tokens and again.timings.stages == before.timings.stages
    assert again.timings.doubts == before.timings.doubts and "library" in again.timings.reuse_note
    assert again.timings.reused_tokens >= len(first) - (2 if prune == "off" else 0)  # what the cuts chose is there, too
    fresh = slimrt.load(model, device=device, prune=prune, threads=1).generate(other, **ASKED)
    found = later.generate(other, session=later.session(), **ASKED)
    assert found.tokens == fresh.tokens and found.timings.stages == fresh.timings.stages
    assert len(DOCUMENT) - 20 <= found.timings.reused_tokens <= len(DOCUMENT)
    assert files(tmp_path / "read") == [kept]  # what both share is there already
    # A conversation that is in memory already is not read from disk again.
    session = later.session()
    session.prefill(other, None if prune == "off" else PLAN)
    assert "library" not in session.prefill([*other, 9], None if prune == "off" else PLAN).note


@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_what_was_read_whole_answers_as_without_cuts_and_the_same_prompt_as_before(
    model: Path, tmp_path: Path, device: str
) -> None:
    plan = dataclasses.replace(PLAN, questions=2)
    first, other = ([*DOCUMENT, *question] for question in (range(5, 25), range(60, 75)))
    one = slimrt.load(model, device=device, prune=plan, cache=tmp_path / "read", threads=1)
    before = one.generate(first, **ASKED)
    assert before.timings.stages and one.current.incomplete
    assert one.current.complete() == len(first) and not one.current.incomplete
    one.current.keep(len(first), "")
    assert {book.header.boundary for book in one.engine.library.books()} == {1, None}
    later = slimrt.load(model, device=device, prune=plan, cache=tmp_path / "read", threads=1)
    fresh = slimrt.load(model, device=device, prune=plan.without_cuts, threads=1).generate(other, **ASKED)
    for llm, session in ((later, later.session()), (one, one.current)):
        found = llm.generate(other, session=session, **ASKED)
        assert found.tokens == fresh.tokens and found.timings.stages == ()
        assert "read whole before" in found.timings.dense_note
        assert len(DOCUMENT) - 20 <= found.timings.reused_tokens <= len(DOCUMENT)
    again = later.generate(first, session=later.session(), **ASKED)
    assert again.tokens == before.tokens and again.timings.stages == before.timings.stages
    assert again.timings.reused_tokens == len(first)
    # Whoever gives a plan that cuts always gets its cuts: what was read whole does not serve.
    cut = slimrt.load(model, device=device, prune=PLAN, cache=tmp_path / "read", threads=1).generate(other, **ASKED)
    assert cut.timings.stages and cut.timings.dense_note == ""
    assert cut.tokens == slimrt.load(model, device=device, prune=PLAN, threads=1).generate(other, **ASKED).tokens


@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_what_was_read_whole_up_to_a_later_cut_is_chosen_for_from_there_on(
    model: Path, tmp_path: Path, device: str
) -> None:
    plan = dataclasses.replace(PLAN, questions=4)
    first, other = ([*DOCUMENT, *question] for question in (range(5, 25), range(60, 75)))
    one = slimrt.load(model, device=device, prune=plan, cache=tmp_path / "read", threads=1)
    one.generate(first, **ASKED)

    def interrupt(done: int, total: int) -> None:
        if done == total - 1:  # behind the second cut
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.current.complete(interrupt, "the document")
    library = one.engine.library
    assert {(book.header.boundary, book.header.passing) for book in library.books()} == {(1, False), (2, True)}
    later = slimrt.load(model, device=device, prune=plan, cache=tmp_path / "read", threads=1)
    second = dataclasses.replace(plan, stages=plan.stages[1:])
    fresh = slimrt.load(model, device=device, prune=second, threads=1).generate(other, **ASKED)
    for llm, session in ((later, later.session()), (one, one.current)):
        found = llm.generate(other, session=session, **ASKED)
        assert found.tokens == fresh.tokens
        assert found.timings.stages == fresh.timings.stages and len(fresh.timings.stages) == 1
        assert found.timings.reused_tokens > 280 and "read the document whole before" in found.timings.doubts[0]
        session.keep(len(other), "")
        assert len(library.books()) == 2  # nothing that is there already in another way
    # Only the rest is left to do, and then of no more use.
    assert one.current.complete(begins="the document") == len(other)
    one.current.keep(len(other), "the document")
    assert {book.header.boundary for book in library.books()} == {1, None}
    whole = slimrt.load(model, device=device, prune=plan.without_cuts, threads=1).generate(first[:310], **ASKED)
    assert one.generate(first[:310], **ASKED).tokens == whole.tokens


@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_a_prompt_too_short_for_the_cuts_of_its_plan_is_not_read_again_either(
    model: Path, tmp_path: Path, device: str
) -> None:
    plan = dataclasses.replace(PLAN, min_keep=250, questions=2)
    first, other = ([*DOCUMENT, *question] for question in (range(5, 25), range(60, 75)))

    def load(**cache: Any) -> slimrt.LLM:
        return slimrt.load(model, device=device, prune=plan, threads=1, **cache)

    before = load(cache=tmp_path / "read").generate(first, **ASKED)
    assert not before.timings.stages and len(files(tmp_path / "read")) == 1
    again = load(cache=tmp_path / "read").generate(first, **ASKED)
    assert again.tokens == before.tokens and again.timings.reused_tokens >= len(first) - 2
    grown = [*DOCUMENT, *np.random.default_rng(1).integers(3, 200, 300).tolist()]
    for ids, cuts, reused in ((other, 0, 300), (grown, 2, 256)):  # of more tokens more are under windows
        found = load(cache=tmp_path / "read").generate(ids, **ASKED)
        assert found.tokens == load().generate(ids, **ASKED).tokens and len(found.timings.stages) == cuts
        assert found.timings.reused_tokens == reused


def test_entries_of_before_choices_were_kept_serve_still(model: Path, tmp_path: Path) -> None:
    llm = slimrt.load(model, device="numpy", prune="off", cache=tmp_path / "read")
    llm.generate(DOCUMENT, **ASKED)
    (path,) = files(tmp_path / "read")
    whole = path.read_bytes()
    length = int.from_bytes(whole[8:12], "little")
    header = json.loads(whole[12 : 12 + length])
    for name in ("chosen", "behind", "whys"):
        del header[name]
    data = json.dumps(header).encode()
    head = whole[:8] + len(data).to_bytes(4, "little") + data
    path.write_bytes(head + hashlib.sha256(head).digest() + whole[12 + length + 32 :])
    assert llm.generate(DOCUMENT, session=llm.session(), **ASKED).timings.reused_tokens > 290


def test_nothing_runs_for_the_same_prompt_and_an_interrupted_completion_costs_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dataclasses.replace(PLAN, questions=2)
    llm = slimrt.load(model, device="numpy", prune=plan)
    wanted = llm.generate(DOCUMENT, temperature=1, seed=1, **ASKED)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "prefill", None)
        again = llm.generate(DOCUMENT, temperature=1, seed=1, **ASKED)
        assert (again.tokens, again.timings.stages) == (wanted.tokens, wanted.timings.stages)
        assert again.timings.reused_tokens == len(DOCUMENT) and "nothing of it runs again" in again.timings.reuse_note

    def interrupt(done: int, total: int) -> None:
        if done == 2:  # of four: in front of the second cut
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.current.complete(interrupt)
    assert llm.current.incomplete
    other = [*DOCUMENT[:290], 7, 8, 9]
    found = llm.generate(other, **ASKED)
    assert found.tokens == slimrt.load(model, device="numpy", prune=plan).generate(other, **ASKED).tokens
    assert found.timings.stages and found.timings.reused_tokens > 250
    assert llm.current.complete() == len(other)


BACKGROUND = """
import sys
from click_cli import cli
from slimrt.library import store

store.LEAST, store._FIRST = 100, 32
cli(sys.argv[1:])
"""


FAILING = BACKGROUND.replace(
    "cli(sys",
    """
from slimrt.session import Session

def fail(self, progress=None, begins=None):
    raise OSError("the disk is gone")

Session.complete = fail
cli(sys""",
)


@pytest.mark.skipif(sys.platform != "linux", reason="processes with threads are copied on Linux alone")
def test_generate_leaves_the_rest_to_a_process_in_the_background(model: Path, tmp_path: Path) -> None:
    file, beside = GGUFFile(model), preset_path(model)
    presets = {"fast": {"plan": dataclasses.asdict(PLAN)}}  # without an end of questions
    beside.write_text(json.dumps({"model": fingerprint(file, read_config(file)), "presets": presets}))
    environment = {**os.environ, "SLIMRT_CACHE": str(tmp_path)}
    document, library = "the world hello there " * 40, Library(tmp_path / "read")

    def ask(question: str, *options: str, script: str = BACKGROUND) -> dict[str, Any]:
        command = ["generate", document + question, "-m", str(model), "--device", "numpy", "--prune", "fast", "-n", "2"]
        done = subprocess.run(
            [sys.executable, "-c", script, *command, "--json", *options],
            env=environment, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        return json.loads(done.stdout)["timings"]

    try:
        assert ask("hello", "--no-cache")["stages"] and not (tmp_path / "read").exists()
        assert ask("hello", script=FAILING)["stages"]
        reason, until = tmp_path / "read" / ".completing", time.monotonic() + 60
        while not (reason.exists() and reason.stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        assert reason.read_text().endswith("OSError: the disk is gone\n") and len(library.books()) == 1
        assert ask("there hello")["stages"]
        until = time.monotonic() + 60
        while {book.header.boundary for book in library.books()} != {1, None} and time.monotonic() < until:
            time.sleep(0.05)
        assert {book.header.boundary for book in library.books()} == {1, None} and not reason.read_text()
        other = ask("there is the world")
        assert "read whole before" in other["dense_note"] and other["reused_tokens"] > 100
        assert ask("hello")["stages"]  # just this prompt: as it was
    finally:
        beside.unlink()


def test_nothing_is_left_to_the_background_if_so_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr("slimrt.terminal.generate.read_on", lambda *about: calls.append(about))
    command = ["generate", "hello", "-m", str(model), "--device", "numpy", "-n", "1", "--no-cache"]
    for options, expected in (([], 1), (["--no-read-on"], 1), (["--json"], 2), (["--no-read-on", "--json"], 2)):
        assert CliRunner().invoke(cli, [*command, *options]).exit_code == 0
        assert len(calls) == expected


def test_another_model_and_other_settings_never_match(model: Path, tmp_path: Path) -> None:
    def reused(path: Path, **options: object) -> int:
        llm = slimrt.load(path, device="numpy", cache=tmp_path / "read", **options)  # type: ignore[arg-type]
        return llm.generate(DOCUMENT, **ASKED).timings.reused_tokens

    assert reused(model, prune="off") == 0 and reused(model, prune="off") > 250
    assert reused(write_tiny_llama(tmp_path / "other.gguf", n_layers=4, ctx=1024, seed=1), prune="off") == 0
    assert reused(model, prune=PLAN) == 0
    assert reused(model, prune="off", rope_base=5000.0) == 0
    os.utime(model)  # a file that was written again, whatever is in it
    assert reused(model, prune="off") == 0
    assert slimrt.load(model, cache=tmp_path / "read", kv_budget=128).engine.library is None


def test_a_damaged_entry_is_dropped_and_the_prompt_read(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = slimrt.load(model, device="numpy", prune=PLAN, cache=tmp_path / "read")
    wanted = llm.generate(DOCUMENT, **ASKED)
    (path,) = files(tmp_path / "read")
    whole = path.read_bytes()
    places = [0, 9, 20, len(whole) // 3, len(whole) // 2, len(whole) - 1]
    cases = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places]
    cases += [whole[:cut] for cut in (0, 8, 40, len(whole) // 2, len(whole) - 1)]
    for case in cases:
        for old in files(tmp_path / "read"):
            old.unlink()
        path.write_bytes(case)
        path.chmod(0o600)
        caplog.clear()
        found = llm.generate(DOCUMENT, session=llm.session(), **ASKED)
        assert found.tokens == wanted.tokens and found.timings.reused_tokens == 0
        assert any("damaged" in record.message for record in caplog.records), len(case)
        assert files(tmp_path / "read") == [path] and path.read_bytes() == whole  # written again


def test_the_longest_unused_go_first_and_a_longer_one_takes_the_place_of_its_beginning(
    model: Path, tmp_path: Path
) -> None:
    llm = slimrt.load(model, device="numpy", prune="off", cache=tmp_path / "read")
    documents = [np.random.default_rng(seed).integers(3, 200, 200).tolist() for seed in range(3)]
    llm.generate(documents[0], **ASKED)
    (first,) = files(tmp_path / "read")
    llm.engine.library = Library(tmp_path / "read", "x", limit=int(2.5 * first.stat().st_size))
    for number, document in enumerate(documents):
        llm.generate(document, session=llm.session(), **ASKED)
        for path in files(tmp_path / "read"):
            os.utime(path, (1000 + number, 1000 + number)) if path.stat().st_mtime > 1e6 else None
    there = llm.engine.library.books()
    assert len(there) == 2 and all(book.used >= 1001 for book in there)  # the first two writers' went
    llm.generate([*documents[2], *documents[1]], session=llm.session(), **ASKED)
    assert max(book.header.tokens for book in llm.engine.library.books()) == 400
    llm.engine.library = Library(tmp_path / "read", "y", limit=1000)
    llm.generate(documents[0], session=llm.session(), **ASKED)  # larger than the limit: not kept, nothing deleted
    assert max(book.header.tokens for book in llm.engine.library.books()) == 400


KILLED = """
import resource, signal, sys
import slimrt
from slimrt.library import store

model, folder, size, ids = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
store.LEAST, store._FIRST = 100, 32
llm = slimrt.load(model, device="numpy", prune="off", cache=folder, threads=1)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the system kills who writes a longer file
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
llm.generate(ids, max_tokens=1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of a process's files")
def test_a_process_killed_while_it_writes_loses_that_alone(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read"
    llm = slimrt.load(model, device="numpy", prune="off", cache=folder, threads=1)
    llm.generate(DOCUMENT[:200], **ASKED)
    (shorter,) = files(folder)
    for size in (100, 20_000, int(1.4 * shorter.stat().st_size)):
        command = [sys.executable, "-c", KILLED, str(model), str(folder), str(size), repr(DOCUMENT)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGXFSZ, done.stderr
        assert [book.path for book in llm.engine.library.books()] == [shorter]
        assert len(files(folder)) == 2  # and what the last one left, not those before it
    # The next process goes on from what there was, and tidies up.
    later = slimrt.load(model, device="numpy", prune="off", cache=folder, threads=1)
    assert "library" in later.generate(DOCUMENT, **ASKED).timings.reuse_note
    (longer,) = files(folder)
    assert longer != shorter and later.engine.library.books()[0].header.tokens == 300


def test_a_disk_that_fails_and_a_folder_of_others_stop_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    llm = slimrt.load(model, device="numpy", prune="off", cache=tmp_path / "read")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        wanted = llm.generate(DOCUMENT, **ASKED)
    assert "No space left" in caplog.text and files(tmp_path / "read") == []
    assert llm.generate(DOCUMENT, session=llm.session(), **ASKED).tokens == wanted.tokens
    (tmp_path / "read").chmod(0o777)
    assert llm.generate(DOCUMENT, session=llm.session(), **ASKED).timings.reused_tokens == 0
    assert caplog.text.count("others may write to it") == 1  # said once, not at each step
    (tmp_path / "file").write_text("")
    blocked = slimrt.load(model, device="numpy", prune="off", cache=tmp_path / "file")
    assert blocked.generate(DOCUMENT, **ASKED).tokens == wanted.tokens


def test_processes_that_write_the_same_at_once_leave_one_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Library, "_compared", lambda *about: (False, [])
    )  # neither sees the other's: it is not there yet
    for _ in range(2):
        slimrt.load(model, device="numpy", prune=PLAN, cache=tmp_path / "read").generate(DOCUMENT, **ASKED)
    assert len(files(tmp_path / "read")) == 1
    assert Library(tmp_path / "read").books()[0].header.tokens == len(DOCUMENT)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders")
def test_what_is_no_file_is_left_alone(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read"
    llm = slimrt.load(model, device="numpy", prune="off", cache=folder)
    llm.generate(DOCUMENT, **ASKED)
    (kept,) = files(folder)
    name = kept.name
    kept.unlink()
    (folder / name).symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / f"a{name}")  # opened, it would wait for a writer
    assert llm.engine.library.books() == []
    assert llm.generate(DOCUMENT[1:], session=llm.session(), **ASKED).timings.reused_tokens == 0
    assert [book.header.tokens for book in llm.engine.library.books()] == [len(DOCUMENT) - 1]
    assert llm.engine.library.clear() > 0 and len(files(folder)) == 2


def test_the_commands(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMRT_CACHE", str(tmp_path))
    text = "the world hello there " * 40

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    asked = ("generate", text, "-m", str(model), "--device", "numpy", "--prune", "off", "-n", "2")
    assert "is kept for next time" not in run(*asked, "--no-cache") and not (tmp_path / "read").exists()
    assert "is kept for next time" in run(*asked) and "is kept for next time" not in run(*asked)
    told = json.loads(run("cache", "list", "--json"))
    assert len(told["entries"]) == 1 and told["bytes"] == told["entries"][0]["bytes"] <= told["limit"]
    assert told["entries"][0]["begins"].startswith("the world hello")
    assert "the world hello" in run("cache", "list")
    assert json.loads(run("cache", "clear", "--json"))["bytes"] == told["bytes"]
    run(*asked, "--chat")  # the words of the message, not those of the template before it
    assert json.loads(run("cache", "list", "--json"))["entries"][0]["begins"].startswith("user the world hello")
    run("cache", "clear")
    assert json.loads(run("cache", "list", "--json"))["entries"] == []
