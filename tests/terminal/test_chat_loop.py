"""The chat: what it keeps of a conversation, what it says when something goes wrong, on pipes and on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import slimrt
from click_cli import cli
from slimrt.config import SamplingConfig
from slimrt.context import Progress
from slimrt.llm import LLM
from slimrt.output import human_bytes
from slimrt.session import Session
from slimrt.terminal import reading_on
from slimrt.terminal.chat import Chat
from slimrt.terminal.line_input import read_message
from slimrt.terminal.options import AnswerSettings
from slimrt.terminal.screen import Screen
from slimrt.terminal.wrap import WordWrap
from tests.terminal_notes import without_backend_note
from tests.tiny_gguf import write_tiny_llama


class Lines:
    """Input from a list; an exception in it is raised."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines: list[str | type[BaseException]] = list(lines)
        self.prompts: list[str] = []

    def read(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = self._lines.pop(0) if self._lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    def close(self) -> None:
        pass


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


def settings(max_tokens: int | None = 8) -> AnswerSettings:
    return AnswerSettings(SamplingConfig(), max_tokens, ())


def talk(llm: LLM, *lines: str | type[BaseException], screen: Screen | None = None, system: str | None = None) -> Chat:
    chat = Chat(llm, settings(), Lines(*lines), screen or Screen(), system)
    chat.run()
    return chat


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


# -- while it waits ----------------------------------------------------------------------------------------------------

CUTS = slimrt.PrunePlan(
    stages=(slimrt.Stage(1, 0.5), slimrt.Stage(2, 0.25)), block=8, unit=4, query_window=4, min_tokens=32, questions=9
)  # fmt: skip


class Thinking(Lines):
    """A user who writes the next message when ``until`` says so."""

    def __init__(self, until: Callable[[], bool], *lines: str | type[BaseException]) -> None:
        super().__init__(*lines)
        self._until = until

    def read(self, prompt: str) -> str:
        end = time.monotonic() + 60
        while not self._until() and time.monotonic() < end:
            time.sleep(0.005)
        return super().read(prompt)


@pytest.fixture
def cutting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr(reading_on, "LEAST", 100)
    path = write_tiny_llama(tmp_path / "tiny.gguf", n_layers=4, ctx=1024)
    return slimrt.load(path, device="numpy", prune=CUTS, threads=1)


def test_the_rest_of_a_document_is_read_while_the_chat_waits(cutting: LLM) -> None:
    chat: Chat

    def rested() -> bool:
        return not chat._talk.incomplete

    document = "the world hello there " * 30
    chat = Chat(cutting, settings(), Thinking(rested, document, "and", "then"), Screen(), None, reads_on=True)
    chat.run()
    first, *later = (answer.timings for answer in chat.answers)
    assert len(first.stages) == 2 and not any(timings.stages for timings in later) and len(later) == 2
    assert all("read whole before" in timings.dense_note for timings in later)
    assert cutting.engine.turn is None
    plain = Chat(cutting, settings(), Lines(document, "and"), Screen(), None)
    plain.run()
    assert plain.answers[1].timings.stages  # not so where nobody said that it may


@pytest.mark.parametrize("ends", [KeyboardInterrupt, None], ids=["ctrl-c", "a message"])
def test_a_message_ends_it_at_once_and_costs_nothing(
    cutting: LLM, monkeypatch: pytest.MonkeyPatch, ends: type[BaseException] | None
) -> None:
    at, complete, ended = threading.Event(), Session.complete, []

    def completes(session: Session, progress: Progress) -> int:
        def slowly(done: int, total: int) -> None:
            at.set()
            while done == 3:  # the second cut is passed: nothing but a message ends this
                progress(done, total)
                time.sleep(0.001)

        try:
            return complete(session, slowly)
        finally:
            ended.append(len(session.tokens))

    monkeypatch.setattr(Session, "complete", completes)
    document = "the world hello there " * 30
    lines = [document, *([ends] if ends else []), "and", "/quit"]
    screen = Screen(interactive=False)
    screen.interactive = ends is not None  # where Ctrl-C is a remark, not the end
    monkeypatch.setattr("slimrt.terminal.chat.quiet_keyboard", contextlib.nullcontext)
    chat = Chat(
        cutting, settings(), Thinking(lambda: at.is_set() or not chat.answers, *lines), screen, None, reads_on=True
    )
    chat.run()
    assert len(ended) == (3 if ends else 2) and chat.failures == 0
    found = chat.answers[1].timings
    assert len(found.stages) == 1 and "read the document whole before" in found.doubts[0]
    assert not any(one.name == "slimrt reads on" for one in threading.enumerate())


def test_what_fails_meanwhile_is_a_line_and_the_chat_goes_on(cutting: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fails(session: Session, progress: Progress) -> int:
        tried.append(1)
        raise MemoryError("no room")

    monkeypatch.setattr(Session, "complete", fails)
    lines = ["the world hello there " * 30, "and", "then"]
    chat = Chat(
        cutting, settings(), Thinking(lambda: bool(tried) or not chat.answers, *lines), Screen(), None, reads_on=True
    )
    chat.run()
    assert len(chat.answers) == 3 and chat.failures == 1 and len(tried) == 1


# -- on a terminal -----------------------------------------------------------------------------------------------------


class Terminal:
    """A chat in a pseudo-terminal of 80 columns."""

    def __init__(self, master: int) -> None:
        self._master = master
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def press(self, key: str, pattern: str) -> str:
        """Press ``key`` until it has worked: readline misses a signal that comes just before it waits for input."""
        for _ in range(20):
            self.type(key)
            with contextlib.suppress(AssertionError):
                return self.wait(pattern, timeout=3)
        raise AssertionError(f"{key!r} did not bring {pattern!r}: {self.screen!r}")

    def wait(self, pattern: str, timeout: float = 60) -> str:
        """Read until ``pattern`` is on the screen, and take off what led to it."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.screen)):
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.screen!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                self.screen += os.read(self._master, 65536).decode(errors="replace")
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before


@contextmanager
def terminal(
    model: Path, state: Path, *flags: str, toolkit: bool = True
) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    master, slave = pty.openpty()
    hide = "" if toolkit else "sys.modules['prompt_toolkit'] = None; "
    code = f"import sys; {hide}import click_cli; click_cli.main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "chat", "-m", str(model), "-c", "64k", "--prune", "off", *flags],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=_own_terminal,
        env=os.environ
        | {"TERM": "xterm", "COLUMNS": "80", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(state)},
    ) as process:  # fmt: skip
        os.close(slave)
        try:
            yield Terminal(master), process
        finally:
            process.kill()
            os.close(master)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches the chat as a signal


@pytest.mark.parametrize("toolkit", [True, False], ids=["prompt_toolkit", "readline"])
def test_ctrl_c_stops_the_answer_and_not_the_program(tiny: Path, tmp_path: Path, toolkit: bool) -> None:
    if toolkit:
        pytest.importorskip("prompt_toolkit")
    endless = ["-n", "-1", "--logit-bias", "36=1000"]  # "!" for ever
    with terminal(tiny, tmp_path, *endless, toolkit=toolkit) as (screen, process):
        start = screen.wait("/quit leaves")
        assert "memory up to" in start
        screen.wait(">")
        screen.press("\x03", "Ctrl-D or /quit leaves")
        screen.type("hello \\\rthere\r")
        screen.wait("!!!!")
        screen.type("/help\r\x03")  # the line typed meanwhile is not shown among the answer
        assert "/help" not in screen.wait("stopped")
        screen.wait(">")
        screen.type("/stats\r")
        screen.wait("messages  2")
        screen.wait(">")
        screen.type("\x04")
        assert process.wait(timeout=30) == 0
    history = (tmp_path / "slimrt" / ("chat_history" if toolkit else "chat_history.readline")).read_text()
    assert "hello \\" in history and "there" in history


def test_a_state_folder_that_cannot_be_made_costs_the_history_only(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with terminal(tiny, tmp_path / "file", "-n", "4") as (screen, process):
        screen.wait("input history is not kept")
        screen.type("hello\r")
        screen.wait("TTFT")
        screen.wait(">")
        screen.type("/quit\r")
        assert process.wait(timeout=30) == 0


# -- the screen --------------------------------------------------------------------------------------------------------


def test_long_lines_break_between_words_whatever_the_pieces() -> None:
    code = "```\na very long line of code stays\n```\n"
    text = f"The quick brown fox\n\n{code}jumps  over 東京東京東京 the lazy-bones-of-a-dog  "
    expected = f"The quick\nbrown fox\n\n{code}jumps\nover 東京\n東京東京\nthe\nlazy-bones-of-a-dog  "
    for size in (1, 2, 3, 7, 100):
        wrap = WordWrap(lambda: 10)
        out = "".join(wrap.push(text[at : at + size]) for at in range(0, len(text), size)) + wrap.flush()
        assert out == expected, size


def test_text_without_blanks_is_not_held_back() -> None:
    for text in ("!" * 50, "東京" * 20):
        wrap = WordWrap(lambda: 10)
        shown = "".join(wrap.push(character) for character in text)
        assert len(shown.replace("\n", "")) >= len(text) - 10


def test_sizes_are_written_for_people() -> None:
    assert [human_bytes(n) for n in (5, 2048, 98_362_432, 513 << 20, 24 << 30, 5 << 40)] == [
        "5 B", "2.0 KiB", "93.8 MiB", "513 MiB", "24.0 GiB", "5.0 TiB"
    ]  # fmt: skip


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
