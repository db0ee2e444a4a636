"""Matrices as compiled kernels hold them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType

from slimrt.ops.fast.panels import Panels
from slimrt.weights.gguf import TensorInfo
from slimrt.weights.quants import dequantize

__all__ = ["FastWeight", "as_bfloat16"]


@dataclass(frozen=True)
class FastWeight:
    """A matrix [out, in], or several stacked along ``out``: packed, and (``panels``) perhaps unpacked as well."""

    parts: tuple[TensorInfo, ...]
    panels: Panels | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[-1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def as_bfloat16(tensor: TensorInfo) -> TensorInfo:
    """A matrix rounded to bfloat16."""
    bits = dequantize(tensor).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return TensorInfo(tensor.name, tensor.shape, GGMLQuantizationType.BF16, rounded.astype(np.uint16))
