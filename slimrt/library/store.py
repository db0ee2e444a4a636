"""The folder of documents that were read: finding the one that a prompt begins with, keeping within a budget of bytes.

A document is found by its first tokens (``_FIRST`` of them are in the file's name, hashed, with the model and settings
whose bits it holds), then compared token by token. It serves a prompt when it was read under the same boundary and
windows as the prompt will be: the session's own rule of what can be used again decides the rest. A prompt with cuts is
served by what was read whole, too, and what the cuts of just this prompt chose is kept for the next time it comes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slimrt.context import Context
from slimrt.engine import Engine
from slimrt.hub.store import cache_dir
from slimrt.kv.boundary import BoundaryStates
from slimrt.kv.cache import KVCache
from slimrt.library.entry import DamagedEntryError, Header, read_context, read_header, read_tokens, write_entry
from slimrt.output import remove_leftovers
from slimrt.paths import check_owner
from slimrt.prune.plan import PrunePlan
from slimrt.prune.schedule import Schedule, Windows
from slimrt.reuse import Choice, common_prefix

__all__ = ["LEAST", "Book", "Library", "library_folder"]

log = logging.getLogger(__name__)

LEAST = 2048  # tokens: what is shorter is read again in little time
_FIRST = 512
_MOST_BYTES = 4 << 30
_OF_FREE = 8  # no more than this part of what the disk has free, with what the library holds already
_SUFFIX = ".slimrt-read"
_BEGINS, _PASSED, _WHOLE, _SAME = 1, 2, 3, 4  # how an entry serves a prompt, the best last


def _digest(plan: PrunePlan | None) -> str:
    return hashlib.sha256(repr(plan).encode()).hexdigest()


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


@dataclass(frozen=True)
class Found:
    """What an entry holds of a prompt: the context and its tokens; and where it is just this prompt, the ``logits`` [V]
    after it and ``whys`` its cuts kept more than usual."""

    context: Context
    tokens: list[int]
    logits: np.ndarray | None
    whys: tuple[str, ...]


class Library:
    """Entries in ``folder`` for one model as it is loaded (``key``); ``limit``: bytes of all entries together (None: 4
    GiB, or an eighth of the free disk where that is less). ``plan``: one with cuts, in whose place a document that was
    read whole serves (None: none does but those that have an end of ``questions``).

    Nothing that goes wrong with the disk stops a prompt: it is logged, and the prompt is read as without a library.
    """

    def __init__(self, folder: Path, key: str = "", limit: int | None = None, plan: PrunePlan | None = None) -> None:
        self.folder, self._key, self._limit = folder, hashlib.sha256(key.encode()).hexdigest(), limit
        self.plan = plan
        self.written = 0  # bytes that this process wrote
        self._told: set[str] = set()  # what went wrong and was said

    # -- using it -----------------------------------------------------------------------------------------------------

    def find(
        self, engine: Engine, ids: Sequence[int], plan: PrunePlan | None, rule: Schedule, held: int
    ) -> Found | None:
        """What serves the prompt ``ids``, which ``rule`` reads under ``plan``, best, and is of use beside the first
        ``held`` tokens that are there already. It was read under the same windows, and begins with ``LEAST`` tokens or
        more of the prompt. In this order: just this prompt under this plan; where there are cuts, most of it, whole
        (if this library's ``plan`` allows that), or whole up to a later cut; the longest beginning with hidden states
        at the rule's boundary."""
        if len(ids) < LEAST:
            return None
        best: tuple[int, int, int, Path] | None = None  # kind, up to which later cut, tokens in common
        for path in self._entries(self._prefix(ids)):
            with self._forgiving(path, "could not be read"), path.open("rb") as file:
                check_owner(path, os.fstat(file.fileno()))
                header = read_header(file)
                if header.key != self._key or dict(header.windows) != rule.windows.reach:
                    continue
                same = common_prefix(read_tokens(file, header), ids)
                if not rule.anew and header.layers < engine.config.n_layers:
                    continue  # nothing is chosen behind the boundary: the layers there must have been read
                kind = self._serves(header, ids, plan, rule, same, held)
                depth = header.layers if kind == _PASSED else 0
                if kind and (best is None or (kind, depth, same) > best[:3]):
                    best = kind, depth, same, path
        if best is None:
            return None
        found, (kind, _, same, path) = None, best
        with self._forgiving(path, "could not be read"), path.open("rb") as file:
            header = read_header(file)
            tokens = read_tokens(file, header)
            context, logits = read_context(file, header, engine, chosen=kind == _SAME)
            found = Found(context, tokens.tolist(), logits, header.whys)
            os.utime(path)
            log.info("a prompt begins as one read before: %d tokens from %s", same, path.name)
        return found

    def _serves(
        self, header: Header, ids: Sequence[int], plan: PrunePlan | None, rule: Schedule, same: int, held: int
    ) -> int:
        """How well an entry that has ``same`` first tokens in common with a prompt serves it; 0: not at all."""
        if same < LEAST:
            return 0
        if header.boundary == rule.boundary:
            if rule.cuts and same == len(ids) == header.tokens and header.chosen == _digest(plan):
                return _SAME
            return _BEGINS if same > held else 0
        takes_whole = rule.cuts and plan is not None and (plan.questions or plan == self.plan)
        if not takes_whole or 2 * same <= len(ids):
            return 0
        if header.boundary is None:
            return _WHOLE
        return _PASSED if header.boundary in [cut.layer for cut in rule.cuts[1:]] else 0

    def has_whole(self, engine: Engine, tokens: Sequence[int], windows: Windows) -> bool:
        """Whether all but a little of ``tokens`` is there as all layers read it, under these windows."""
        header = self._header(engine, None, windows, len(tokens), "")
        return self._compared(self._prefix(tokens), header, tokens)[0]

    def keep(
        self,
        engine: Engine,
        context: Context,
        tokens: Sequence[int],
        count: int,
        begins: str,
        choice: Choice | None = None,
        *,
        passing: bool = False,
    ) -> None:
        """Write the first ``count`` of the ``tokens`` that ``context`` holds, unless that much is there already;
        ``choice``: and what the cuts of just this prompt chose; ``passing``: until more layers have read them."""
        boundary = context.boundary
        header = self._header(engine, boundary, context.windows, count, begins)
        header = dataclasses.replace(header, passing=passing)
        last = engine.config.n_layers - 1
        if not passing and choice is None and np.searchsorted(context.cache.positions(last), count) == count:
            header = dataclasses.replace(header, layers=last + 1)  # no cut left anything out
        layers = header.layers
        if count < LEAST or any(context.cache.length(layer) < count for layer in range(layers)):
            return
        if choice is not None and boundary is not None and isinstance(context.cache, KVCache):
            behind = range(layers, engine.config.n_layers)
            rows = tuple(int(np.searchsorted(context.cache.positions(layer), count)) for layer in behind)
            header = dataclasses.replace(header, chosen=_digest(choice.plan), behind=rows, whys=choice.whys)
        prefix = self._prefix(tokens)
        covered, superfluous = self._compared(prefix, header, tokens)
        if covered:
            return
        # Processes that write the same at the same time write the same file, one after the other.
        same = hashlib.sha256(repr(header).encode() + np.asarray(tokens[:count], "<i4").tobytes()).hexdigest()
        path = self.folder / f"{prefix}-{same[:12]}{_SUFFIX}"
        with self._forgiving(None, "could not be written"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_owner(self.folder, self.folder.stat())
            remove_leftovers(self.folder, _SUFFIX, any_beginning=True)
            c = engine.config
            size = 2 * layers * count * c.n_kv_heads * c.head_dim * np.dtype(engine.ops.kv_type).itemsize
            size += 0 if boundary is None else 4 * count * c.d_model
            size += 2 * sum(header.behind) * c.n_kv_heads * c.head_dim * np.dtype(engine.ops.kv_type).itemsize
            if not self._make_room(size):
                log.info("a prompt of %d tokens takes %d bytes, more than the library may have", count, size)
                return
            logits = choice.logits if choice is not None and header.chosen else None
            write_entry(path, header, tokens, engine, context, logits)
            self.written += path.stat().st_size
            for shorter in set(superfluous) - {path}:  # not before: who is killed loses what it was writing, no more
                shorter.unlink(missing_ok=True)
            log.info("kept %d tokens in %s", count, path)

    def _header(
        self, engine: Engine, boundary: BoundaryStates | None, windows: Windows, count: int, begins: str
    ) -> Header:
        """Of ``count`` tokens, all layers of them, or up to the ``boundary``."""
        return Header(
            key=self._key,
            tokens=count,
            layers=engine.config.n_layers if boundary is None else boundary.layer + 1,
            boundary=None if boundary is None else boundary.layer,
            first=0 if boundary is None else min(boundary.first_length, count),
            windows=tuple(sorted((layer, tuple(reach)) for layer, reach in windows.reach.items())),
            windowed=min(windows.rows, count),
            dtype=np.dtype(engine.ops.kv_type).newbyteorder("<").str,
            model=engine.config.name,
            begins=" ".join(begins.split())[:80],
        )

    def _compared(self, prefix: str, header: Header, tokens: Sequence[int]) -> tuple[bool, list[Path]]:
        """Whether an entry serves all but a little of what would be written, and which ones that makes superfluous."""
        mine, superfluous = tokens[: header.tokens], []
        for path in self._entries(prefix):
            with self._forgiving(path, "could not be read"), path.open("rb") as file:
                other = read_header(file)
                if (other.key, other.windows) != (header.key, header.windows):
                    continue
                passed = other.passing and other.layers < header.layers
                if other.boundary != header.boundary and not passed:
                    continue
                theirs = read_tokens(file, other)
                same = common_prefix(theirs, mine)
                if other.layers >= header.layers and len(mine) - same < LEAST // 4:
                    return True, []
                if other.layers <= header.layers and len(theirs) - same < (LEAST // 4 if passed else 1):
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
        for _, nbytes, path in self._sizes():
            path.unlink(missing_ok=True)
            freed += nbytes
        return freed

    @property
    def limit(self) -> int:
        """Bytes that all entries may take."""
        if self._limit is not None:
            return self._limit
        place = self.folder
        while not place.exists():
            place = place.parent
        held = sum(nbytes for _, nbytes, _ in self._sizes())
        return min(_MOST_BYTES, (shutil.disk_usage(place).free + held) // _OF_FREE)

    def _make_room(self, size: int) -> bool:
        """Delete what was not used for the longest time until ``size`` more bytes are within the limit."""
        limit = self.limit
        if size > limit:
            return False
        there = sorted(self._sizes())
        total = sum(nbytes for _, nbytes, _ in there)
        for _, nbytes, path in there:
            if total + size <= limit:
                break
            path.unlink(missing_ok=True)
            total -= nbytes
        return True

    def _sizes(self) -> list[tuple[float, int, Path]]:
        """When each entry was last used, its bytes and its file; another process may drop one meanwhile."""
        found = []
        for path in self._entries(""):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _entries(self, prefix: str) -> list[Path]:
        try:
            check_owner(self.folder, self.folder.stat())
            # Neither a pipe, which would be waited for, nor a link to nothing.
            return sorted(path for path in self.folder.glob(f"{prefix}*{_SUFFIX}") if path.is_file())
        except FileNotFoundError:
            return []
        except OSError as error:
            self._warn("the library of documents is not used", error)
            return []

    def _warn(self, what: str, error: OSError) -> None:
        """In the log, each error once."""
        if str(error) not in self._told:
            self._told.add(str(error))
            log.warning("%s: %s", what, error)

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
            self._warn(f"an entry of the library {what}", error)
