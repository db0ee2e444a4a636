"""Memory-mapped GGUF files: checked metadata and packed tensors, no arithmetic. ``header`` walks each file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from slimrt.errors import ModelFileError
from slimrt.paths import user_path
from slimrt.weights.header import Part, TensorInfo, shown

__all__ = ["GGUFFile", "TensorInfo"]

Scalar = TypeVar("Scalar", int, float, bool, str)

_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")


class GGUFFile:
    """A GGUF model, in one file or several (``name-00001-of-000NN.gguf``), mapped read-only.

    ``metadata`` maps keys to int, float, bool, str, NumPy arrays (numeric arrays) or lists (strings, nested arrays).
    ``tensors`` maps names to :class:`TensorInfo`, in file order. ``paths``: the files, first part first.

    Raises :class:`ModelFileError` for anything that is not a complete, consistent file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        first = Part(self.path)
        self.paths = [self.path]
        self.version = first.version
        self.metadata: dict[str, Any] = first.metadata
        self.tensors: dict[str, TensorInfo] = dict(first.tensors)
        self.file_size = first.size
        for number, other in enumerate(self._other_parts(), 1):
            part = Part(other)
            self.paths.append(other)
            self.file_size += part.size
            claim = part.metadata.get("split.no", number)
            if not isinstance(claim, int) or claim != number:
                raise ModelFileError(
                    f"{other}: split.no is {shown(claim)}, the name says {number} (from 0); "
                    "give the parts their own names again, or fetch the model again"
                )
            for name, tensor in part.tensors.items():
                if name in self.tensors:
                    raise ModelFileError(
                        f"{other}: tensor {shown(name)} is in an earlier part too; "
                        "parts must not overlap; split the model again"
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
                f"{self.path}: metadata key '{key}' is missing; the format requires it; convert the model again"
            )
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelFileError(
                f"{self.path}: metadata key '{key}' is {_kind_name(value)}, it must be {kind.__name__}; "
                "convert the model again"
            )
        return value

    def tensor(self, name: str) -> TensorInfo:
        """The tensor called ``name``; raises ModelFileError if the file has none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFileError(
                f"{self.path}: tensor '{name}' is missing; the architecture requires it; convert the model again"
            ) from None


def _kind_name(value: Any) -> str:
    return "an array" if isinstance(value, (list, np.ndarray)) else type(value).__name__
