"""``slimrt batch``: every line answered once, documents read once, kills survived, other people's files left alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import slimrt
from click_cli import cli
from slimrt.batch import lines
from slimrt.batch.run import answer_batch
from slimrt.errors import OutputError, SettingError
from tests.terminal_notes import without_backend_note
from tests.tiny_gguf import write_tiny_llama

OPTIONS = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_layers=4, ctx=2048)


@pytest.fixture(scope="module")
def llm(model: Path) -> slimrt.LLM:
    return slimrt.load(model, prune="off", threads=1)


def document(seed: int) -> str:
    words = np.random.default_rng(seed).choice(["the", "world", "hello", "there"], 120)
    return " ".join(words)


def request(name: str, text: str, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], **OPTIONS, **more}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, requests: list[Any]) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in requests))
    return path


def answers(path: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({one["id"] for one in found}) == len(found)
    return {one["custom_id"]: one for one in found}


@pytest.fixture(scope="module")
def requests() -> list[dict[str, Any]]:
    """Two questions on each of three documents, in turns."""
    return [request(f"{d}-{q}", f"{document(d)} {q}") for q in ("what?", "why?") for d in range(3)]


def test_every_line_is_answered_as_alone_and_documents_are_read_once(
    llm: slimrt.LLM, tmp_path: Path, requests: list[dict[str, Any]]
) -> None:
    source = write(tmp_path / "in.jsonl", [*requests, "", {**requests[0], "custom_id": "e", "url": "/v1/embeddings",
                                                           "body": {"input": "hello"}}])  # fmt: skip
    report = answer_batch(llm, source, tmp_path / "out.jsonl")
    assert (report.lines, report.before, report.failed) == (7, 0, 0)
    assert report.reused > 0.4 * report.prompt_tokens  # three documents of six
    found = answers(tmp_path / "out.jsonl")
    for one in requests:
        alone = llm.chat(one["body"]["messages"], max_tokens=4, ignore_eos=True, session=llm.session())
        body = found[one["custom_id"]]["response"]["body"]
        assert body["choices"][0]["message"]["content"] == alone.text
        assert body["usage"]["prompt_tokens"] == alone.usage.prompt_tokens
    assert len(found["e"]["response"]["body"]["data"][0]["embedding"]) == llm.config.d_model


def test_a_killed_run_goes_on_without_a_lost_or_doubled_line(
    llm: slimrt.LLM, tmp_path: Path, requests: list[dict[str, Any]]
) -> None:
    source, target = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"

    class KilledError(Exception):
        pass

    def kill(done: int, total: int, what: str) -> None:
        if done == 4:
            raise KilledError

    with pytest.raises(KilledError):
        answer_batch(llm, source, target, progress=kill)
    assert len(target.read_text().splitlines()) == 4
    with target.open("ab") as file:
        file.write(target.read_bytes()[:60])  # killed within a line
    report = answer_batch(llm, source, target)
    assert (report.lines, report.before) == (6, 4)
    assert answers(target).keys() == {one["custom_id"] for one in requests}
    before = target.read_bytes()
    assert answer_batch(llm, source, target).before == 6 and target.read_bytes() == before


def test_another_model_or_plan_does_not_go_on_where_one_stopped(
    llm: slimrt.LLM, tmp_path: Path, requests: list[dict[str, Any]]
) -> None:
    source, target = write(tmp_path / "in.jsonl", requests[:1]), tmp_path / "out.jsonl"
    answer_batch(llm, source, target)
    before = target.read_bytes()
    other = write_tiny_llama(tmp_path / "other.gguf", n_layers=4, ctx=2048, seed=1)
    plan = slimrt.PrunePlan(stages=(slimrt.Stage(1, 0.5),))
    for path, options in ((other, {}), (llm.file.path, {"prune": plan}), (llm.file.path, {"rope_base": 5000.0}),
                          (llm.file.path, {"chat_template": "chatml"})):  # fmt: skip
        with (
            slimrt.load(path, **{"prune": "off", "threads": 1, **options}) as one,
            pytest.raises(OutputError, match="answers of another model, or of this one loaded otherwise"),
        ):
            answer_batch(one, source, target)
    assert target.read_bytes() == before
    # What computes, and how many threads, may differ from one run to the next.
    with slimrt.load(llm.file.path, prune="off", threads=1, device="numpy", ctx=1024) as one:
        assert answer_batch(one, source, target).before == 1


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"id": "x"}\n', b'{"id": "batch_req_9_00000000"}\n'])
def test_files_of_others_are_left_alone(llm: slimrt.LLM, tmp_path: Path, content: bytes) -> None:
    source = write(tmp_path / "in.jsonl", [request("a", "hello")])
    (tmp_path / "out.jsonl").write_bytes(content)
    with pytest.raises(OutputError, match="something else than answers"):
        answer_batch(llm, source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_what_is_wrong_with_a_line_is_its_answer(llm: slimrt.LLM, tmp_path: Path) -> None:
    bad = [
        "{", "[1]", {"custom_id": "url", "url": "/v1/wings", "body": {}}, {**request("get", "x"), "method": "GET"},
        request("field", "x", wings=1), request("long", "hello " * 3000), request("good", "hello"),
        {"custom_id": "body", "url": "/v1/completions"},
    ]  # fmt: skip
    report = answer_batch(llm, write(tmp_path / "in.jsonl", bad), tmp_path / "out.jsonl")
    assert (report.lines, report.failed) == (8, 7)
    found = answers(tmp_path / "out.jsonl")
    assert "must be one of" in found["url"]["error"]["message"] and "POST" in found["get"]["error"]["message"]
    assert "body: must be" in found["body"]["error"]["message"] and found["body"]["response"] is None
    assert found["field"]["response"]["status_code"] == 400 and found["field"]["error"] is None
    assert "Unknown parameter" in found["field"]["response"]["body"]["error"]["message"]
    assert "2048" in found["long"]["response"]["body"]["error"]["message"]
    assert found["good"]["response"]["status_code"] == 200
    assert all("\n" not in json.dumps(one) for one in found.values())


def test_odd_lines_do_not_end_a_batch(llm: slimrt.LLM, tmp_path: Path) -> None:
    bad = [
        request("half \ud800", "hello"), request("name", "hello", **{"\udfff": 1}), request("good", "hello"),
        {**request("list", "x"), "url": ["x"]}, {**request("dict", "x"), "url": {}}, "[" * 5000,
    ]  # fmt: skip
    report = answer_batch(llm, write(tmp_path / "in.jsonl", bad), tmp_path / "out.jsonl")
    assert (report.lines, report.failed) == (6, 4)
    found = answers(tmp_path / "out.jsonl")
    assert found["half \ud800"]["response"]["body"]["choices"] and found["good"]["response"]["status_code"] == 200
    assert answer_batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl").before == 6


def test_a_disk_that_fills_up_costs_one_line(llm: slimrt.LLM, tmp_path: Path, requests: list[dict[str, Any]]) -> None:
    resource = pytest.importorskip("resource")
    source, target = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # fails in the midst of a line, as a full disk does
    try:
        with pytest.raises(OutputError, match="File too large; the answers so far are kept"):
            answer_batch(llm, source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(target.read_bytes()) == 1000
    whole = target.read_bytes().count(b"\n")
    report = answer_batch(llm, source, target)
    assert (report.lines, report.before) == (6, whole) and whole > 0
    assert answers(target).keys() == {one["custom_id"] for one in requests}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_only_whole_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 11)
    rows = lines.Rows("{path}", tmp_path, "path", largest=10)
    for name, said in (("pipe", "not a regular"), (".", "not a regular"), ("/dev/zero", "not a regular"),
                       ("large", "larger than"), ("\ud800", "no file can have")):  # fmt: skip
        with pytest.raises(lines.LineError, match=said):
            rows.request({"path": name})


def test_a_batch_that_is_wrong_as_a_whole(llm: slimrt.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = write(tmp_path / "twice.jsonl", [request("a", "x"), request("b", "x"), request("a", "y")])
    with pytest.raises(SettingError, match="lines 1 and 3 have the same custom_id 'a'"):
        answer_batch(llm, twice, tmp_path / "out.jsonl")
    with pytest.raises(SettingError, match="No such file"):
        answer_batch(llm, tmp_path / "none", tmp_path / "out.jsonl")
    monkeypatch.setattr(lines, "LONGEST", 100)
    with pytest.raises(SettingError, match="line 1 is longer than"):
        answer_batch(llm, twice, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def run(model: Path, *arguments: object) -> Result:
    options = ("-m", model, "--prune", "off", "--threads", "1")
    return CliRunner().invoke(cli, [str(one) for one in ("batch", *arguments, *options)])


def test_rows_with_files_and_a_template(model: Path, llm: slimrt.LLM, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(document(1))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    rows = [
        {"custom_id": "one", "path": "a.txt", "who": "world"},
        {"custom_id": "two", "path": "a.txt"},
        {"custom_id": "three", "path": "b.txt", "who": "x"},
        {"custom_id": "four", "path": "no.txt", "who": "x"},
    ]
    source, target = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    options = ("--file-column", "path", "--template", "hello {who}?", "--system", "be brief", "-n", "3")
    result = run(model, source, target, *options)
    assert result.exit_code == 0, result.output
    assert "4 lines answered, 3 with an error" in " ".join(result.stderr.split())
    found = answers(target)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": f"{document(1)}\n\nhello world?"},
    ]
    alone = llm.chat(messages, max_tokens=3, session=llm.session())
    assert found["one"]["response"]["body"]["choices"][0]["message"]["content"] == alone.text
    for name, said in (("two", "column 'who'"), ("three", "not valid UTF-8"), ("four", "No such file")):
        assert said in found[name]["error"]["message"]
    again = run(model, source, target, *options, "--json")
    assert json.loads(again.stdout)["before"] == 4
    other = run(model, source, target, "--template", "another question", "-n", "3")
    assert other.exit_code == 1 and "something else than answers to this batch" in " ".join(other.stderr.split())
    for arguments, said in (
        ((source, source), "the same file"), ((tmp_path / "none", target), "no such file"),
        ((source, target, "--system", "x"), "needs --template"), ((source, tmp_path), "a folder"),
    ):  # fmt: skip
        refused = run(model, *arguments)
        assert refused.exit_code == 1 and said in refused.stderr
        assert without_backend_note(refused.stderr).count("\n") == 1


def test_rows_are_answered_by_a_schema(model: Path, tmp_path: Path) -> None:
    source, target = write(tmp_path / "rows.jsonl", [{"custom_id": "one", "who": "world"}]), tmp_path / "out.jsonl"
    schema, grammar = tmp_path / "schema.json", tmp_path / "g.gbnf"
    schema.write_text('{"enum": ["yes", "no"]}')
    grammar.write_text('root ::= "yes"')
    rows = (source, target, "--template", "hello {who}?")
    result = run(model, *rows, "--schema", schema)
    assert result.exit_code == 0, result.output
    assert answers(target)["one"]["response"]["body"]["choices"][0]["message"]["content"] in ('"yes"', '"no"')
    for arguments, said in (
        ((source, tmp_path / "b.jsonl", "--schema", schema), "needs --template"),
        ((source, tmp_path / "c.jsonl", *rows[2:], "--grammar", grammar), "JSON schemas only"),
    ):
        refused = run(model, *arguments)
        assert refused.exit_code == 1 and said in refused.stderr
