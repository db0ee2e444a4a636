"""Packed matrices made ready for many rows: panels of factors, a layer's at a time, in memory that is used again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType

from slimrt.ops.fast.features import Features
from slimrt.ops.fast.products import PANEL, Shape, packed_shape, shape_of
from slimrt.ops.fast.team import Program, Team, address
from slimrt.ops.fast.unpack import unpack
from slimrt.ops.fast.whole_panels import unpack_whole
from slimrt.weights.gguf import TensorInfo

__all__ = ["PanelMaker", "Panels"]

_FLOATS = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
_CACHED = 32 << 20  # bytes of panels that some cache may hold until they are read


@dataclass(eq=False)
class Panels:
    """All parts of a stacked matrix, each filled up to whole groups of panels."""

    shape: Shape  # of what is multiplied with them
    memory: np.ndarray
    address: int
    inner: int  # columns of the matrix, filled up: K
    starts: tuple[int, ...]  # of each part: its first panel
    count: int  # panels in all

    def columns(self, part: int) -> int:
        """The column of a product where ``part`` begins."""
        return self.starts[part] * PANEL

    def spread(self, values: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """A bias of the stacked rows, laid out like a product's columns."""
        wide = np.zeros(self.count * PANEL, np.float32)
        at = 0
        for part, size in enumerate(sizes):
            wide[self.columns(part) : self.columns(part) + size] = values[at : at + size]
            at += size
        return wide


class PanelMaker:
    """Unpacks matrices on a team. The memory of panels that were dropped serves the next of its size."""

    def __init__(self, features: Features, team: Team) -> None:
        self._features, self._team = features, team
        self._free: dict[int, list[np.ndarray]] = {}

    def make(self, parts: Sequence[TensorInfo]) -> Panels:
        """``parts`` [out_i, in], stacked: as floats if the file has them as such."""
        as_floats = any(part.type in _FLOATS for part in parts)
        shape = shape_of(self._features) if as_floats else packed_shape(self._features)
        inner = shape.padded(parts[0].shape[-1])
        panel_bytes = shape.panel_bytes(inner)
        starts, count = [], 0
        for part in parts:
            starts.append(count)
            count += shape.padded(part.shape[0]) // PANEL
        memory = self._memory(count * panel_bytes)
        begin = -(-address(memory) // 64) * 64
        past_caches = count * panel_bytes > _CACHED
        program = Program()
        for part, start in zip(parts, starts, strict=True):
            rows = part.shape[0]
            used = -(-rows // PANEL)
            at = begin + start * panel_bytes
            if shape.element == "i16":
                kernel = unpack_whole(self._features, part.type, past_caches)
            else:
                kernel = unpack(self._features, part.type, shape.element, past_caches)
            program.add(
                kernel, used,
                address(part.data), part.nbytes // rows, rows, part.shape[-1], at, inner,
            )  # fmt: skip
            unused = shape.padded(rows) // PANEL - used  # zeros, for they are multiplied with
            low = at - address(memory) + used * panel_bytes
            memory[low : low + unused * panel_bytes] = 0
        self._team.run(program)
        panels = Panels(shape, memory, begin, inner, tuple(starts), count)
        weakref.finalize(panels, self._give_back, memory)
        return panels

    def _memory(self, nbytes: int) -> np.ndarray:
        try:
            return self._free[nbytes].pop()
        except (KeyError, IndexError):
            return np.empty(nbytes + 64, np.uint8)

    def _give_back(self, memory: np.ndarray) -> None:
        """Called wherever the last panels go, also while another thread takes some: no lock, each step is one of
        Python's own."""
        self._free.setdefault(len(memory) - 64, []).append(memory)
