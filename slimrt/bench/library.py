"""What the library of documents saves: ``slimrt generate`` in processes of their own, on one document, one after the
other: cold, the same question, another one at once, and another one when nobody has asked for a while."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from slimrt.bench.ttft import environment
from slimrt.errors import ComputeError, SettingError
from slimrt.eval.text import corpus_from_text, load_corpus
from slimrt.hub.store import cache_dir
from slimrt.library.store import LEAST, Library
from slimrt.prune.presets import PRESETS
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile

__all__ = ["LibraryReport", "Reads", "measure_library"]

_QUESTIONS = ("What is this text about?", "Which example does it give?", "What should one keep in mind?")
_ROOM = 96  # tokens for a question, a chat template and the answer
_WAIT_S = 1800  # for the process in the background
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Reads:
    """One document under one plan, in seconds to the first token: the first process (``cold``), the next with the
    ``same`` question, with another one ``at_once``, with a third one ``later``, when the document was read whole;
    ``same_later``: the first question then. ``whole_s``: seconds from the end of the first process until it was read
    whole (0: it was at once, or the plan keeps its cuts).
    ``nbytes`` of the library. ``kept``: tokens kept after each cut of the first, ``later_kept``: of the last."""

    cold_s: float
    same_s: float
    at_once_s: float
    whole_s: float
    later_s: float
    same_later_s: float
    nbytes: int
    kept: tuple[int, ...]
    later_kept: tuple[int, ...]


@dataclass(frozen=True)
class LibraryReport:
    """All runs by plan, in the order in which they were taken."""

    model: str
    length: int
    threads: int
    environment: dict[str, Any]
    runs: dict[str, list[Reads]]

    def to_json(self) -> str:
        """Everything, with medians as shares of the cold one."""
        told = dataclasses.asdict(self)
        told["of_cold"] = {
            plan: {name: _median(runs, name) / _median(runs, "cold_s") for name in _SHARES}
            for plan, runs in self.runs.items()
        }
        return json.dumps(told, indent=2)

    def table(self) -> Table:
        """For the terminal: medians, in brackets the range, and the share of the cold one."""
        title = f"first token of {self.length:,} tokens, {self.model}, {self.threads} threads; new processes"
        table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
        headings = ("", "cold s", "same question", "another at once", "another later", "whole after s", "MiB")
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left")
        for plan, runs in self.runs.items():
            shares = [f"{_spread(runs, name)}, {_median(runs, name) / _median(runs, 'cold_s'):.1%}" for name in _SHARES]
            size = f"{statistics.median(run.nbytes for run in runs) / 2**20:.0f}"
            table.add_row(Text(plan), _spread(runs, "cold_s"), *shares[:3], _spread(runs, "whole_s"), size)
        return table


_SHARES = ("same_s", "at_once_s", "later_s", "same_later_s")


def measure_library(
    model: Path,
    length: int,
    plans: Sequence[str] = ("off", "auto", "fast"),
    repeats: int = 3,
    threads: int = 1,
    text: str | None = None,
    progress: Progress | None = None,
    device: str = "auto",
) -> LibraryReport:
    """Measure ``slimrt generate`` with a library of its own for each run, which goes afterwards. ``text``: the document
    (None: Python's documentation). Raises SettingError for a length that the library does not keep, ComputeError where
    a process fails."""
    if length < LEAST + _ROOM:
        raise SettingError(f"--length {length}: the library keeps prompts of {LEAST} tokens and more; give {2 * LEAST}")
    say = progress or (lambda done, total, what: None)
    tokenizer = Tokenizer.from_gguf(GGUFFile(model))
    corpus = load_corpus(tokenizer) if text is None else corpus_from_text(tokenizer, text)
    where = environment()
    runs: dict[str, list[Reads]] = {plan: [] for plan in plans}
    for repeat in range(repeats):
        for number, plan in enumerate(plans):
            say(repeat * len(plans) + number, repeats * len(plans), f"--prune {plan}")
            begin = 1000 * repeat % max(1, len(corpus.tokens) - length)
            document = tokenizer.decode(corpus.tokens[begin : begin + length - _ROOM].tolist())
            chat = ["--chat"] if tokenizer.chat_template else []
            with _own_library() as cache:
                (Path(cache) / "document.txt").write_text(document)
                command = ["--model", model, "--threads", threads, "--prune", plan, "--ctx", length + _ROOM, *chat]
                command += ["--device", device]
                runs[plan].append(_reads(plan, [str(part) for part in command], Path(cache)))
    say(repeats * len(plans), repeats * len(plans), "done")
    return LibraryReport(model.name, length, threads, where, runs)


@contextmanager
def _own_library() -> Iterator[str]:
    """A cache folder that has all that the user's has but the documents."""
    with tempfile.TemporaryDirectory(prefix="slimrt-bench-", ignore_cleanup_errors=True) as folder:
        for there in cache_dir().iterdir() if cache_dir().exists() else ():
            if there.name != "read":
                (Path(folder) / there.name).symlink_to(there)
        yield folder


def _reads(plan: str, options: list[str], cache: Path) -> Reads:
    def ask(question: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "click_cli", "generate", question, "--file", str(cache / "document.txt")]
        done = subprocess.run(
            [*command, *options, "--max-tokens", "4", "--json"], env={**os.environ, "SLIMRT_CACHE": str(cache)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ComputeError(f"slimrt generate failed: {(done.stderr.strip().splitlines() or ['nothing said'])[-1]}")
        timings: dict[str, Any] = json.loads(done.stdout)["timings"]
        return timings

    first, other, last = _QUESTIONS
    library = Library(cache / "read")
    cold = ask(first)
    ended = time.monotonic()
    same, at_once = ask(first), ask(other)
    whole = 0.0
    while plan in PRESETS and cold["stages"] and all(book.header.boundary is not None for book in library.books()):
        whole = time.monotonic() - ended
        if whole > _WAIT_S:
            raise ComputeError("the document was not read whole in the background: is there another process at work?")
        time.sleep(0.1)
    later, same_later = ask(last), ask(first)
    return Reads(
        cold["ttft_s"], same["ttft_s"], at_once["ttft_s"], whole, later["ttft_s"], same_later["ttft_s"],
        sum(book.nbytes for book in library.books()), tuple(cold["stages"]), tuple(later["stages"]),
    )  # fmt: skip


def _median(runs: Sequence[Reads], name: str) -> float:
    return statistics.median(getattr(run, name) for run in runs)


def _spread(runs: Sequence[Reads], name: str) -> str:
    values = [getattr(run, name) for run in runs]
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}-{max(values):.2f})"
