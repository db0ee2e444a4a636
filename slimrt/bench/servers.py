"""``slimrt serve`` beside llama.cpp's server in one run: the same file, prompts of the same tokens over HTTP, the same
number of threads and of places, in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from slimrt.bench.serving import Crowd, Standstill, gaps_meanwhile
from slimrt.bench.ttft import environment
from slimrt.errors import ComputeError, SettingError
from slimrt.eval.text import load_corpus
from slimrt.output import counted
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile

__all__ = ["Setting", "Versus", "run_versus"]

_STARTS_S = 300  # that a server may take until it answers
_LIMIT_S = 3600  # that one request may take
_STREAM = 8  # tokens of a stream before a long prompt comes
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Setting:
    """What is measured: prompts of ``length`` tokens beside a stream (0: none), and ``clients`` at once with prompts of
    ``prompt`` and answers of ``tokens`` tokens, ``repeats`` times; with so many ``threads``. ``prune``, ``device``,
    ``draft``: slimrt's."""

    model: Path
    length: int
    clients: tuple[int, ...]
    prompt: int
    tokens: int
    repeats: int
    threads: int
    prune: str = "auto"
    device: str = "auto"
    draft: str = "auto"


@dataclass(frozen=True)
class Versus:
    """All runs of each server, in the order in which they were taken."""

    setting: Setting
    environment: dict[str, Any]
    crowds: dict[str, dict[int, list[Crowd]]]
    standstills: dict[str, list[Standstill]]

    def to_json(self) -> str:
        """Everything, and each figure's median."""
        told = dataclasses.asdict(self)
        told["setting"]["model"] = self.setting.model.name
        told["medians"] = {
            name: {
                **{str(clients): _medians(runs) for clients, runs in crowds.items()},
                **({"standstill": _medians(self.standstills[name])} if self.standstills[name] else {}),
            }
            for name, crowds in self.crowds.items()
        }
        return json.dumps(told, indent=2)

    def tables(self) -> list[Table]:
        """For the terminal: medians, and in brackets the range."""
        s = self.setting
        title = f"{s.model.name}, {counted(s.threads, 'thread')}, prompts of {s.prompt} tokens, answers of {s.tokens}"
        many = _table(title, "clients", "", "tokens/s, all", "first token s", "between tokens ms")
        for clients in s.clients:
            for name, crowds in self.crowds.items():
                runs = crowds[clients]
                many.add_row(
                    f"{clients}", name, _range([run.tokens_per_s for run in runs], 1),
                    _range([run.ttft_s for run in runs], 2), _range([1000 * run.between_s for run in runs], 0),
                )  # fmt: skip
        if not s.length:
            return [many]
        one = _table(
            f"a stream while another client's {s.length:,} tokens are read", "", "their first token s",
            "stream alone ms", "meanwhile: median ms", "longest ms", "tokens",
        )  # fmt: skip
        for name, beside in self.standstills.items():
            one.add_row(
                name, _range([run.ttft_s for run in beside], 2), _range([1000 * run.alone_s for run in beside], 0),
                _range([1000 * run.median_s for run in beside], 0), _range([1000 * run.longest_s for run in beside], 0),
                _range([run.tokens for run in beside], 0),
            )  # fmt: skip
        return [many, one]


def run_versus(setting: Setting, llama_server: Path, progress: Progress | None = None) -> Versus:
    """Measure both servers. Raises SettingError where one cannot be started, ComputeError where one fails."""
    say = progress or (lambda done, total, what: None)
    if not os.access(llama_server, os.X_OK) or llama_server.is_dir():
        raise SettingError(f"--llama-server {llama_server}: no program; build llama.cpp's target llama-server")
    text = load_corpus(Tokenizer.from_gguf(GGUFFile(setting.model))).tokens
    needed = setting.length + max(setting.clients) * setting.prompt * setting.repeats
    text = np.tile(text, -(-needed // len(text)) + 1)
    crowds: dict[str, dict[int, list[Crowd]]] = {name: {n: [] for n in setting.clients} for name in _SERVERS}
    standstills: dict[str, list[Standstill]] = {name: [] for name in _SERVERS}
    rounds = [*setting.clients, *((0,) if setting.length else ())]
    steps = setting.repeats * len(rounds) * len(_SERVERS)
    where = environment()
    with contextlib.ExitStack() as running:
        urls = {name: running.enter_context(start(setting, llama_server)) for name, start in _SERVERS.items()}
        for address in urls.values():  # threads are started, code is loaded, every weight touched
            _crowd(address, [text[: setting.prompt].tolist()], 4)
        done = 0
        for repeat in range(setting.repeats):
            for clients in rounds:
                for name in _order(repeat):
                    say(done, steps, f"{name}, {clients} clients" if clients else f"{name}, a long prompt")
                    # No prompt twice: neither server has read any of it.
                    begins = [(repeat * max(setting.clients) + at) * setting.prompt for at in range(clients)]
                    prompts = [text[at + 7 * clients :][: setting.prompt].tolist() for at in begins]
                    if clients:
                        crowds[name][clients].append(_crowd(urls[name], prompts, setting.tokens))
                    else:
                        long = text[17 * (repeat + 1) :][: setting.length].tolist()
                        standstills[name].append(_standstill(urls[name], long, text[3 + repeat :][:16].tolist()))
                    done += 1
    say(steps, steps, "done")
    return Versus(setting, where, crowds, standstills)


def _order(repeat: int) -> list[str]:
    """Who is first changes from one repeat to the next."""
    return list(_SERVERS) if repeat % 2 == 0 else list(reversed(_SERVERS))


# -- servers -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _slimrt(setting: Setting, llama_server: Path) -> Iterator[str]:
    s = setting
    ctx = max(s.length, s.prompt) + s.tokens + 64
    command = [
        sys.executable, "-m", "click_cli", "serve", "--port", "0", "--model", s.model, "--threads", s.threads,
        "--sessions", max(2, *s.clients), "--ctx", ctx, "--prune", s.prune, "--device", s.device, "--draft", s.draft,
        "--no-cache",
    ]  # fmt: skip
    with _process(command) as (process, log):
        yield _answering("slimrt serve", process, log, lambda told: told.split(" at http://")[1].split()[0])


@contextlib.contextmanager
def _llama_cpp(setting: Setting, llama_server: Path) -> Iterator[str]:
    s = setting
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = max(2, *s.clients)
    ctx = s.length + places * (s.prompt + s.tokens + 64)
    command = [
        llama_server, "--model", s.model, "--host", "127.0.0.1", "--port", port, "--threads", s.threads,
        "--threads-batch", s.threads, "--parallel", places, "--ctx-size", ctx, "--kv-unified", "--no-webui",
    ]  # fmt: skip
    with _process(command) as (process, log):
        yield _answering(str(llama_server), process, log, lambda told: f"127.0.0.1:{port}")


_SERVERS: dict[str, Callable[[Setting, Path], contextlib.AbstractContextManager[str]]] = {
    "llama.cpp": _llama_cpp,
    "slimrt": _slimrt,
}


@contextlib.contextmanager
def _process(command: Sequence[Any]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A program, ended with the block, and the file of what it says."""
    with tempfile.TemporaryDirectory(prefix="slimrt-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=subprocess.STDOUT)
        try:
            yield process, log
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answering(name: str, process: subprocess.Popen[bytes], log: Path, address: Callable[[str], str]) -> str:
    """host:port of a server, once it is ready. Raises SettingError where it ends instead."""
    deadline = time.monotonic() + _STARTS_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, IndexError, http.client.HTTPException):
            found = address(log.read_text(errors="replace"))
            connection = http.client.HTTPConnection(found, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return found
        time.sleep(0.2)
    said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
    raise SettingError(f"{name}: does not serve; it said: {said[-1][:200]}")


# -- clients -----------------------------------------------------------------------------------------------------------


class _Stream(threading.Thread):
    """One request for a stream of ``tokens``, and when its events came."""

    def __init__(self, address: str, prompt: Sequence[int], tokens: int) -> None:
        super().__init__(daemon=True)
        self.came: list[float] = []
        self.error = ""
        self.begun, self.left = threading.Event(), False
        self._address, self._tokens = address, tokens
        self._body = json.dumps({
            "prompt": list(prompt), "max_tokens": tokens, "stream": True, "temperature": 0, "ignore_eos": True,
        })  # fmt: skip

    def run(self) -> None:
        try:
            connection = http.client.HTTPConnection(self._address, timeout=_LIMIT_S)
            connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                self.error = f"status {response.status}: {response.read()[:200]!r}"
                return
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                if "error" in json.loads(line.removeprefix(b"data: ")):  # not the text: a model may write that word
                    self.error = line.decode()[:200]
                    return
                self.came.append(time.monotonic())
                if len(self.came) >= _STREAM:
                    self.begun.set()
                if self.left:
                    connection.close()
                    return
        except (OSError, http.client.HTTPException) as error:
            self.error = str(error) or type(error).__name__
        finally:
            self.begun.set()


def _checked(streams: Sequence[_Stream]) -> None:
    for stream in streams:
        stream.join()
        if stream.error or not stream.came:
            raise ComputeError(f"a server failed: {stream.error or 'no token came'}")


def _crowd(address: str, prompts: Sequence[Sequence[int]], tokens: int) -> Crowd:
    streams = [_Stream(address, prompt, tokens) for prompt in prompts]
    begun = time.monotonic()
    for stream in streams:
        stream.start()
    _checked(streams)
    seconds = time.monotonic() - begun
    gaps = [gap for stream in streams for gap in np.diff(stream.came)]
    return Crowd(
        len(prompts), len(prompts[0]), len(prompts) * tokens / seconds,
        statistics.median(stream.came[0] - begun for stream in streams), float(np.median(gaps)) if gaps else 0.0,
    )  # fmt: skip


def _standstill(address: str, long: list[int], short: list[int]) -> Standstill:
    stream, reader = _Stream(address, short, len(long)), _Stream(address, long, 1)
    stream.start()
    stream.begun.wait(_LIMIT_S)
    asked = time.monotonic()
    reader.start()
    _checked([reader])
    read = reader.came[0]
    while stream.is_alive() and stream.came[-1] <= read:
        time.sleep(0.01)
    stream.left = True
    _checked([stream])
    return gaps_meanwhile(stream.came, asked, read - asked, len(long))


# -- tables ------------------------------------------------------------------------------------------------------------


def _medians(runs: Sequence[Any]) -> dict[str, float]:
    return {
        field.name: statistics.median(getattr(run, field.name) for run in runs) for field in dataclasses.fields(runs[0])
    }


def _range(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}-{high})"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right")
    return table
