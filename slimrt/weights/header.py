"""The header of one GGUF file: metadata and where its tensors lie, every length checked before it is used.

The layout is that of the GGUF specification, versions 2 and 3, little-endian
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Constants and block sizes come from the ``gguf``
package. Its ``GGUFReader`` is the reference in the tests but not the reader here, for two measured reasons: it trusts
the counts in the file (an array that claims 2**60 elements keeps it busy for ever), and it builds a NumPy view for each
vocabulary entry (1.7 s for 49k tokens, where this walk takes 0.1 s).

Nothing is allocated in proportion to a number in the file before that number has been held against the file's size,
and what the header may hold is bounded too: else a few wrong bytes at the front of a large file would have gigabytes of
weights read as text.
"""

from __future__ import annotations

import mmap
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from slimrt.errors import ModelFileError

__all__ = ["Part", "TensorInfo", "shown"]

_SCALARS: dict[int, tuple[struct.Struct, str]] = {
    GGUFValueType.UINT8: (struct.Struct("<B"), "<u1"),
    GGUFValueType.INT8: (struct.Struct("<b"), "<i1"),
    GGUFValueType.UINT16: (struct.Struct("<H"), "<u2"),
    GGUFValueType.INT16: (struct.Struct("<h"), "<i2"),
    GGUFValueType.UINT32: (struct.Struct("<I"), "<u4"),
    GGUFValueType.INT32: (struct.Struct("<i"), "<i4"),
    GGUFValueType.UINT64: (struct.Struct("<Q"), "<u8"),
    GGUFValueType.INT64: (struct.Struct("<q"), "<i8"),
    GGUFValueType.FLOAT32: (struct.Struct("<f"), "<f4"),
    GGUFValueType.FLOAT64: (struct.Struct("<d"), "<f8"),
    GGUFValueType.BOOL: (struct.Struct("<?"), "?"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_NESTING = 4  # arrays of arrays; the format allows any depth, no file uses more than one
_MAX_NAME = 65535  # bytes of a key, by the specification; taken for tensor names too
_MAX_TEXT = 1 << 24  # bytes of a text; the longest chat templates have some ten thousand
_MAX_ENTRIES = 1 << 22  # texts and arrays within arrays, in all; the largest vocabularies take under a million
_MAX_TENSORS = 1 << 16  # the largest dense models have some 2,000; each takes a kilobyte of memory and 14 us
_OTHERS = {
    b"PK\x03\x04": "a PyTorch checkpoint",
    b"version https://git-lfs": "a Git LFS pointer, whose file was not fetched,",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"lmgg": "a GGML file from before GGUF",
    b"tjgg": "a GGML file from before GGUF",
    b"fmgg": "a GGML file from before GGUF",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as it lies in the file.

    ``shape`` is in NumPy order (rows first; GGUF stores the reverse). ``data`` is a read-only view of the mapped file:
    float types in their own dtype with ``shape``, BF16 as uint16 with ``shape``, block types as uint8
    ``[*shape[:-1], bytes per row]``.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def shown(value: Any) -> str:
    """``value`` for an error message: on one line, without control characters, of bounded length."""
    if isinstance(value, (list, np.ndarray)):
        return f"an array of {len(value)}"
    text = repr(value[:81] if isinstance(value, str) else value)
    return text if len(text) <= 84 else f"{text[:80]}...'"


class Part:
    """One physical file: its header walked once, every length held against the bytes that are left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if "\0" in str(path):
            raise self._error("no file can have a NUL byte in its name; name a .gguf file")
        try:
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise self._error("a folder; a model is a .gguf file; 'slimrt convert' makes one of a checkpoint")
            if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
                raise self._error("a device or a pipe; a model is mapped into memory, so it must be a regular file")
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size < 24:
                    raise self._error(
                        f"{self.size} bytes; a GGUF header takes 24; the file is truncated or not a model"
                    )
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise self._error("no such file; name a .gguf file, or fetch a model with 'slimrt pull'") from None
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror}); check the file and its permissions") from None
        self.at = 0
        self.entries = 0
        self.metadata: dict[str, Any] = {}
        self._read_header()

    def _error(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}")

    def _need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self._error(
                f"{what} needs {count} bytes at offset {self.at}, {self.size - self.at} are left; "
                "the file is truncated or corrupt; fetch or convert it again"
            )

    def _u32(self, what: str) -> int:
        self._need(4, what)
        (value,) = _U32.unpack_from(self.buffer, self.at)
        self.at += 4
        return value

    def _u64(self, what: str) -> int:
        self._need(8, what)
        (value,) = _U64.unpack_from(self.buffer, self.at)
        self.at += 8
        return value

    def _text(self, what: str, limit: int = _MAX_TEXT) -> str:
        length = self._u64(what)
        self._need(length, what)
        if length > limit:
            raise self._error(f"{what} has {length} bytes; at most {limit} are allowed; the file is corrupt")
        raw = self.buffer[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._error(
                f"{what} is not valid UTF-8; GGUF text must be; the file is corrupt or of another format"
            ) from None

    def _count_entries(self, count: int, what: str) -> None:
        self.entries += count
        if self.entries > _MAX_ENTRIES:
            raise self._error(
                f"{what} brings the texts in arrays to {self.entries}; at most {_MAX_ENTRIES} are allowed; "
                "the file is corrupt"
            )

    def _read_header(self) -> None:
        magic = self.buffer[:4]
        if magic != b"GGUF":
            other = next((what for start, what in _OTHERS.items() if self.buffer[: len(start)] == start), None)
            raise self._error(
                f"starts with {magic!r}{f', as {other} does' if other else ''}; a GGUF file starts with b'GGUF'; "
                "convert it with 'slimrt convert', or fetch it as GGUF"
            )
        self.at = 4
        self.version = self._u32("version")
        if self.version not in (2, 3):
            hint = (
                "it is big-endian"
                if self.version in (2 << 24, 3 << 24)
                else "it is newer than this program, older or corrupt"
            )
            raise self._error(
                f"GGUF version {self.version}; little-endian versions 2 and 3 are readable; {hint}; convert it again"
            )
        tensor_count = self._u64("tensor count")
        key_count = self._u64("metadata count")
        # The smallest entries: an empty key with a one-byte value, an empty name with no dimensions.
        self._need(key_count * 13, f"a metadata count of {key_count}")
        self._need(tensor_count * 24, f"a tensor count of {tensor_count}")
        if tensor_count > _MAX_TENSORS:
            raise self._error(f"{tensor_count} tensors; at most {_MAX_TENSORS} are read; the file is corrupt")
        for _ in range(key_count):
            key = self._text("a metadata key", _MAX_NAME)
            label = f"metadata key {shown(key)}"
            if key in self.metadata:
                raise self._error(f"{label} occurs twice; keys are unique; convert the model again")
            self.metadata[key] = self._value(self._u32(f"the type of {label}"), label)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8 or alignment > 1 << 20:
            raise self._error(
                f"general.alignment is {shown(alignment)}; it must be a multiple of 8; convert the model again"
            )
        self._read_tensors(tensor_count, alignment)

    def _value(self, kind: int, label: str) -> Any:
        if kind in _SCALARS:
            unpack, _ = _SCALARS[kind]
            self._need(unpack.size, f"the value of {label}")
            (value,) = unpack.unpack_from(self.buffer, self.at)
            self.at += unpack.size
            return value
        if kind == GGUFValueType.STRING:
            return self._text(f"the value of {label}")
        if kind == GGUFValueType.ARRAY:
            return self._array(label, 0)
        raise self._error(f"{label} has value type {kind}; types 0 to 12 are known; the file is corrupt or newer")

    def _array(self, label: str, depth: int) -> Any:
        if depth >= _MAX_NESTING:
            raise self._error(f"{label} nests arrays deeper than {_MAX_NESTING}; the file is corrupt")
        kind = self._u32(f"the element type of {label}")
        count = self._u64(f"the length of {label}")
        what = f"{label} with {count} elements"
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind][1])
            self._need(count * dtype.itemsize, what)
            values = np.frombuffer(self.buffer, dtype, count, self.at)
            self.at += values.nbytes
            return values
        if kind == GGUFValueType.STRING:
            self._need(count * 8, what)
            self._count_entries(count, what)
            return self._texts(count, what)
        if kind == GGUFValueType.ARRAY:
            self._need(count * 12, what)
            self._count_entries(count, what)
            return [self._array(label, depth + 1) for _ in range(count)]
        raise self._error(f"{label} has element type {kind}; types 0 to 12 are known; the file is corrupt or newer")

    def _texts(self, count: int, what: str) -> list[str]:
        # The one loop that runs once per vocabulary entry: everything is local.
        buffer, at, size, unpack = self.buffer, self.at, self.size, _U64.unpack_from
        texts: list[str] = []
        try:
            for _ in range(count):
                (length,) = unpack(buffer, at)
                end = at + 8 + length
                if end > size:
                    raise struct.error
                if length > _MAX_TEXT:
                    raise self._error(
                        f"{what}: entry {len(texts)} has {length} bytes; at most {_MAX_TEXT} are allowed; "
                        "the file is corrupt"
                    )
                texts.append(buffer[at + 8 : end].decode())
                at = end
        except struct.error:
            raise self._error(
                f"{what} runs past the end of the file; it is truncated or corrupt; fetch or convert it again"
            ) from None
        except UnicodeDecodeError:
            raise self._error(
                f"{what}: entry {len(texts)} is not valid UTF-8; the file is corrupt or of another format"
            ) from None
        self.at = at
        return texts

    def _read_tensors(self, count: int, alignment: int) -> None:
        entries: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(count):
            name, shape, number, offset = self._tensor_entry()
            if name in entries:
                raise self._error(f"tensor {shown(name)} occurs twice; names are unique; convert the model again")
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise self._error(
                    f"tensor {shown(name)} has type number {number}, which the installed gguf package does not know; "
                    "upgrade it, or quantise the model to a common type (Q8_0, Q4_K, ...)"
                ) from None
            entries[name] = (shape, kind, offset)
        start = -(-self.at // alignment) * alignment
        self.tensors = {
            name: self._tensor(name, shape, kind, start, offset, alignment)
            for name, (shape, kind, offset) in entries.items()
        }
        # Tensors on the same bytes would let a small file ask for any amount of memory.
        end, before = 0, ""
        for name, (_, _, offset) in sorted(entries.items(), key=lambda entry: entry[1][2]):
            if offset < end:
                raise self._error(
                    f"tensor {shown(name)} overlaps tensor {shown(before)}; each has bytes of its own; "
                    "the file is corrupt"
                )
            end, before = offset + self.tensors[name].nbytes, name

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type and offset of the next tensor in the header."""
        name = self._text("a tensor name", _MAX_NAME)
        label = f"tensor {shown(name)}"
        dims = self._u32(f"the dimensions of {label}")
        if not 1 <= dims <= _MAX_DIMS:
            raise self._error(f"{label} has {dims} dimensions; 1 to {_MAX_DIMS} are allowed; the file is corrupt")
        shape = tuple(self._u64(f"the shape of {label}") for _ in range(dims))[::-1]
        if min(shape) < 1:
            raise self._error(f"{label} has shape {shape}; every dimension is at least 1; the file is corrupt")
        return name, shape, self._u32(f"the type of {label}"), self._u64(f"the offset of {label}")

    def _tensor(
        self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, start: int, offset: int, alignment: int
    ) -> TensorInfo:
        label = f"tensor {shown(name)}"
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self._error(
                f"{label}: rows of {shape[-1]} do not divide into {kind.name} blocks of {block}; the file is corrupt"
            )
        elements = 1
        for dim in shape:
            elements *= dim
        nbytes = elements // block * block_bytes
        if offset % alignment or start + offset + nbytes > self.size:
            raise self._error(
                f"{label} ({kind.name} {shape}) needs {nbytes} bytes at offset {start + offset} of {self.size}; "
                f"tensors are aligned to {alignment}, inside the file; it is truncated or corrupt; fetch it again"
            )
        dtype, view = {
            GGMLQuantizationType.F32: ("<f4", shape),
            GGMLQuantizationType.F16: ("<f2", shape),
            GGMLQuantizationType.F64: ("<f8", shape),
            GGMLQuantizationType.BF16: ("<u2", shape),
        }.get(kind, ("u1", (*shape[:-1], shape[-1] // block * block_bytes)))
        count = nbytes // np.dtype(dtype).itemsize
        data = np.frombuffer(self.buffer, dtype, count, start + offset).reshape(view)
        return TensorInfo(name, shape, kind, data)
