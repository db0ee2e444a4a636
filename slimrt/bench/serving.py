"""What clients of one server get: how long a stream stands still while a long prompt is read, and tokens a second of
several clients at once."""

from __future__ import annotations

import dataclasses
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from slimrt.errors import SettingError
from slimrt.eval.text import load_corpus
from slimrt.llm import LLM
from slimrt.request import GenerationRequest
from slimrt.server.scheduler import Ended, Event, Failed, Job, Piece, Read, Scheduler

__all__ = ["Crowd", "ServingReport", "Standstill", "gaps_meanwhile", "run"]

_BEFORE = 8  # tokens of a stream before a long prompt comes
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Standstill:
    """A stream while another client's prompt of ``length`` tokens is read, in seconds: the prompt's time to first
    token, and between two tokens of the stream the median and the longest time, meanwhile and (``alone``) when nobody
    reads. ``tokens``: that the stream got meanwhile."""

    length: int
    ttft_s: float
    alone_s: float
    median_s: float
    longest_s: float
    tokens: int


@dataclass(frozen=True)
class Crowd:
    """``clients`` at once, each with a prompt of ``length`` tokens of its own: tokens a second of all together, the
    median time to first token and between tokens, in seconds."""

    clients: int
    length: int
    tokens_per_s: float
    ttft_s: float
    between_s: float


@dataclass(frozen=True)
class ServingReport:
    """All that was measured on ``model``."""

    model: str
    backend: str
    plan: str
    standstill: Standstill
    crowds: tuple[Crowd, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def tables(self) -> tuple[Table, Table]:
        """For the terminal."""
        one, s = _table("A stream while another client's prompt is read"), self.standstill
        for heading in ("prompt", "its first token", "stream alone", "meanwhile: median", "longest", "tokens"):
            one.add_column(heading, justify="right")
        times = (f"{1000 * value:.0f} ms" for value in (s.alone_s, s.median_s, s.longest_s))
        one.add_row(f"{s.length:,}", f"{s.ttft_s:.2f} s", *times, f"{s.tokens}")
        many = _table("Clients at once")
        for heading in ("clients", "prompt", "tokens/s, all", "first token", "between tokens"):
            many.add_column(heading, justify="right")
        for c in self.crowds:
            between = f"{1000 * c.between_s:.0f} ms"
            many.add_row(f"{c.clients}", f"{c.length:,}", f"{c.tokens_per_s:.1f}", f"{c.ttft_s:.2f} s", between)
        return one, many


class _Client:
    """One request, and when its tokens came."""

    def __init__(self) -> None:
        self.came: list[float] = []
        self.read = 0.0
        self.error: Exception | None = None
        self.over, self.begun = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Piece) and event.step.token is not None:
            self.came.append(time.monotonic())
            if len(self.came) >= _BEFORE:
                self.begun.set()
        elif isinstance(event, Read):
            self.read = event.seconds
        elif isinstance(event, Ended | Failed):
            self.error = event.error if isinstance(event, Failed) else None
            self.begun.set()
            self.over.set()


def run(
    llm: LLM,
    *,
    length: int = 8000,
    clients: Sequence[int] = (1, 4, 16),
    prompt: int = 256,
    tokens: int = 32,
    progress: Progress | None = None,
) -> ServingReport:
    """Measure ``llm``. Raises SettingError where the context is too small for the prompts and their answers."""
    needed = max(length + 1, 16 + length, prompt + tokens)
    if needed > llm.ctx:
        raise SettingError(
            f"prompts of {length} and {prompt} tokens need a context of {needed}, not {llm.ctx}; --ctx {needed}"
        )
    text = load_corpus(llm.tokenizer).tokens
    if len(text) < length + prompt:
        text = np.tile(text, -(-(length + prompt) // len(text)))
    say = progress or (lambda done, total, what: None)
    steps = 1 + len(clients)
    say(0, steps, f"a stream beside a prompt of {length:,} tokens")
    standstill = _standstill(llm, text[:length].tolist(), text[length : length + 16].tolist())
    crowds = []
    for number, count in enumerate(clients, 1):
        say(number, steps, f"{count} clients")
        starts = np.linspace(0, len(text) - prompt, count).astype(int)
        crowds.append(_crowd(llm, [text[at : at + prompt].tolist() for at in starts], tokens))
    say(steps, steps, "done")
    return ServingReport(llm.config.name, llm.backend.ops.name, llm.plan.source, standstill, tuple(crowds))


def _standstill(llm: LLM, long: list[int], short: list[int]) -> Standstill:
    scheduler = Scheduler(llm, sessions=2)
    stream, reader = _Client(), _Client()
    try:
        first = Job(short, _request(llm.ctx), stream)
        scheduler.submit(first)
        stream.begun.wait()
        asked = time.monotonic()
        scheduler.submit(Job(long, _request(1), reader))
        reader.over.wait()
        scheduler.cancel(first)
    finally:
        scheduler.close()
    _raise(reader)
    return gaps_meanwhile(stream.came, asked, reader.read, len(long))


def gaps_meanwhile(came: Sequence[float], asked: float, read_s: float, length: int) -> Standstill:
    """What a stream whose tokens ``came`` at these times had of a prompt of ``length`` tokens that came at ``asked``
    and was read after ``read_s`` seconds."""
    before = [at for at in came if at <= asked]
    # From the last token before the prompt came to the first behind it: all that could stand still.
    during = [before[-1], *(at for at in came if asked < at)]
    done = asked + read_s
    behind = next((number for number, at in enumerate(during) if at > done), len(during) - 1)
    gaps = np.diff(during[: behind + 1])
    return Standstill(
        length,
        read_s,
        statistics.median(np.diff(before)),
        float(np.median(gaps)) if len(gaps) else read_s,
        float(gaps.max()) if len(gaps) else read_s,
        max(0, behind - 1),
    )


def _crowd(llm: LLM, prompts: list[list[int]], tokens: int) -> Crowd:
    scheduler = Scheduler(llm, sessions=len(prompts), queue=len(prompts))
    clients = [_Client() for _ in prompts]
    try:
        begun = time.monotonic()
        for ids, client in zip(prompts, clients, strict=True):
            scheduler.submit(Job(ids, _request(tokens), client))
        for client in clients:
            client.over.wait()
        seconds = time.monotonic() - begun
    finally:
        scheduler.close()
    for client in clients:
        _raise(client)
    gaps = [gap for client in clients for gap in np.diff(client.came)]
    return Crowd(
        len(prompts),
        len(prompts[0]),
        sum(len(client.came) for client in clients) / seconds,
        statistics.median(client.came[0] - begun for client in clients),
        float(np.median(gaps)) if gaps else 0.0,
    )


def _request(tokens: int) -> GenerationRequest:
    return GenerationRequest(max_tokens=tokens, ignore_eos=True)


def _raise(client: _Client) -> None:
    if client.error is not None:
        raise client.error


def _table(title: str) -> Table:
    options: dict[str, Any] = {"box": None, "pad_edge": False, "title_justify": "left", "title_style": "bold"}
    return Table(title=title, **options)
