"""The kernels that read packed weights, run on the CPU: every type against ``quants.dequantize`` and float64."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from slimrt.weights.gguf import TensorInfo
from slimrt.weights.quants import dequantize
from tests.kernel_cases import (
    NULL,
    Array,
    assert_as_exact,
    full,
    half,
    launch,
    mode,
    needs_compiler,
    noise,
    rounded,
)

__all__ = ["mode"]
pytestmark = needs_compiler

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


@pytest.mark.parametrize("kind", TYPES)
def test_embed_is_bit_equal(kind: str) -> None:
    tensor = packed(kind, 7, 768)
    ids = np.array([6, 0, 3, 3], np.int32)
    out = np.full((4, 768), np.nan, np.float32)
    launch("embed.cu", {"TYPE": kind}, "embed", (4,), 128, [bytes_of(tensor), ids, out, 768])
    assert np.array_equal(out, dequantize(tensor)[ids])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("out_kind", ["f16", "bf16"])
def test_dequantize_rounds_the_exact_weights(kind: str, out_kind: str) -> None:
    """Two parts of a stacked matrix, the second from a row on: launches into parts of one result."""
    tensor = packed(kind, 5, 512)
    out = half(np.zeros((6, 512), np.float32), out_kind)
    for rows, at in ((slice(0, 2), 0), (slice(2, 5), 3)):
        units = (rows.stop - rows.start) * 512 // 32
        source = np.ascontiguousarray(tensor.data[rows]).reshape(-1).view(np.uint8)
        args = [source, out[at:], units]
        launch("dequantize.cu", {"TYPE": kind, "T": out_kind}, "dequantize", (-(-units // 128),), 128, args)
    expected = rounded(dequantize(tensor), out_kind)  # equal as numbers: the sign of 0 is the kernel's own
    assert np.array_equal(full(out[[0, 1, 3, 4, 5]]), expected)
    assert not out[2].any()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("rows", "width", "tokens", "bias", "residual"), [(5, 256, 1, 0, 0), (40, 4352, 7, 1, 1), (16, 1280, 19, 0, 1)]
)
def test_gemv(kind: str, rows: int, width: int, tokens: int, bias: int, residual: int) -> None:
    tensor = packed(kind, rows, width)
    x = half(noise((tokens, width), 1))
    shift = noise((rows,), 2) if bias else None
    out = noise((tokens, rows + 3), 3)  # part of wider rows, and its own residual
    before = out.copy()
    args = [bytes_of(tensor), x, NULL if shift is None else shift, out if residual else NULL, out]
    defines = {"TYPE": kind, "T": "f16", "OUT": "float"}
    launch("gemv.cu", defines, "gemv", (-(-rows // 16), -(-tokens // 16)), 256, [*args, rows, width, rows + 3, tokens])

    def finished(product: Array) -> Array:
        return product + (0 if shift is None else shift) + (before[:, :rows] if residual else 0)

    # Naive is what prefill does, weights and product in 16 bits.
    weights = dequantize(tensor)
    exact = finished(full(x).astype(np.float64) @ weights.T.astype(np.float64))
    assert_as_exact(out[:, :rows], finished(rounded(full(x) @ rounded(weights).T)), exact)
    assert np.array_equal(out[:, rows:], before[:, rows:])


@pytest.mark.parametrize("out_kind", ["f16", "bf16"])
def test_gemv_into_sixteen_bits(out_kind: str) -> None:
    tensor = packed("Q4_K", 9, 512)
    x = half(noise((1, 512), 1), out_kind)
    out = half(np.zeros((1, 9), np.float32), out_kind)
    defines = {"TYPE": "Q4_K", "T": out_kind, "OUT": out_kind}
    launch("gemv.cu", defines, "gemv", (1, 1), 256, [bytes_of(tensor), x, NULL, NULL, out, 9, 512, 9, 1])
    exact = full(x).astype(np.float64) @ dequantize(tensor).T.astype(np.float64)
    assert_as_exact(full(out), rounded(exact.astype(np.float32), out_kind), exact)
