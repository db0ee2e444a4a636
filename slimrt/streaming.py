"""A generation as a stream: pieces of text as they come, and the whole with what it cost."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from typing import NoReturn

from slimrt.context import Progress
from slimrt.drafting.drawing import Guesses, check_draft
from slimrt.errors import SettingError
from slimrt.generation import first_words, generate_tokens
from slimrt.prune.plan import PrunePlan
from slimrt.request import GenerationRequest
from slimrt.results import Completion, FinishReason, Timings, TokenLogprob, Usage
from slimrt.reuse import Reading
from slimrt.session import Session
from slimrt.structured import guide as guides
from slimrt.text.tokenizer import Tokenizer

__all__ = ["CompletionStream"]

log = logging.getLogger(__name__)


class _Writing:
    """What a stream has read and written. The generator that writes holds this and not the stream, so that dropping the
    stream ends it at once."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        request: GenerationRequest,
        plan: PrunePlan | None,
        progress: Progress | None,
        note: str,
        on_end: Callable[[str], None] | None,
    ) -> None:
        self.note = note
        self.session, self.tokenizer, self.ids, self.request = session, tokenizer, ids, request
        self.plan, self.progress, self.on_end = plan, progress, on_end
        self.reading: Reading | None = None
        self.fetched = session.fetched  # before the text
        self.revision = 0  # of the session, after the prompt
        self.begun = self.first = self.last = 0.0
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.reason: FinishReason = "length"
        self.complete = None if request.grammar is None else False
        self.dropped = 0
        self.guesses = Guesses()
        self.interrupted = False

    def read(self) -> None:
        """Read the prompt, once."""
        if self.reading is None:
            self.begun = time.perf_counter()
            with self.session.lock:
                reading = self.session.prefill(self.ids, self.plan, progress=self.progress)
                self.revision, self.reading = self.session.revision, reading
                self.fetched = self.session.fetched

    def run(self) -> Generator[str, None, None]:
        """The pieces of text."""
        try:
            yield from self._texts()
        except GeneratorExit:
            self.end(written=bool(self.pieces))
            raise
        except KeyboardInterrupt:  # wherever it struck; the generator is over, ``close`` decides what becomes of it
            self.interrupted = True
            raise
        self.end(written=True)

    def _texts(self) -> Generator[str, None, None]:
        self.read()
        for step in generate_tokens(self.session, self.tokenizer, self.request, self.plan, self.revision, self.guesses):
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.dropped += step.dropped
            if step.token is not None:
                self.tokens.append(step.token)
            if step.logprob is not None:
                self.logprobs.append(step.logprob)
            if step.finish_reason is not None:
                self.reason, self.complete = step.finish_reason, step.complete
            if step.text:
                self.pieces.append(step.text)
                yield step.text

    def end(self, *, written: bool) -> None:
        """Nothing more will be written."""
        if log.isEnabledFor(logging.INFO):
            done = self.completion
            log.info(
                "prompt %d tokens (%d reused; kept %s), first token %.2f s, answer %d tokens at %.1f tokens/s, %s",
                done.usage.prompt_tokens,
                done.timings.reused_tokens,
                " > ".join(map(str, done.timings.stages)) or "all",
                done.timings.ttft_s,
                done.usage.completion_tokens,
                done.timings.decode_tok_s,
                done.finish_reason,
            )
        if self.reading is not None and written:
            # After the answer: what was read of its prompt is kept for others.
            self.session.keep(len(self.ids), first_words(self.tokenizer, self.ids))
        on_end, self.on_end = self.on_end, None
        if on_end is not None and written:
            on_end("".join(self.pieces))

    @property
    def completion(self) -> Completion:
        """The text so far, whole once the iteration has ended."""
        reading = self.reading or Reading(0, "")
        written, decoding = len(self.tokens), self.last - self.first
        fetched = self.session.fetched.since(self.fetched)
        return Completion(
            text="".join(self.pieces),
            tokens=list(self.tokens),
            finish_reason=self.reason,
            usage=Usage(len(self.ids), written),
            timings=Timings(
                ttft_s=self.first - self.begun if self.first else 0.0,
                decode_tok_s=(written - 1) / decoding if written > 1 and decoding > 0 else 0.0,
                stages=reading.stages,
                kv_bytes_device=self.session.kv_bytes_device,
                kv_bytes_host=self.session.kv_bytes_host,
                kv_bytes_fetched=fetched.nbytes,
                kv_bytes_in_time=fetched.in_time,
                kv_waits=fetched.waits,
                reused_tokens=reading.reused,
                reuse_note="; ".join(part for part in (self.note, reading.note, self._shift_note) if part),
                windowed_tokens=reading.windowed,
                dense_note=reading.dense,
                doubts=reading.doubts,
                drafted_tokens=self.guesses.made,
                accepted_tokens=self.guesses.right,
            ),
            logprobs=None if self.request.logprobs is None else list(self.logprobs),
            complete=self.complete,
        )

    @property
    def _shift_note(self) -> str:
        if not self.dropped:
            return ""
        return f"the context filled up while the text was written: {self.dropped} tokens of it were dropped"


class CompletionStream:
    """Pieces of text as they come; ``completion`` holds the whole once the iteration is over (or was closed).

    The prompt is read when the first piece is asked for, or by ``read_prompt``. ``for piece in stream`` iterates;
    ``async for piece in stream`` leaves the event loop free meanwhile. Several threads may share a stream:
    each piece goes to one of them.

    Closing it (also by leaving the loop and dropping it) stops the generation. ``note``: what was done to the prompt
    before, for the timings. ``on_end`` is called with the text when it is complete, or when it is closed after some was
    written; not after an exception, but for Ctrl-C where the caller then closes the stream.

    Raises what ``Session.prefill`` raises for a prompt that cannot be read.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        request: GenerationRequest,
        plan: PrunePlan | None = None,
        progress: Progress | None = None,
        *,
        note: str = "",
        on_end: Callable[[str], None] | None = None,
    ) -> None:
        if request.n_keep is not None and request.n_keep >= session.ctx:
            raise SettingError(f"n_keep {request.n_keep}: must be less than the context, {session.ctx}")
        session.check(ids)
        check_draft(request, session)
        if request.grammar is not None:  # one that cannot be followed is refused before the prompt is read
            guides.start(request.grammar, tokenizer, session.engine.config.vocab_size)
        self._writing = _Writing(session, tokenizer, list(ids), request, plan, progress, note, on_end)
        self._pieces_left = self._writing.run()
        self._lock = threading.RLock()

    def read_prompt(self) -> None:
        """Read the prompt now, if it was not read yet; raises as the first piece would."""
        with self._lock:
            self._writing.read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with self._lock:
            return next(self._pieces_left)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        piece: str | None = await asyncio.to_thread(next, self, None)
        if piece is None:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Stop generating; ``completion`` then holds the text so far. A piece that another thread waits for comes
        first."""
        with self._lock:
            self._pieces_left.close()
            if self._writing.interrupted:
                self._writing.interrupted = False
                self._writing.end(written=bool(self._writing.pieces))

    async def aclose(self) -> None:
        """``close``, without holding up the event loop."""
        await asyncio.to_thread(self.close)

    @property
    def completion(self) -> Completion:
        """The text so far, whole once the iteration has ended."""
        return self._writing.completion

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SettingError("a stream cannot be pickled or copied; its completion, when it has ended, can")

    def finished(self) -> Completion:
        """Run to the end; returns the completion. Nobody else moves the session on meanwhile."""
        with self._lock, self._writing.session.lock:
            for _ in self._pieces_left:
                pass
            return self.completion
