"""Questions about a long text, in the shapes in which people ask them.

One or a few sentences are planted in running text; the prompt asks about them; the opening of an answer is read behind
the prompt, as if the model had written it, and what is judged is the answer's likelihood. So a plan chooses before it
sees the answer's opening, and a model too small to answer well still tells what was lost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from slimrt.errors import SettingError
from slimrt.eval.facts import Fact, draw_facts, guests, two_hops
from slimrt.eval.sample import Sample, Source, Task
from slimrt.eval.text import windows

__all__ = ["SHAPES"]

Rng = np.random.Generator

BRIEF = " Reply with one short sentence in plain words, and leave out whatever was not asked for."
RULES = (
    "\n\nWhen you reply, keep to the following:\n- Rely on the text alone; what it does not say you do not know.\n"
    "- Write for somebody who has not read the text, in whole sentences and without jargon.\n"
    "- Forty words are enough. What matters most comes first.\n- No lists, tables, headings, links or bold type.\n"
    "- Do not open with a greeting or a compliment, and do not offer further help at the end.\n"
    "- Copy numbers, names and dates letter by letter.\n- Where the text is unclear, say so in one sentence.\n"
    "- Spell out abbreviations when they first occur.\n- Do not speak about these points in the reply."
)
OFFICE = (
    "You work in the archive of a museum. Be exact and polite, give no opinions, never speak about colleagues, and "
    "refuse requests for private addresses. Write British English."
)
THANKS = " Many thanks in advance, this would help me a great deal."
REMINDER = "\n\nNow please answer what was asked at the beginning."
SCHEMA = (
    '\n\nReturn JSON of this form only:\n{"type": "object", "properties": {"reply": {"type": "string"}, "certainty": '
    '{"type": "number", "minimum": 0, "maximum": 1}}, "required": ["reply", "certainty"]}'
)
EXAMPLES = (
    "Some examples of how to reply.\n\nQ: How many days has a week?\nA: A week has seven days.\n\n"
    "Q: Who painted the Mona Lisa?\nA: The Mona Lisa was painted by Leonardo da Vinci.\n\n"
)
_TRIES = 60  # document lengths tried to meet a prompt's length
_PADDING, _PADDED = " more", 12  # a word of one token, and how many of it may end a document
_QUOTED, _LEAST_QUOTED = 24, 200
_LONGEST_TAIL = 40  # tokens of the longest opening with its answer

Messages = Sequence[dict[str, str]]
Compose = Callable[[str, list[Fact]], str | Messages]


_ONE, _TWO, _THREE = (functools.partial(draw_facts, count=count) for count in (1, 2, 3))


@dataclass(frozen=True)
class _Shape:
    """``compose`` makes a prompt (raw text or messages) of a document and facts, of which the first is judged.
    ``lead``: what stands before the answer's opening."""

    summary: str
    compose: Compose
    facts: Callable[[Rng], list[Fact]] = _ONE
    lead: str = ""


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _behind(after: str) -> Compose:
    return lambda document, facts: _user(f"{document}\n\n{facts[0].question}{after}")


def _before(after: str) -> Compose:
    return lambda document, facts: _user(f"Find this out: {facts[0].question}\n\n{document}{after}")


def _system(document: str, facts: list[Fact]) -> Messages:
    return [
        {"role": "system", "content": OFFICE},
        *_user(f"{document}\n\n{facts[0].question}{THANKS}"),
    ]


def _several(document: str, facts: list[Fact]) -> Messages:
    return _user(f"{document}\n\nI have some questions.\n" + "\n".join(f"- {fact.question}" for fact in facts))


def _follow_up(question: Callable[[Fact], str]) -> Compose:
    def compose(document: str, facts: list[Fact]) -> Messages:
        asked, before = facts
        return [
            *_user(f"{document}\n\n{before.question}"),
            {"role": "assistant", "content": f"{before.opening}{before.answer}."},
            *_user(question(asked)),
        ]

    return compose


def _form(document: str, facts: list[Fact]) -> Messages:
    lines = "".join(f"{fact.field}: ...\n" for fact in facts)
    return _user(f"{document}\n\nComplete this form.\n{lines}Filled in by: ...\nDate: ...\n")


def _examples(document: str, facts: list[Fact]) -> Messages:
    return _user(f"{document}\n\n{facts[0].question}\n\n{EXAMPLES}Reply in this style.")


def _raw(document: str, facts: list[Fact]) -> str:
    return f"{document}\n\nQ: {facts[0].question}\nA:"


_SHAPES = {
    "ask": _Shape("the question last", _behind("")),
    "ask_brief": _Shape("an instruction behind the question", _behind(BRIEF)),
    "ask_rules": _Shape("170 tokens of rules behind the question", _behind(RULES)),
    "ask_schema": _Shape("a JSON schema behind the question", _behind(SCHEMA), lead='{"reply": "'),
    "ask_examples": _Shape("examples behind the question", _examples, lead="A: "),
    "ask_first": _Shape("the question before the text", _before("")),
    "ask_first_reminder": _Shape("the same, and a reminder at the end", _before(REMINDER)),
    "ask_system": _Shape("rules in a system message, thanks behind the question", _system),
    "ask_several": _Shape("three questions, the first one judged", _several, _THREE),
    "ask_again": _Shape("a second question", _follow_up(lambda fact: fact.question), _TWO),
    "ask_about": _Shape(
        "a second question that names a subject only",
        _follow_up(lambda fact: f"And what can you say about {fact.subject}? One sentence will do."),
        _TWO,
    ),
    "ask_form": _Shape("a form to fill in", _form, _TWO),
    "ask_raw": _Shape("no chat template", _raw, lead=" "),
    "ask_two_hops": _Shape("two sentences that lead to the answer", _behind(BRIEF), lambda rng: [two_hops(rng)]),
    "ask_list": _Shape("three sentences to list", _behind(BRIEF), lambda rng: [guests(rng)]),
}


def _planted(text: str, share: float, facts: list[Fact], rng: Rng) -> str:
    """The facts' sentences behind sentences or lines of the first ``share`` of ``text``, those of a fact in order."""
    sentences = [sentence for fact in facts for sentence in fact.sentences]
    places = np.sort(rng.uniform(0.05, 0.95, len(sentences)))
    if len(facts) > 1:
        places = rng.permutation(places)
    for place, sentence in sorted(zip(places, sentences, strict=True), reverse=True):
        at = int(place * share * len(text))
        ends = [end for mark in (". ", ".\n", "\n") if (end := text.find(mark, at)) >= 0]
        at = min(ends) + 1 if ends else at
        text = f"{text[:at]} {sentence} {text[at:].lstrip(' ')}"
    return text


def _read(source: Source, prompt: str | Messages) -> list[int]:
    if isinstance(prompt, str):
        return source.tokenizer.encode(prompt, add_bos=source.tokenizer.add_bos)
    if source.chat is None:  # a base model: what is said, without who says it
        return _read(source, "".join(f"{message['content']}\n\n" for message in prompt))
    return source.chat(prompt)


def _overhead(source: Source, length: int, prompt: Callable[[str], str | Messages], name: str) -> int:
    """The tokens of a prompt without its document."""
    found = len(_read(source, prompt("")))
    if found > length // 2:
        raise SettingError(f"task {name}: a prompt of {length} tokens; its shortest has {2 * found}, ask for more")
    return found


def _fitted(
    source: Source, length: int, document: Sequence[int], prompt: Callable[[str], str | Messages], name: str
) -> tuple[int, ...]:
    """``prompt`` of exactly ``length`` tokens, about a beginning of ``document``."""
    count = length - _overhead(source, length, prompt, name)
    for _ in range(_TRIES):
        begin = source.tokenizer.decode(document[:count])
        ids = _read(source, prompt(begin))
        short = length - len(ids)
        if 0 < short <= _PADDED:  # a border within the text may never come out right, some words behind it do
            ids = _read(source, prompt(begin + _PADDING * short))
        if len(ids) == length:
            return tuple(ids)
        count += short if abs(short) > _PADDED else -1
    raise SettingError(f"task {name}: length {length}; no prompt of just so many tokens was found, ask for a few more")


def _rows_of(source: Source, ids: Sequence[int], passages: Sequence[str]) -> tuple[int, ...]:
    """The rows of ``ids`` that hold the ``passages`` where they first occur; none if the prompt does not have one."""
    ends = np.cumsum([len(source.tokenizer.token_bytes(id, special=True)) for id in ids])
    whole = source.tokenizer.decode_bytes(ids, special=True)
    rows: list[int] = []
    for passage in passages:
        wanted = passage.strip().encode()
        at = whole.find(wanted)
        if at < 0 or ends[-1] != len(whole):
            return ()
        rows += range(int(np.searchsorted(ends, at, "right")), int(np.searchsorted(ends, at + len(wanted))) + 1)
    return tuple(rows)


def _make(name: str, source: Source, length: int, count: int, rng: Rng) -> Iterator[Sample]:
    shape, encode = _SHAPES[name], functools.partial(source.tokenizer.encode, add_bos=False)
    for index, (text, cluster) in enumerate(windows(source.corpus, length, 1, count, rng)):
        facts = shape.facts(rng)

        def prompt(document: str, facts: list[Fact] = facts) -> str | Messages:
            return shape.compose(document, facts)

        share = 1 - _overhead(source, length, prompt, name) / length
        document = encode(_planted(source.tokenizer.decode(text.tolist()), share, facts, rng))
        ids = _fitted(source, length, document, prompt, name)
        forced, answer = encode(shape.lead + facts[0].opening), encode(facts[0].answer)
        yield Sample(
            name, index, "continuation", ids, continuation=tuple(answer), forced=tuple(forced), cluster=cluster,
            evidence=_rows_of(source, ids, facts[0].sentences),
        )  # fmt: skip


def _quote(source: Source, length: int, count: int, rng: Rng) -> Iterator[Sample]:
    """A passage to be continued, its first words in the middle of the question."""
    name = "quote"
    if length < _LEAST_QUOTED:
        raise SettingError(f"task {name}: a prompt of {length} tokens; its shortest has {_LEAST_QUOTED}, ask for more")
    for index, (text, cluster) in enumerate(windows(source.corpus, length, 1, count, rng)):
        place = int(rng.integers(_QUOTED, max(_QUOTED + 1, int(0.8 * length) - 4 * _QUOTED)))
        cue, answer = text[place : place + _QUOTED], text[place + _QUOTED : place + 2 * _QUOTED]
        words = source.tokenizer.decode(cue.tolist())

        def prompt(document: str, words: str = words) -> Messages:
            return _user(f"{document}\n\nThe text has a passage that begins with\n\n{words}\n\nWrite it out.{BRIEF}")

        ids = _fitted(source, length, text.tolist(), prompt, name)
        forced, following = tuple(cue.tolist()), tuple(answer.tolist())
        yield Sample(
            name, index, "continuation", ids, continuation=following, forced=forced, cluster=cluster,
            evidence=_rows_of(source, ids, [source.tokenizer.decode(answer.tolist())]),
        )  # fmt: skip


SHAPES = (
    *(
        Task(name, shape.summary, "continuation", _LONGEST_TAIL + 20, functools.partial(_make, name))
        for name, shape in _SHAPES.items()
    ),
    Task("quote", "24 tokens quoted, their beginning inside the question", "continuation", 2 * _QUOTED, _quote),
)
