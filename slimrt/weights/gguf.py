"""Memory-mapped GGUF files: checked metadata and packed tensors, no arithmetic.

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
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from slimrt.errors import ModelFileError
from slimrt.paths import user_path

__all__ = ["GGUFFile", "TensorInfo"]

Scalar = TypeVar("Scalar", int, float, bool, str)

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
_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")


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


class GGUFFile:
    """A GGUF model, in one file or several (``name-00001-of-000NN.gguf``), mapped read-only.

    ``metadata`` maps keys to int, float, bool, str, NumPy arrays (numeric arrays) or lists (strings, nested arrays).
    ``tensors`` maps names to :class:`TensorInfo`, in file order. ``paths``: the files, first part first.

    Raises :class:`ModelFileError` for anything that is not a complete, consistent file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        first = _Part(self.path)
        self.paths = [self.path]
        self.version = first.version
        self.metadata: dict[str, Any] = first.metadata
        self.tensors: dict[str, TensorInfo] = dict(first.tensors)
        self.file_size = first.size
        for number, other in enumerate(self._other_parts(), 1):
            part = _Part(other)
            self.paths.append(other)
            self.file_size += part.size
            claim = part.metadata.get("split.no", number)
            if not isinstance(claim, int) or claim != number:
                raise ModelFileError(
                    f"{other}: split.no is {_shown(claim)}, the name says {number} (from 0); "
                    "give the parts their own names again, or fetch the model anew"
                )
            for name, tensor in part.tensors.items():
                if name in self.tensors:
                    raise ModelFileError(
                        f"{other}: tensor {_shown(name)} is in an earlier part too; "
                        "parts must not overlap; split the model anew"
                    )
                self.tensors[name] = tensor
        expected = self.metadata.get("split.tensors.count")
        if isinstance(expected, int) and expected != len(self.tensors) and self.metadata.get("split.count", 0):
            raise ModelFileError(
                f"{self.path}: the parts hold {len(self.tensors)} tensors and split.tensors.count says {expected}; "
                "a part is incomplete; fetch the model again"
            )

    def _other_parts(self) -> list[Path]:
        count = self.metadata.get("split.count", 0)
        if not isinstance(count, int) or count <= 1:
            return []
        match = _SPLIT_NAME.match(self.path.name)
        if match is None or int(match["count"]) != count:
            raise ModelFileError(
                f"{self.path}: the file says that it is one of {count} parts, so its name must end in "
                f"-00001-of-{count:05d}.gguf; give it that name again"
            )
        if int(match["no"]) != 1:
            raise ModelFileError(
                f"{self.path}: part {int(match['no'])} of {count}; a model is opened by its first part; "
                f"name {match['stem']}-00001-of-{count:05d}.gguf"
            )
        parts = [self.path.with_name(f"{match['stem']}-{no:05d}-of-{count:05d}.gguf") for no in range(2, count + 1)]
        missing = [part.name for part in parts if not part.exists()]
        if missing:
            raise ModelFileError(
                f"{self.path}: {len(missing)} of {count} parts are missing (first: {missing[0]}); "
                "all parts must lie in one folder; fetch the missing ones"
            )
        return parts

    def get(self, key: str, kind: type[Scalar], default: Scalar | None = None) -> Scalar:
        """The metadata value of ``key`` as ``kind`` (int, float, bool or str).

        Raises ModelFileError if it is absent and there is no default, or of another kind.
        """
        value = self.metadata.get(key)
        if value is None:
            if default is not None:
                return default
            raise ModelFileError(
                f"{self.path}: metadata key '{key}' is missing; the format requires it; convert the model anew"
            )
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelFileError(
                f"{self.path}: metadata key '{key}' is {_kind_name(value)}, it must be {kind.__name__}; "
                "convert the model anew"
            )
        return value

    def tensor(self, name: str) -> TensorInfo:
        """The tensor called ``name``; raises ModelFileError if the file has none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFileError(
                f"{self.path}: tensor '{name}' is missing; the architecture requires it; convert the model anew"
            ) from None


def _shown(value: Any) -> str:
    """``value`` for an error message: on one line, without control characters, of bounded length."""
    if isinstance(value, (list, np.ndarray)):
        return f"an array of {len(value)}"
    text = repr(value[:81] if isinstance(value, str) else value)
    return text if len(text) <= 84 else f"{text[:80]}...'"


def _kind_name(value: Any) -> str:
    return "an array" if isinstance(value, (list, np.ndarray)) else type(value).__name__


class _Part:
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
        self._read_header()

    def _error(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}")

    def _need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self._error(
                f"{what} needs {count} bytes at offset {self.at}, {self.size - self.at} are left; "
                "the file is truncated or corrupt; fetch or convert it anew"
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
            raise self._error(
                f"starts with {magic!r}; a GGUF file starts with b'GGUF'; convert the model with 'slimrt convert'"
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
                f"GGUF version {self.version}; little-endian versions 2 and 3 are readable; {hint}; convert it anew"
            )
        tensor_count = self._u64("tensor count")
        key_count = self._u64("metadata count")
        # The smallest entries: an empty key with a one-byte value, an empty name with no dimensions.
        self._need(key_count * 13, f"a metadata count of {key_count}")
        self._need(tensor_count * 24, f"a tensor count of {tensor_count}")
        if tensor_count > _MAX_TENSORS:
            raise self._error(f"{tensor_count} tensors; at most {_MAX_TENSORS} are read; the file is corrupt")
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._text("a metadata key", _MAX_NAME)
            label = f"metadata key {_shown(key)}"
            if key in self.metadata:
                raise self._error(f"{label} occurs twice; keys are unique; convert the model anew")
            self.metadata[key] = self._value(self._u32(f"the type of {label}"), label)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8 or alignment > 1 << 20:
            raise self._error(
                f"general.alignment is {_shown(alignment)}; it must be a multiple of 8; convert the model anew"
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
                f"{what} runs past the end of the file; it is truncated or corrupt; fetch or convert it anew"
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
            name = self._text("a tensor name", _MAX_NAME)
            label = f"tensor {_shown(name)}"
            if name in entries:
                raise self._error(f"{label} occurs twice; names are unique; convert the model anew")
            dims = self._u32(f"the dimensions of {label}")
            if not 1 <= dims <= _MAX_DIMS:
                raise self._error(f"{label} has {dims} dimensions; 1 to {_MAX_DIMS} are allowed; the file is corrupt")
            shape = tuple(self._u64(f"the shape of {label}") for _ in range(dims))[::-1]
            if min(shape) < 1:
                raise self._error(f"{label} has shape {shape}; every dimension is at least 1; the file is corrupt")
            number = self._u32(f"the type of {label}")
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise self._error(
                    f"{label} has type number {number}, which the installed gguf package does not know; "
                    "upgrade it, or quantise the model to a common type (Q8_0, Q4_K, ...)"
                ) from None
            entries[name] = (shape, kind, self._u64(f"the offset of {label}"))
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
                    f"tensor {_shown(name)} overlaps tensor {_shown(before)}; each has bytes of its own; "
                    "the file is corrupt"
                )
            end, before = offset + self.tensors[name].nbytes, name

    def _tensor(
        self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, start: int, offset: int, alignment: int
    ) -> TensorInfo:
        label = f"tensor {_shown(name)}"
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
                f"tensors are aligned to {alignment} and lie inside the file; it is truncated or corrupt; fetch it anew"
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
