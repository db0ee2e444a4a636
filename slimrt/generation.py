"""Generation as a generator: prefill, then one token at a time, stop strings and byte-safe text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from slimrt.drafting.drawing import Drawing, Guesses
from slimrt.prune.plan import PrunePlan
from slimrt.request import GenerationRequest
from slimrt.results import FinishReason, TokenLogprob
from slimrt.sampler import Sampler
from slimrt.sampling.dry import dry_breakers
from slimrt.session import Session
from slimrt.structured import guide as guides
from slimrt.text.channels import Channels
from slimrt.text.tokenizer import Tokenizer

__all__ = ["Step", "first_words", "generate_tokens"]

_BEGINS = 64  # tokens of a prompt by which people know it


def first_words(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The words by which people know a prompt: its first ones, behind what a chat template sets before a message."""
    head = [int(token) for token in ids[: 2 * _BEGINS]]
    message = max((at + 1 for at, token in enumerate(head[:_BEGINS]) if not tokenizer.is_text(token)), default=0)
    return tokenizer.decode(head[message : message + _BEGINS])


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
    ``plan`` prunes what is read again when the context shifts. ``revision``: the session's after the prompt (None: its
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
    held = _Text(request.stop, Channels() if request.chat else None)
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
            text = held.push(decoder.flush()) + held.finish()
            yield Step(None, text, None, "stop", dropped, None if guide is None else not held.stopped)
            return
        if guide is not None and guide.done:
            break
    # The last token asked for is not read: nothing is drawn after it.
    text = held.push(decoder.flush()) + held.finish()
    ended = held.stopped or (guide is not None and guide.done)
    complete = None if guide is None else guide.complete and not held.stopped
    yield Step(None, text, None, "stop" if ended else "length", 0, complete)


class _Text:
    """Passes text on, but holds back what may turn out to be the beginning of a stop string; of ``channels`` what is to
    be seen."""

    def __init__(self, stops: Sequence[str], channels: Channels | None) -> None:
        self.stops, self.held, self.stopped, self._channels = stops, "", False, channels

    def push(self, text: str) -> str:
        self.held += text if self._channels is None else self._channels.push(text)
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

    def finish(self) -> str:
        """What is held back at the end."""
        return self.flush() + ("" if self._channels is None else self._channels.finish())
