"""``slimrt chat``: the loop, its commands, and what it keeps of the conversation."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from slimrt.errors import ContextError, SettingError, SlimrtError
from slimrt.llm import LLM
from slimrt.memory.resident import resident_bytes
from slimrt.output import human_bytes, write_atomically
from slimrt.paths import user_path
from slimrt.results import Completion
from slimrt.streaming import CompletionStream
from slimrt.terminal.answer import cut_note, larger_context, stream_answer
from slimrt.terminal.guard import one_line
from slimrt.terminal.line_input import LineInput, read_message
from slimrt.terminal.options import AnswerSettings
from slimrt.terminal.reading_on import ReadingOn
from slimrt.terminal.screen import Screen, quiet_keyboard, stats_line
from slimrt.terminal.text_input import join_document, read_document, size_limit

__all__ = ["Chat"]

_COMMAND = re.compile(r"^/([a-z?]+)(?:\s+(.*))?$", re.DOTALL)  # "/etc/hosts is what?" is a message, not a command

_ROOM = 1024  # tokens for an answer
_RETRY_TEMPERATURE = 0.8

HELP = '''\
/help            this text
/load FILE       read a document; it goes before your next message
/system TEXT     set the system prompt (/system shows it, off removes it)
/retry           take the last answer back and ask again
/clear           forget the conversation and loaded documents
/save FILE       write the conversation to FILE.json or FILE.md, or all that was read to FILE.slim
/restore FILE    go on with the conversation in FILE.slim, without reading it again
/stats           context, speed and memory
/quit            leave (exit and Ctrl-D do too)
several lines    end a line with \\, or write """ before and after{newline}
Ctrl-C           stops an answer'''


class Chat:
    """A conversation in the terminal.

    Whatever goes wrong is one line, and the conversation is then as it was before. ``reads_on``: while it waits for a
    message, what cuts left unread of a document is read.
    """

    def __init__(
        self,
        llm: LLM,
        settings: AnswerSettings,
        source: LineInput,
        screen: Screen,
        system: str | None,
        *,
        reads_on: bool = False,
    ) -> None:
        self._llm, self._settings, self._source, self._screen = llm, settings, source, screen
        self._talk = llm.session(system=system)
        self._reading_on = ReadingOn(llm, self._talk) if reads_on else None
        self._documents: list[tuple[str, str]] = []  # (name, text), waiting for the next message
        self._written: set[Path] = set()  # files that /save made, and may replace
        self._open = True
        self.answers: list[Completion] = []
        self.failures = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help, "load": self.load, "system": self._set_system, "clear": self._clear, "save": self._save,
            "retry": self._retry,
            "restore": self.restore, "stats": self._stats, "quit": self._quit, "exit": self._quit, "?": self._help,
        }  # fmt: skip

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, system prompt first, as ``LLM.chat`` takes it."""
        system = [{"role": "system", "content": self._talk.system}] if self._talk.system else []
        return [*system, *self._talk.messages]

    def run(self) -> None:
        """Read and answer until the input ends or /quit."""
        while self._open:
            try:
                text = self._next_message()
                self._handle(text)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._screen.interactive:
                    raise
                self._screen.remark("(Ctrl-C stops an answer; Ctrl-D or /quit leaves)")
            except UnicodeDecodeError:
                self._fail("that line is not valid UTF-8; set the terminal to UTF-8")
            except (SlimrtError, OSError, MemoryError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                self._fail(one_line(error))

    def _next_message(self) -> str:
        if self._reading_on is None:
            return read_message(self._source.read)
        try:
            with self._reading_on.meanwhile():
                return read_message(self._source.read)
        finally:
            if error := self._reading_on.failed():
                self._fail(f"the rest of the document could not be read meanwhile: {one_line(error)}")

    def _fail(self, text: str) -> None:
        self.failures += 1
        self._screen.error(text)

    def _handle(self, text: str) -> None:
        command = _COMMAND.match(text.strip())
        if command is None:
            if text.strip() in ("exit", "quit"):
                self._quit("")
            elif text.strip():
                self._ask(text)
            return
        name, argument = command[1], (command[2] or "").strip()
        if name not in self._commands:
            raise SettingError(f"/{name}: no such command; /help lists them")
        self._commands[name](argument)

    # -- messages ---------------------------------------------------------------------------------------------------

    def _ask(self, text: str, settings: AnswerSettings | None = None, *, with_documents: bool = True) -> None:
        settings = settings or self._settings
        content = text
        if self._documents and with_documents:
            content = join_document("\n\n".join(document.rstrip() for _, document in self._documents), text)
        tokens = self._checked_length([*self.messages, {"role": "user", "content": content}])

        def begin(**options: Any) -> CompletionStream:
            return self._talk.ask(content, stream=True, **options)

        try:
            with quiet_keyboard() if self._screen.interactive else nullcontext():
                answer = stream_answer(begin, tokens, settings, self._screen)
        except KeyboardInterrupt:
            self._screen.remark("(stopped before the answer; the message was not kept)")
            return
        completion = answer.completion
        if with_documents:
            self._documents.clear()
        self.answers.append(completion)
        cut = "stopped" if answer.stopped else cut_note(self._llm, completion, settings)
        self._screen.remark(stats_line(completion, compiled=answer.compiled) + (f" · {cut}" if cut else ""))
        if self._llm.overflow == "shift" and "full" in completion.timings.reuse_note:
            self._screen.remark(completion.timings.reuse_note)
        if self._screen.interactive:
            self._screen.remark("")

    def _checked_length(self, messages: list[dict[str, Any]]) -> int:
        """The messages' tokens; raises ContextError if they leave no room for an answer, and none is to be made."""
        tokens, ctx = len(self._llm.chat_tokens(messages)), self._llm.ctx
        if tokens >= ctx and self._llm.overflow == "error":
            larger = larger_context(self._llm, tokens + _ROOM)
            raise ContextError(
                f"the conversation would take {tokens:,} tokens, the context holds {ctx:,} with the answer; "
                f"the message was not kept; /clear starts over, or start with {larger}, or with --overflow shift"
            )
        return tokens

    def _retry(self, _: str) -> None:
        """Ask the last question again, as if its answer had not been given; a greedy chat draws for once."""
        before = list(self._talk.messages)
        if len(before) < 2 or before[-1]["role"] != "assistant":
            raise SettingError("/retry: there is no answer yet; ask something first")
        settings = self._settings
        if settings.sampling.greedy:
            settings = dataclasses.replace(
                settings, sampling=dataclasses.replace(settings.sampling, temperature=_RETRY_TEMPERATURE)
            )
            self._screen.remark(f"(drawn at temperature {_RETRY_TEMPERATURE:g}: at 0 the same answer would come again)")
        self._talk.messages = before[:-2]
        answers = len(self.answers)
        try:
            self._ask(before[-2]["content"], settings, with_documents=False)
        finally:
            if len(self.answers) == answers:  # nothing came of it
                self._talk.messages = before

    # -- commands ---------------------------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        from slimrt.terminal.line_input import PromptToolkitInput

        keys = "; Alt-Enter starts a new line" if isinstance(self._source, PromptToolkitInput) else ""
        self._screen.remark(HELP.format(newline=keys))

    def load(self, argument: str) -> None:
        """Read a document, to go before the next message. Raises SettingError or ContextError, and keeps nothing."""
        path = _path(argument, "/load report.txt")
        ctx = self._llm.ctx
        text = read_document(path, size_limit(ctx))
        size = len(self._llm.tokenizer.encode(text, add_bos=False))
        waiting = "\n\n".join([document for _, document in self._documents] + [text])
        used = len(self._llm.chat_tokens([*self.messages, {"role": "user", "content": waiting}]))
        if used >= ctx:
            remedy = "/clear starts over, or start" if used - size > ctx // 8 else "load a part of it, or start"
            raise ContextError(
                f"{path}: {size:,} tokens bring the conversation to {used:,}, the context holds {ctx:,}; not loaded; "
                f"{remedy} with {larger_context(self._llm, used + _ROOM)}"
            )
        self._documents.append((path.name, text))
        self._screen.remark(
            f"{path.name}: {size:,} tokens read ({used:,} of {ctx:,} in use); it goes before your next message"
        )

    def _set_system(self, text: str) -> None:
        if not text:
            self._screen.remark(
                f"system prompt: {self._talk.system}"
                if self._talk.system
                else "no system prompt; /system TEXT sets one"
            )
            return
        self._talk.system = None if text == "off" else text
        self._screen.remark("system prompt removed" if text == "off" else "system prompt set")

    def _clear(self, _: str) -> None:
        self._talk.messages.clear()
        self._talk.reset()
        self._documents.clear()
        self._screen.remark("conversation cleared" + ("; the system prompt stays" if self._talk.system else ""))

    def _save(self, argument: str) -> None:
        path = _path(argument, "/save talk.md")
        if path.suffix not in (".json", ".md", ".slim"):
            raise SettingError(f"{path}: the name must end in .json, .md or .slim, which says how to write it")
        if path.exists() and path.resolve() not in self._written:
            raise SettingError(f"{path}: exists already and is not this chat's; choose another name")
        if path.suffix == ".slim":
            self._talk.save(path)
        else:
            text = self._as_json() if path.suffix == ".json" else self._as_markdown()
            write_atomically(path, text.encode())
        self._written.add(path.resolve())
        self._screen.remark(f"{len(self._talk.messages)} messages written to {path}")

    def restore(self, argument: str) -> None:
        """Go on with the conversation in a file that ``/save FILE.slim`` wrote. Raises SessionFileError."""
        path = _path(argument, "/restore talk.slim")
        self._talk.load(path)
        self._documents.clear()
        self._written.add(path.resolve())
        held, tokens = len(self._talk.messages), len(self._talk.tokens)
        self._screen.remark(f"{held} messages restored from {path}; none of their {tokens:,} tokens is read again")

    def _as_json(self) -> str:
        return (
            json.dumps({"model": self._llm.config.name, "messages": self.messages}, ensure_ascii=False, indent=2) + "\n"
        )

    def _as_markdown(self) -> str:
        parts = [f"# Chat with {self._llm.config.name}"]
        for message in self.messages:
            parts.append(f"## {message['role'].capitalize()}\n\n{message['content'].strip()}")
        return "\n\n".join(parts) + "\n"

    def _stats(self, _: str) -> None:
        now, memory = self._talk, resident_bytes()
        lines = [
            f"context   {len(now.tokens):,} of {now.ctx:,} tokens, keys and values {human_bytes(now.kv_bytes)}",
            f"messages  {len(now.messages)}" + "".join(f", {name} waiting" for name, _ in self._documents),
            f"answers   {len(self.answers)}, {sum(a.usage.completion_tokens for a in self.answers):,} tokens",
        ]
        if self.answers:
            last = self.answers[-1]
            lines += [f"last      {stats_line(last)}", f"reuse     {last.timings.reuse_note}"]
        if memory is not None:
            lines.append(f"memory    {human_bytes(memory)}")
        self._screen.remark("\n".join(lines))

    def _quit(self, _: str) -> None:
        self._open = False

    def to_json(self) -> dict[str, Any]:
        """The conversation and what each answer cost."""
        return {
            "model": self._llm.config.name,
            "messages": self.messages,
            "answers": [dataclasses.asdict(answer) for answer in self.answers],
        }


def _path(argument: str, example: str) -> Path:
    """The file named after a command: as it is, in quotes, or with blanks escaped as a shell has them."""
    if not argument:
        raise SettingError(f"no file named; write for example {example}")
    try:
        words = shlex.split(argument)
    except ValueError:
        if argument[0] in "\"'":
            raise SettingError(f"{argument}: the quotation mark is not closed; close it or leave it out") from None
        words = []
    # A name with blanks, apostrophes or backslashes of its own needs no quotes where a file is called so.
    if len(words) == 1 and not (words[0] != argument and user_path(argument).exists()):
        return user_path(words[0])
    return user_path(argument)
