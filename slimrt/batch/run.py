"""Answering a batch: prompts that begin alike one after the other, so that what they share is read once.

Every answer is a line of the result as soon as it is whole, so a run that was killed lost one at most. The next run
reads what is there, drops a torn last line, and goes on with the rest.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from slimrt.batch.answering import Answerer, Counts, Work, is_error, line_of, model_mark, prompt_key, work_of
from slimrt.batch.lines import Line, LineError, Rows, parsed, read_lines, unmarked
from slimrt.errors import OutputError, SettingError
from slimrt.llm import LLM

if sys.platform != "win32":
    import fcntl

__all__ = ["BatchReport", "Elsewhere", "answer_batch"]

_BEGIN = b'{"id": "batch_req_'  # of every line that this writes
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BatchReport:
    """``lines`` of the batch; ``before``: answered by earlier runs; ``failed``: of all answers those with an error.
    ``prompt_tokens`` that this run's answers needed, ``reused`` of them not read again, ``written`` tokens."""

    lines: int
    before: int
    failed: int
    prompt_tokens: int
    reused: int
    written: int


class Elsewhere(Protocol):
    """Other processes that answer (``slimrt.batch.cluster``)."""

    counts: Counts

    def answers(self, work: Sequence[Callable[[], Work]]) -> Generator[dict[str, Any], None, None]:
        """The answers to ``work``, in any order; neighbours in it have most in common."""


def answer_batch(
    llm: LLM,
    source: Path,
    target: Path,
    rows: Rows | None = None,
    progress: Progress | None = None,
    elsewhere: Elsewhere | None = None,
) -> BatchReport:
    """Append to ``target`` an answer to each line of ``source`` that has none there.

    ``rows``: how lines become requests that are rows of a table; None: they are OpenAI's batch requests (custom_id,
    method, url, body). Answers come in the order that reads least, each with its line's id and custom_id. An id is of
    the line's number, its content, and the model as it is loaded. ``elsewhere`` computes in place of ``llm``, which
    then only tells which prompts begin alike.

    Raises SettingError for a source that cannot be read or repeats a custom_id, OutputError for a target that holds
    other answers, another model's too, or that another run is writing. What is wrong with a line is its answer.
    """
    say = progress or (lambda done, total, what: None)
    mark = model_mark(llm)
    try:
        lines = {line.id: line for line, _ in read_lines(source, rows, mark)}
    except OSError as error:
        raise SettingError(f"{source}: {error.strerror}; name a file of JSON lines") from None
    before = 0
    with _opened(target) as out, source.open("rb") as file:
        done = _done(out, target, lines)
        before = sum(done.values())
        requests = _Requests(file, rows)
        say(len(done), len(lines), "reading prompts")
        waiting = sorted(
            (line for name, line in lines.items() if name not in done),
            key=lambda line: prompt_key(llm, requests.work(line)),
        )
        answering = _Here(llm) if elsewhere is None else elsewhere
        written = set(done)
        say(len(written), len(lines), "answering")
        try:
            with contextlib.closing(
                answering.answers([functools.partial(requests.work, line) for line in waiting])
            ) as answers:
                for answer in answers:
                    if answer["id"] in written:  # two processes may have worked on it, one of which was thought dead
                        continue
                    _append(out, answer)
                    written.add(answer["id"])
                    say(len(written), len(lines), "answering")
        except OSError as error:
            raise OutputError(
                f"{target}: {error.strerror}; the answers so far are kept, the same command goes on"
            ) from None
    say(len(lines), len(lines), "done")
    counts = answering.counts
    return BatchReport(len(lines), len(done), before + counts.failed, counts.prompt, counts.reused, counts.written)


class _Here:
    """This process answers."""

    def __init__(self, llm: LLM) -> None:
        self._answerer = Answerer(llm)
        self.counts = self._answerer.counts

    def answers(self, work: Sequence[Callable[[], Work]]) -> Generator[dict[str, Any], None, None]:
        try:
            for one in work:
                yield self._answerer.answer(one())
        finally:
            self._answerer.close()


class _Requests:
    """The lines of a source, which is open, as requests."""

    def __init__(self, file: IO[bytes], rows: Rows | None) -> None:
        self._file, self._rows = file, rows

    def work(self, line: Line) -> Work:
        """What a line asks for."""
        return work_of(line.id, line.number, line.custom_id, functools.partial(self._request, line))

    def _request(self, line: Line) -> tuple[str, dict[str, Any]]:
        """(url, body) of a line. Raises LineError."""
        self._file.seek(line.start)
        data = parsed(self._file.readline())
        if self._rows is not None:
            return "/v1/chat/completions", self._rows.request(data)
        url, body = data.get("url"), data.get("body")
        if data.get("method", "POST") != "POST":
            raise LineError(f"method {str(data['method'])[:40]!r}: must be POST")
        if not isinstance(body, dict):
            raise LineError("body: must be a JSON object")
        return str(url), body


def _opened(target: Path) -> IO[bytes]:
    try:
        out = target.open("a+b")
    except OSError as error:
        raise OutputError(f"{target}: {error.strerror}; choose another name") from None
    if sys.platform != "win32":
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            out.close()
            raise OutputError(f"{target}: another run is writing it; wait for its end, or name another file") from None
    return out


def _done(out: IO[bytes], target: Path, lines: dict[str, Line]) -> dict[str, bool]:
    """The ids that have an answer already, and whether it is an error; a torn last line is cut off."""
    done: dict[str, bool] = {}
    known = {unmarked(name) for name in lines}
    whole = 0
    out.seek(0)
    for content in out:
        if not content.endswith(b"\n") and content.startswith(_BEGIN[: len(content)]):
            break  # torn
        try:
            answer = parsed(content)
        except LineError:
            answer = {}
        name = answer.get("id")
        if name not in lines:
            if isinstance(name, str) and unmarked(name) in known:
                raise OutputError(
                    f"{target}: holds answers of another model, or of this one loaded otherwise (adapters, plan, RoPE, "
                    "chat template); name another file, or replace it with --force"
                )
            raise OutputError(
                f"{target}: holds something else than answers to this batch; name another file, or replace it with "
                "--force"
            )
        done[name] = is_error(answer)
        whole += len(content)
    out.truncate(whole)
    out.seek(0, os.SEEK_END)
    return done


def _append(out: IO[bytes], answer: dict[str, Any]) -> None:
    """Write a line and bring it to the disk. Not through the file's buffer: where the disk is full, closing the file
    would try once more to write what is left there."""
    left = line_of(answer)
    while left:
        left = left[os.write(out.fileno(), left) :]
    os.fsync(out.fileno())
