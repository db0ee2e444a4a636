"""Generation as a generator: prefill, then one token at a time, stop strings and byte-safe text."""

from __future__ import annotations

import asyncio
import difflib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from slimrt.config import SamplingConfig
from slimrt.drafting.drawing import Drawing, Guesses, check_draft
from slimrt.engine import Progress
from slimrt.errors import SettingError
from slimrt.prune.plan import PrunePlan
from slimrt.request import Draft, GenerationRequest, Overflow, check_overflow
from slimrt.results import Completion, FinishReason, Timings, TokenLogprob, Usage
from slimrt.sampler import LogitsProcessor, Sampler
from slimrt.sampling.dry import dry_breakers
from slimrt.session import Reading, Session
from slimrt.structured import guide as guides
from slimrt.structured.grammar import Grammar, Schema, grammar_of
from slimrt.text.tokenizer import Tokenizer

__all__ = [
    "BEGINS",
    "CompletionStream",
    "GenerateOptions",
    "GenerationRequest",
    "Overflow",
    "Step",
    "check_overflow",
    "generate_tokens",
]

log = logging.getLogger(__name__)

BEGINS = 64  # tokens of a prompt by which people know it


@dataclass(frozen=True)
class Step:
    """One step of a generation.

    ``token`` is None where the step only ends the text. ``text`` is what has become safe to show: complete UTF-8 that
    is not the beginning of a stop string. ``finish_reason`` is set on the last step. ``dropped``: tokens that left the
    full context before this one was drawn. ``complete``: on the last step of an answer that is bound to a grammar,
    whether it is whole.
    """

    token: int | None
    text: str = ""
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    dropped: int = 0
    complete: bool | None = None


def _sampler_of(request: GenerationRequest, tokenizer: Tokenizer, vocab_size: int) -> Sampler:
    """What draws the tokens of an answer; ``vocab_size``: of the logits."""
    sampling = request.sampling
    breakers = dry_breakers(sampling.dry_sequence_breakers, tokenizer) if sampling.dry_multiplier else None
    return Sampler(sampling, vocab_size, request.processors, breakers)


def generate_tokens(
    session: Session,
    tokenizer: Tokenizer,
    request: GenerationRequest,
    plan: PrunePlan | None = None,
    revision: int | None = None,
    count: Guesses | None = None,
    begun: Callable[[Drawing], None] | None = None,
) -> Generator[Step, None, None]:
    """Draw tokens from ``session``, which has read the prompt, until a stop; the last step carries the reason.

    A token joins the session when the next one is asked for, so an abandoned generator leaves no half-done work; tokens
    that were guessed and drawn are in it before, and leave it where the generator ends before them.
    ``plan`` prunes what is read anew when the context shifts. ``revision``: the session's after the prompt (None: its
    present one). ``count`` counts guesses; ``begun`` is given what draws, to ask it what it will read next. Raises
    SettingError if the session is moved on by another call meanwhile, for a grammar as
    ``slimrt.structured.guide.start`` does, and where guessing was asked for and cannot be.
    """
    guide = None
    if request.grammar is not None:
        guide = guides.start(request.grammar, tokenizer, session.engine.config.vocab_size)
    stops = frozenset() if request.ignore_eos else tokenizer.stop_ids
    sampler = _sampler_of(request, tokenizer, session.engine.config.vocab_size)
    drawing = Drawing(session, request, sampler, guide, stops, plan, revision, count)
    if begun is not None:
        begun(drawing)
    decoder = tokenizer.stream_decoder(shown=request.shown)
    held = _StopStrings(request.stop)
    drawn = 0
    while request.max_tokens is None or drawn < request.max_tokens:
        turn = drawing.turn(None if request.max_tokens is None else request.max_tokens - drawn)
        if turn is None:
            break
        dropped = turn.dropped
        for one in turn.written:
            drawn += 1
            text = held.push(decoder.push(one.token))
            if held.stopped:
                drawing.take_back(one)
                yield Step(one.token, text, one.logprob, "stop", dropped, None if guide is None else False)
                return
            try:
                yield Step(one.token, text, one.logprob, None, dropped)
            except GeneratorExit:
                drawing.take_back(one)
                raise
            dropped = 0
        if turn.ended:
            text = held.push(decoder.flush()) + held.flush()
            yield Step(None, text, None, "stop", dropped, None if guide is None else not held.stopped)
            return
        if guide is not None and guide.done:
            break
    # The last token asked for is not read: nothing is drawn after it.
    text = held.push(decoder.flush()) + held.flush()
    ended = held.stopped or (guide is not None and guide.done)
    complete = None if guide is None else guide.complete and not held.stopped
    yield Step(None, text, None, "stop" if ended else "length", 0, complete)


class _StopStrings:
    """Passes text on, but holds back what may turn out to be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.stopped = stops, "", False

    def push(self, text: str) -> str:
        self.held += text
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            text, self.held = self.held[: min(found)], ""
            return text
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for length in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-length:]) for stop in self.stops):
                text, self.held = self.held[:-length], self.held[-length:]
                return text
        return self.flush()

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


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
            self.session.keep(len(self.ids), self.tokenizer.decode(self.ids[:BEGINS]))
        on_end, self.on_end = self.on_end, None
        if on_end is not None and written:
            on_end("".join(self.pieces))

    @property
    def completion(self) -> Completion:
        """The text so far, whole once the iteration has ended."""
        reading = self.reading or Reading(0, "")
        written, decoding = len(self.tokens), self.last - self.first
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

    def finished(self) -> Completion:
        """Run to the end; returns the completion. Nobody else moves the session on meanwhile."""
        with self._lock, self._writing.session.lock:
            for _ in self._pieces_left:
                pass
            return self.completion


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of ``LLM.generate`` that say how far to generate and how; see ``LLM.stream``."""

    max_tokens: int | None
    stop: str | Sequence[str] | None
    logits_processors: Sequence[LogitsProcessor]
    logprobs: int | None
    ignore_eos: bool
    overflow: Overflow | None
    n_keep: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    top_n_sigma: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    dynatemp_range: float | None
    dynatemp_exponent: float | None
    mirostat: int | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: Sequence[str] | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    penalty_last_n: int | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    schema: Schema | None
    grammar: Grammar | str | None
    draft: Draft | None


def request_from_options(overflow: Overflow, options: GenerateOptions) -> GenerationRequest:
    """Keyword arguments of ``LLM.generate`` -> GenerationRequest; unknown ones are refused.

    ``overflow``: what holds where the options do not say.
    """
    known = GenerateOptions.__annotations__
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise SettingError(f"unknown option '{name}'; {hint}")
    sampling = {
        name: value
        for name, value in options.items()
        if name in SamplingConfig.__dataclass_fields__ and value is not None
    }
    stop = options.get("stop")
    processors = options.get("logits_processors") or ()
    if callable(processors):
        raise SettingError("logits_processors: must be a list of callables; put the one into [ ]")
    return GenerationRequest(
        max_tokens=options.get("max_tokens", 128),
        sampling=replace(SamplingConfig(), **sampling),  # type: ignore[arg-type]
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        processors=tuple(processors),
        logprobs=options.get("logprobs"),
        ignore_eos=options.get("ignore_eos", False),
        overflow=options.get("overflow") or overflow,
        n_keep=options.get("n_keep"),
        grammar=grammar_of(options.get("schema"), options.get("grammar")),
        draft=options.get("draft", "auto"),
    )
