"""The folder of documents that were read: finding the one that a prompt begins with, keeping within a budget of bytes.

A document is found by its first tokens (``_FIRST`` of them are in the file's name, hashed, with the model and settings
whose bits it holds), then compared token by token. It serves a prompt when it was read under the same boundary and
windows as the prompt will be: the session's own rule of what can be used again decides the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slimrt.context import Context
from slimrt.engine import Engine
from slimrt.hub.store import cache_dir
from slimrt.library.entry import DamagedEntryError, Header, read_context, read_header, read_tokens, write_entry
from slimrt.output import remove_leftovers
from slimrt.paths import check_owner
from slimrt.reuse import common_prefix

__all__ = ["LEAST", "Book", "Library", "library_folder"]

log = logging.getLogger(__name__)

LEAST = 2048  # tokens: what is shorter is read again in little time
_FIRST = 512
_MOST_BYTES = 4 << 30
_OF_FREE = 8  # no more than this part of what the disk has free, with what the library holds already
_SUFFIX = ".slimrt-read"


def library_folder() -> Path:
    """The user's library, beside the models that were fetched (``$SLIMRT_CACHE`` moves both)."""
    return cache_dir() / "read"


@dataclass(frozen=True)
class Book:
    """One entry: its file and size, when it was last used (seconds since 1970), and what it says of itself."""

    path: Path
    nbytes: int
    used: float
    header: Header


class Library:
    """Entries in ``folder`` for one model as it is loaded (``key``); ``limit``: bytes of all entries together (None: 4
    GiB, or an eighth of the free disk where that is less).

    Nothing that goes wrong with the disk stops a prompt: it is logged, and the prompt is read as without a library.
    """

    def __init__(self, folder: Path, key: str = "", limit: int | None = None) -> None:
        self.folder, self._key, self._limit = folder, hashlib.sha256(key.encode()).hexdigest(), limit
        self.written = 0  # bytes that this process wrote

    # -- using it -----------------------------------------------------------------------------------------------------

    def find(
        self, engine: Engine, ids: Sequence[int], boundary: int | None, reach: dict[int, tuple[int, ...]], held: int
    ) -> tuple[Context, list[int]] | None:
        """The entry with the longest beginning in common with ``ids``, more than ``held`` tokens and ``LEAST``, that
        was read with hidden states at ``boundary`` and windows of ``reach``; as a context of ``engine``, and its
        tokens."""
        if len(ids) < LEAST:
            return None
        best: tuple[int, Path] | None = None  # tokens in common
        for path in self._entries(self._prefix(ids)):
            with self._forgiving(path, "could not be read"), path.open("rb") as file:
                check_owner(path, os.fstat(file.fileno()))
                header = read_header(file)
                if header.key != self._key or header.boundary != boundary or dict(header.windows) != reach:
                    continue
                tokens = read_tokens(file, header)
                same = common_prefix(tokens, ids)
                if same >= max(LEAST, held + 1) and (best is None or same > best[0]):
                    best = same, path
        if best is None:
            return None
        found, (same, path) = None, best
        with self._forgiving(path, "could not be read"), path.open("rb") as file:
            header = read_header(file)
            tokens = read_tokens(file, header)
            found = read_context(file, header, engine), tokens.tolist()
            os.utime(path)
            log.info("a prompt begins as one read before: %d tokens from %s", same, path.name)
        return found

    def keep(self, engine: Engine, context: Context, tokens: Sequence[int], count: int, begins: str) -> None:
        """Write the first ``count`` of the ``tokens`` that ``context`` holds, unless that much is there already."""
        boundary = context.boundary
        layers = engine.config.n_layers if boundary is None else boundary.layer + 1
        if count < LEAST or any(context.cache.length(layer) < count for layer in range(layers)):
            return
        header = Header(
            key=self._key,
            tokens=count,
            layers=layers,
            boundary=None if boundary is None else boundary.layer,
            first=0 if boundary is None else min(boundary.first_length, count),
            windows=tuple(sorted((layer, tuple(reach)) for layer, reach in context.windows.reach.items())),
            windowed=min(context.windows.rows, count),
            dtype=np.dtype(engine.ops.kv_type).newbyteorder("<").str,
            model=engine.config.name,
            begins=" ".join(begins.split())[:80],
        )
        prefix = self._prefix(tokens)
        covered, superfluous = self._compared(prefix, header, tokens)
        if covered:
            return
        path = self.folder / f"{prefix}-{secrets.token_hex(6)}{_SUFFIX}"
        with self._forgiving(None, "could not be written"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_owner(self.folder, self.folder.stat())
            remove_leftovers(self.folder, _SUFFIX, any_beginning=True)
            c = engine.config
            size = 2 * layers * count * c.n_kv_heads * c.head_dim * np.dtype(engine.ops.kv_type).itemsize
            size += 0 if boundary is None else 4 * count * c.d_model
            if not self._make_room(size):
                log.info("a prompt of %d tokens takes %d bytes, more than the library may have", count, size)
                return
            write_entry(path, header, tokens, engine, context)
            self.written += path.stat().st_size
            for shorter in superfluous:  # not before: a killed process loses no more than what it was writing
                shorter.unlink(missing_ok=True)
            log.info("kept %d tokens in %s", count, path)

    def _compared(self, prefix: str, header: Header, tokens: Sequence[int]) -> tuple[bool, list[Path]]:
        """Whether an entry serves all but a little of what would be written, and which ones that makes superfluous."""
        mine, superfluous = tokens[: header.tokens], []
        for path in self._entries(prefix):
            with self._forgiving(path, "could not be read"), path.open("rb") as file:
                other = read_header(file)
                same_kind = (other.key, other.boundary, other.windows) == (header.key, header.boundary, header.windows)
                if not same_kind:
                    continue
                theirs = read_tokens(file, other)
                same = common_prefix(theirs, mine)
                if len(mine) - same < LEAST // 4:
                    return True, []
                if same == len(theirs):
                    superfluous.append(path)
        return False, superfluous

    # -- looking after it ---------------------------------------------------------------------------------------------

    def books(self) -> list[Book]:
        """All entries of all models, the last used first; what is no entry is left out."""
        found = []
        for path in self._entries(""):
            with self._forgiving(path, "could not be read"), path.open("rb") as file:
                status = os.fstat(file.fileno())
                found.append(Book(path, status.st_size, status.st_mtime, read_header(file)))
        return sorted(found, key=lambda book: -book.used)

    def clear(self) -> int:
        """Delete all entries; returns their bytes. Raises OSError."""
        freed = 0
        remove_leftovers(self.folder, _SUFFIX, any_beginning=True)
        for path in self._entries(""):
            freed += path.stat().st_size
            path.unlink(missing_ok=True)
        return freed

    @property
    def limit(self) -> int:
        """Bytes that all entries may take."""
        if self._limit is not None:
            return self._limit
        place = self.folder
        while not place.exists():
            place = place.parent
        held = sum(path.stat().st_size for path in self._entries(""))
        return min(_MOST_BYTES, (shutil.disk_usage(place).free + held) // _OF_FREE)

    def _make_room(self, size: int) -> bool:
        """Delete what was not used for the longest time until ``size`` more bytes are within the limit."""
        limit = self.limit
        if size > limit:
            return False
        there = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._entries(""))
        total = sum(nbytes for _, nbytes, _ in there)
        for _, nbytes, path in there:
            if total + size <= limit:
                break
            path.unlink(missing_ok=True)
            total -= nbytes
        return True

    def _entries(self, prefix: str) -> list[Path]:
        try:
            check_owner(self.folder, self.folder.stat())
            return sorted(self.folder.glob(f"{prefix}*{_SUFFIX}"))
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("the library of documents is not used: %s", error)
            return []

    def _prefix(self, tokens: Sequence[int]) -> str:
        first = np.asarray(tokens[:_FIRST], "<i4").tobytes()
        return hashlib.sha256(self._key.encode() + first).hexdigest()[:32]

    @contextlib.contextmanager
    def _forgiving(self, path: Path | None, what: str) -> Iterator[None]:
        """A disk's failure is a line in the log; a damaged entry goes."""
        try:
            yield
        except FileNotFoundError:  # another process dropped it
            log.info("an entry of the library is gone")
        except (DamagedEntryError, ValueError, TypeError, KeyError) as error:
            log.warning("an entry of the library is damaged and goes: %s (%s)", path, error)
            if path is not None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("an entry of the library %s: %s", what, error)
