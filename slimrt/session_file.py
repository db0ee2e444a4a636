"""A session on disk: one file, written whole or not at all, that continues exactly where the conversation stopped.

Layout, all numbers little-endian:

    magic      8 bytes  "SLIMRTS\\n"
    version    u32      3
    length     u32      bytes of the header
    header     UTF-8 JSON: "model" (fingerprint), "ctx", "rope", "plan", "system", "messages", "tokens" (how many),
               "rows" (how many each layer holds), "boundary" (the layer of the hidden states, or null),
               "first" (of how many first tokens that layer's queries are kept),
               "windows" (in force, as in a plan), "windowed" (how many first rows they hold for), "logits" (bool)
    digest     32 bytes, SHA-256 of all of the above
    arrays     each its raw elements, then their SHA-256 (32 bytes):
               tokens int32 [N]; of every layer keys, values float32 [Hkv, n, Dh] and positions int64 [n];
               boundary states float32 [N, D], uint8 [N] (1: behind the attention, 0: before it) and queries float32
               [first, H, Dh] if there is a boundary;
               logits float32 [V] if there are any

The header and the model give the size of every array, so the file's size is known before anything of it is allocated;
it must be exactly that. A digest guards against damage, not against forgery: what is read is checked as input besides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slimrt.config import ModelConfig
from slimrt.context import Context
from slimrt.engine import Engine
from slimrt.errors import SessionFileError, SettingError
from slimrt.kv.restore import placed, restore_layer
from slimrt.output import whole_or_nothing
from slimrt.paths import user_path
from slimrt.prune.asked import HEAD
from slimrt.prune.plan import PrunePlan, check_plan
from slimrt.prune.schedule import Windows
from slimrt.session import Session
from slimrt.weights.gguf import GGUFFile

__all__ = [
    "MAGIC",
    "DamagedFileError",
    "SavedTalk",
    "model_fingerprint",
    "read_session",
    "saved_tokens",
    "write_session",
]

MAGIC = b"SLIMRTS\n"
VERSION = 3
_PREFIX = struct.Struct("<8sII")
_DIGEST = 32
_MAX_HEADER = 1 << 26  # bytes; the messages of a million tokens take about 5 MB
_SAMPLE = 256  # bytes of every tensor that count for the fingerprint: models of one family differ in nothing else
_KEYS = {
    "model",
    "ctx",
    "rope",
    "plan",
    "system",
    "messages",
    "tokens",
    "rows",
    "boundary",
    "first",
    "windows",
    "windowed",
    "logits",
}


class DamagedFileError(SessionFileError):
    """A session's file that is not as it was written."""


@dataclass(frozen=True)
class SavedTalk:
    """What a session file holds besides the model's memory. ``plan`` None: prompts run dense."""

    messages: list[dict[str, Any]]
    system: str | None
    plan: PrunePlan | None


def model_fingerprint(file: GGUFFile, adapters: str = "") -> str:
    """SHA-256 (hex) of a model's metadata, tensor table and the first bytes of each tensor; ``adapters``: which ones
    are applied (``Engine.adapters``)."""
    digest = hashlib.sha256(adapters.encode())
    for key, value in file.metadata.items():
        digest.update(f"{key}\0".encode())
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype.str}{value.shape}".encode() + value.tobytes())
        else:
            digest.update(repr(value).encode(errors="surrogatepass"))
    for tensor in file.tensors.values():
        digest.update(f"{tensor.name}\0{tensor.shape}{int(tensor.type)}".encode())
        digest.update(tensor.data.reshape(-1)[:_SAMPLE].tobytes()[:_SAMPLE])
    return digest.hexdigest()


# -- writing ----------------------------------------------------------------------------------------------------------


def write_session(path: str | Path, session: Session, file: GGUFFile, talk: SavedTalk) -> None:
    """Write ``session`` and ``talk`` to ``path``, through a temporary file beside it: a save that fails, or is killed,
    leaves what ``path`` held.

    Raises SessionFileError where ``path`` cannot be written or holds something else than a session.
    """
    path = user_path(path)
    _check_target(path)
    config, context = session.engine.config, session.context
    rows = [context.cache.length(layer) for layer in range(config.n_layers)]
    header = {
        "model": model_fingerprint(file, session.adapters),
        "ctx": session.ctx,
        "rope": dataclasses.asdict(config.rope),
        "plan": None if talk.plan is None else dataclasses.asdict(talk.plan),
        "system": talk.system,
        "messages": talk.messages,
        "tokens": len(session.tokens),
        "rows": rows,
        "boundary": None if context.boundary is None else context.boundary.layer,
        "first": 0 if context.boundary is None else context.boundary.first_length,
        "windows": [{"layer": layer, "reach": reach} for layer, reach in sorted(context.windows.reach.items())],
        "windowed": context.windows.rows,
        "logits": session.logits is not None,
    }
    try:
        text = json.dumps(header).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SessionFileError(f"{path}: the messages cannot be saved ({error}); they must be JSON data") from None
    if len(text) > _MAX_HEADER:
        raise SessionFileError(
            f"{path}: the messages take {len(text)} bytes, at most {_MAX_HEADER} can be saved; shorten them"
        )
    try:
        _replace(path, _PREFIX.pack(MAGIC, VERSION, len(text)) + text, _arrays(session))
    except OSError as error:
        raise SessionFileError(
            f"{path}: cannot be written ({error.strerror}); choose a folder with room that you may write to"
        ) from None


def _check_target(path: Path) -> None:
    if "\0" in str(path):
        raise SessionFileError(f"{path}: no file can have a NUL byte in its name; choose another")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SessionFileError(f"{path}: not a regular file; a session is saved to a file of its own")
        with path.open("rb") as file:
            begin = file.read(len(MAGIC))
    except FileNotFoundError:
        return
    except OSError as error:
        raise SessionFileError(f"{path}: cannot be looked at ({error.strerror}); choose another name") from None
    if begin not in (MAGIC, b""):
        raise SessionFileError(f"{path}: exists and is not a saved session; choose another name")


def _arrays(session: Session) -> Iterator[np.ndarray]:
    """The arrays of the file, in its order; one layer's copies alive at a time."""
    context = session.context
    yield np.asarray(session.tokens, "<i4")
    for layer in range(session.engine.config.n_layers):
        keys, values, positions = context.cache.rows(layer)
        yield np.ascontiguousarray(session.engine.ops.floats(keys), "<f4")
        yield np.ascontiguousarray(session.engine.ops.floats(values), "<f4")
        yield np.ascontiguousarray(positions, "<i8")
    if context.boundary is not None:
        yield np.ascontiguousarray(context.boundary.on_host(session.engine.ops, len(session.tokens)), "<f4")
        yield np.ascontiguousarray(context.boundary.attended, np.uint8)
        if context.boundary.first_length:
            yield np.ascontiguousarray(session.engine.ops.floats(context.boundary.first_queries()), "<f4")
    if session.logits is not None:
        yield np.ascontiguousarray(session.logits, "<f4")


def _replace(path: Path, head: bytes, arrays: Iterator[np.ndarray]) -> None:
    with whole_or_nothing(path, private=True) as part, part.open("wb") as file:
        file.write(head)
        file.write(hashlib.sha256(head).digest())
        for array in arrays:
            data = array.reshape(-1).view(np.uint8).data
            file.write(data)
            file.write(hashlib.sha256(data).digest())
        file.flush()
        os.fsync(file.fileno())


# -- reading ----------------------------------------------------------------------------------------------------------


def read_session(path: str | Path, session: Session, file: GGUFFile) -> SavedTalk:
    """Replace what ``session`` read by what ``path`` holds.

    Raises SessionFileError for a file that is damaged, no session, another model's, or does not fit the settings;
    the session is then as it was.
    """
    path = user_path(path)
    try:
        if "\0" in str(path) or not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise SessionFileError(f"{path}: not a regular file; name one that a session was saved to")
        with path.open("rb") as stream:
            reader = _Reader(path, stream, os.fstat(stream.fileno()).st_size, session.engine.config, session.ctx)
            return reader.read(session, model_fingerprint(file, session.engine.adapters))
    except FileNotFoundError:
        raise SessionFileError(f"{path}: no such file; name one that a session was saved to") from None
    except OSError as error:
        raise SessionFileError(
            f"{path}: cannot be read ({error.strerror}); check the file and its permissions"
        ) from None


def saved_tokens(path: str | Path, session: Session, model: str) -> list[int]:
    """The tokens that ``path`` holds, without anything else of it; ``model``: the fingerprint of the session's.

    Raises SessionFileError as ``read_session`` does."""
    path = user_path(path)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            return _Reader(path, stream, size, session.engine.config, session.ctx).tokens(model)[1]
    except OSError as error:
        raise SessionFileError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


class _Reader:
    """One file, read front to back; nothing is allocated before it is known that the file holds it."""

    def __init__(self, path: Path, stream: BinaryIO, size: int, config: ModelConfig, ctx: int) -> None:
        self._path, self._stream, self._size, self._config, self._ctx = path, stream, size, config, ctx

    def tokens(self, model: str) -> tuple[SavedTalk, list[int], dict[str, Any]]:
        """What the file holds besides the model's memory: the talk, the tokens, the header."""
        header = self._header()
        talk = self._checked(header, model)
        self._check_size(header)
        ids = self._array("<i4", (header["tokens"],), "the tokens")
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._config.vocab_size:
            raise self._broken(f"a token id lies outside 0..{self._config.vocab_size - 1}")
        return talk, ids.tolist(), header

    def read(self, session: Session, model: str) -> SavedTalk:
        talk, ids, header = self.tokens(model)
        tokens, boundary = header["tokens"], header["boundary"]
        reach = {window.layer: window.reach for window in self._plan({"windows": header["windows"]}).windows}
        context = session.engine.new_context(boundary, Windows(reach, header["windowed"]))
        try:
            logits = self._fill(session.engine, context, header)
        except BaseException:
            context.cache.close()
            raise
        context.length = tokens
        session.replace(context, ids, logits)
        return talk

    def _fill(self, engine: Engine, context: Context, header: dict[str, Any]) -> np.ndarray | None:
        """Read what the model remembers into ``context``; returns the logits."""
        c, tokens = self._config, header["tokens"]
        for layer, rows in enumerate(header["rows"]):
            shape = (c.n_kv_heads, rows, c.head_dim)
            keys = self._array("<f4", shape, f"the keys of layer {layer}")
            values = self._array("<f4", shape, f"the values of layer {layer}")
            positions = self._array("<i8", (rows,), f"the positions of layer {layer}")
            if rows and not (positions[0] >= 0 and positions[-1] < tokens and (np.diff(positions) > 0).all()):
                raise self._broken(f"the positions of layer {layer} do not ascend within 0..{tokens - 1}")
            restore_layer(engine.ops, context.cache, layer, keys, values, positions)
        if context.boundary is not None:
            states = self._array("<f4", (tokens, c.d_model), "the boundary states")
            attended = self._array("u1", (tokens,), "which of them are behind the attention")
            if tokens and attended.max() > 1:
                raise self._broken("which boundary states are behind the attention must be 0 or 1 of each")
            queries = None
            if header["first"]:
                shape = (header["first"], c.n_heads, c.head_dim)
                first = self._array("<f4", shape, "the first queries")
                queries = placed(engine.ops, first, engine.ops.empty((0,)).dtype)
            there = attended != 0
            before, behind = (placed(engine.ops, states[some]) for some in (~there, there))
            context.boundary.restore(before, behind, there, queries)
        return self._array("<f4", (c.vocab_size,), "the logits") if header["logits"] else None

    def _broken(self, what: str) -> DamagedFileError:
        return DamagedFileError(f"{self._path}: {what}; the file is damaged; restore it from a copy or begin again")

    def _header(self) -> dict[str, Any]:
        prefix = self._stream.read(_PREFIX.size)
        if prefix[: len(MAGIC)] != MAGIC:
            raise SessionFileError(
                f"{self._path}: starts with {prefix[:8]!r}, not {MAGIC!r}; it is no saved session; name one that is"
            )
        if len(prefix) < _PREFIX.size:
            raise self._broken(f"ends after {len(prefix)} bytes")
        _, version, length = _PREFIX.unpack(prefix)
        if version != VERSION:
            raise SessionFileError(
                f"{self._path}: version {version}; this program reads version {VERSION}; save the session with it again"
            )
        if length > min(_MAX_HEADER, self._size - _PREFIX.size - _DIGEST):
            raise self._broken(f"claims a header of {length} bytes in a file of {self._size}")
        text = self._stream.read(length)
        if self._stream.read(_DIGEST) != hashlib.sha256(prefix + text).digest():
            raise self._broken("the header's checksum differs")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            raise self._broken("the header is not JSON") from None
        if not isinstance(header, dict) or set(header) != _KEYS:
            raise self._broken(f"the header must have the keys {', '.join(sorted(_KEYS))}")
        return header

    def _checked(self, header: dict[str, Any], model: str) -> SavedTalk:
        """The header's values against the model's sizes and the settings it was loaded with."""
        c, tokens = self._config, header["tokens"]
        if header["model"] != model:
            raise SessionFileError(
                f"{self._path}: saved with another model than {c.name} as it is loaded here; "
                "load the model, and the adapters, that the session was saved with"
            )
        rope = dataclasses.asdict(c.rope)
        if header["rope"] != rope:
            told = header["rope"] if isinstance(header["rope"], dict) else {}
            differing = ", ".join(
                f"{key} {str(told.get(key))[:40]}, here {rope[key]}" for key in rope if told.get(key) != rope[key]
            )
            raise SessionFileError(
                f"{self._path}: saved under other RoPE settings ({differing}); load the model with those, "
                f"or with the context that led to them (ctx={str(header['ctx'])[:20]})"
            )
        numbers = [tokens, *header["rows"]] if isinstance(header["rows"], list) else [None]
        if len(numbers) != c.n_layers + 1 or any(type(n) is not int or not 0 <= n <= (tokens or 0) for n in numbers):
            raise self._broken(f"the header must give the rows of {c.n_layers} layers, none above the number of tokens")
        boundary = header["boundary"]
        if boundary is not None and (type(boundary) is not int or not 0 <= boundary < c.n_layers):
            raise self._broken(f"the boundary is layer {str(boundary)[:40]} of {c.n_layers}")
        first = header["first"]
        if type(first) is not int or not 0 <= first <= min(tokens, HEAD) or (first and boundary is None):
            raise self._broken(f"claims the queries of {str(first)[:40]} first tokens")
        # Layers up to the first cut hold every token, all do where nothing is cut.
        dense = c.n_layers if boundary is None else boundary + 1
        if any(rows != tokens for rows in header["rows"][:dense]):
            raise self._broken("a layer before the first cut lacks rows")
        if tokens > self._ctx:
            raise SessionFileError(
                f"{self._path}: holds {tokens} tokens, the context {self._ctx}; load the model with ctx={tokens} or "
                "more (--ctx)"
            )
        if type(header["windowed"]) is not int or header["windowed"] < 0:
            raise self._broken("how many rows are under windows must be a number of at least 0")
        messages, system, plan = header["messages"], header["system"], header["plan"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise self._broken("the messages must be a list of objects")
        if not isinstance(system, (str, type(None))) or type(header["logits"]) is not bool:
            raise self._broken("the system prompt must be text, and whether there are logits true or false")
        return SavedTalk(messages, system, None if plan is None else self._plan(plan))

    def _plan(self, data: Any) -> PrunePlan:
        try:
            plan = PrunePlan.from_dict(data)
            check_plan(plan, self._config)
        except (SettingError, TypeError, AttributeError) as error:
            raise self._broken(f"its plan is unusable ({error})") from None
        return plan

    def _check_size(self, header: dict[str, Any]) -> None:
        c, tokens = self._config, header["tokens"]
        expected = self._stream.tell() + 4 * tokens + _DIGEST
        for rows in header["rows"]:
            expected += rows * (2 * 4 * c.n_kv_heads * c.head_dim + 8) + 3 * _DIGEST
        if header["boundary"] is not None:
            expected += 4 * tokens * c.d_model + tokens + 2 * _DIGEST
        if header["first"]:
            expected += 4 * header["first"] * c.n_heads * c.head_dim + _DIGEST
        if header["logits"]:
            expected += 4 * c.vocab_size + _DIGEST
        if expected != self._size:
            raise self._broken(f"has {self._size} bytes where its header promises {expected}")

    def _array(self, dtype: str, shape: tuple[int, ...], what: str) -> np.ndarray:
        array = np.empty(shape, dtype)
        data = array.reshape(-1).view(np.uint8).data
        if self._stream.readinto(data) != data.nbytes:  # type: ignore[attr-defined]
            raise self._broken(f"ends within {what}")
        if self._stream.read(_DIGEST) != hashlib.sha256(data).digest():
            raise self._broken(f"the checksum of {what} differs")
        if dtype == "<f4" and not np.isfinite(array).all():
            raise self._broken(f"{what} are not finite")
        return array
