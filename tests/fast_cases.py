"""What the tests of the fast backend share: packed matrices of every type, and processors that lack features."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from slimrt.ops.fast.features import Features, detect
from slimrt.weights.gguf import TensorInfo

Kind = GGMLQuantizationType
KINDS = (
    Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0,
    Kind.MXFP4, Kind.IQ4_NL, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS, Kind.TQ2_0,
    Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S,
)  # fmt: skip
MASKS = ((), ("vnni", "bf16"), ("avx512",), ("avx512", "avxvnni"))

# Where a block's float16 numbers lie; all its other bytes may be anything.
_HALVES = {
    Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,), Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.IQ4_NL: (0,), Kind.Q2_K: (80, 82), Kind.Q3_K: (108,),
    Kind.IQ4_XS: (0,), Kind.TQ2_0: (64,), Kind.IQ2_XXS: (0,), Kind.IQ2_XS: (0,), Kind.IQ2_S: (0,), Kind.IQ3_XXS: (0,),
    Kind.IQ3_S: (0,),
}  # fmt: skip


def usable(mask: tuple[str, ...]) -> Features:
    """This processor's features without ``mask``; skips where that changes nothing."""
    features = detect()
    masked = features.without(*mask)
    if mask and masked == features:
        pytest.skip(f"this processor has none of {', '.join(mask)}")
    return masked


def packed_rows(kind: GGMLQuantizationType, rows: int, columns: int, seed: int = 0) -> TensorInfo:
    """Random blocks, every bit pattern among them, with scales such as models have; read-only as a mapped file is."""
    rng = np.random.default_rng([seed, rows, columns])
    elements, size = GGML_QUANT_SIZES[kind]
    if kind in _HALVES:
        blocks = rng.integers(0, 256, (rows, columns // elements, size), dtype=np.uint8)
        for at in _HALVES[kind]:
            scales = rng.normal(0, 0.02, (rows, columns // elements, 1)).astype(np.float16)
            blocks[:, :, at : at + 2] = scales.view(np.uint8)
        data = blocks.reshape(rows, -1)
    else:
        floats = rng.standard_normal((rows, columns), np.float32)
        data = gguf.quantize(floats, kind)
        if kind == Kind.BF16:
            data = data.view(np.uint16)
    data.flags.writeable = False
    return TensorInfo("w", (rows, columns), kind, data)


def unpacked(tensor: TensorInfo) -> np.ndarray:
    """``tensor`` as float32 by gguf's own dequantiser."""
    data = tensor.data.view(np.uint8) if tensor.type == Kind.BF16 else tensor.data
    return gguf.dequantize(data, tensor.type).reshape(tensor.shape)
