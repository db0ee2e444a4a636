"""The lines of a batch: OpenAI's requests, or rows of a table with a template; each known by its number and content."""

from __future__ import annotations

import functools
import json
import re
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimrt.documents import document_text
from slimrt.errors import SettingError

__all__ = ["Line", "Rows", "read_lines", "unmarked"]

LONGEST = 64 << 20  # bytes of a line
_HELD = 4  # documents whose text is kept: rows on one follow each other, and a PDF takes a second to read
_FIELD = re.compile(r"\{(\w+)\}")


class LineError(Exception):
    """A line that is no request; in one line, why."""


@dataclass(frozen=True)
class Line:
    """Line ``number`` (from 1) at byte ``start``. ``id``: of the number, the content and the model that answers, so
    that an answer can be told to belong to it. ``custom_id``: the caller's, None where the line has none."""

    number: int
    start: int
    id: str
    custom_id: str | None


@dataclass(frozen=True)
class Rows:
    """How a row (any JSON object) becomes a chat request: ``template`` with {column} in it; the text of the file that
    the column ``file_column`` names stands before it. Relative paths start at ``folder``. ``body``: fields of every
    request, ``system``: a system message."""

    template: str
    folder: Path
    file_column: str | None = None
    system: str | None = None
    body: Mapping[str, Any] | None = None
    largest: int = 32 << 20  # bytes of a file

    def request(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The body of /v1/chat/completions. Raises LineError."""

        def value(found: re.Match[str]) -> str:
            if found[1] not in row:
                raise LineError(f"the template names column '{found[1]}', which the row has not")
            content = row[found[1]]
            return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)

        text = _FIELD.sub(value, self.template)
        if self.file_column is not None:
            text = "\n\n".join(part for part in (self._document(row), text) if part)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": [*system, {"role": "user", "content": text}], **(self.body or {})}

    def _document(self, row: Mapping[str, Any]) -> str:
        name = row.get(self.file_column or "")
        if not isinstance(name, str) or not name or "\0" in name:
            raise LineError(f"column '{self.file_column}' must name a file, not {str(name)[:80]!r}")
        path = self.folder / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device may have no end
                raise LineError(f"{name!a}: not a regular file")
            return _text(path, name, self.largest, (status.st_mtime_ns, status.st_size))
        except OSError as error:
            raise LineError(f"{name[:200]}: {error.strerror}") from None
        except UnicodeEncodeError:
            raise LineError(f"{ascii(name)[:200]}: no file can have such a name") from None
        except SettingError as error:
            raise LineError(str(error)) from None


@functools.lru_cache(maxsize=_HELD)
def _text(path: Path, name: str, largest: int, version: tuple[int, int]) -> str:
    """The text of ``path``, which rows know as ``name``; ``version`` changes when the file does. Raises LineError,
    OSError and SettingError."""
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise LineError(f"{name!a}: larger than {largest >> 20} MiB")
    return document_text(content, name)


def read_lines(source: Path, rows: Rows | None = None, mark: int = 0) -> Iterator[tuple[Line, bytes]]:
    """Every line of ``source`` that is not blank, with its bytes. Its id is also of how ``rows`` become requests: under
    another template it is another question; and of ``mark``, which tells who answers.

    Raises SettingError for a line beyond ``LONGEST``, and for a custom_id that came before.
    """
    known: dict[str, int] = {}
    asked = 0 if rows is None else zlib.crc32(repr((rows.template, rows.file_column, rows.system, rows.body)).encode())
    with source.open("rb") as file:
        start = number = 0
        while content := file.readline(LONGEST + 1):
            number += 1
            if len(content) > LONGEST:
                raise SettingError(f"{source}: line {number} is longer than {LONGEST >> 20} MiB; split it")
            if content.strip():
                custom = _custom_id(content)
                if custom is not None and known.setdefault(custom, number) != number:
                    raise SettingError(
                        f"{source}: lines {known[custom]} and {number} have the same custom_id '{custom[:80]}'; "
                        "give each its own"
                    )
                name = f"batch_req_{number}_{zlib.crc32(content.strip(), asked):08x}_{mark:08x}"
                yield Line(number, start, name, custom), content
            start += len(content)


def unmarked(id: str) -> str:
    """A line's id without the model that answers."""
    return id.rpartition("_")[0]


def parsed(content: bytes) -> dict[str, Any]:
    """A line's JSON object. Raises LineError."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LineError(f"no JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict):
        raise LineError("must be a JSON object")
    return data


def _custom_id(content: bytes) -> str | None:
    try:
        found = parsed(content).get("custom_id")
    except LineError:
        return None
    return None if found is None else str(found)
