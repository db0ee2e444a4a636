"""A document's bytes -> its text, by a reader in a process of its own, or as they stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from multiprocessing.spawn import get_executable
from pathlib import Path

import slimrt
from slimrt.documents.kinds import Kind, kind_of
from slimrt.documents.worker import MISSING, PROBLEM
from slimrt.errors import SettingError

__all__ = ["LARGEST", "document_text", "plain_text"]

_WALL_SECONDS = 120  # the last resort, where the system limits no processor time or the machine is very busy
_MEMORY = 1 << 30  # bytes that a reader may take beside the document
MOST = 1 << 28  # bytes of text
_READ = "name a text, PDF, Word or HTML file"
LARGEST = 64 << 20  # bytes of a document that is not text; who reads one bounds it by this


def document_text(raw: bytes, name: str, *, most: int = MOST) -> str:
    """The text of the file ``name``, which holds ``raw``: UTF-8 as it stands; PDF, Word and HTML (by the ending of the
    name) through their readers, which the extra ``slimrt[documents]`` brings. ``most``: bytes that a reader may make.

    Raises SettingError that says what the file is and what helps.
    """
    kind = kind_of(raw, name)
    if kind is not None and kind.reader:
        return _read_apart(raw, name, kind, most)
    return plain_text(raw, name)


def plain_text(raw: bytes, name: str) -> str:
    """``raw`` as UTF-8 without a byte-order mark. Raises SettingError that says what it is, or which byte is wrong."""
    kind = kind_of(raw, "")
    if kind is not None:
        remedy = _by_hand(kind) if kind.command else _READ
        raise SettingError(f"{name}: is {kind.words}, which cannot be read; {remedy}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in raw:  # no text has it, whatever its encoding
            raise SettingError(f"{name}: is not text, and no kind of file that is known; {_READ}") from None
        byte = raw[error.start]
        raise SettingError(
            f"{name}: byte {error.start} (0x{byte:02x}) is not valid UTF-8; "
            "make it UTF-8 text first (for example: iconv -f LATIN1 -t UTF-8 FILE)"
        ) from None


def _read_apart(raw: bytes, name: str, kind: Kind, most: int) -> str:
    root = str(Path(slimrt.__file__).parent.parent)
    path = json.dumps([root, *(entry for entry in sys.path if isinstance(entry, str))])
    worker = str(Path(__file__).with_name("worker.py"))
    # -I -S: the modules are those that this process sees, without reading the site's configuration again.
    command = [os.fsdecode(get_executable() or ""), "-I", "-S", worker, path, kind.reader, str(most), str(_MEMORY)]
    try:
        done = subprocess.run(command, input=raw, capture_output=True, timeout=_WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise SettingError(f"{name}: takes more than {_WALL_SECONDS} s to read; {_by_hand(kind)}") from None
    except OSError as error:
        raise SettingError(
            f"documents are read in a process of its own, and {command[0]!r} cannot be started "
            f"({error.strerror or error}); set the interpreter with multiprocessing.set_executable"
        ) from None
    told = done.stdout.decode()
    if done.returncode == 0:
        return told
    if done.returncode == MISSING:
        raise SettingError(
            f"{name}: is {kind.words}, which slimrt[documents] reads (without it {told} is missing): "
            f"pip install 'slimrt[documents]'; or {_by_hand(kind)}"
        )
    if done.returncode == PROBLEM:
        raise SettingError(f"{name}: {told}" + ("" if ";" in told else f"; {_by_hand(kind)}"))
    raise SettingError(f"{name}: takes more time or memory to read than any document should; {_by_hand(kind)}")


def _by_hand(kind: Kind) -> str:
    return f"make text of it first, for example with: {kind.command}"
