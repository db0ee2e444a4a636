"""The chat: what it keeps of a conversation, what it says when something goes wrong, and on pipes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import slimrt
from click_cli import cli
from slimrt.llm import LLM
from slimrt.terminal.chat import Chat
from slimrt.terminal.line_input import read_message
from slimrt.terminal.screen import Screen
from tests.terminal_notes import Lines, settings, talk, without_backend_note
from tests.tiny_gguf import write_tiny_llama


class Interrupting(Screen):
    """A screen on which Ctrl-C is pressed after ``pieces`` pieces of the first answer."""

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self._left = pieces

    def answer(self, piece: str) -> None:
        super().answer(piece)
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", ctx=1024)


@pytest.fixture
def llm(tiny: Path) -> LLM:
    return slimrt.load(tiny, ctx=256, prune="off")


def in_pipe(model: Path, text: str | bytes, *flags: str) -> Result:
    result = CliRunner().invoke(cli, ["chat", "-m", str(model), "-n", "6", *flags], input=text)
    result.stderr_bytes = without_backend_note(result.stderr_bytes)
    return result


# -- input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["plain"], "plain"),
        (["one \\", "two\\", "three"], "one \ntwo\nthree"),
        (["one\\"], "one\n"),
        (['"""one', "", "two\\", 'three"""'], "one\n\ntwo\\\nthree"),
        (['"""all in one"""'], "all in one"),
        (['"""', "one", '"""'], "one"),
        (['"""one', "the end is missing"], "one\nthe end is missing"),
        (['not """ at the start'], 'not """ at the start'),
    ],
)
def test_messages_of_several_lines(lines: list[str], message: str) -> None:
    source = Lines(*lines)
    assert read_message(source.read) == message
    assert source.prompts[0] != source.prompts[-1] or len(source.prompts) == 1


def test_the_end_of_the_input_and_ctrl_c_pass_through() -> None:
    with pytest.raises(EOFError):
        read_message(Lines().read)
    with pytest.raises(KeyboardInterrupt):
        read_message(Lines("begun \\", KeyboardInterrupt).read)


# -- the conversation --------------------------------------------------------------------------------------------------


def test_the_whole_conversation_reaches_the_model(llm: LLM, tiny: Path) -> None:
    chat = talk(llm, "hello", "world", system="be brief")
    other = slimrt.load(tiny, ctx=256, prune="off")
    messages = [{"role": "system", "content": "be brief"}]
    for text in ("hello", "world"):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": other.chat(messages, max_tokens=8).text})
    assert chat.messages == messages
    assert chat.answers[1].timings.reused_tokens > 0


def test_clear_forgets_and_system_stays(llm: LLM) -> None:
    chat = talk(llm, "/system be brief", "hello", "/clear")
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    assert talk(llm, "/system be brief", "/system off").messages == []


def test_quit_ends_and_what_follows_is_not_read(llm: LLM) -> None:
    for leave in ("/quit", "/exit"):
        assert talk(llm, leave, "hello").messages == []


def test_a_path_is_not_a_command(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(llm, "/etc/hosts is what?").messages[0]["content"] == "/etc/hosts is what?"
    assert talk(llm, "/nope").failures == 1
    assert "error: /nope: no such command; /help lists them\n" in capsys.readouterr().err


def test_every_command_is_explained(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    talk(llm, "/help")
    text = capsys.readouterr().err
    for command in ("/help", "/system TEXT", "/load FILE", "/clear", "/save FILE", "/stats", "/quit", "Ctrl-C"):
        assert command in text


def test_stats(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    talk(llm, "/stats", "hello", "/stats")
    text = capsys.readouterr().err
    assert "context   0 of 256 tokens" in text
    assert f"context   {len(llm.current.tokens)} of 256 tokens" in text
    assert "reuse     nothing read before" in text


# -- documents ---------------------------------------------------------------------------------------------------------


def test_a_document_goes_before_the_next_message_only(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a b.txt").write_text("the hello\n\n")
    chat = talk(llm, f"/load {tmp_path}/a b.txt", f'/load "{tmp_path}/a b.txt"', "who?", "and?")
    contents = [message["content"] for message in chat.messages if message["role"] == "user"]
    assert contents == ["the hello\n\nthe hello\n\nwho?", "and?"]
    size = len(llm.tokenizer.encode("the hello\n\n", add_bos=False))
    assert f"a b.txt: {size} tokens read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"bad \xff byte", "byte 4 (0xff) is not valid UTF-8"),
        (b" \n", "no text in it"),
        (b"hello " * 2000, "not loaded; load a part of it, or start with --ctx"),
        (b"x" * (1 << 19), "more than 256 KiB"),
    ],
)
def test_documents_that_cannot_be_loaded_leave_the_chat_as_it_was(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, part: str
) -> None:
    (tmp_path / "d.txt").write_bytes(content)
    chat = talk(llm, f"/load {tmp_path}/d.txt", "hello")
    assert part in capsys.readouterr().err
    assert (chat.failures, chat.messages[0]["content"]) == (1, "hello")


def test_load_wants_a_file_that_is_there(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(llm, "/load", f"/load {tmp_path}/none.txt", f"/load {tmp_path}", '/load "open', "hello")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == chat.failures == 4
    for line, part in zip(errors, ("no file named", "No such file", "Is a directory", "not closed"), strict=True):
        assert part in line


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_full_context_is_said_and_nothing_is_dropped(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    long = "hello world " * 300
    chat = talk(llm, "hello", long, "again")
    said = capsys.readouterr().err
    error = re.search(r"error: the conversation would take (\d+) tokens, the context holds 256.*", said)
    assert error and int(error[1]) > 600
    assert "/clear" in error[0] and "--ctx 2k" in error[0]
    contents = [message["content"] for message in chat.messages if message["role"] == "user"]
    assert contents == ["hello", "again"]
    assert len(chat.answers) == 2


def test_an_answer_that_the_context_or_the_limit_cuts_says_so(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    source = Lines("hello " * 9)
    llm.tokenizer.stop_ids = frozenset()  # nothing but the context ends the answer
    Chat(llm, settings(None), source, Screen(), None).run()
    assert "cut: the context of 256 tokens is full" in capsys.readouterr().err
    talk(llm, "hello")
    assert "cut by --max-tokens 8 (-1: no limit)" in capsys.readouterr().err


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def test_ctrl_c_in_an_answer_keeps_what_there_is(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    whole = talk(llm, "hello").answers[0].text
    llm.reset()
    chat = talk(llm, "hello", "world", screen=Interrupting(2))
    partial = chat.messages[1]["content"]
    assert partial and whole.startswith(partial) and partial != whole
    assert len(chat.answers) == 2
    assert chat.answers[1].usage.completion_tokens > 2
    assert " · stopped\n" in capsys.readouterr().err


def test_ctrl_c_while_the_prompt_is_read_drops_the_message(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attend, calls = llm.engine.ops.attend, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attend(*args, **options)

    monkeypatch.setattr(llm.engine.ops, "attend", interrupted)
    chat = talk(llm, "hello", "world")
    assert [message["content"] for message in chat.messages if message["role"] == "user"] == ["world"]
    assert "the message was not kept" in capsys.readouterr().err


# -- /save -------------------------------------------------------------------------------------------------------------


def test_save_json_and_markdown(llm: LLM, tmp_path: Path) -> None:
    chat = talk(
        llm, "hello wörld", f"/save {tmp_path}/talk.json", "more", f"/save {tmp_path}/talk.json", system="brief"
    )
    data = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert data == {"model": "tiny", "messages": chat.messages}
    talk(llm, "hello wörld", f"/save {tmp_path}/talk.md", system="brief")
    text = (tmp_path / "talk.md").read_text(encoding="utf-8")
    assert text.startswith("# Chat with tiny\n\n## System\n\nbrief\n\n## User\n\nhello wörld\n\n## Assistant\n\n")


def test_save_overwrites_nothing_foreign_and_leaves_no_parts(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.md").write_text("mine")
    chat = talk(
        llm,
        "hello",
        "/save",
        f"/save {tmp_path}/mine.md",
        f"/save {tmp_path}/x.txt",
        f"/save {tmp_path}/none/x.md",
        "bye",
    )
    assert chat.failures == 4
    assert (tmp_path / "mine.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.md"]
    assert len(chat.answers) == 2
    assert f"{tmp_path}/none" in capsys.readouterr().err


# -- in a pipe ---------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_the_answers_and_nothing_else(tiny: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    text = slimrt.load(tiny).chat(messages, max_tokens=6, repeat_penalty=1.05).text
    result = in_pipe(tiny, "hello\n")
    assert result.exit_code == 0
    assert result.stdout == text + "\n" * (not text.endswith("\n"))
    assert "TTFT" in result.stderr and "\x1b" not in result.stderr and "━" not in result.stderr


def test_errors_in_a_pipe_give_status_1_and_the_chat_goes_on(tiny: Path) -> None:
    result = in_pipe(tiny, b"/nope\nbad \xff line\n/load /none\nhello\n")
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "line 2 of the input: byte 4 (0xff) is not valid UTF-8" in errors[1]
    assert result.stdout != ""


def test_json_collects_the_conversation(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("the world")
    result = in_pipe(tiny, "hello\nmore\n", "--json", "--file", str(tmp_path / "d.txt"), "--system", "brief")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert [message["role"] for message in data["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert data["messages"][1]["content"] == "the world\n\nhello"
    assert [answer["text"] for answer in data["answers"]] == [m["content"] for m in data["messages"][2::2]]


def test_a_document_that_is_not_there_ends_the_start(tiny: Path) -> None:
    result = in_pipe(tiny, "hello\n", "--file", "none.txt")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: none.txt: No such file or directory; name a text file that can be read\n"


def test_a_saved_conversation_goes_on_without_being_read_again(llm: LLM, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.slim"
    first = talk(llm, "hello", f"/save {file}", "and then?")
    other = slimrt.load(tiny, ctx=256, prune="off")
    second = talk(other, f"/restore {file}", "and then?")
    assert second.messages == first.messages
    assert second.answers[0].timings.reused_tokens == first.answers[1].timings.reused_tokens > 0
    assert talk(other, f"/restore {tmp_path / 'none.slim'}").failures == 1


def test_a_full_context_goes_on_where_it_is_told_to(tiny: Path) -> None:
    lines = "tell me a story about a crow\n" * 9
    refused = in_pipe(tiny, lines, "--ctx", "160")
    assert refused.exit_code == 1 and "--overflow shift" in refused.stderr
    shifted = in_pipe(tiny, lines, "--ctx", "160", "--overflow", "shift")
    assert shifted.exit_code == 0 and "messages were dropped" in shifted.stderr
