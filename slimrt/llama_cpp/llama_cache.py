"""Caches of what was read, under llama_cpp's names: ``Llama.set_cache(LlamaRAMCache())``.

An entry is a whole context, found by the longest beginning in common with a prompt. The last prompt's beginning is used
again without a cache; one pays where prompts take turns.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slimrt.errors import SessionFileError, SettingError
from slimrt.llama_cpp.state import LlamaState
from slimrt.paths import user_path
from slimrt.reuse import common_prefix
from slimrt.session import Session
from slimrt.session_file import DamagedFileError, SavedTalk, read_session, saved_tokens, write_session

__all__ = ["BaseLlamaCache", "LlamaCache", "LlamaDiskCache", "LlamaRAMCache"]

log = logging.getLogger(__name__)

_CAPACITY = 2 << 30


class _User(Protocol):
    """What a cache on disk asks of the ``Llama`` that uses it."""

    @property
    def _fingerprint(self) -> str: ...
    @property
    def _model(self) -> Any: ...
    @property
    def _current(self) -> Session: ...
    def n_ctx(self) -> int: ...
    def n_vocab(self) -> int: ...
    def _fresh_session(self) -> Session: ...
    def _state_of(self, session: Session, scores: np.ndarray) -> LlamaState: ...
    def _check_state(self, state: Any) -> None: ...


class BaseLlamaCache(ABC):
    """Tokens -> the state of a context that has read them; a program may bring its own."""

    def __init__(self, capacity_bytes: int = _CAPACITY) -> None:
        """``capacity_bytes``: of all entries; beyond it those used longest ago go."""
        self.capacity_bytes = capacity_bytes

    @property
    @abstractmethod
    def cache_size(self) -> int:
        """Bytes of all entries."""

    @abstractmethod
    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """The state with the longest beginning in common with ``key``. Raises KeyError where none has any."""

    @abstractmethod
    def __contains__(self, key: Sequence[int]) -> bool:
        """Whether a state has a beginning in common with ``key``."""

    @abstractmethod
    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Keep ``value``, which has read ``key``."""


class LlamaRAMCache(BaseLlamaCache):
    """A cache in memory."""

    def __init__(self, capacity_bytes: int = _CAPACITY) -> None:
        super().__init__(capacity_bytes)
        self.cache_state: OrderedDict[tuple[int, ...], LlamaState] = OrderedDict()

    @property
    def cache_size(self) -> int:
        return sum(state.llama_state_size for state in self.cache_state.values())

    def _find_longest_prefix_key(self, key: Sequence[int]) -> tuple[int, ...] | None:
        return _longest(self.cache_state, key)

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        found = self._find_longest_prefix_key(key)
        if found is None:
            raise KeyError("Key not found")
        self.cache_state.move_to_end(found)
        return self.cache_state[found]

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._find_longest_prefix_key(key) is not None

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        self.cache_state.pop(tuple(key), None)
        self.cache_state[tuple(key)] = value
        while self.cache_state and self.cache_size > self.capacity_bytes:
            self.cache_state.popitem(last=False)


LlamaCache = LlamaRAMCache


class LlamaDiskCache(BaseLlamaCache):
    """A cache in a folder, whose files are those of ``Conversation.save``: private, written whole or not at all,
    checked when they are read. A damaged one goes; those of other models stay and are not used."""

    def __init__(self, cache_dir: str | Path = ".cache/llama_cache", capacity_bytes: int = _CAPACITY) -> None:
        """Raises SettingError for a folder that cannot be made."""
        super().__init__(capacity_bytes)
        self._folder = user_path(cache_dir)
        self._lock = threading.RLock()
        self._llama: weakref.ref[_User] | None = None
        self._known: dict[Path, tuple[int, tuple[int, ...]]] = {}  # file -> its time when it was read, its tokens
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise SettingError(f"cache_dir {str(cache_dir)!r}: {error.strerror}; name a folder to write to") from None

    @contextlib.contextmanager
    def used_by(self, llama: _User) -> Iterator[None]:
        """Entries are read and written with this model's sizes."""
        with self._lock:
            before, self._llama = self._llama, weakref.ref(llama)
            try:
                yield
            finally:
                self._llama = before or self._llama

    @property
    def cache_size(self) -> int:
        return sum(size for _, size, _ in self._files())

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        with self._lock:
            path = self._find(key)
            if path is None:
                raise KeyError("Key not found")
            llama = self._user()
            session = llama._fresh_session()
            try:
                read_session(path, session, llama._model.file)
            except SessionFileError as error:
                self._drop(path, error)
                raise KeyError("Key not found") from None
            with contextlib.suppress(OSError):  # of others, who may not be changed: it goes a little sooner
                os.utime(path)
            return llama._state_of(session, np.empty((0, llama.n_vocab()), np.float32))

    def __contains__(self, key: Sequence[int]) -> bool:
        with self._lock:
            return self._find(key) is not None

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        with self._lock:
            llama = self._user()
            llama._check_state(value)
            session = Session(llama._model.engine, llama.n_ctx(), llama._model.asking)
            session.replace(value.llama_state, value.input_ids[: value.n_tokens].tolist(), value.logits)
            name = hashlib.sha256(np.asarray(key, "<i4").tobytes()).hexdigest()[:32]
            path = self._folder / f"{llama._fingerprint[:16]}-{name}.slim"
            try:
                write_session(path, session, llama._model.file, SavedTalk([], None, None))
            except SessionFileError as error:
                log.warning("not kept: %s", error)
            self._trim()

    def _user(self) -> _User:
        llama = None if self._llama is None else self._llama()
        if llama is None:
            raise SettingError("LlamaDiskCache: no model uses it yet; give it to Llama.set_cache first")
        return llama

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time, bytes, path) of every entry, the one used longest ago first."""
        found = []
        for path in self._folder.glob("*.slim"):
            with contextlib.suppress(FileNotFoundError):  # another process trims too
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _find(self, key: Sequence[int]) -> Path | None:
        llama = self._user()
        entries: dict[tuple[int, ...], Path] = {}
        for time, _, path in self._files():
            if not path.name.startswith(llama._fingerprint[:16]):
                continue
            known = self._known.get(path)
            if known is None or known[0] != time:
                try:
                    tokens = saved_tokens(path, llama._current, llama._fingerprint)
                except SessionFileError as error:
                    self._drop(path, error)
                    continue
                known = self._known[path] = time, tuple(tokens)
            entries[known[1]] = path
        found = _longest(entries, key)
        return None if found is None else entries[found]

    def _trim(self) -> None:
        files = self._files()
        size = sum(size for _, size, _ in files)
        for _, one, path in files:
            if size <= self.capacity_bytes:
                break
            path.unlink(missing_ok=True)
            self._known.pop(path, None)
            size -= one

    def _drop(self, path: Path, error: SessionFileError) -> None:
        """An entry that cannot be used: it goes if it is damaged, and stays if it was saved under other settings."""
        log.warning("not used: %s", error)
        self._known.pop(path, None)
        if isinstance(error, DamagedFileError):
            path.unlink(missing_ok=True)


def _longest(entries: Iterable[tuple[int, ...]], key: Sequence[int]) -> tuple[int, ...] | None:
    """The entry with the longest beginning in common with ``key``, the first such; None where none has any."""
    best = max(entries, key=lambda tokens: common_prefix(tokens, key), default=None)
    return best if best is not None and common_prefix(best, key) else None
