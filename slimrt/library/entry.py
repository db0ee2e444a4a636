"""What was read of a prompt, as a file, and back.

Layout, all numbers little-endian:

    magic      8 bytes  "SLIMRTL2"
    length     u32      bytes of the header
    header     UTF-8 JSON, see ``Header``
    digest     32 bytes, SHA-256 of all of the above
    tokens     int32 [N]
    arrays     of layers 0 .. layers - 1 keys, then values [Hkv, N, Dh], in the type that the backend keeps; boundary
               states float32 [N, D], uint8 [N] (1: behind the attention, 0: before it) and queries float32 [first, H,
               Dh] if there is a boundary; where what a plan's cuts chose is kept, of each layer behind the boundary
               keys, values [Hkv, rows, Dh] and positions int32 [rows], and the logits float32 [V] after the prompt
    each of them followed by its SHA-256 (32 bytes)

Elements are kept as the backend has them, so what is read back is bit for bit what was there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from slimrt.context import Context
from slimrt.engine import Engine
from slimrt.kv.restore import placed, restore_layer
from slimrt.output import whole_or_nothing
from slimrt.prune.schedule import Windows

__all__ = ["DamagedEntryError", "Header", "read_context", "read_header", "read_tokens", "write_entry"]

MAGIC = b"SLIMRTL2"
_LENGTH = struct.Struct("<I")
_DIGEST = 32
_MAX_HEADER = 1 << 20


class DamagedEntryError(Exception):
    """The file is no entry, or not the one that was written."""


@dataclass(frozen=True)
class Header:
    """``key``: model, settings and backend whose bits these are. ``tokens`` rows in each of the first ``layers``
    layers; ``boundary``: the layer of the hidden states, None where there are none. ``first``: of how many first
    tokens the queries at the boundary are kept. ``windows``: (layer, reach by KV head) under which the first
    ``windowed`` rows were read. ``chosen``: under which plan (its digest) the layers behind the boundary chose their
    ``behind`` rows of just this prompt, empty where that is not kept; ``whys``: why each cut kept more than usual.
    ``passing``: written while the layers behind the boundary read on, and of no use once they have.
    ``model``, ``begins``: for people."""

    key: str
    tokens: int
    layers: int
    boundary: int | None
    first: int
    windows: tuple[tuple[int, tuple[int, ...]], ...]
    windowed: int
    dtype: str
    model: str
    begins: str
    chosen: str = ""
    behind: tuple[int, ...] = ()
    whys: tuple[str, ...] = ()
    passing: bool = False

    @property
    def reach(self) -> Windows:
        """The windows as the engine has them."""
        return Windows(dict(self.windows), self.windowed)


def write_entry(
    path: Path,
    header: Header,
    tokens: Sequence[int],
    engine: Engine,
    context: Context,
    logits: np.ndarray | None = None,
) -> None:
    """Write the first ``header.tokens`` rows of ``context``, whole or not at all; ``logits`` [V]: those after the
    prompt, where what its cuts chose is kept. Raises OSError."""
    data = json.dumps(dataclasses.asdict(header)).encode()
    head = MAGIC + _LENGTH.pack(len(data)) + data
    with whole_or_nothing(path, private=True) as part, part.open("wb") as file:
        file.write(head)
        file.write(hashlib.sha256(head).digest())
        for array in _arrays(header, tokens, engine, context, logits):
            raw = array.reshape(-1).view(np.uint8).data
            file.write(raw)
            file.write(hashlib.sha256(raw).digest())
        file.flush()
        os.fsync(file.fileno())


def _arrays(
    header: Header, tokens: Sequence[int], engine: Engine, context: Context, logits: np.ndarray | None
) -> Iterator[np.ndarray]:
    n, host = header.tokens, engine.ops.to_host
    yield np.asarray(tokens[:n], "<i4")
    for layer in range(header.layers):
        keys, values, _ = context.cache.rows(layer)
        yield np.ascontiguousarray(host(keys[:, :n]), header.dtype)
        yield np.ascontiguousarray(host(values[:, :n]), header.dtype)
    if header.boundary is not None:
        assert context.boundary is not None
        yield np.ascontiguousarray(context.boundary.on_host(engine.ops, n), "<f4")
        yield np.ascontiguousarray(context.boundary.attended[:n], np.uint8)
        if header.first:
            queries = engine.ops.floats(context.boundary.first_queries()[: header.first])
            yield np.ascontiguousarray(queries, "<f4")
    if logits is not None:
        for layer, rows in enumerate(header.behind, header.layers):
            keys, values, positions = context.cache.rows(layer)
            yield np.ascontiguousarray(host(keys[:, :rows]), header.dtype)
            yield np.ascontiguousarray(host(values[:, :rows]), header.dtype)
            yield np.ascontiguousarray(positions[:rows], "<i4")
        yield np.ascontiguousarray(logits, "<f4")


def read_header(file: BinaryIO) -> Header:
    """The header, and the file stands before the tokens. Raises DamagedEntryError, OSError."""
    head = file.read(len(MAGIC) + _LENGTH.size)
    if head[: len(MAGIC)] != MAGIC or len(head) < len(MAGIC) + _LENGTH.size:
        raise DamagedEntryError("no entry of the library")
    (length,) = _LENGTH.unpack(head[len(MAGIC) :])
    if length > _MAX_HEADER:
        raise DamagedEntryError(f"claims a header of {length} bytes")
    data = file.read(length)
    if file.read(_DIGEST) != hashlib.sha256(head + data).digest():
        raise DamagedEntryError("the header's checksum differs")
    fields = json.loads(data)
    windows = tuple((layer, tuple(reach)) for layer, reach in fields.pop("windows"))
    behind, whys = (tuple(fields.pop(name, ())) for name in ("behind", "whys"))  # entries of before have neither
    header = Header(**fields, windows=windows, behind=behind, whys=whys)
    if not 0 < 4 * header.tokens < os.fstat(file.fileno()).st_size:  # before anything of that size is made room for
        raise DamagedEntryError(f"claims {header.tokens} tokens")
    return header


def read_tokens(file: BinaryIO, header: Header) -> np.ndarray:
    """The tokens [N]; the file stands before the arrays. Raises DamagedEntryError, OSError."""
    return _array(file, "<i4", (header.tokens,))


def read_context(
    file: BinaryIO, header: Header, engine: Engine, *, chosen: bool = False
) -> tuple[Context, np.ndarray | None]:
    """A new context of ``engine`` with what the file holds, which stands before the arrays; ``chosen``: with what the
    cuts of the prompt chose, and the logits [V] after it.

    Raises DamagedEntryError where a checksum differs or the file ends early, OSError.
    """
    c, ops, n = engine.config, engine.ops, header.tokens
    context = engine.new_context(header.boundary, header.reach)
    positions = np.arange(n)
    try:
        for layer in range(header.layers):
            shape = c.n_kv_heads, n, c.head_dim
            keys, values = (_array(file, header.dtype, shape) for _ in range(2))
            restore_layer(ops, context.cache, layer, keys, values, positions)
        if header.boundary is not None:
            assert context.boundary is not None
            states = _array(file, "<f4", (n, c.d_model))
            attended = _array(file, "u1", (n,)) != 0
            queries = None
            if header.first:
                found = _array(file, "<f4", (header.first, c.n_heads, c.head_dim))
                queries = placed(ops, found, ops.empty((0,)).dtype)
            before, behind = (placed(ops, states[some]) for some in (~attended, attended))
            context.boundary.restore(before, behind, attended, queries)
        logits = _chosen(file, header, engine, context) if chosen else None
    except BaseException:
        context.cache.close()
        raise
    context.length = n
    return context, logits


def _chosen(file: BinaryIO, header: Header, engine: Engine, context: Context) -> np.ndarray:
    """Give the layers behind the boundary their rows; returns the logits [V]."""
    c = engine.config
    for layer, rows in enumerate(header.behind, header.layers):
        keys, values = (_array(file, header.dtype, (c.n_kv_heads, rows, c.head_dim)) for _ in range(2))
        positions = _array(file, "<i4", (rows,)).astype(np.int64)
        restore_layer(engine.ops, context.cache, layer, keys, values, positions)
    return _array(file, "<f4", (c.vocab_size,))


def _array(file: BinaryIO, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, dtype)
    raw = array.reshape(-1).view(np.uint8).data
    if file.readinto(raw) != raw.nbytes:  # type: ignore[attr-defined]
        raise DamagedEntryError("ends early")
    if file.read(_DIGEST) != hashlib.sha256(raw).digest():
        raise DamagedEntryError("a checksum differs")
    return array
