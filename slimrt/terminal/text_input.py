"""Prompts and documents as the shell hands them over: arguments, files, standard input; bounded."""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO

import click

from slimrt.documents import LARGEST, document_text, kind_of
from slimrt.errors import SettingError
from slimrt.paths import user_path

__all__ = ["checked_argument", "join_document", "prompt_text", "read_document", "size_limit"]

_DEFAULT_CTX = 8192
_BYTES_A_TOKEN = 1024  # no vocabulary has longer tokens, so more bytes than this per token cannot fit
_MOST_BYTES = 1 << 28  # where no context bounds the text


def size_limit(ctx: int | None) -> int:
    """Bytes of text that may be read for a context of ``ctx`` tokens (None: the default one)."""
    return min(_MOST_BYTES, (ctx or _DEFAULT_CTX) * _BYTES_A_TOKEN)


def read_document(path: Path, limit: int = _MOST_BYTES) -> str:
    """The text of ``path`` ("-": standard input), without a byte-order mark.

    Raises SettingError if it cannot be read, is empty, has more than ``limit`` bytes, or as ``document_text`` does.
    """
    if str(path) == "-":
        return _read(sys.stdin.buffer, "standard input", limit)
    path = user_path(path)
    try:
        with path.open("rb") as file:
            return _read(file, str(path), limit)
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror}; name a text file that can be read") from None


def _read(file: BinaryIO, name: str, limit: int) -> str:
    raw = _bounded(file, name, limit)
    if not raw.strip():
        remedy = "pipe some in, or give it as an argument" if file is sys.stdin.buffer else "name a file that has some"
        raise SettingError(f"{name}: no text in it; {remedy}")
    return document_text(raw, name, most=limit)


def _bounded(file: BinaryIO, name: str, limit: int) -> bytes:
    # Bounded by what is read, not by the size that the system reports: a pipe has none.
    raw = file.read(limit + 1)
    if len(raw) > limit and kind_of(raw, name) is not None and limit < LARGEST:
        raw += file.read(LARGEST + 1 - len(raw))  # its text may be a small part of it
        limit = LARGEST
    if len(raw) > limit:
        raise SettingError(
            f"{name}: more than {limit // 1024:,} KiB, which no context set here can hold; cut it, or raise --ctx"
        )
    return raw


def checked_argument(text: str, name: str) -> str:
    """``text`` from the command line; raises SettingError if its bytes were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SettingError(f"{name}: character {error.start} is not valid UTF-8; set the terminal to UTF-8") from None
    return text


def prompt_text(prompt: str | None, file: Path | None, limit: int = _MOST_BYTES) -> str:
    """The prompt of a one-shot command: PROMPT, "-" or a piped stdin, or a document followed by PROMPT.

    The document is ``file``, else what is piped into stdin beside a PROMPT. Raises UsageError if nothing was given,
    SettingError for text that is not UTF-8.
    """
    if file is not None:
        document = read_document(file, limit)
        return join_document(document, checked_argument(prompt, "PROMPT")) if prompt is not None else document
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("no text: give it as an argument, with --file, or on standard input")
    if prompt is None or prompt == "-":
        return read_document(Path("-"), limit)
    question = checked_argument(prompt, "PROMPT")
    if _is_piped():
        piped = _bounded(sys.stdin.buffer, "standard input", limit)
        if piped.strip():
            return join_document(document_text(piped, "standard input", most=limit), question)
    return question


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file, out of which a text may come; a terminal, /dev/null and a socket are none."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except io.UnsupportedOperation:  # a stream in memory, as under a test runner
        return True
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def join_document(document: str, question: str) -> str:
    """A document and what is asked about it, as one text."""
    return f"{document.rstrip()}\n\n{question}"
