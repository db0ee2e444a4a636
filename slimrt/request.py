"""What is asked of a generation: the request, and the keyword arguments that it is made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict, get_args

import numpy as np

from slimrt.config import Overflow, SamplingConfig, check_overflow, is_whole
from slimrt.errors import SettingError
from slimrt.sampler import LogitsProcessor
from slimrt.structured.grammar import Grammar, Schema, grammar_of

__all__ = ["Draft", "GenerateOptions", "GenerationRequest", "Overflow", "check_overflow", "request_from_options"]

Draft = Literal["auto", "lookup"]  # how next tokens are guessed, see GenerationRequest


@dataclass(frozen=True)
class GenerationRequest:
    """How far to generate and how. ``max_tokens`` None: until the model stops or the context is full.

    With ``overflow`` "shift" a full context does not end the text: the first ``n_keep`` tokens stay, of the others the
    older half is dropped, and what is left is read again at its new positions. A prompt that does not fit is refused
    either way. ``n_keep`` None: the system message of a chat, else 4.

    ``grammar``: what the answer must match. Tokens that it forces are read several at a time, unless
    ``one_by_one`` or ``logprobs`` want the logits before each. With ``one_by_one`` the session has read all but the
    last token that was written whenever somebody looks; nothing is guessed. ``shown``: control tokens that the text
    shows. ``chat``: the answer is a chat's; of one in channels (gpt-oss) the text has no thoughts, see
    ``slimrt.text.channels``.

    ``draft``: how next tokens are guessed; the text is the same. "auto": as the model was loaded; "lookup": by what
    stood behind the same words before; None: not at all.
    """

    max_tokens: int | None = 128
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()
    processors: tuple[LogitsProcessor, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    overflow: Overflow = "error"
    n_keep: int | None = None
    grammar: Grammar | None = None
    one_by_one: bool = False
    shown: frozenset[int] = frozenset()
    chat: bool = False
    draft: Draft | None = "auto"

    def __post_init__(self) -> None:
        check_overflow(self.overflow)
        if self.draft is not None and self.draft not in get_args(Draft):
            raise SettingError(
                f"draft {self.draft!r}: must be 'auto', 'lookup' or None; a draft model is named at load"
            )
        if self.n_keep is not None and not (is_whole(self.n_keep) and self.n_keep >= 0):
            raise SettingError(f"n_keep {self.n_keep!r}: must be a whole number of tokens, at least 0")
        if self.max_tokens is not None and not (is_whole(self.max_tokens) and self.max_tokens >= 0):
            raise SettingError(
                f"max_tokens {self.max_tokens!r}: must be a whole number, at least 0, or None for no limit"
            )
        if self.logprobs is not None and not (is_whole(self.logprobs) and self.logprobs >= 0):
            raise SettingError(
                f"logprobs {self.logprobs!r}: must be a whole number, at least 0 (how many alternatives), "
                "or None for none"
            )
        if self.grammar is not None and self.ignore_eos:
            raise SettingError("ignore_eos with a schema or grammar: an answer ends when it is whole; leave one out")
        for name in ("max_tokens", "logprobs", "n_keep"):  # NumPy's numbers count with narrow types
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, int(value))
        if not isinstance(self.ignore_eos, (bool, np.bool_)):
            raise SettingError(f"ignore_eos {self.ignore_eos!r}: must be True or False")
        for processor in self.processors:
            if not callable(processor):
                raise SettingError(f"logits_processors: {str(processor)[:40]!r} is none; each must be callable")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise SettingError(f"stop {text!r}: must be a text or a list of texts, none of them empty")


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
    if callable(processors) or not isinstance(processors, Iterable):
        raise SettingError("logits_processors: must be a list of callables; put the one into [ ]")
    given: object = stop
    if given is not None and (isinstance(given, bytes) or not isinstance(given, Iterable)):
        raise SettingError(f"stop {stop!r}: must be a text or a list of texts, none of them empty")
    return GenerationRequest(
        max_tokens=options.get("max_tokens", 128),
        sampling=replace(SamplingConfig(), **sampling),  # type: ignore[arg-type]
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        processors=tuple(processors),
        logprobs=options.get("logprobs"),
        ignore_eos=options.get("ignore_eos") or False,
        overflow=options.get("overflow") or overflow,
        n_keep=options.get("n_keep"),
        grammar=grammar_of(options.get("schema"), options.get("grammar")),
        draft=options.get("draft", "auto"),
    )
