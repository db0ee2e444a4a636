"""The kernels that treat rows, run on the CPU, against their NumPy references."""

from __future__ import annotations

import numpy as np
import pytest

from slimrt.ops.numpy.numpy_ops import NumpyOps
from tests.kernel_cases import NULL, Array, assert_as_exact, full, half, launch, mode, needs_compiler, noise, rounded

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


def test_add_rmsnorm_leaves_the_sum_in_the_stream() -> None:
    x, delta, gain, eps = noise((3, 1028), 1), half(noise((3, 1028), 2)), noise((1028,), 3), 1e-6
    out, total = np.zeros_like(delta), x + full(delta)
    launch("rmsnorm.cu", {"T": "f16"}, "add_rmsnorm", (3,), 256, [x, delta, gain, out, 1028, eps])
    assert np.array_equal(x, total)
    assert_as_exact(full(out), rounded(OPS.rmsnorm(total, gain, eps)), norm64(total, gain, eps))


@pytest.mark.parametrize(
    ("heads", "dh", "half_width", "kind"), [(3, 64, 32, "f16"), (5, 128, 64, "bf16"), (9, 80, 20, "f16")]
)
@pytest.mark.parametrize("table", [False, True])
def test_rope(heads: int, dh: int, half_width: int, kind: str, table: bool) -> None:
    """The first heads of wider rows, all or part of each; angles by row, or by position out of a longer table."""
    tokens = 4
    x = half(noise((tokens, heads + 2, dh), 1), kind)
    angles = np.random.default_rng(2).uniform(0, 6, (20, half_width)).astype(np.float32)
    positions = np.array([3, 4, 11, 19], np.int32)
    angles = angles if table else angles[positions]
    cos, sin = np.cos(angles), np.sin(angles)
    read = positions if table else slice(None)
    exact = OPS.rope(full(x[:, :heads]).astype(np.float64), cos[read], sin[read])
    naive = rounded(OPS.rope(full(x[:, :heads]), cos[read], sin[read]), kind)
    rest = x[:, heads:].copy()
    grid = (tokens, -(-heads * half_width // 256))
    args = [x, cos, sin, positions if table else NULL, heads, dh, half_width, (heads + 2) * dh]
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


def test_argmax() -> None:
    logits = noise((6, 5003), 1)
    logits[1, [40, 4000]] = 50  # the first of equals
    logits[2, 4999] = np.nan
    logits[3, 7] = np.inf
    logits[4, 8] = -np.inf
    logits[5] = -3e38
    token = np.full(6, -7, np.int32)
    launch("argmax.cu", {}, "argmax", (6,), 1024, [logits, token, 5003])
    assert token.tolist() == [int(logits[0].argmax()), 40, -1, -1, -1, 0]
