"""What the library of documents saves: ``slimrt generate`` in processes of their own, on one document, one after the
other: cold, another question at once, the same one, another one soon, another one when nobody has asked for a while."""

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
from slimrt.output import counted
from slimrt.prune.presets import PRESETS
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile

__all__ = ["LibraryReport", "Reads", "measure_library"]

_QUESTIONS = (
    "What is this text about?", "Which example does it give?", "What should one keep in mind?", "Who should read it?"
)  # fmt: skip
_ROOM = 96  # tokens for a question, a chat template and the answer
_WAIT_S = 1800  # for the process in the background
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Reads:
    """One document under one plan, in seconds to the first token: the first process (``cold``), the next with another
    question ``at_once``, with the ``same`` one, with a third one ``soon``, when the layers up to the plan's next cut
    had read the document (None: there is no such time, or it was over), with a fourth one ``later``, when all had;
    ``same_later``: the first question then. ``soon_after_s``, ``whole_s``: seconds from the end of the first process
    until then (0: it was at once, or the plan keeps its cuts).
    ``nbytes`` of the library. ``kept``: tokens kept after each cut of the first, ``later_kept``: of the last."""

    cold_s: float
    at_once_s: float
    same_s: float
    soon_after_s: float
    soon_s: float | None
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
        told["of_cold"] = {plan: {name: _share(runs, name) for name in _SHARES} for plan, runs in self.runs.items()}
        return json.dumps(told, indent=2)

    def table(self) -> Table:
        """For the terminal: medians, in brackets the range, and the share of the cold one."""
        title = f"first token of {self.length:,} tokens, {self.model}, {counted(self.threads, 'thread')}; new processes"
        table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
        headings = ("", "cold s", "same question", "another at once", "soon", "after s", "later", "after s", "MiB")
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left")
        for plan, runs in self.runs.items():
            same, at_once, soon, later, _ = (
                "-" if (share := _share(runs, name)) is None else f"{_spread(runs, name)}, {share:.1%}"
                for name in _SHARES
            )
            size = f"{statistics.median(run.nbytes for run in runs) / 2**20:.0f}"
            soon_after = "-" if soon == "-" else _spread(runs, "soon_after_s")
            whole = _spread(runs, "whole_s")
            table.add_row(Text(plan), _spread(runs, "cold_s"), same, at_once, soon, soon_after, later, whole, size)
        return table


_SHARES = ("same_s", "at_once_s", "soon_s", "later_s", "same_later_s")


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

    def wait(*states: str) -> float:
        """Seconds from the end of the first process until the library has the document in one of these states."""
        while not there() & {*states}:
            if time.monotonic() - ended > _WAIT_S:
                raise ComputeError("the document was not read whole in the background: is another process at work?")
            time.sleep(0.1)
        return time.monotonic() - ended

    def there() -> set[str]:
        headers = [book.header for book in library.books()]
        return {"whole" if one.boundary is None else "passing" if one.passing else "cut" for one in headers}

    first, other, third, last = _QUESTIONS
    library = Library(cache / "read")
    cold = ask(first)
    ended = time.monotonic()
    at_once, same = ask(other), ask(first)
    soon_after, soon, whole = 0.0, None, 0.0
    if plan in PRESETS and cold["stages"]:
        soon_after = wait("passing", "whole")
        if "passing" in there():
            found = ask(third)
            soon = found["ttft_s"] if found["stages"] else None
        whole = wait("whole")
    later, same_later = ask(last), ask(first)
    return Reads(
        cold["ttft_s"], at_once["ttft_s"], same["ttft_s"], soon_after, soon, whole, later["ttft_s"],
        same_later["ttft_s"], sum(book.nbytes for book in library.books()), tuple(cold["stages"]),
        tuple(later["stages"]),
    )  # fmt: skip


def _values(runs: Sequence[Reads], name: str) -> list[float]:
    return [value for run in runs if (value := getattr(run, name)) is not None]


def _share(runs: Sequence[Reads], name: str) -> float | None:
    """The median as a share of the cold one's; None where there is no value."""
    values = _values(runs, name)
    return statistics.median(values) / statistics.median(_values(runs, "cold_s")) if values else None


def _spread(runs: Sequence[Reads], name: str) -> str:
    values = _values(runs, name)
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}-{max(values):.2f})"
