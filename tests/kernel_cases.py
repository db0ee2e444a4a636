"""What the kernel tests share: launches in the emulation's modes, 16-bit arrays, and the rule of tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.emulation import compiler, emulated, emulation_mode

Array = np.ndarray

NULL = np.uintp(0)
MODES = {"deferred": (True, 0), "eager-1": (False, 1), "eager-2": (False, 2)}

needs_compiler = pytest.mark.skipif(compiler() is None, reason="kernels run on the CPU by g++ on Linux; install it")


@pytest.fixture(params=MODES, autouse=True)
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of a module that imports this runs in each of the emulation's modes."""
    deferred, seed = MODES[request.param]
    with emulation_mode(deferred=deferred, seed=seed):
        yield


def launch(
    source: str,
    defines: dict[str, object],
    name: str,
    grid: Sequence[int],
    block: int,
    args: Sequence[Any],
    shared: int = 0,
) -> None:
    """One launch; Python's numbers become int32 and float32, which is all that kernels take."""
    kernel = emulated(source, defines).kernel(name)
    kernel.max_dynamic_shared_size_bytes = max(shared, kernel.max_dynamic_shared_size_bytes)
    typed = {int: np.int32, float: np.float32}
    kernel(grid, (block,), [typed.get(type(arg), lambda x: x)(arg) for arg in args], shared_mem=shared)


def half(x: Array, kind: str = "f16") -> Array:
    """float32 -> the 16-bit type as the kernels take it: float16, or the bits of a bfloat16 (NumPy has none)."""
    if kind == "f16":
        return x.astype(np.float16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def full(x: Array) -> Array:
    """The inverse of ``half``, as float32."""
    if x.dtype == np.float16:
        return x.astype(np.float32)
    return (x.astype(np.uint32) << 16).view(np.float32)


def rounded(x: Array, kind: str = "f16") -> Array:
    """``x`` rounded to the 16-bit type, as float32."""
    return full(half(x, kind))


def noise(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Array:
    """Normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)


def assert_as_exact(got: Array, naive: Array, exact: Array, k: float = 2.0) -> None:
    """The error of ``got`` against float64 is at most ``k`` times that of a naive computation of the same precision.

    Where the naive one is exact by luck, as of a single key whose weight is 1, float32's rounding stands in for it.
    """
    assert got.shape == exact.shape
    assert np.isfinite(got).all() and np.isfinite(naive).all()
    unit = np.finfo(np.float32).eps / 2 * np.abs(exact).max()
    allowed = k * max(np.abs(naive.astype(np.float64) - exact).max(), unit)
    error = np.abs(got.astype(np.float64) - exact).max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
