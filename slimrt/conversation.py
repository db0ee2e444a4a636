"""Questions and answers on one session, and what goes when its context is full."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, Unpack, overload

from slimrt.context import Progress
from slimrt.engine import Engine
from slimrt.errors import SettingError
from slimrt.prune.asked import Asked
from slimrt.prune.plan import PrunePlan
from slimrt.request import GenerateOptions, GenerationRequest, Overflow, request_from_options
from slimrt.results import Completion
from slimrt.reuse import common_prefix
from slimrt.session import Session
from slimrt.session_file import SavedTalk, read_session, write_session
from slimrt.streaming import CompletionStream
from slimrt.weights.gguf import GGUFFile

__all__ = ["Conversation", "Fitted", "fit_messages"]


class AskOptions(GenerateOptions, total=False):
    """The keyword arguments of ``Conversation.ask``."""

    prune: PrunePlan | str | Path | None
    progress: Progress | None


@dataclass(frozen=True)
class Fitted:
    """A chat's prompt: the messages that are left, their tokens, the request, and a note on what was left out."""

    messages: list[Mapping[str, Any]]
    ids: list[int]
    request: GenerationRequest
    note: str = ""


def fit_messages(
    tokens: Callable[[Sequence[Mapping[str, Any]]], list[int]],
    messages: Sequence[Mapping[str, Any]],
    ctx: int,
    request: GenerationRequest,
) -> Fitted:
    """``messages`` as a prompt, by the chat template's ``tokens``; with overflow "shift" no longer than ``ctx`` allows.

    If a context of ``ctx`` has no room for them and an answer (``max_tokens``, at most a quarter of the context), the
    oldest turns after the system message are dropped until a quarter is free: whole turns, so that what is left still
    begins with a question. The last question is never dropped. The request then says how many first tokens must stay if
    the answer itself fills the context.
    """
    ids = tokens(messages)
    left = list(messages)
    request = dataclasses.replace(request, chat=True)
    if request.overflow == "error":
        return Fitted(left, ids, request)
    begin = next((at for at, message in enumerate(left) if message["role"] != "system"), len(left))
    quarter = ctx // 4
    if len(ids) + min(quarter, quarter if request.max_tokens is None else request.max_tokens) > ctx:
        while len(ids) + quarter > ctx:
            turn = next((at for at in range(begin + 1, len(left)) if left[at]["role"] == "user"), None)
            if turn is None:
                break
            del left[begin:turn]
            ids = tokens(left)
    if request.n_keep is None and begin < len(left):
        head = tokens([*left[:begin], {**left[begin], "content": ""}])
        request = dataclasses.replace(request, n_keep=min(common_prefix(head, ids), ctx - 1))
    dropped = len(messages) - len(left)
    note = f"the context was full: the oldest {dropped} messages were dropped" if dropped else ""
    return Fitted(left, ids, request, note)


class Answering(Protocol):
    """What a conversation asks of the ``LLM`` that it belongs to."""

    ctx: int
    file: GGUFFile

    @property
    def asking(self) -> Callable[[Sequence[int]], Asked]:
        """Which tokens of a prompt ask."""

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """``messages`` as the model reads them."""

    def begin(
        self, ids: Sequence[int], request: GenerationRequest, *, prune: PrunePlan | str | Path | None = None,
        session: Session | None = None, progress: Progress | None = None, note: str = "",
        on_end: Callable[[str], None] | None = None,
    ) -> CompletionStream:  # fmt: skip
        """Read ``ids`` in ``session``; the stream of the text after it."""


class Conversation(Session):
    """A session that keeps its messages.

    ``messages``: the turns that the model still reads ([{"role": ..., "content": ...}]); ``system``: text before them,
    or None; ``plan``: the prune plan of its prompts (None: dense); ``overflow``: what happens when the context is full.
    As a plain session it serves wherever ``session=`` is taken; what is read that way is no message.
    """

    def __init__(
        self,
        llm: Answering,
        engine: Engine,
        *,
        system: str | None = None,
        plan: PrunePlan | None = None,
        overflow: Overflow = "error",
    ) -> None:
        super().__init__(engine, llm.ctx, llm.asking)
        if system is not None and not isinstance(system, str):
            raise SettingError(f"system message {system!r}: must be a text, or None for none")
        self.messages: list[dict[str, Any]] = []
        self.system, self.plan, self.overflow = system, plan, overflow
        self._llm = llm
        self._answer: weakref.ref[CompletionStream] | None = None  # a stream that nobody holds has ended

    @overload
    def ask(self, text: str, *, stream: Literal[False] = False, **options: Unpack[AskOptions]) -> Completion: ...
    @overload
    def ask(self, text: str, *, stream: Literal[True], **options: Unpack[AskOptions]) -> CompletionStream: ...
    def ask(self, text: str, *, stream: bool = False, **options: Unpack[AskOptions]) -> Completion | CompletionStream:
        """Answer ``text`` (documents are just text in it) as the next message, through the model's chat template.

        ``stream``: return the pieces as they come. Options: as for ``LLM.stream``. The question and its answer join
        ``messages`` when the answer is complete, or when its stream is closed after it wrote something; a further
        ``ask``, ``save`` or ``close`` closes a stream that is still open. After an exception they are as before.

        With ``overflow`` "shift" the oldest turns are dropped where the context would leave no room for an answer, and
        ``timings.reuse_note`` says so.

        Raises SettingError for bad options or an empty question, ContextError if the prompt does not fit.
        """
        if not isinstance(text, str) or not text.strip():
            raise SettingError(f"question {text!r}: must be a text that is not blank")
        self._end_answer()
        prune, progress = options.pop("prune", None), options.pop("progress", None)
        if prune is None:
            prune = "off" if self.plan is None else self.plan
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        request = request_from_options(self.overflow, options)
        question = {"role": "user", "content": text}
        fitted = fit_messages(self._llm.chat_tokens, [*system, *self.messages, question], self.ctx, request)

        this = weakref.ref(self)  # the stream holds this session, which it is not to keep alive once it was dropped

        def keep(answer: str) -> None:
            turn = [*fitted.messages[len(system) :], {"role": "assistant", "content": answer}]
            conversation = this()
            if conversation is not None:
                conversation.messages = [dict(message) for message in turn]

        answer = self._llm.begin(
            fitted.ids, fitted.request, prune=prune, session=self, progress=progress, note=fitted.note, on_end=keep
        )
        if not stream:
            return answer.finished()
        self._answer = weakref.ref(answer)
        return answer

    def _end_answer(self) -> None:
        answer = None if self._answer is None else self._answer()
        if answer is not None:
            answer.close()
        self._answer = None

    def save(self, path: str | Path) -> None:
        """Write everything to one file, whole or not at all; ``LLM.restore`` continues from it exactly.

        Raises SessionFileError where the file cannot be written, or holds something else than a session.
        """
        self._end_answer()
        write_session(path, self, self._llm.file, SavedTalk(self.messages, self.system, self.plan))

    def load(self, path: str | Path) -> None:
        """Become the conversation that ``save`` wrote; on an error it is as before. See ``LLM.restore``."""
        talk = read_session(path, self, self._llm.file)
        self._end_answer()
        self.messages, self.system, self.plan = talk.messages, talk.system, talk.plan

    def fork(self) -> Conversation:
        """A conversation of its own that goes on from here: the same messages, nothing is read again."""
        self._end_answer()
        other = Conversation(self._llm, self.engine, system=self.system, plan=self.plan, overflow=self.overflow)
        other.messages = [dict(message) for message in self.messages]
        return self._copied_into(other)

    def close(self) -> None:
        """End an open answer and give the memory back; the messages stay, and asking again reads them again."""
        self._end_answer()
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
