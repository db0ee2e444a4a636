"""What guesses at the next tokens bring: the same texts with and without, where text repeats and where not."""

from __future__ import annotations

import bisect
import heapq
import inspect
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimrt.errors import SettingError
from slimrt.llm import LLM

__all__ = ["Case", "DraftRow", "cases", "measure", "pass_costs"]

Progress = Callable[[int, int, str], None]
PASSES = (1, 2, 4, 8, 16)  # tokens of a pass whose cost is measured

_PEOPLE = (
    ("Grace Weatherby", "Bristol", 1907, "bridges"), ("Tomas Lindqvist", "Uppsala", 1889, "sundials"),
    ("Amina Okonkwo", "Enugu", 1931, "looms"), ("Pavel Dvorak", "Brno", 1874, "organs"),
    ("Ines Carvalho", "Porto", 1916, "lighthouses"), ("Rafael Montoya", "Cusco", 1922, "aqueducts"),
    ("Hanna Virtanen", "Turku", 1899, "icebreakers"), ("Kenji Morita", "Nagoya", 1941, "clocks"),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A prompt whose continuation ``repeats`` what stands in it, or not, and how that is drawn."""

    name: str
    repeats: bool
    prompt: str
    options: dict[str, Any]


@dataclass(frozen=True)
class DraftRow:
    """Tokens a second after the first, and milliseconds of processor time a token (all threads; which other programs do
    not change as they change the clock's), without guesses and with them: medians. Tokens guessed and right."""

    name: str
    repeats: bool
    tokens: int
    plain_tok_s: float
    drafted_tok_s: float
    plain_cpu_ms: float
    drafted_cpu_ms: float
    drafted: int
    accepted: int

    @property
    def factor(self) -> float:
        return self.drafted_tok_s / self.plain_tok_s

    @property
    def cpu_factor(self) -> float:
        return self.plain_cpu_ms / self.drafted_cpu_ms


def cases() -> list[Case]:
    """A passage quoted, code with a name changed, records filled in from prose; a story, and tokens at random.

    The texts are those of Python's own library. Each prompt ends within the text that is wanted, so that a model
    without instructions goes on as well.
    """
    prose, likeliest = heapq.__about__, {"temperature": 0.0}
    code = inspect.getsource(bisect)
    edited = re.sub(r"\blo\b", "first", code)
    people = " ".join(f"{name} of {town}, born in {year}, built {made}." for name, town, year, made in _PEOPLE)
    record = '{{"name": "{}", "town": "{}", "born": {}, "built": "{}"}}\n'
    records = "".join(record.format(*one) for one in _PEOPLE[:2])
    story = "A story.\n\nThe keeper of the lighthouse had not seen a ship for eleven days when"
    return [
        Case("quote a passage", True, f"{prose}\n\nThe same text again:\n\n{prose[:300]}", likeliest),
        Case("edit code", True, f"{code}\n\n# The same with lo renamed to first:\n\n{edited[:400]}", likeliest),
        Case("fill in records", True, f"{people}\n\nAs JSON, one a line:\n{records}", likeliest),
        Case("a story, drawn", False, story, {"temperature": 1.0, "seed": 1}),
        Case("a story, likeliest", False, story, {"temperature": 0.0, "repeat_penalty": 1.3, "penalty_last_n": -1}),
        Case("tokens at random", False, story, {"temperature": 100.0, "seed": 1}),
    ]  # fmt: skip


def measure(llm: LLM, tokens: int = 256, repeats: int = 5, progress: Progress | None = None) -> list[DraftRow]:
    """Each of ``cases`` with the model's own way of guessing and without, in turns, on one conversation.

    Raises SettingError if a text differs: guesses change nothing but the time.
    """
    rows, all_cases = [], cases()
    for number, case in enumerate(all_cases):
        ids = llm.tokenize(case.prompt)
        speeds: dict[str | None, list[tuple[float, float]]] = {None: [], "auto": []}
        with llm.session() as session:
            for turn in range(repeats + 1):
                if progress:
                    progress(number * (repeats + 1) + turn, len(all_cases) * (repeats + 1), case.name)
                texts = []
                for draft in (None, "auto") if turn % 2 else ("auto", None):
                    stream = llm.stream(
                        ids, session=session, max_tokens=tokens, ignore_eos=True, draft=draft, **case.options
                    )
                    next(stream)
                    written, begun, processor = len(stream.completion.tokens), time.perf_counter(), time.process_time()
                    done = stream.finished()
                    took, worked = time.perf_counter() - begun, time.process_time() - processor
                    texts.append(done.tokens)
                    if draft:
                        timings = done.timings
                    written = len(done.tokens) - written
                    if turn:  # the first one warms up
                        speeds[draft].append((written / took, 1e3 * worked / written))
                if texts[0] != texts[1]:
                    raise SettingError(
                        f"{case.name}: the text differs with guesses; this backend rounds otherwise then"
                    )
        (plain, plain_ms), (drafted, drafted_ms) = (
            [statistics.median(column) for column in zip(*speeds[draft], strict=True)] for draft in (None, "auto")
        )
        counts = timings.drafted_tokens, timings.accepted_tokens
        rows.append(DraftRow(case.name, case.repeats, tokens, plain, drafted, plain_ms, drafted_ms, *counts))
    return rows


def pass_costs(llm: LLM, context: int = 512, repeats: int = 20) -> dict[int, float]:
    """Seconds of a pass of each number of ``PASSES`` that the backend reads at once, behind ``context`` tokens: medians
    of runs in turns."""
    engine, rng = llm.engine, np.random.default_rng(0)
    ids = rng.integers(0, llm.config.vocab_size, context + max(PASSES)).tolist()
    seconds: dict[int, list[float]] = {}
    with llm.session() as session:
        session.prefill(ids[:context])
        counts = [count for count in PASSES if count <= engine.together]
        for turn in range(repeats + 1):
            for count in counts:
                begun = time.perf_counter()
                session.decode(ids[context : context + count])
                if turn:
                    seconds.setdefault(count, []).append(time.perf_counter() - begun)
                session.truncate(context)
    return {count: statistics.median(times) for count, times in seconds.items()}
