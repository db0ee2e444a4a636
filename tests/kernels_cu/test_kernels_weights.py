"""The kernels that read weights, run on the CPU: every type against ``quants.dequantize`` and float64."""

from __future__ import annotations

import numpy as np
import pytest

from slimrt.ops.cuda.gemv import shared_bytes
from slimrt.ops.cuda.weights import CELLS, packed_nbytes
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
from tests.packed_weights import TYPES, cells, packed

__all__ = ["mode"]
pytestmark = needs_compiler


def ragged(kind: str, width: int) -> int:
    """A width that ends within a cell, where the type allows it."""
    return width if kind.endswith("_K") else width - 32


@pytest.mark.parametrize("kind", TYPES)
def test_embed_is_bit_equal(kind: str) -> None:
    """After repacking in pieces, with a tile that is not full."""
    width = ragged(kind, 768)
    tensor = packed(kind, 19, width)
    ids = np.array([18, 0, 3, 3], np.int32)
    out = np.full((4, width), np.nan, np.float32)
    launch("embed.cu", {"TYPE": kind}, "embed", (4,), 128, [cells(tensor, step=5), ids, out, 19, width])
    assert np.array_equal(out, dequantize(tensor)[ids])


def test_begin_copies_what_the_host_has_written() -> None:
    tensor, host = packed("Q4_0", 19, 96), np.array([17, 5, 6, 7, 1 << 30], np.int32)
    device, out = np.zeros(6, np.int32), np.full((1, 96), np.nan, np.float32)
    launch("embed.cu", {"TYPE": "Q4_0"}, "begin", (1,), 256, [cells(tensor), host, device, out, 19, 96, 5])
    assert device.tolist() == [*host.tolist(), 0]
    assert np.array_equal(out, dequantize(tensor)[[17]])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("out_kind", ["f16", "bf16"])
@pytest.mark.parametrize(("rows", "meet"), [(21, 8), (64, 16)])
def test_dequantize_rounds_the_exact_weights(kind: str, out_kind: str, rows: int, meet: int) -> None:
    width = ragged(kind, 512)
    tensor = packed(kind, rows, width)
    out = half(np.zeros((rows + 1, width), np.float32), out_kind)
    args = [cells(tensor, meet), out[:rows], rows, width, meet]
    launch("dequantize.cu", {"TYPE": kind, "T": out_kind}, "dequantize", (-(-rows // 16) * 4,), 64, args)
    # Equal as numbers: the sign of 0 is the kernel's own.
    assert np.array_equal(full(out[:rows]), rounded(dequantize(tensor), out_kind))
    assert not out[rows].any()


@pytest.mark.parametrize("kind", TYPES)
def test_full_cells_take_the_bytes_of_the_file(kind: str) -> None:
    assert packed_nbytes(kind, 48, 512) == packed(kind, 48, 512).data.nbytes
    if kind in CELLS:
        ragged = packed_nbytes(kind, 40, 512)
        assert ragged == packed(kind, 48, 512).data.nbytes


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("rows", "width", "tokens", "bias", "residual"), [(5, 256, 2, 0, 0), (40, 4352, 7, 1, 1), (16, 1280, 25, 0, 1)]
)
def test_few_tokens(kind: str, rows: int, width: int, tokens: int, bias: int, residual: int) -> None:
    width = ragged(kind, width)
    tensor = packed(kind, rows, width)
    x = half(noise((tokens, width), 1))
    shift = noise((rows,), 2) if bias else None
    out = noise((tokens, rows + 3), 3)  # part of wider rows, and its own residual
    before = out.copy()
    args = [cells(tensor), x, NULL if shift is None else shift, out if residual else NULL, out]
    defines = {"TYPE": kind, "T": "f16", "OUT": "float"}
    grid = (-(-rows // 16), -(-tokens // 16))
    launch("gemm_few.cu", defines, "gemm_few", grid, 256, [*args, rows, width, 8, rows + 3, tokens])

    def finished(product: Array) -> Array:
        return product + (0 if shift is None else shift) + (before[:, :rows] if residual else 0)

    # Naive is what prefill does, weights and product in 16 bits.
    weights = dequantize(tensor)
    exact = finished(full(x).astype(np.float64) @ weights.T.astype(np.float64))
    assert_as_exact(out[:, :rows], finished(rounded(full(x) @ rounded(weights).T)), exact)
    assert np.array_equal(out[:, rows:], before[:, rows:])


@pytest.mark.parametrize("out_kind", ["f16", "bf16"])
def test_few_tokens_into_sixteen_bits(out_kind: str) -> None:
    tensor = packed("Q4_K", 32, 512)
    x = half(noise((2, 512), 1), out_kind)
    out = half(np.zeros((2, 32), np.float32), out_kind)
    defines = {"TYPE": "Q4_K", "T": out_kind, "OUT": out_kind}
    launch("gemm_few.cu", defines, "gemm_few", (2, 1), 256, [cells(tensor, 16), x, NULL, NULL, out, 32, 512, 16, 32, 2])
    exact = full(x).astype(np.float64) @ dequantize(tensor).T.astype(np.float64)
    assert_as_exact(full(out), rounded(exact.astype(np.float32), out_kind), exact)


# -- one token ---------------------------------------------------------------------------------------------------


def ending(x: Array) -> Array:
    """``x`` [n], behind which lies what must not be read."""
    held = np.full(len(x) + 256, np.nan, np.float32).astype(x.dtype)
    held[: len(x)] = x
    return held[: len(x)]


def norm(x: Array, gain: Array, eps: float) -> Array:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean() + eps) * gain


def naive(x: Array, weights: Array, kind: str, out_kind: str) -> Array:
    """Inputs, weights and result in 16 bits, summed in float32."""
    return rounded(rounded(x.astype(np.float32), kind) @ rounded(weights, kind).T, out_kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("rows", "width", "blocks", "bias", "residual"),
    [(5, 256, 1, 0, 0), (72, 4352, 2, 1, 1), (48, 1280, 3, 0, 1)],
)
def test_gemv(kind: str, rows: int, width: int, blocks: int, bias: int, residual: int) -> None:
    """Ragged tiles and columns, fewer cells than warps and more, blocks with several tiles, in place."""
    width = ragged(kind, width)
    tensor = packed(kind, rows, width)
    x = ending(half(noise((width,), 1)))
    shift, out = noise((rows,), 2), noise((rows + 1,), 3)
    before = out.copy()
    defines = {"TYPE": kind, "T": "f16", "FROM": "f16", "OUT": "float", "STAGES": 3}
    args = [cells(tensor), x, NULL, 0.0, shift if bias else NULL, out if residual else NULL, out, rows, width, 8]
    launch("gemv.cu", defines, "gemv", (blocks,), 256, args, shared_bytes(kind, width, 3))
    weights, rest = dequantize(tensor), (shift if bias else 0) + (before[:rows] if residual else 0)
    exact = full(x).astype(np.float64) @ weights.T.astype(np.float64) + rest
    assert_as_exact(out[:rows], naive(full(x), weights, "f16", "f16") + rest, exact)
    assert out[rows] == before[rows]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("to", ["f16", "bf16"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_gemv_of_the_normed_stream(kind: str, to: str, scale: float) -> None:
    """Gains beyond what float16 holds, and a row with an outlier, must not overflow."""
    rows, width, eps = 24, ragged(kind, 512), 1e-5
    if scale < 1 and kind == "F16":
        scale = 5e-36  # where the powers of two end; of other types some products would not be normal numbers
    tensor = packed(kind, rows, width)
    x, gain = ending(noise((width,), 1, 10)), ending(noise((width,), 2, scale))
    x[7] = 3e4
    out = np.full(rows, np.nan, np.float32)
    defines = {"TYPE": kind, "T": to, "FROM": "float", "OUT": "float", "STAGES": 2}
    args = [cells(tensor), x, gain, eps, NULL, NULL, out, rows, width, 8]
    launch("gemv.cu", defines, "gemv", (1,), 256, args, shared_bytes(kind, width, 2))
    normed, weights = norm(x, gain, eps), dequantize(tensor)
    exact = normed @ weights.T.astype(np.float64)
    both = "bf16" if (kind, to) == ("BF16", "bf16") else "f16"
    unit = naive(normed / scale, weights, both, "bf16" if both == "bf16" else "f16") * np.float32(scale)
    assert_as_exact(out, unit.astype(np.float32), exact)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_1", "Q5_K"])
def test_gemv_of_bfloats(kind: str) -> None:
    """Activations beyond 65504 come through."""
    rows, width = 32, 768
    tensor = packed(kind, rows, width)
    x = half(noise((width,), 1, 1e8), "bf16")
    out = half(np.zeros(rows, np.float32), "bf16")
    defines = {"TYPE": kind, "T": "bf16", "FROM": "bf16", "OUT": "bf16", "STAGES": 4}
    args = [cells(tensor, 16), x, NULL, 0.0, NULL, NULL, out, rows, width, 16]
    launch("gemv.cu", defines, "gemv", (2,), 256, args, shared_bytes(kind, width, 4))
    weights = dequantize(tensor)
    exact = full(x).astype(np.float64) @ weights.T.astype(np.float64)
    assert_as_exact(full(out), naive(full(x), weights, "bf16", "bf16"), exact)


@pytest.mark.parametrize(("kind", "to"), [("F16", "f16"), ("Q4_0", "f16"), ("Q6_K", "bf16"), ("BF16", "bf16")])
@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up(kind: str, to: str, bias: bool) -> None:
    count, width, eps = 40, 512, 1e-6
    tensor = packed(kind, 2 * count, width)
    x, gain, shift = noise((width,), 1, 10), noise((width,), 2), noise((2 * count,), 3)
    shift[0] = -20000  # exp(-gate) overflows: the gate is 0
    held = half(np.zeros(2 * count, np.float32), to)
    out = held[:count]
    defines = {"TYPE": kind, "T": to, "FROM": "float", "STAGES": 2}
    args = [cells(tensor, count), x, gain, eps, shift if bias else NULL, out, count, width]
    launch("gemv_gated.cu", defines, "gemv_gated", (2,), 256, args, shared_bytes(kind, width, 2))
    weights, normed = dequantize(tensor), norm(x, gain, eps)
    added = shift if bias else 0

    def gated(y: Array) -> Array:
        with np.errstate(over="ignore"):
            return y[:count] / (1 + np.exp(-y[:count])) * y[count:]

    exact = gated(normed @ weights.T.astype(np.float64) + added)
    unit = rounded(gated(naive(normed, weights, to, to) + added).astype(np.float32), to)
    assert not held[count:].any()
    assert_as_exact(full(out), unit, exact, 3)  # few numbers, so the greatest error of either is a matter of chance


@pytest.mark.parametrize(("kind", "to", "dh"), [("F16", "f16", 64), ("Q4_K", "f16", 128), ("BF16", "bf16", 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_heads_are_rotated_and_appended(kind: str, to: str, dh: int, bias: bool) -> None:
    """Two parts, as where values are of another type: the second begins at a later head."""
    heads, kv_heads, width, eps, capacity, start = 3, 1, 512, 1e-5, 9, 4
    rows = (heads + 2 * kv_heads) * dh
    tensor = packed(kind, rows, width)
    x, gain, shift = noise((width,), 1, 10), noise((width,), 2), noise((rows,), 3, 10)
    angles = np.random.default_rng(4).uniform(0, 6, dh // 2).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    q, layer = half(np.zeros((heads, dh), np.float32), to), half(noise((2, kv_heads, capacity, dh), 5), to)
    before = layer.copy()
    for first, count in ((0, heads + kv_heads), (heads + kv_heads, kv_heads)):
        part = slice(first * dh, (first + count) * dh)
        piece = packed(kind, rows, width)
        piece = type(piece)(piece.name, (count * dh, width), piece.type, piece.data[part])
        defines = {"TYPE": kind, "T": to, "FROM": "float", "STAGES": 3}
        sizes = [count * dh, width, dh, first, heads, kv_heads, capacity]
        added, at = shift[part].copy() if bias else NULL, np.array([start], np.int32)
        args = [cells(piece, dh // 2), x, gain, eps, added, cos, sin, at, q, layer, *sizes]
        launch("gemv_heads.cu", defines, "gemv_heads", (2,), 256, args, shared_bytes(kind, width, 3))

    def rotated(y: Array) -> Array:
        y = (y + (shift if bias else 0)).reshape(-1, dh)
        a, b = y[: heads + kv_heads, : dh // 2], y[: heads + kv_heads, dh // 2 :]
        turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)
        return np.concatenate([turned, y[heads + kv_heads :]])

    weights, normed = dequantize(tensor), norm(x, gain, eps)
    exact = rotated(normed @ weights.T.astype(np.float64))
    unit = rounded(rotated(naive(normed, weights, to, to)).astype(np.float32), to)
    assert_as_exact(np.concatenate([full(q), full(layer[:, 0, start])]), unit, exact)
    before[:, :, start] = layer[:, :, start]
    assert np.array_equal(layer, before)
