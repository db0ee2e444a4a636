"""The exact value types of a GGUF file's metadata, which Python's int and float do not tell apart."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from gguf import GGUFValueType

from slimrt.errors import ModelFileError

__all__ = ["value_types"]

_SIZES = {
    **dict.fromkeys((GGUFValueType.UINT8, GGUFValueType.INT8, GGUFValueType.BOOL), 1),
    **dict.fromkeys((GGUFValueType.UINT16, GGUFValueType.INT16), 2),
    **dict.fromkeys((GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32), 4),
    **dict.fromkeys((GGUFValueType.UINT64, GGUFValueType.INT64, GGUFValueType.FLOAT64), 8),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def value_types(path: Path) -> dict[str, tuple[GGUFValueType, GGUFValueType | None]]:
    """Key -> (type, element type of an array or None), for a file that ``slimrt.weights.gguf.GGUFFile`` has checked.

    Raises ModelFileError for arrays of arrays, which no model uses and the writer cannot repeat faithfully.
    """
    types: dict[str, tuple[GGUFValueType, GGUFValueType | None]] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        (count,) = _U64.unpack_from(buffer, 16)
        at = 24
        for _ in range(count):
            end = _skip_text(buffer, at)
            key = buffer[at + 8 : end].decode()
            kind = GGUFValueType(_U32.unpack_from(buffer, end)[0])
            at, element = end + 4, None
            if kind == GGUFValueType.ARRAY:
                element = GGUFValueType(_U32.unpack_from(buffer, at)[0])
                (length,) = _U64.unpack_from(buffer, at + 4)
                at = _skip(buffer, at + 12, element, length, f"{path}: metadata key '{key[:80]}'")
            else:
                at = _skip(buffer, at, kind, 1, key)
            types[key] = (kind, element)
    return types


def _skip(buffer: mmap.mmap, at: int, kind: GGUFValueType, count: int, label: str) -> int:
    if kind == GGUFValueType.STRING:
        for _ in range(count):
            at = _skip_text(buffer, at)
        return at
    if kind == GGUFValueType.ARRAY:
        raise ModelFileError(
            f"{label} is an array of arrays; one level can be copied; remove the key or convert the model again"
        )
    return at + count * _SIZES[kind]


def _skip_text(buffer: mmap.mmap, at: int) -> int:
    return at + 8 + _U64.unpack_from(buffer, at)[0]
