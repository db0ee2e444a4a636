"""Tensors as they lie in checkpoint files, read a few rows at a time; nothing is ever held whole."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimrt.errors import ModelFileError

__all__ = [
    "FLOAT_TYPES",
    "STORED_TYPES",
    "Rows",
    "StoredTensor",
    "check_regular",
    "concatenate",
    "parse_json",
    "permute_heads",
    "read_bounded",
    "read_json",
]

Rows = Callable[[int, int], np.ndarray]
"""(start, stop) -> float32 [stop - start, ...]: the rows of a tensor, or the values of a vector."""

FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
STORED_TYPES = FLOAT_TYPES | {"U8": np.dtype(np.uint8)}
"""Element types that weights may have, by their safetensors names, and how NumPy reads their bytes."""

_MAX_JSON_BYTES = {
    "tokenizer.json": 64 << 20,
    "tekken.json": 64 << 20,
}  # Gemma's, the largest known one, has 34 million bytes
_MAX_SMALL_JSON_BYTES = 16 << 20  # indexes name every tensor, configurations hold less
_MAX_CONTAINERS = 2_000_000  # merges are the most: under a million in the largest known vocabularies


@dataclass(frozen=True)
class StoredTensor:
    """A row-major tensor of type ``kind`` (floats, or bytes of packed numbers) at byte ``offset`` of an uncompressed
    file.

    ``row_stride`` counts elements from one row to the next; it exceeds the row length where the tensor is a slice of
    the columns of a larger one (PyTorch stores the larger one).
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    row_stride: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` as float32 [stop - start, *shape[1:]].

        Raises ModelFileError if they cannot be read.
        """
        raw = self.stored_rows(start, stop)
        if self.kind == "BF16":
            return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which the writer refuses by name
            return raw.astype(np.float32)

    def stored_rows(self, start: int, stop: int) -> np.ndarray:
        """The same as stored; raises as ``rows`` does."""
        dtype = STORED_TYPES[self.kind]
        width = math.prod(self.shape[1:])
        last_row_only = (stop - start - 1) * self.row_stride + width
        try:
            # Plain reads, not a memory map: mapped pages would count as this process's memory.
            with self.path.open("rb") as file:
                file.seek(self.offset + start * self.row_stride * dtype.itemsize)
                raw = np.fromfile(file, dtype, last_row_only)
        except OSError as error:
            raise ModelFileError(
                f"{self.path}: cannot be read ({error.strerror}); check the file and its permissions"
            ) from None
        if raw.size != last_row_only:
            raise ModelFileError(
                f"{self.path}: ends inside tensor '{self.name}'; the file changed meanwhile; fetch it again"
            )
        if self.row_stride != width:
            raw = np.lib.stride_tricks.as_strided(
                raw, (stop - start, width), (self.row_stride * dtype.itemsize, dtype.itemsize), writeable=False
            )
        return raw.reshape((stop - start, *self.shape[1:]))


def concatenate(parts: Sequence[StoredTensor], axis: int) -> Rows:
    """The rows of ``parts`` laid side by side along ``axis`` (0 or 1)."""
    if len(parts) == 1:
        return parts[0].rows
    if axis == 1:
        return lambda start, stop: np.concatenate([part.rows(start, stop) for part in parts], axis=1)

    def rows(start: int, stop: int) -> np.ndarray:
        pieces, first = [], 0
        for part in parts:
            low, high = max(start, first), min(stop, first + part.shape[0])
            if low < high:
                pieces.append(part.rows(low - first, high - first))
            first += part.shape[0]
        return np.concatenate(pieces)

    return rows


def permute_heads(rows: Rows, n_rows: int, n_heads: int) -> Rows:
    """Query or key rows from Transformers' RoPE layout to that of GGUF's llama architecture.

    Transformers turns the pairs (j, j + Dh/2) of a head, GGUF's llama the pairs (2j, 2j + 1): row 2j + s of a head
    is row s * Dh/2 + j before. Biases are rows of one value.
    """
    head_dim = n_rows // n_heads

    def permuted(start: int, stop: int) -> np.ndarray:
        low, high = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        head, row = np.divmod(np.arange(start, stop), head_dim)
        pair, half = np.divmod(row, 2)
        return rows(low, high)[head * head_dim + half * (head_dim // 2) + pair - low]

    return permuted


def check_regular(path: Path) -> int:
    """The size of the file ``path`` in bytes. Raises ModelFileError for a pipe, which would never end, and a device;
    OSError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ModelFileError(f"{path}: not a regular file; a checkpoint is made of plain files; fetch it again")
    return found.st_size


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes.

    Raises ModelFileError for a pipe or a device (a pipe would never end), a file that is larger, missing or unreadable.
    """
    try:
        size = check_regular(path)
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; a checkpoint needs it; fetch the whole folder") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    if len(raw) > limit:
        raise ModelFileError(f"{path}: {size} bytes; such a file has at most {limit}; fetch it again")
    return raw


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ModelFileError if it is missing, unreadable or anything but an object."""
    data = parse_json(read_bounded(path, _MAX_JSON_BYTES.get(path.name, _MAX_SMALL_JSON_BYTES)), str(path))
    if not isinstance(data, dict):
        raise ModelFileError(f"{path}: holds a JSON {type(data).__name__}; an object is expected; fetch it again")
    return data


def parse_json(raw: bytes, name: str, **how: Any) -> Any:
    """``raw`` parsed with a bounded number of containers, each of which takes some 25 times its text in memory.

    ``how``: as for ``json.loads``. Raises ModelFileError for what is not valid JSON.
    """
    containers = raw.count(b"[") + raw.count(b"{")
    if containers > _MAX_CONTAINERS:
        raise ModelFileError(
            f"{name}: {containers} arrays and objects; a checkpoint has at most {_MAX_CONTAINERS}; fetch it again"
        )
    try:
        return json.loads(raw.decode(), **how)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{name}: not valid JSON ({str(error)[:100]}); fetch it again") from None
