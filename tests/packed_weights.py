"""Matrices of random bits in the file's form, and in the kernels' cells: what the tests of weight kernels share."""

from __future__ import annotations

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from slimrt.ops.cuda.weights import CELLS, packed_nbytes
from slimrt.weights.gguf import TensorInfo
from tests.kernel_cases import Array, half, launch, noise

TYPES = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
SCALES_AT = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # bytes of half numbers


def packed(kind: str, rows: int, width: int, seed: int = 0) -> TensorInfo:
    """A tensor of random bits, but for the scales: every field takes all of its values."""
    random = np.random.default_rng(seed)
    type_ = GGMLQuantizationType[kind]
    if kind in ("F16", "BF16"):
        data = half(noise((rows, width), seed), kind.lower())
        data = data.view(np.uint8) if kind == "BF16" else data
        return TensorInfo(kind, (rows, width), type_, data)
    elements, size = GGML_QUANT_SIZES[type_]
    data = random.integers(0, 256, (rows, width // elements, size), np.uint8)
    for at in SCALES_AT.get(kind, (0,)):
        scales = random.uniform(-1 / 64, 1 / 64, (rows, width // elements)).astype(np.float16)
        data[..., at : at + 2] = scales.view(np.uint8).reshape(*scales.shape, 2)
    return TensorInfo(kind, (rows, width), type_, data.reshape(rows, -1))


def bytes_of(tensor: TensorInfo) -> Array:
    return np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)


def cells(tensor: TensorInfo, half_rows: int = 8, *, step: int = 0) -> Array:
    """``tensor`` as the kernels hold it: ``repack.cu`` in launches of ``step`` rows (0: all at once)."""
    kind = tensor.type.name
    rows, width = tensor.shape
    if kind not in CELLS:
        return bytes_of(tensor)
    out = np.zeros(packed_nbytes(kind, rows, width), np.uint8)
    for first in range(0, rows, step or rows):
        count = min(step or rows, rows - first)
        source = bytes_of(tensor).reshape(rows, -1)[first : first + count].reshape(-1)
        args = [source, out, first, count, rows, width, half_rows]
        launch("repack.cu", {"TYPE": kind}, "repack", (-(-count * width // 32 // 128),), 128, args)
    return out
