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
