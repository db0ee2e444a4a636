"""PyTorch's .pth files without PyTorch, and without running what they contain.

``torch.save`` (since 1.6) writes an uncompressed zip archive: ``*/data.pkl``, a pickle of names, shapes and storages,
and ``*/data/N``, the raw bytes of storage N. The pickle is read by an unpickler that knows four harmless kinds of
global and refuses any other by name, so no code from the file ever runs.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slimrt.convert.checkpoint import FLOAT_TYPES, StoredTensor, check_regular
from slimrt.errors import ModelFileError

__all__ = ["read_pth"]

_STORAGE_TYPES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
_OTHER_STORAGE_TYPES = ("LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage")
_MAX_PICKLE_BYTES = 16 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of name and extra field


@dataclass(frozen=True)
class _StorageType:
    name: str


@dataclass(frozen=True)
class _Storage:
    kind: str  # a key of FLOAT_TYPES, or PyTorch's name of a type that weights cannot have
    offset: int
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pth(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dictionary saved by ``torch.save``, by name.

    Raises ModelFileError for the format before PyTorch 1.6, for any pickle that asks for something other than tensors,
    and for tensors outside their storage.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise ModelFileError(
                    f"{path}: not a zip archive; torch.save writes one since PyTorch 1.6; the file is truncated or "
                    "older; "
                    "load it with PyTorch and save it again"
                )
            with zipfile.ZipFile(file) as archive:
                state = _StateUnpickler(path, archive, file).load_state()
    except ModelFileError:  # a ValueError too, with its own reason
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
        EOFError,
        ValueError,
        struct.error,
    ) as error:
        raise ModelFileError(
            f"{path}: not a readable zip archive ({error}); the file is truncated or corrupt; fetch it again"
        ) from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    if not isinstance(state, dict) or not state:
        raise ModelFileError(
            f"{path}: holds a {_kind(state)}; a dictionary of tensors is expected; save model.state_dict()"
        )
    return {_name(path, name): _stored(path, name, tensor) for name, tensor in state.items()}


class _Sequence(tuple[Any, ...]):
    """A tuple out of a pickle. It has no hash, and so is no key: one whose items are shared, level over level, takes
    a few hundred bytes in the file and longer than anybody waits to hash or to print."""

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<tuple of {len(self)}>"

    __str__ = __repr__


class _StateUnpickler(pickle._Unpickler):
    """Builds dictionaries of tensor descriptions; every global outside the list below is refused.

    Python's own unpickler in place of the one in C, whose tuples cannot be replaced; a state dictionary is small.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # opcode -> method
    if TYPE_CHECKING:
        stack: list[Any]

        def append(self, item: Any) -> None: ...
        def pop_mark(self) -> list[Any]: ...

    def __init__(self, path: Path, archive: zipfile.ZipFile, file: io.BufferedReader) -> None:
        self._path, self._archive, self._file = path, archive, file
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise ModelFileError(
                f"{path}: {len(pickles)} entries called data.pkl; torch.save writes one; the file is of another kind"
            )
        self._folder = pickles[0].removesuffix("data.pkl")
        entry = archive.getinfo(pickles[0])
        if entry.file_size > _MAX_PICKLE_BYTES:
            raise ModelFileError(
                f"{path}: data.pkl has {entry.file_size} bytes, at most {_MAX_PICKLE_BYTES} are read; save the "
                "state dictionary alone"
            )
        byteorder = f"{self._folder}byteorder"
        if byteorder in archive.namelist() and archive.open(byteorder).read(6) != b"little":
            raise ModelFileError(
                f"{path}: saved on a big-endian machine; little-endian files can be read; save it again on another"
            )
        self._pickled = archive.read(entry)
        super().__init__(io.BytesIO(self._pickled))

    def load_state(self) -> Any:
        try:
            # The C unpickler sizes its memo by the largest index in the file; a real file counts them up.
            for opcode, argument, _ in pickletools.genops(self._pickled):
                if "PUT" in opcode.name and isinstance(argument, int) and argument > len(self._pickled):
                    raise pickle.UnpicklingError(f"memo index {argument}")
            return self.load()
        except ModelFileError:
            raise
        except Exception as error:  # corrupt pickles fail in any way that Python's operations can
            raise ModelFileError(
                f"{self._path}: data.pkl is corrupt ({str(error)[:100]}); fetch the file again"
            ) from None

    def _push_sequence(self, items: list[Any]) -> None:
        self.append(_Sequence(items))

    def _load_empty_tuple(self) -> None:
        self._push_sequence([])

    def _load_tuple(self) -> None:
        self._push_sequence(self.pop_mark())

    def _load_last(self, count: int) -> None:
        if len(self.stack) < count:
            raise pickle.UnpicklingError("a tuple of more items than there are")
        items = self.stack[-count:]
        del self.stack[-count:]
        self._push_sequence(items)

    dispatch[pickle.EMPTY_TUPLE[0]] = _load_empty_tuple
    dispatch[pickle.TUPLE[0]] = _load_tuple
    dispatch[pickle.TUPLE1[0]] = lambda self: self._load_last(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self._load_last(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self._load_last(3)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return self._rebuild_parameter
        if module == "torch" and (name in _STORAGE_TYPES or name in _OTHER_STORAGE_TYPES):
            return _StorageType(_STORAGE_TYPES.get(name, name))
        raise ModelFileError(
            f"{self._path}: the pickle asks for '{module[:60]}.{name[:60]}'; only tensors and dictionaries are "
            "read, because "
            "any other global could run code; save model.state_dict() alone, or use safetensors"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise pickle.UnpicklingError("an unknown persistent id")
        _, kind, key, _, count = pid
        if not isinstance(key, str):
            raise pickle.UnpicklingError("a storage whose name is no text")
        entry = self._archive.getinfo(f"{self._folder}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ModelFileError(
                f"{self._path}: storage {key} is compressed; torch.save stores plain bytes; save the file again"
            )
        itemsize = FLOAT_TYPES[kind.name].itemsize if kind.name in FLOAT_TYPES else 1
        if type(count) is not int or count < 0 or count * itemsize > entry.file_size:
            raise ModelFileError(
                f"{self._path}: storage {key} should hold {count} values and has {entry.file_size} bytes; "
                "the file is truncated or corrupt; fetch it again"
            )
        return _Storage(kind.name, self._data_offset(entry), count)

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        # The local header repeats the name and has its own extra field (torch pads with it to align the data).
        self._file.seek(entry.header_offset)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or offset + entry.file_size > self._file.seek(0, 2):
            raise ModelFileError(
                f"{self._path}: entry {entry.filename[:60]} lies outside the file; it is truncated; fetch it again"
            )
        return offset

    def _rebuild_tensor(self, storage: _Storage, first: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
        numbers = (first, *shape, *strides)
        if (
            not isinstance(storage, _Storage)
            or len(shape) != len(strides)
            or any(type(n) is not int or n < 0 for n in numbers)
        ):
            raise pickle.UnpicklingError("a malformed tensor")
        return _Tensor(storage, first, tuple(shape), tuple(strides))

    def _rebuild_parameter(self, tensor: _Tensor, *_: Any) -> _Tensor:
        return tensor


def _kind(value: Any) -> str:
    return "tuple" if isinstance(value, _Sequence) else type(value).__name__


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str):
        raise ModelFileError(f"{path}: a key is a {_kind(name)}, not a name; a dictionary of named tensors is expected")
    return name


def _stored(path: Path, name: str, tensor: Any) -> StoredTensor:
    label = f"{path}: '{name[:80]}'"
    if not isinstance(tensor, _Tensor):
        raise ModelFileError(f"{label} is a {_kind(tensor)}; a tensor is expected; save model.state_dict() alone")
    kind, shape, strides = tensor.storage.kind, tensor.shape, tensor.strides
    if kind not in FLOAT_TYPES:
        raise ModelFileError(
            f"{label} lies in a {kind}; {', '.join(FLOAT_TYPES)} can be converted; save floating-point weights"
        )
    if not 1 <= len(shape) <= 4 or min(shape) < 1:
        raise ModelFileError(f"{label} has shape {shape}; weights have one to four dimensions; the file is corrupt")
    width = math.prod(shape[1:])
    packed = tuple(math.prod(shape[axis + 1 :]) for axis in range(1, len(shape)))
    if strides[1:] != packed or strides[0] < width:
        raise ModelFileError(
            f"{label} has strides {strides} for shape {shape}; rows must be contiguous; save tensor.contiguous()"
        )
    if tensor.first + (shape[0] - 1) * strides[0] + width > tensor.storage.count:
        raise ModelFileError(
            f"{label} of shape {shape} exceeds its storage of {tensor.storage.count} values; the file is corrupt; "
            "fetch it again"
        )
    offset = tensor.storage.offset + tensor.first * FLOAT_TYPES[kind].itemsize
    return StoredTensor(path, name, kind, shape, offset, strides[0])
