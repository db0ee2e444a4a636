"""RULER's tasks that need no download (Hsieh et al. 2024, arXiv 2404.06654).

Prompt wording, needle counts and answer lengths follow the paper and its appendix of templates, in the form for base
models: instruction to memorise, context, question, half-written answer, no chat template. The differences: words come
from ``slimrt.eval.words``; a prompt has exactly the length asked for (RULER: at most that, with its answer), by
a cut-off line of noise in front of the context; the worked example of variable tracking is short; no prompt ends in a
space, which would keep the answer's first word from being one token.
"""

from __future__ import annotations

import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from slimrt.eval.fit import fit
from slimrt.eval.sample import Sample, Source, Task
from slimrt.eval.words import ADJECTIVES, NOUNS

__all__ = ["RULER"]

Rng = np.random.Generator
Draw = Callable[[Rng], str]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
NIAH = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is"
)
TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are:"
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
DOTS = "..."
FILLER = " ".join([NOISE] * 8)

HOPS = 4
COMMON_WORDS = 10
SHORT_LIST = 4096  # in prompts under this length RULER repeats the words of its lists less often
ZETA_2 = np.pi**2 / 6  # the codes' frequencies are rank**-2 / zeta(2)
CODE_LETTERS = 6
FEWEST_CODED = 100  # from this many coded words on, the fourth code is rarer than the third
FEWEST_TOKENS = 3  # of an entry in a numbered list: number, full stop, word


def _pick(rng: Rng, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _key_words(rng: Rng) -> str:
    return f"{_pick(rng, ADJECTIVES)}-{_pick(rng, NOUNS)}"


def _compound(rng: Rng) -> str:
    return _pick(rng, ADJECTIVES) + _pick(rng, NOUNS)


def _number(rng: Rng) -> str:
    return str(rng.integers(10**6, 10**7))


def _uuid(rng: Rng) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _letters(alphabet: str, count: int) -> Draw:
    return lambda rng: "".join(_pick(rng, alphabet) for _ in range(count))


class _Distinct:
    """Draws that never repeat, remembered: the first n are the same whatever was asked for before."""

    def __init__(self, draw: Draw, rng: Rng) -> None:
        self._draw, self._rng = draw, rng
        self._seen: set[str] = set()
        self._drawn: list[str] = []

    def first(self, count: int) -> list[str]:
        while len(self._drawn) < count:
            item = self._draw(self._rng)
            if item not in self._seen:
                self._seen.add(item)
                self._drawn.append(item)
        return self._drawn[:count]


def _joined(glue: str, padding: str, parts: Sequence[str]) -> str:
    return glue.join([padding, *parts] if padding else parts)


@dataclass(frozen=True)
class _Needle:
    """A needle in a haystack of noise, or of needles of the same kind."""

    name: str
    kind: str
    key: Draw
    value: Draw
    among_needles: bool

    def sample(self, source: Source, length: int, index: int, rng: Rng) -> Sample:
        key_rng, value_rng = rng.spawn(2)
        keys, values = _Distinct(self.key, key_rng), _Distinct(self.value, value_rng)
        depth = rng.random()

        def needles(count: int) -> list[str]:
            pairs = zip(keys.first(count), values.first(count), strict=True)
            return [NEEDLE.format(kind=self.kind, key=key, value=value) for key, value in pairs]

        def compose(units: int, padding: str) -> str:
            needle, *others = needles(units + 1) if self.among_needles else [*needles(1), *[NOISE] * units]
            others.insert(round(depth * units), needle)
            return NIAH.format(kind=self.kind, context=_joined("\n", padding, others), query=keys.first(1)[0])

        prompt = fit(source.tokenizer, length, compose, FILLER, 1, self.name)
        return Sample(self.name, index, "generation", prompt.ids, (values.first(1)[0],), max_tokens=128)


def _chain(rng: Rng, letters: int) -> tuple[str, list[str], list[str]]:
    """A value, the variables that it is handed through, and the lines that do so."""
    value = str(rng.integers(10**4, 10**5))
    names = _Distinct(_letters(string.ascii_uppercase, letters), rng).first(HOPS + 1)
    handed = [f"VAR {new} = VAR {old}" for old, new in pairwise(names)]
    return value, names, [f"VAR {names[0]} = {value}", *handed]


def _tracked(rng: Rng, lines: Sequence[str], value: str) -> Callable[[int, str], str]:
    """The prompt with ``lines`` in order, at random depths, among so many lines of noise."""
    depths = np.sort(rng.random(len(lines)))

    def compose(units: int, padding: str) -> str:
        context = [NOISE] * units
        for before, (line, depth) in enumerate(zip(lines, depths, strict=True)):
            context.insert(round(depth * units) + before, line)
        return TRACKING.format(context=_joined("\n", padding, context), value=value, count=len(lines))

    return compose


def _tracking(source: Source, length: int, index: int, rng: Rng) -> Sample:
    value, names, lines = _chain(rng, 3)
    example = f"{_tracked(rng, lines, value)(HOPS + 1, '')} {' '.join(names)}"
    value, names, lines = _chain(rng, 5)
    question = _tracked(rng, lines, value)
    prompt = fit(
        source.tokenizer,
        length,
        lambda units, padding: f"{example}\n\n{question(units, padding)}",
        FILLER,
        1,
        "vt",
    )
    return Sample("vt", index, "generation", prompt.ids, tuple(names), max_tokens=30)


def _single_words(rng: Rng) -> list[str]:
    """All words, shuffled."""
    words = [*ADJECTIVES, *NOUNS]
    rng.shuffle(words)
    return words


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _word_list(words: Sequence[str], common_repeats: int, other_repeats: int, seed: int) -> str:
    """A numbered list, shuffled by ``seed``, in which the first ``COMMON_WORDS`` of ``words`` come oftener."""
    entries = [*words[:COMMON_WORDS]] * common_repeats + [*words[COMMON_WORDS:]] * other_repeats
    np.random.default_rng(seed).shuffle(entries)
    return _numbered(entries)


def _common(source: Source, length: int, index: int, rng: Rng) -> Sample:
    shown_count, shown_repeats, repeats = (20, (3, 1), (6, 1)) if length < SHORT_LIST else (40, (10, 3), (30, 3))
    seed = int(rng.integers(2**63))
    shown = _single_words(rng)[:shown_count]
    example = f"{COMMON.format(context=_word_list(shown, *shown_repeats, seed))} {_numbered(shown[:COMMON_WORDS])}\n"
    # Compounds where the single words could run out: all of them, or their form would tell common words from others.
    single = _single_words(rng)
    enough = length < len(single) * FEWEST_TOKENS * repeats[1]
    compounds = _Distinct(_compound, rng.spawn(1)[0])

    def words(count: int) -> list[str]:
        return single[:count] if enough else compounds.first(count)

    def compose(units: int, padding: str) -> str:
        question = COMMON.format(context=_word_list(words(units), *repeats, seed))
        return _joined("\n", padding, [example + question])

    prompt = fit(source.tokenizer, length, compose, FILLER, COMMON_WORDS + 1, "cwe")
    return Sample("cwe", index, "generation", prompt.ids, tuple(words(COMMON_WORDS)), max_tokens=120)


def _frequent(source: Source, length: int, index: int, rng: Rng) -> Sample:
    codes = _Distinct(_letters(string.ascii_lowercase, CODE_LETTERS), rng.spawn(1)[0])
    ranked = [DOTS, *codes.first(max(length // 50, 8))]
    share = np.arange(1, len(ranked) + 1) ** -2.0 / ZETA_2
    seed = int(rng.integers(2**63))

    def compose(units: int, padding: str) -> str:
        repeats = (units * share).astype(int)
        context = [word for word, count in zip(ranked, repeats, strict=True) for _ in range(count)]
        np.random.default_rng(seed).shuffle(context)
        return FREQUENT.format(context=_joined(" ", padding, context))

    prompt = fit(source.tokenizer, length, compose, " ".join([DOTS] * 64), FEWEST_CODED, "fwe")
    return Sample("fwe", index, "generation", prompt.ids, tuple(ranked[1:4]), max_tokens=50)


def _task(name: str, summary: str, extra: int, one: Callable[[Source, int, int, Rng], Sample]) -> Task:
    def make(source: Source, length: int, count: int, rng: Rng) -> Iterator[Sample]:
        return (one(source, length, index, child) for index, child in enumerate(rng.spawn(count)))

    return Task(name, summary, "generation", extra, make)


_NEEDLES = (
    ("one number hidden in noise", _Needle("niah_single_1", "number", _key_words, _number, False)),
    ("one of many numbers, by its name", _Needle("niah_multikey_2", "number", _key_words, _number, True)),
    ("one of many uuids, by its uuid", _Needle("niah_multikey_3", "uuid", _uuid, _uuid, True)),
)

RULER = (
    *(_task(needle.name, summary, 128, needle.sample) for summary, needle in _NEEDLES),
    _task("vt", f"a value followed through {HOPS} assignments", 30, _tracking),
    _task("cwe", f"the {COMMON_WORDS} common words of a list", 120, _common),
    _task("fwe", "the three most frequent codes", 50, _frequent),
)
