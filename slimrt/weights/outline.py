"""What can be told of a GGUF file that cannot be opened: one of several parts, cut short, of tensor types not known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from slimrt.errors import ModelFileError
from slimrt.paths import user_path
from slimrt.weights.header import Part

__all__ = ["ListedTensor", "Outline", "UnknownType"]


@dataclass(frozen=True)
class UnknownType:
    """A tensor type by its number alone."""

    number: int

    @property
    def name(self) -> str:
        return f"type {self.number}"


@dataclass(frozen=True)
class ListedTensor:
    """A tensor as the header lists it; ``nbytes`` is 0 where the type does not tell."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType | UnknownType
    nbytes: int


class Outline(Part):
    """The header of one file as far as it can be read: ``metadata`` and ``listed`` tensors, no weights behind them.

    ``problem``: why the file cannot be opened.

    Raises ModelFileError where there is not even a metadata key.
    """

    def __init__(self, path: str | Path) -> None:
        self.listed: dict[str, ListedTensor] = {}
        self.problem = ""
        super().__init__(user_path(path))
        self.file_size = self.size

    def _read_header(self) -> None:
        try:
            super()._read_header()
        except ModelFileError:
            if not self.metadata:
                raise

    def _read_tensors(self, count: int, alignment: int) -> None:
        for _ in range(count):
            name, shape, number, _offset = self._tensor_entry()
            kind: GGMLQuantizationType | UnknownType
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                kind, nbytes = UnknownType(number), 0
            else:
                block, size = GGML_QUANT_SIZES[kind]
                nbytes = math.prod(shape) // block * size
            self.listed[name] = ListedTensor(name, shape, kind, nbytes)
