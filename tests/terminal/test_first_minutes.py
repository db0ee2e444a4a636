"""The first ten minutes with the command: pipes, refusals in one style, files by name, and what it says meanwhile."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import slimrt
from click_cli import cli
from slimrt.config import SamplingConfig
from slimrt.hub.suggested import SUGGESTED
from slimrt.memory.plan import largest_context, plan
from slimrt.models import read_config
from slimrt.terminal import guard, progress
from slimrt.terminal.answer import cut_note
from slimrt.terminal.chat import Chat
from slimrt.terminal.line_input import completions
from slimrt.terminal.options import AnswerSettings
from slimrt.terminal.screen import Screen
from slimrt.terminal.text_input import read_document
from slimrt.weights.gguf import GGUFFile
from tests.terminal_notes import Lines, talk, without_backend_note
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("first") / "tiny.gguf", ctx=1024)


@pytest.fixture
def llm(tiny: Path) -> slimrt.LLM:
    return slimrt.load(tiny, ctx=256, prune="off", device="numpy")


def run(*arguments: object, input: str | None = None) -> Result:
    result = CliRunner().invoke(cli, [str(one) for one in arguments], input=input)
    result.stderr_bytes = without_backend_note(result.stderr_bytes)
    return result


def shell(line: str, tiny: Path) -> subprocess.CompletedProcess[str]:
    command = line.replace("slimrt", f"{sys.executable} -m click_cli").replace("TINY", str(tiny))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    done.stderr = without_backend_note(done.stderr)
    return done


# -- pipes -------------------------------------------------------------------------------------------------------------


def test_a_piped_document_and_a_question_are_both_read(tiny: Path, tmp_path: Path) -> None:
    def tokens(*arguments: object, input: str | None = None) -> dict[str, Any]:
        result = run("generate", "-m", tiny, "-n", 4, "--json", *arguments, input=input)
        assert result.exit_code == 0, result.output
        data: dict[str, Any] = json.loads(result.stdout)
        return {"tokens": data["tokens"], "prompt": data["usage"]["prompt_tokens"]}

    assert tokens("who?", input="the world\nover\n\n") == tokens("the world\nover\n\nwho?")
    assert tokens("who?", input="") == tokens("who?")
    (tmp_path / "document").write_text("the world")
    for line, same in (
        (f"slimrt generate who? -m TINY -n 4 --json < {tmp_path}/document", "the world\n\nwho?"),
        (f"cat {tmp_path}/document | slimrt generate who? -m TINY -n 4 --json", "the world\n\nwho?"),
        ("slimrt generate who? -m TINY -n 4 --json < /dev/null", "who?"),
    ):
        data = json.loads(shell(line, tiny).stdout)
        assert data["usage"]["prompt_tokens"] == tokens(same)["prompt"], line


@pytest.mark.parametrize("command", ["tokenize a -m TINY --pieces", "generate a -m TINY -n 2"])
def test_closed_streams_give_a_line_or_nothing(command: str, tiny: Path) -> None:
    whole = shell(f"slimrt {command}", tiny)
    assert whole.returncode == 0
    closed = shell(f"slimrt {command} >&-", tiny)
    assert closed.returncode == 1 and closed.stderr.startswith("error: standard output is closed")
    assert closed.stderr.count("\n") == 1
    quiet = shell(f"slimrt {command} 2>&-", tiny)
    assert quiet.returncode == 0 and quiet.stdout == whole.stdout
    assert shell(f"slimrt {command} <&-", tiny).returncode == 0


def test_commands_that_read_a_closed_stdin(tiny: Path) -> None:
    for command in ("tokenize -m TINY", "generate -m TINY"):
        result = shell(f"slimrt {command} <&-", tiny)
        assert result.returncode == 1 and result.stderr == (
            "error: standard input: no text in it; pipe some in, or give it as an argument\n"
        )
    assert shell("slimrt chat -m TINY <&-", tiny).returncode == 0


# -- one style of error ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nonsense",), "no such command 'nonsense'; see slimrt --help"),
        (("generat",), "error: no such command 'generat'; perhaps 'generate'; see slimrt --help"),
        (("chat", "--nonsense"), "no such option '--nonsense'"),
        (("explain",), "error: --file is missing; see slimrt explain --help"),
        (("inspect", "--ctx", "64q"), "error: --ctx: size '64q': must be a whole number above 0"),
        (("quantize", "a.gguf"), "error: TARGET is missing; see slimrt quantize --help"),
        (("bench", "ttft", "--repeats", "0"), "see slimrt bench ttft --help"),
    ],
)
def test_mistakes_in_the_command_line_look_like_other_errors(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and said in result.stderr and result.stderr.count("\n") == 1


def test_a_terminal_breaks_messages_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("COLUMNS", "40")
    text = "error: /a/folder-with-a-long-name/and-a-file.txt: no such file; name another one, that is there"
    lines = guard.wrapped(text).split("\n")
    assert " ".join(lines) == text and "/a/folder-with-a-long-name/and-a-file.txt:" in lines
    assert all(len(line) <= 39 or " " not in line for line in lines)
    assert guard.wrapped("TTFT 0.16 s · 49.1 tokens/s · prompt 37 (35 reused) · memory 429 MiB").split("\n") == [
        "TTFT 0.16 s · 49.1 tokens/s ·", "prompt 37 (35 reused) · memory 429 MiB"
    ]  # fmt: skip
    assert guard.wrapped("memory up to 597 MiB of 19.8 GiB, of it 598 MiB").split("\n") == [
        "memory up to 597 MiB of 19.8 GiB, of it", "598 MiB"
    ]  # fmt: skip
    assert guard.wrapped("/load FILE  read a document; it goes before the next").split("\n") == [
        "/load FILE  read a document; it goes", "            before the next"
    ]  # fmt: skip


def test_help_fits_a_terminal() -> None:
    def check(command: click.Command, *words: str) -> None:
        shown = CliRunner().invoke(cli, [*words, "--help"], terminal_width=80).stdout
        lines = [line for line in shown.splitlines() if not line.startswith("Usage: ")]
        assert [line for line in lines if len(line) > 80 or line.endswith("...")] == [], words
        for name, part in getattr(command, "commands", {}).items():
            check(part, *words, name)

    check(cli)


# -- advice ------------------------------------------------------------------------------------------------------------


def _cut(llm: slimrt.LLM, written: int, limit: int | None) -> str | None:
    usage = SimpleNamespace(completion_tokens=written, total_tokens=llm.ctx)
    completion: Any = SimpleNamespace(finish_reason="length", usage=usage, complete=None)
    return cut_note(llm, completion, AnswerSettings(SamplingConfig(), limit, ()))


def test_cut_says_which_limit(tiny: Path, llm: slimrt.LLM) -> None:
    assert _cut(llm, 8, 8) == "cut by --max-tokens 8 (-1: no limit)"  # though the context is full as well
    assert _cut(llm, 7, 8) == "cut: the context of 256 tokens is full (--ctx 1k or --overflow shift goes on)"
    assert _cut(llm, 7, None) == _cut(llm, 7, 8)
    shifting = slimrt.load(tiny, ctx=256, prune="off", device="numpy", overflow="shift")
    assert "--overflow" not in str(_cut(shifting, 7, 8))


def test_a_context_beyond_the_trained_one_is_advised_as_such(tiny: Path) -> None:
    full = slimrt.load(tiny, ctx=1024, prune="off", device="numpy")
    assert "--ctx 2k, beyond the 1,024 that the model was trained on" in str(_cut(full, 7, None))
    chat = Chat(full, AnswerSettings(SamplingConfig(), 4, ()), Lines(), Screen(), None)
    with pytest.raises(ValueError, match=r"--ctx \d+k, beyond the 1,024 that the model was trained on"):
        chat._ask("hello " * 600)


def test_an_advised_context_fits_a_moment_later(tiny: Path) -> None:
    file = GGUFFile(tiny)
    config = read_config(file)
    free = plan(config, file, 40_000, threads=1, available=1 << 40, fast=True).total
    advised = largest_context(config, file, 65536, threads=1, available=free, fast=True)
    assert 30_000 < advised < 40_000
    assert plan(config, file, advised, threads=1, available=int(0.96 * free), fast=True).fits()


# -- files by name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("my report.txt", "my\\ report.txt"),
        ("my report.txt", "my report.txt"),
        ("my report.txt", "'my report.txt'"),
        ("my report.txt", '"my report.txt"'),
        ("it's.txt", "it's.txt"),
        ("it's.txt", "it\\'s.txt"),
        ("a\\ b.txt", "'a\\ b.txt'"),
        ("plain.txt", "~/plain.txt"),
    ],
)
def test_paths_are_taken_as_people_write_them(
    name: str, written: str, llm: slimrt.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / name).write_text("the world")
    chat = talk(llm, f"/load {written}")
    assert chat.failures == 0 and [document for _, document in chat._documents] == ["the world"]


def test_tab_completes_commands_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my report.txt", "my notes.md", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "docs" / "deep").mkdir(parents=True)

    def completed(line: str) -> list[str]:
        return [line[: len(line) - replaced] + text for text, replaced in completions(line)]

    assert completed("/re") == ["/retry ", "/restore "]
    assert completed("/load my") == ["/load my\\ notes.md", "/load my\\ report.txt"]
    assert completed("/load my\\ r") == ["/load my\\ report.txt"]
    assert completed("/load 'my r") == ["/load 'my report.txt'"]
    assert completed("/load docs/") == ["/load docs/deep/"]
    assert completed("/load .h") == ["/load .hidden"]
    assert completed(f"/load {tmp_path}/do") == [f"/load {tmp_path}/docs/"]
    assert completed("/load no/such/place") == completed("/system my") == completed("my") == []
    for line in completed("/load "):  # what is completed is what /load takes
        assert not line.endswith("txt") or Path(line.removeprefix("/load ").replace("\\", "")).exists()


@pytest.mark.parametrize(
    ("begin", "kind"),
    [
        (b"PK\x03\x04\x14\0", "is a zip archive, as LibreOffice and other Office files are.*pandoc"),
        (b"\x89PNG\r\n", "is a picture, which cannot be read; name a text, PDF, Word or HTML file"),
        (b"GGUF\3\0\0\0", "is a model"),
        ("text".encode("utf-16"), "is text in UTF-16.*iconv"),
        (b"caf\xe9", r"byte 3 \(0xe9\) is not valid UTF-8.*iconv"),
    ],
)
def test_a_refused_file_is_named_by_its_kind(begin: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "document").write_bytes(begin)
    with pytest.raises(ValueError, match=kind):
        read_document(tmp_path / "document")


# -- commands of the chat ----------------------------------------------------------------------------------------------


def test_retry_asks_the_last_question_again(llm: slimrt.LLM, capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(llm, "first", "second", "/retry", temperature=0.9)
    assert [message["content"] for message in chat.messages if message["role"] == "user"] == ["first", "second"]
    assert len(chat.answers) == 3 and chat.messages[-1]["content"] == chat.answers[-1].text
    capsys.readouterr()
    talk(llm, "first", "/retry")
    assert "drawn at temperature 0.8" in capsys.readouterr().err


def test_a_retry_that_comes_to_nothing_changes_nothing(llm: slimrt.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talk(llm, "/retry")
    assert chat.failures == 1 and chat.messages == []
    chat = talk(llm, "first")
    before = chat.messages

    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(chat._talk, "ask", fails)
    with pytest.raises(MemoryError):
        chat._handle("/retry")
    assert chat.messages == before


@pytest.mark.parametrize("word", ["exit", "quit", "/exit", "/quit"])
def test_leaving(word: str, llm: slimrt.LLM) -> None:
    assert talk(llm, word, "not asked").answers == []


# -- what is said meanwhile --------------------------------------------------------------------------------------------


def test_models_worth_fetching_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMRT_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    shown = run("pull", "--list")
    listed = json.loads(run("pull", "--list", "--json").stdout)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for model in SUGGESTED:
        assert model.name in shown.stdout and model.name in readme
        assert f"{model.size / 1e9:.1f} GB" in readme and f"{model.memory / 1e9:.1f} GB" in readme
        assert model.name in [one["name"] for one in listed["suggested"]]
    assert all(len(line) <= 80 for line in shown.stdout.splitlines() if not line.startswith("  hf:"))


def test_many_pieces_are_written_line_by_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a b" * 100_000)
    begun = time.process_time()
    result = run("tokenize", "-m", tiny, "--pieces", "-f", tmp_path / "text")
    assert time.process_time() - begun < 10
    assert result.stdout.count("\n") == len(run("tokenize", "-m", tiny, "-f", tmp_path / "text").stdout.split())


def test_the_bar_shows_before_the_first_report_and_tells_of_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(progress.sys, "stderr", SimpleNamespace(isatty=lambda: True))

    class Bar:
        def update(self, task: object, **state: Any) -> None:
            shown.append(state)

        def stop(self) -> None:
            shown.append({"over": True})

    def opened(self: Any) -> None:
        self._bar = Bar()
        self._bar.update(None, **self._state)

    monkeypatch.setattr(progress._Bar, "_open", opened)
    with progress.progress_bar("reading") as report:
        deadline = time.monotonic() + 10
        while not shown and time.monotonic() < deadline:
            time.sleep(0.01)
        logging.getLogger(progress.COMPILER).debug("compiling %s", "a kernel")
        assert report is not None
        report(29, 30)
    assert [state.get("description") for state in shown[:3]] == ["reading", "compiling kernels, once", "reading"]
    assert shown[0]["total"] is None and shown[2]["completed"] == 29 and shown[-1] == {"over": True}


def test_a_note_goes_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(progress.sys, "stderr", screen)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with progress.progress_bar("reading"):
        deadline = time.monotonic() + 10
        while "reading" not in screen.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        guard.note("something to know")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")
    assert "note: something to know" in [line.rstrip() for line in shown.split("\n")]


def test_compiling_is_told_once(tmp_path: Path, tiny: Path) -> None:
    pytest.importorskip("numba")
    from slimrt.ops.fast.features import detect
    from slimrt.ops.fast.kernels import cache_folder

    if not detect().avx2:
        pytest.skip("this processor has no fast path")
    command = [sys.executable, "-m", "click_cli", "generate", "hello", "-m", str(tiny), "-n", "2", "-t", "1"]

    def said(**environment: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    said()  # other tests need these kernels too
    folder = tmp_path / "kernels" / cache_folder().name
    shutil.copytree(cache_folder(), folder, ignore=shutil.ignore_patterns("*.decode_kernels.*"))
    (tmp_path / "kernels").chmod(0o700)
    first = said(SLIMRT_CACHE=str(tmp_path))
    assert first.count("compiling kernels for this processor") == 1  # not once for each
    assert first.rstrip().split("\n")[-1].count("kernels were compiled meanwhile, once") == 1
    assert len(list(folder.glob("*.decode_kernels.*"))) > 1
    assert "compil" not in said(SLIMRT_CACHE=str(tmp_path))


def test_the_slow_backend_says_how_to_get_the_fast_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "numba" else real(name))
    assert any("slimrt[fast]" in text and "several times as fast" in text for text in slimrt.load(tiny).notes)
    assert slimrt.load(tiny, device="numpy").notes == []  # asked for


def test_a_service_can_follow_what_happens(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "slimrt"):
        slimrt.load(tiny, device="numpy").generate("hello", max_tokens=3)
    said = [record.getMessage() for record in caplog.records]
    assert any("loaded: context" in text for text in said)
    assert any(text.startswith("prompt ") and "answer 3 tokens" in text for text in said)
