"""The 16-bit element of a GPU's activations, keys and values: float16, or bfloat16 for models that are stored in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from slimrt.weights.gguf import GGUFFile

__all__ = ["ELEMENTS", "Element", "ElementName", "element_of"]

ElementName = Literal["f16", "bf16"]


@dataclass(frozen=True)
class Element:
    """``name``: the kernels' type. ``dtype``: NumPy's and CuPy's; they have no bfloat16, so its bits travel as uint16,
    with which only kernels may compute. ``weights``: the type of weights that need no unpacking. ``cublas``: its
    cudaDataType_t. ``largest``: the largest finite number."""

    name: ElementName
    dtype: np.dtype
    weights: str
    cublas: int
    words: str
    largest: float

    def narrowed(self, x: np.ndarray) -> np.ndarray:
        """``x`` rounded to nearest even, as an array of ``dtype``."""
        if self.name == "f16":
            with np.errstate(over="ignore"):
                return x.astype(np.float16)
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)

    def widened(self, x: np.ndarray) -> np.ndarray:
        """``x``, an array of ``dtype``, in float32."""
        return x.astype(np.float32) if self.name == "f16" else (x.astype(np.uint32) << 16).view(np.float32)


ELEMENTS: dict[ElementName, Element] = {
    "f16": Element("f16", np.dtype(np.float16), "F16", 2, "float16", 65504.0),
    "bf16": Element("bf16", np.dtype(np.uint16), "BF16", 14, "bfloat16", 3.38953139e38),
}


def element_of(file: GGUFFile) -> ElementName:
    """What a file's model is computed in: bfloat16 where more than half of its layers' weights are stored in it. Such
    models may have activations and keys beyond 65504, where float16 ends."""
    brains = others = 0
    for name, tensor in file.tensors.items():
        if name.startswith("blk.") and len(tensor.shape) > 1:
            size = math.prod(tensor.shape)
            brains, others = (brains + size, others) if tensor.type == Type.BF16 else (brains, others + size)
    return "bf16" if brains > others else "f16"
