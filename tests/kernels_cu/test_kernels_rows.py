"""The kernels that treat rows, run on the CPU, against their NumPy references."""

from __future__ import annotations

import numpy as np
import pytest

from slimrt.ops.numpy.numpy_ops import NumpyOps
from tests.kernel_cases import Array, assert_as_exact, full, half, launch, mode, needs_compiler, noise, rounded

__all__ = ["mode"]
pytestmark = needs_compiler

OPS = NumpyOps(threads=1)


def norm64(x: Array, gain: Array, eps: float) -> Array:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * gain


@pytest.mark.parametrize(("tokens", "width", "kind"), [(1, 8, "f16"), (3, 2056, "f16"), (2, 576, "bf16")])
def test_rmsnorm(tokens: int, width: int, kind: str) -> None:
    x, gain, eps = noise((tokens, width), 1, 10), noise((width,), 2), 1e-5
    out = half(np.zeros_like(x), kind)
    launch("rmsnorm.cu", {"T": kind}, "rmsnorm", (tokens,), 256, [x, gain, out, width, eps])
    assert_as_exact(full(out), rounded(OPS.rmsnorm(x, gain, eps), kind), norm64(x, gain, eps))


@pytest.mark.parametrize(
    ("heads", "dh", "half_width", "kind"), [(3, 64, 32, "f16"), (5, 128, 64, "bf16"), (9, 80, 20, "f16")]
)
def test_rope(heads: int, dh: int, half_width: int, kind: str) -> None:
    """The first heads of wider rows, all or part of each."""
    tokens = 4
    x = half(noise((tokens, heads + 2, dh), 1), kind)
    angles = np.random.default_rng(2).uniform(0, 6, (tokens, half_width)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    exact = OPS.rope(full(x[:, :heads]).astype(np.float64), cos, sin)
    naive = rounded(OPS.rope(full(x[:, :heads]), cos, sin), kind)
    rest = x[:, heads:].copy()
    grid = (tokens, -(-heads * half_width // 256))
    args = [x, cos, sin, heads, dh, half_width, (heads + 2) * dh]
    launch("rope.cu", {"T": kind}, "rope", grid, 256, args)
    assert_as_exact(full(x[:, :heads]), naive, exact)
    assert np.array_equal(x[:, heads:], rest)


@pytest.mark.parametrize(("groups", "width", "kind"), [(3, 64, "f16"), (1, 1056, "f16"), (2, 128, "bf16")])
@pytest.mark.parametrize("normed", [True, False])
def test_norms_of_heads(groups: int, width: int, kind: str, normed: bool) -> None:
    """By head and by row, in the first heads of wider rows; or only scaled. Small numbers, so that eps counts."""
    tokens, eps, scale = 3, 1e-5, 0.37
    x, gain = half(noise((tokens, groups + 1, width), 1, 0.01), kind), noise((width,), 2)
    before = full(x[:, :groups]).astype(np.float64)
    exact = scale * (before / np.sqrt((before * before).mean(axis=2, keepdims=True) + eps) * gain if normed else before)
    rest = x[:, groups:].copy()
    args = [x, gain if normed else np.uintp(0), eps, scale, width, (groups + 1) * width]
    launch("norm_heads.cu", {"T": kind}, "norm_heads", (tokens, groups), 32 * min(8, -(-width // 128)), args)
    assert_as_exact(full(x[:, :groups]), rounded(exact.astype(np.float32), kind), exact)
    assert np.array_equal(x[:, groups:], rest)


@pytest.mark.parametrize("normed", [True, False])
def test_merge(normed: bool) -> None:
    tokens, width, eps, scale = 3, 1060, 1e-5, 0.37
    x, y, gain = noise((tokens, width), 1), noise((tokens, width), 2, 0.01), noise((width,), 3)
    exact = x + scale * (norm64(y, gain, eps) if normed else y.astype(np.float64))
    naive = x + np.float32(scale) * (OPS.rmsnorm(y, gain, eps) if normed else y)
    launch("merge.cu", {}, "merge", (tokens,), 256, [x, y, gain if normed else np.uintp(0), width, eps, scale])
    assert_as_exact(x, naive, exact)


@pytest.mark.parametrize(("width", "kind"), [(8, "f16"), (2056, "f16"), (1536, "bf16")])
def test_narrowing_and_biases(width: int, kind: str) -> None:
    x, bias = noise((3, width), 1, 10), noise((width,), 2)
    narrow = half(np.zeros_like(x), kind)
    grid = (3, -(-width // 2048))
    launch("elements.cu", {"T": kind}, "narrow", grid, 256, [x, narrow, width])
    assert np.array_equal(narrow, half(x, kind))
    shifted = narrow.copy()
    launch("elements.cu", {"T": kind}, "shift", grid, 256, [shifted, bias, width])
    assert np.array_equal(shifted, half(full(narrow) + bias, kind))


def test_gelu() -> None:
    x = half(noise((2, 2 * 72), 1, 4))
    out = half(np.full((2, 72), np.nan, np.float32))
    launch("swiglu.cu", {"T": "f16", "GELU": 1}, "swiglu", (2, 1), 256, [x, out, 72])
    gate, up = np.split(full(x).astype(np.float64), 2, axis=1)
    exact = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    assert_as_exact(full(out), rounded(OPS.geglu(full(x))), exact)


@pytest.mark.parametrize(("tokens", "width", "kind"), [(1, 8, "f16"), (3, 2056, "f16"), (2, 1536, "bf16")])
def test_swiglu(tokens: int, width: int, kind: str) -> None:
    x = noise((tokens, 2 * width), 1, 4)
    x[0, 0] = -20000  # exp(-gate) overflows: the gate is 0
    x = half(x, kind)
    out = half(np.full((tokens, width), np.nan, np.float32), kind)
    launch("swiglu.cu", {"T": kind}, "swiglu", (tokens, -(-width // 2048)), 256, [x, out, width])
    gate, up = np.split(full(x).astype(np.float64), 2, axis=1)
    with np.errstate(over="ignore"):
        exact = gate / (1 + np.exp(-gate)) * up
    assert_as_exact(full(out), rounded(OPS.swiglu(full(x)), kind), exact)
