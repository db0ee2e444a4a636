"""Tensors as they lie in checkpoint files, read a few rows at a time; nothing is ever held whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimrt.errors import ModelFileError

__all__ = ["FLOAT_TYPES", "Rows", "StoredTensor", "concatenate", "permute_heads", "read_json"]

Rows = Callable[[int, int], np.ndarray]
"""(start, stop) -> float32 [stop - start, ...]: the rows of a tensor, or the values of a vector."""

FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""Element types that weights may have, by their safetensors names, and how NumPy reads their bytes."""

_MAX_JSON_BYTES = 256 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A row-major tensor of float type ``kind`` at byte ``offset`` of an uncompressed file.

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
        dtype = FLOAT_TYPES[self.kind]
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
                f"{self.path}: ends inside tensor '{self.name}'; the file changed meanwhile; fetch it anew"
            )
        if self.row_stride != width:
            raw = np.lib.stride_tricks.as_strided(
                raw, (stop - start, width), (self.row_stride * dtype.itemsize, dtype.itemsize), writeable=False
            )
        if self.kind == "BF16":
            values = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            with np.errstate(
                over="ignore"
            ):  # a float64 beyond float32 becomes infinite, which the writer refuses by name
                values = raw.astype(np.float32)
        return values.reshape((stop - start, *self.shape[1:]))


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ModelFileError if it is missing, unreadable or anything but an object."""
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise ModelFileError(
                f"{path}: {size} bytes; a JSON file of a checkpoint has at most {_MAX_JSON_BYTES}; fetch it anew"
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; a checkpoint needs it; fetch the whole folder") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not valid JSON ({error}); fetch it anew") from None
    if not isinstance(data, dict):
        raise ModelFileError(f"{path}: holds a JSON {type(data).__name__}; an object is expected; fetch it anew")
    return data
