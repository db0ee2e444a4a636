"""What a request for tools comes to: the prompt's tools, the grammar of the answer, and who reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from slimrt.errors import SettingError
from slimrt.request import GenerationRequest
from slimrt.results import Completion, FinishReason
from slimrt.streaming import CompletionStream
from slimrt.structured.grammar import Grammar
from slimrt.text.tokenizer import Tokenizer
from slimrt.tools.formats import Format
from slimrt.tools.grammar import answer_grammar, shown_tokens
from slimrt.tools.messages import ToolForm
from slimrt.tools.parser import Answer, CallParser, Delta, TextDelta, Thinking
from slimrt.tools.tool import Tool, choice_of, tools_of

__all__ = ["Calling", "ToolStream"]


@dataclass(frozen=True)
class Calling:
    """How one answer may call ``tools``; ``listed``: those that the prompt has. ``made``: makes the grammar of answers
    that are calls, or valid by a JSON schema."""

    tools: tuple[Tool, ...]
    listed: tuple[Tool, ...]
    format: Format
    grammar: Grammar
    shown: frozenset[int]
    thinking: Thinking
    made: Callable[[Grammar], Grammar]

    @classmethod
    def of(
        cls, form: ToolForm, tokenizer: Tokenizer, tools: Any, tool_choice: Any = None, parallel: bool | None = None
    ) -> Calling | None:
        """``tools``, ``tool_choice`` and ``parallel_tool_calls`` (None: as the model's template can) of a request; None
        where nothing may be called.

        Raises SettingError for tools, a choice or a schema that are none, or not supported."""
        listed = tools_of(tools)
        choice = choice_of(listed, tool_choice)
        if choice.mode == "none":
            return None
        if parallel is not None and not isinstance(parallel, bool):
            raise SettingError(f"parallel_tool_calls {str(parallel)[:80]!r}: must be true or false")
        many = form.many and (not choice.named if parallel is None else parallel)

        def made(answer: Grammar | None) -> Grammar:
            return answer_grammar(
                form.format, choice.tools, tokenizer, required=choice.mode == "required", many=many,
                thinking=form.thinking, answer=answer,
            )  # fmt: skip

        shown = shown_tokens(form.format, tokenizer)
        return cls(choice.tools, listed, form.format, made(None), shown, form.thinking, made)

    def or_valid_by(self, answer: Grammar | None) -> Calling:
        """The same where an answer without calls is bound to ``answer``. Raises SettingError for what is no JSON
        schema."""
        if answer is None:
            return self
        if answer.kind != "JSON schema":
            raise SettingError(f"tools with a {answer.kind}: beside tools answers can be bound to a JSON schema alone")
        return dataclasses.replace(self, grammar=self.made(answer))

    def bind(self, request: GenerationRequest) -> GenerationRequest:
        """``request``, its answer bound; raises as ``or_valid_by``."""
        grammar = self.or_valid_by(request.grammar).grammar
        return dataclasses.replace(request, grammar=grammar, shown=self.shown)

    def parser(self) -> CallParser:
        """A reader of one answer."""
        return CallParser(self.format, self.tools, self.thinking)

    def answer(self, text: str) -> Answer:
        """A whole answer read."""
        parser, answer = self.parser(), Answer()
        answer.take(parser.push(text))
        answer.take(parser.finish())
        return answer

    def finish_reason(self, reason: FinishReason, answer: Answer) -> FinishReason:
        """Why an answer ended: with calls, where it made some and nothing cut them."""
        return "tool_calls" if reason == "stop" and answer.calls and not answer.cut else reason


class ToolStream(CompletionStream):
    """An answer that may hold calls, as it comes. ``for piece in stream``: its text; ``deltas()``: text and calls."""

    def __init__(self, calling: Calling, *given: Any, **options: Any) -> None:
        """As CompletionStream, which it is."""
        super().__init__(*given, **options)
        self._calling, self._parser, self._ended = calling, calling.parser(), False
        self._answer = Answer()

    def deltas(self) -> Iterator[Delta]:
        """The pieces of text and of calls as they come; none twice, whether told here or as text."""
        while True:
            with self._lock:
                found = self._next()
            if found is None:
                return
            yield from found

    def _next(self) -> list[Delta] | None:
        """What the answer's next piece makes; None behind its end."""
        if self._ended:
            return None
        try:
            found = self._parser.push(super().__next__())
        except StopIteration:
            self._ended, found = True, self._parser.finish()
        self._answer.take(found)
        return found

    def __next__(self) -> str:
        with self._lock:
            while (found := self._next()) is not None:
                text = "".join(delta.text for delta in found if isinstance(delta, TextDelta))
                if text:
                    return text
            raise StopIteration

    def finished(self) -> Completion:
        """Run to the end; returns the completion. Nobody else moves the session on meanwhile."""
        with self._lock, self._writing.session.lock:
            while self._next() is not None:
                pass
            return self.completion

    @property
    def completion(self) -> Completion:
        """The answer so far, whole once the iteration has ended: its text and the calls that are whole."""
        with self._lock:
            written = self._writing.completion
            answer = self._answer if self._ended else self._calling.answer(written.text)
            return dataclasses.replace(
                written,
                text=answer.text,
                tool_calls=tuple(answer.calls),
                finish_reason=self._calling.finish_reason(written.finish_reason, answer),
            )
