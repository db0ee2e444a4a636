"""Weights on a GPU: packed as in the file, unpacked to float16 a layer at a time for many rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from slimrt.errors import DeviceError
from slimrt.ops.cuda.memory import CupyMemory
from slimrt.ops.cuda.modules import Kernels
from slimrt.weights.gguf import TensorInfo
from slimrt.weights.quants import dequantize

__all__ = ["PACKED_TYPES", "CudaWeight", "Packed", "load_weight", "unpack"]

Array = Any  # of CuPy

# The types that have kernels. F32 is not among them here: float16 is what its products are computed in anyway.
PACKED_TYPES = frozenset({
    Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K,
})  # fmt: skip
_HOST_ROWS = 1 << 24  # elements of a tensor without kernels that are unpacked on the host at a time


@dataclass(frozen=True)
class Packed:
    """Rows of one type: ``data`` uint8 [rows, bytes per row] on the device, or on the host where the layer is streamed;
    ``width`` elements a row."""

    type: str
    data: Array
    width: int

    @property
    def rows(self) -> int:
        return int(self.data.shape[0])


@dataclass(frozen=True)
class CudaWeight:
    """A matrix [out, in]: ``parts`` stacked along out; ``dense`` is it in float16, where that exists."""

    parts: tuple[Packed, ...]
    dense: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.rows for part in self.parts), self.parts[0].width

    @property
    def nbytes(self) -> int:
        return sum(int(part.data.nbytes) for part in self.parts)

    @classmethod
    def of(cls, parts: tuple[Packed, ...]) -> CudaWeight:
        """A weight on the device; one that is float16 throughout needs no unpacking."""
        return cls(parts, parts[0].data.view(np.float16) if [part.type for part in parts] == ["F16"] else None)


def load_weight(memory: CupyMemory, tensors: tuple[TensorInfo, ...], *, host: bool = False) -> CudaWeight:
    """``tensors`` [out_i, in] stacked along out, on the device or the ``host``; neighbours of one type become one part.

    Raises DeviceError where a row does not divide into the kernels' units of 32.
    """
    width = tensors[0].shape[-1]
    if width % 32:
        raise DeviceError(
            f"tensor '{tensors[0].name}' has rows of {width}; the GPU's kernels take multiples of 32; use device='cpu'"
        )
    groups: list[tuple[str, list[TensorInfo]]] = []
    for tensor in tensors:
        kind = tensor.type.name if tensor.type in PACKED_TYPES else "F16"
        if groups and groups[-1][0] == kind:
            groups[-1][1].append(tensor)
        else:
            groups.append((kind, [tensor]))
    if host:
        return CudaWeight(tuple(Packed(kind, _stacked(np.empty, np.copyto, group), width) for kind, group in groups))
    return CudaWeight.of(
        tuple(Packed(kind, _stacked(memory.empty, memory.load, group), width) for kind, group in groups)
    )


def _stacked(empty: Callable[..., Array], load: Callable[..., object], tensors: list[TensorInfo]) -> Array:
    rows = sum(tensor.shape[0] for tensor in tensors)
    width = tensors[0].shape[-1]
    held = tensors[0].type in PACKED_TYPES
    row_bytes = tensors[0].nbytes // tensors[0].shape[0] if held else 2 * width
    data = empty((rows, row_bytes), np.uint8)
    at = 0
    for tensor in tensors:
        count = tensor.shape[0]
        if tensor.type in PACKED_TYPES:
            packed = np.ascontiguousarray(tensor.data).reshape(count, -1).view(np.uint8)
            load(data[at : at + count], packed)
        else:
            step = max(1, _HOST_ROWS // width)
            for lo in range(0, count, step):
                half = _half(tensor, slice(lo, min(lo + step, count)))
                load(data[at + lo : at + lo + len(half)], half.view(np.uint8))
        at += count
    return data


def _half(tensor: TensorInfo, rows: slice) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = dequantize(tensor, rows).astype(np.float16)
    if not np.isfinite(half).all():
        raise DeviceError(
            f"tensor '{tensor.name}' ({tensor.type.name}) exceeds what float16 holds (65504); use device='cpu'"
        )
    return half


def unpack(weight: CudaWeight, memory: CupyMemory, kernels: Kernels, out: Array | None = None) -> Array:
    """``weight`` as float16 [out, in], a new array or ``out``."""
    if out is None:
        out = memory.empty(weight.shape)
    at = 0
    for part in weight.parts:
        units = part.rows * part.width // 32
        rows = out[at : at + part.rows]
        kernels.launch(
            "dequantize", "dequantize", (-(-units // 128),), 128, part.data, rows, units, TYPE=part.type, T="f16"
        )
        at += part.rows
    return out
