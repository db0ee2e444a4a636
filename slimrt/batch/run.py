"""Answering a batch: prompts that begin alike one after the other, so that what they share is read once.

Every answer is a line of the result as soon as it is whole, so a run that was killed lost one at most. The next run
reads what is there, drops a torn last line, and goes on with the rest.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from slimrt.batch.lines import Line, LineError, Rows, parsed, read_lines
from slimrt.errors import OutputError, SettingError, SlimrtError
from slimrt.llm import LLM
from slimrt.request import GenerationRequest
from slimrt.server.embeddings import embeddings
from slimrt.server.errors import ApiError
from slimrt.server.openai import ChatReply, CompletionReply, chat_prompt, completion_prompts, whole_completion
from slimrt.server.scheduler import Read, answers
from slimrt.session import Session

if sys.platform != "win32":
    import fcntl

__all__ = ["BatchReport", "answer_batch"]

_BEGIN = b'{"id": "batch_req_'  # of every line that this writes
_KEY = 1 << 16  # bytes of a prompt's tokens that it is sorted by: 16k tokens
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


def answer_batch(
    llm: LLM, source: Path, target: Path, rows: Rows | None = None, progress: Progress | None = None
) -> BatchReport:
    """Append to ``target`` an answer to each line of ``source`` that has none there.

    ``rows``: how lines become requests that are rows of a table; None: they are OpenAI's batch requests (custom_id,
    method, url, body). Answers come in the order that reads least, each with its line's id and custom_id.

    Raises SettingError for a source that cannot be read or repeats a custom_id, OutputError for a target that holds
    other answers or that another run is writing. What is wrong with a line is its answer.
    """
    say = progress or (lambda done, total, what: None)
    try:
        lines = {line.id: line for line, _ in read_lines(source, rows)}
    except OSError as error:
        raise SettingError(f"{source}: {error.strerror}; name a file of JSON lines") from None
    counts = {"failed": 0, "prompt": 0, "reused": 0, "written": 0}
    with _opened(target) as out:
        done = _done(out, target, lines)
        counts["failed"] = sum(done.values())
        waiting = [line for name, line in lines.items() if name not in done]
        say(len(done), len(lines), "reading prompts")
        worker = _Worker(llm, source, rows, counts)
        try:
            waiting.sort(key=worker.key)
            for number, line in enumerate(waiting, len(done)):
                say(number, len(lines), f"line {line.number}")
                answer = worker.answer(line)
                _append(out, answer)
        except OSError as error:
            raise OutputError(
                f"{target}: {error.strerror}; the answers so far are kept, the same command goes on"
            ) from None
        finally:
            worker.close()
    say(len(lines), len(lines), "done")
    return BatchReport(len(lines), len(done), counts["failed"], counts["prompt"], counts["reused"], counts["written"])


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
            raise OutputError(
                f"{target}: holds something else than answers to this batch; name another file, or replace it with "
                "--force"
            )
        done[name] = _is_error(answer)
        whole += len(content)
    out.truncate(whole)
    out.seek(0, os.SEEK_END)
    return done


def _append(out: IO[bytes], answer: dict[str, Any]) -> None:
    """Write a line and bring it to the disk. Not through the file's buffer: where the disk is full, closing the file
    would try once more to write what is left there."""
    try:
        content = json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, in a custom_id or an unknown field's name: as it came, escaped
        content = json.dumps(answer).encode()
    left = content + b"\n"
    while left:
        left = left[os.write(out.fileno(), left) :]
    os.fsync(out.fileno())


def _is_error(answer: dict[str, Any]) -> bool:
    return answer.get("error") is not None or (answer.get("response") or {}).get("status_code") != 200


class _Worker:
    """Makes answers, on one session."""

    def __init__(self, llm: LLM, source: Path, rows: Rows | None, counts: dict[str, int]) -> None:
        self._llm, self._rows, self._counts = llm, rows, counts
        self._file = source.open("rb")
        self._session = Session(llm.engine, llm.ctx, llm.asking)

    def close(self) -> None:
        """Let go of the file and of what was read."""
        self._file.close()
        self._session.release()

    def _request(self, line: Line) -> tuple[str, dict[str, Any]]:
        """(url, body) of a line. Raises LineError."""
        self._file.seek(line.start)
        data = parsed(self._file.readline())
        if self._rows is not None:
            return "/v1/chat/completions", self._rows.request(data)
        url, body = data.get("url"), data.get("body")
        if not isinstance(url, str) or url not in _URLS:
            raise LineError(f"url {str(url)[:80]!r}: must be one of {', '.join(_URLS)}")
        if data.get("method", "POST") != "POST":
            raise LineError(f"method {str(data['method'])[:40]!r}: must be POST")
        if not isinstance(body, dict):
            raise LineError("body: must be a JSON object")
        return url, body

    def key(self, line: Line) -> bytes:
        """Prompts that begin alike lie side by side when sorted by it."""
        try:
            url, body = self._request(line)
            if url == "/v1/chat/completions":
                ids = chat_prompt(self._llm, body)[1]
            elif url == "/v1/completions":
                ids = completion_prompts(self._llm, body)[1][0]
            else:
                ids = []
        except (LineError, ApiError):
            return b""  # told when its turn comes: at once
        return np.asarray(ids[: _KEY // 4], ">u4").tobytes()

    def answer(self, line: Line) -> dict[str, Any]:
        """The line of the result."""
        response, error = None, None
        try:
            url, body = self._request(line)
            response = {"status_code": 200, "request_id": line.id, "body": _URLS[url](self, {**body, "stream": False})}
        except LineError as why:
            error = {"code": "invalid_request", "message": f"line {line.number}: {why}"}
        except ApiError as why:
            response = {"status_code": why.status, "request_id": line.id, "body": why.body()}
        except SlimrtError as why:
            told = ApiError(500, str(why))
            response = {"status_code": 500, "request_id": line.id, "body": told.body()}
        answer = {"id": line.id, "custom_id": line.custom_id, "response": response, "error": error}
        self._counts["failed"] += _is_error(answer)
        return answer

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        values, ids, request, calling = chat_prompt(self._llm, body)
        reply = ChatReply(
            self._llm, len(ids), choices=values["n"], usage=False, progress=False, calling=calling,
            older=values["older"],
        )  # fmt: skip
        self._write(reply, ids, request, values["n"])
        return reply.whole(logprobs=values["logprobs"])

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        values, prompts, request = completion_prompts(self._llm, body)
        replies = []
        for number, ids in enumerate(prompts):
            echo = self._llm.detokenize(ids) if values["echo"] else ""
            reply = CompletionReply(
                self._llm, len(ids), choices=values["n"], usage=False, progress=False, first=number * values["n"],
                echo=echo,
            )  # fmt: skip
            self._write(reply, ids, request, values["n"])
            replies.append(reply)
        return whole_completion(replies, logprobs=values["logprobs"] is not None)

    def _embed(self, body: dict[str, Any]) -> dict[str, Any]:
        body.pop("stream")
        answer = embeddings(self._llm, body)
        self._counts["prompt"] += answer["usage"]["prompt_tokens"]
        return answer

    def _write(self, reply: Any, ids: list[int], request: GenerationRequest, choices: int) -> None:
        if len(ids) >= self._llm.ctx:
            raise ApiError(
                400, f"the prompt has {len(ids)} tokens, the context holds {self._llm.ctx} with the answer; give a "
                "larger --ctx", code="context_length_exceeded",
            )  # fmt: skip
        for event in answers(self._llm, self._session, ids, request, choices):
            if isinstance(event, Read):
                self._counts["prompt"] += len(ids)
                self._counts["reused"] += event.reading.reused
            for _ in reply.take(event):
                pass
        self._counts["written"] += reply.written


_URLS: dict[str, Callable[[_Worker, dict[str, Any]], dict[str, Any]]] = {
    "/v1/chat/completions": _Worker._chat,
    "/v1/completions": _Worker._complete,
    "/v1/embeddings": _Worker._embed,
}
