"""What each function of ``kernels_cu/ptx.cuh`` must do, from NVIDIA's definition of the instruction behind it.

``check_ptx`` runs ``tests/ptx_probe.cu`` by a function that it is given: the emulation's, or a real GPU's. The emulated
twins stand for the instructions in all other tests, so both have to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tests.kernel_cases import Array, full, half, noise

__all__ = ["PROBE", "check_ptx"]

PROBE = Path(__file__).with_name("ptx_probe.cu")

# Runs one warp: (kernel, arguments: arrays that it reads or writes in place, and NumPy scalars; dynamic shared bytes)
Launch = Callable[[str, Sequence[Array | np.generic], int], None]

LANES = np.arange(32)
GROUP, THREAD = LANES // 4, LANES % 4


def check_ptx(launch: Launch, kind: str) -> None:
    """Raise AssertionError where a wrapper for the 16-bit type ``kind`` does not do what it says."""
    _check_mma(launch, kind)
    _check_matrices(launch)
    _check_copies(launch)
    _check_conversions(launch, kind)
    _check_exponential(launch)


def _pairs(x: Array) -> Array:
    """16-bit numbers [..., 2 n] -> uint32 [..., n], the first of two in the low half."""
    return np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) @ np.array([1, 1 << 16], np.uint32)


def _check_mma(launch: Launch, kind: str) -> None:
    a, b, d = half(noise((16, 16), 1), kind), half(noise((16, 8), 2), kind), noise((16, 8), 3)
    rows = [GROUP + 8 * (i % 2) for i in range(4)]
    columns = [2 * THREAD + 8 * (i // 2) for i in range(4)]
    a_parts = np.stack([_pairs(np.stack([a[r, c], a[r, c + 1]], -1)) for r, c in zip(rows, columns, strict=True)], 1)
    depth = [2 * THREAD, 2 * THREAD + 8]
    b_parts = np.stack([_pairs(np.stack([b[k, GROUP], b[k + 1, GROUP]], -1)) for k in depth], 1)
    places = [(GROUP + 8 * (i // 2), 2 * THREAD + i % 2) for i in range(4)]
    sums = np.stack([d[place] for place in places], 1)
    launch("mma", [np.ascontiguousarray(a_parts), np.ascontiguousarray(b_parts), sums], 0)
    exact = full(a).astype(np.float64) @ full(b).astype(np.float64) + d
    size = np.abs(full(a)).astype(np.float64) @ np.abs(full(b)) + np.abs(d)
    for i, place in enumerate(places):
        # Tensor cores align the products of a step and cut them off: up to one unit of the largest each.
        assert (np.abs(sums[:, i] - exact[place]) <= 17 * 2.0**-23 * size[place]).all(), "mma_m16n8k16"


def _check_matrices(launch: Launch) -> None:
    values = np.random.default_rng(4).integers(0, 1 << 16, (4, 8, 8), np.uint16)
    straight, transposed = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.uint32)
    launch("matrices", [values, straight, transposed], 512)
    for got, matrices, name in ((straight, values, ""), (transposed, values.transpose(0, 2, 1), "_trans")):
        for i, matrix in enumerate(matrices):
            wanted = _pairs(np.stack([matrix[GROUP, 2 * THREAD], matrix[GROUP, 2 * THREAD + 1]], -1))
            assert np.array_equal(got[:, i], wanted), f"ldmatrix_x4{name}"


def _check_copies(launch: Launch) -> None:
    source = np.random.default_rng(5).integers(0, 1 << 32, (2, 32, 4), np.uint32)
    got = np.full_like(source, 7)
    launch("copies", [source, got], 1024)
    source[:, ::3] = 0
    assert np.array_equal(got, source[:, ::-1]), "cp_async16"


def _check_conversions(launch: Launch, kind: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    every = every.view(np.float16) if kind == "f16" else every
    wide = np.zeros(1 << 16, np.float32)
    launch("widen", [every, wide, np.int32(len(wide))], 0)
    with np.errstate(all="ignore"):
        assert np.array_equal(wide, full(every), equal_nan=True), "to_float"
        # Every exponent, around every rounding of the fraction's last places, both signs.
        steps = np.arange(0, 1 << 32, 1 << 13, dtype=np.uint64)[:, None]
        edges = (steps + np.array([0, 1, (1 << 12) - 1, 1 << 12, (1 << 12) + 1], np.uint64)).astype(np.uint32)
        numbers = edges.reshape(-1).view(np.float32)
        single, pairs = np.zeros_like(half(numbers, kind)), np.zeros(len(numbers), np.uint32)
        launch("narrow", [numbers, single, pairs, np.int32(len(numbers))], 0)
        wanted, real = half(numbers, kind).view(np.uint16), ~np.isnan(numbers)
        assert np.array_equal(single.view(np.uint16)[real], wanted[real]), "from_float"
        assert np.isnan(full(single)[~real]).all(), "from_float of NaN"
        low, high = (pairs & 0xFFFF).astype(np.uint16), (pairs >> 16).astype(np.uint16)
        assert np.array_equal(low[real], wanted[real]), "pack: low half"
        assert np.array_equal(high[real[::-1]], wanted[::-1][real[::-1]]), "pack: high half"


def _check_exponential(launch: Launch) -> None:
    x = np.concatenate([np.linspace(-140, 120, 4096, dtype=np.float32), np.float32([0, -np.inf, -3e38])])
    got = np.full_like(x, np.nan)
    launch("exponential", [x, got, np.int32(len(x))], 0)
    exact = np.exp2(x.astype(np.float64))
    # 2 ulp and the rounding of the result; what is subnormal becomes 0.
    assert (np.abs(got - exact) <= np.maximum(exact * 2.0**-21, 2.0**-126)).all(), "exp2_fast"
    assert got[-1] == got[-2] == 0, "exp2_fast of -infinity"
