"""Weights on a GPU: in the cells of ``kernels_cu/quant.cuh``, unpacked to 16 bits for many rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from slimrt.errors import DeviceError
from slimrt.ops.cuda.element import Element
from slimrt.ops.cuda.memory import CupyMemory
from slimrt.ops.cuda.modules import Kernels
from slimrt.weights.gguf import TensorInfo
from slimrt.weights.quants import dequantize

__all__ = ["CELLS", "PACKED_TYPES", "CudaWeight", "Packed", "load_weight", "packed_nbytes", "unpack"]

Array = Any  # of CuPy, or of NumPy where the layer is streamed

# Bytes and columns of a cell, 16 rows each: SIZE and 32 UNITS of quant.cuh.
CELLS = {
    "Q4_0": (1152, 128), "Q4_1": (1280, 128), "Q5_0": (1408, 128), "Q5_1": (1536, 128), "Q8_0": (2176, 128),
    "Q4_K": (2304, 256), "Q5_K": (2816, 256), "Q6_K": (3360, 256),
}  # fmt: skip
# The types that have kernels. F32 is not among them here: 16 bits are what its products are computed in anyway.
PACKED_TYPES = frozenset({Type.F16, Type.BF16, *(Type[name] for name in CELLS)})
_STAGED = 1 << 26  # bytes that are uploaded, or elements that are unpacked on the host, at a time


def packed_nbytes(kind: str, rows: int, width: int) -> int:
    """Bytes that a matrix of type ``kind`` takes on the device: those of the file where ``rows`` and ``width`` fill
    its cells, 16 rows of 128 or 256 columns."""
    if kind not in CELLS:
        return 2 * rows * width
    size, columns = CELLS[kind]
    return -(-rows // 16) * -(-width // columns) * size


@dataclass(frozen=True)
class Packed:
    """Rows of one type: ``data`` uint8, flat, on the device, or on the host where the layer is streamed. ``half``: of
    quant.cuh, how far apart the two runs of rows are that meet in a tile."""

    type: str
    data: Array
    rows: int
    width: int
    half: int = 8


@dataclass
class CudaWeight:
    """A matrix [out, in]: ``parts`` stacked along out; ``dense`` is it in 16 bits, once that exists."""

    parts: tuple[Packed, ...]
    dense: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.rows for part in self.parts), self.parts[0].width

    @property
    def nbytes(self) -> int:
        return sum(int(part.data.nbytes) for part in self.parts)

    @classmethod
    def of(cls, parts: tuple[Packed, ...], element: Element) -> CudaWeight:
        """A weight on the device; one that is of the ``element`` throughout needs no unpacking."""
        if [part.type for part in parts] != [element.weights]:
            return cls(parts)
        return cls(parts, parts[0].data.view(element.dtype).reshape(parts[0].rows, parts[0].width))


def load_weight(
    memory: CupyMemory, kernels: Kernels, tensors: tuple[TensorInfo, ...], *, half: int = 0, host: bool = False
) -> CudaWeight:
    """``tensors`` [out_i, in] stacked along out, on the device or the ``host``; neighbours of one type become one part.

    ``half``: rows i and i + half of each 2 half are wanted together (0: none are). Raises DeviceError where a row does
    not divide into the kernels' units of 32.
    """
    width = tensors[0].shape[-1]
    if width % 32:
        raise DeviceError(
            f"tensor '{tensors[0].name}' has rows of {width}; the GPU's kernels take multiples of 32; use device='cpu'"
        )
    groups: list[tuple[str, list[TensorInfo]]] = []
    for tensor in tensors:
        kind = tensor.type.name if tensor.type in PACKED_TYPES else memory.element.weights
        if groups and groups[-1][0] == kind:
            groups[-1][1].append(tensor)
        else:
            groups.append((kind, [tensor]))
    parts = []
    for kind, group in groups:
        rows = sum(tensor.shape[0] for tensor in group)
        meet = half if half and half % 8 == 0 and rows % (2 * half) == 0 else 8
        part = Packed(kind, memory.empty((packed_nbytes(kind, rows, width),), np.uint8), rows, width, meet)
        _fill(memory, kernels, part, group)
        parts.append(Packed(kind, memory.to_host(part.data), rows, width, meet) if host else part)
    return CudaWeight(tuple(parts)) if host else CudaWeight.of(tuple(parts), memory.element)


def _fill(memory: CupyMemory, kernels: Kernels, part: Packed, tensors: list[TensorInfo]) -> None:
    if part.type in CELLS and (part.rows % 16 or part.width % CELLS[part.type][1]):
        part.data[...] = 0  # what pads the last cells counts for nothing
    first = 0
    for rows in _pieces(part, tensors, memory.element):
        if part.type in CELLS:
            staged = memory.empty((rows.size,), np.uint8)
            memory.load(staged, rows.reshape(-1))
            grid = (-(-len(rows) * part.width // 32 // 128),)
            kernels.launch("repack", "repack", grid, 128, staged, part.data, first, len(rows), part.rows, part.width,
                           part.half, TYPE=part.type)  # fmt: skip
        else:
            at = first * part.width * 2
            memory.load(part.data[at : at + rows.size], rows.reshape(-1))
        first += len(rows)


def _pieces(part: Packed, tensors: list[TensorInfo], element: Element) -> Iterator[np.ndarray]:
    """The rows of all tensors in order, uint8 [some rows, bytes per row] at a time."""
    for tensor in tensors:
        count = tensor.shape[0]
        if tensor.type in PACKED_TYPES:
            packed = np.ascontiguousarray(tensor.data).reshape(count, -1).view(np.uint8)
            step = max(1, _STAGED // packed.shape[1])
            yield from (packed[lo : lo + step] for lo in range(0, count, step))
        else:
            step = max(1, _STAGED // 4 // part.width)
            for lo in range(0, count, step):
                yield _narrowed(tensor, slice(lo, min(lo + step, count)), element).view(np.uint8)


def _narrowed(tensor: TensorInfo, rows: slice, element: Element) -> np.ndarray:
    numbers = element.narrowed(dequantize(tensor, rows))
    if not np.isfinite(element.widened(numbers)).all():
        raise DeviceError(
            f"tensor '{tensor.name}' ({tensor.type.name}) exceeds what {element.words} holds ({element.largest:g}); "
            "use device='cpu'"
        )
    return numbers


def unpack(weight: CudaWeight, memory: CupyMemory, kernels: Kernels, out: Array | None = None) -> Array:
    """``weight`` in 16 bits [out, in], a new array or ``out``."""
    if out is None:
        out = memory.empty(weight.shape)
    at = 0
    for part in weight.parts:
        rows = out[at : at + part.rows]
        grid = (-(-part.rows // 16) * -(-part.width // 128),)
        kernels.launch("dequantize", "dequantize", grid, 64, part.data, rows, part.rows, part.width, part.half,
                       TYPE=part.type, T=memory.element.name)  # fmt: skip
        at += part.rows
    return out
