"""How long a piece of work takes on a backend, and how fast its machine can go at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Peaks", "Timer", "measure_peaks", "put"]

Work = Callable[[], object]

_FLUSH = 256 << 20  # bytes written between runs: more than the caches of any device hold

# Dense float16 with float32 sums, TFLOP/s, and GB/s: the vendors' data sheets.
_THEORETICAL = {
    "H100 PCIe": (756, 2000),
    "H100 NVL": (835, 3900),
    "H100": (989, 3350),
    "H200": (989, 4800),
    "A100-SXM4-40GB": (312, 1555),
    "A100": (312, 2039),
    "RTX 4090": (165, 1008),
}


@dataclass(frozen=True)
class Peaks:
    """FLOP/s and bytes/s: the best that was measured, and what the vendor promises (None where that is not known)."""

    flops: float
    bandwidth: float
    theoretical_flops: float | None = None
    theoretical_bandwidth: float | None = None

    def roofline(self, flops: float, nbytes: float) -> tuple[float, str]:
        """Seconds that work of so many operations and bytes takes at least, and what holds it up (roofline model)."""
        compute = flops / (self.theoretical_flops or self.flops)
        memory = nbytes / (self.theoretical_bandwidth or self.bandwidth)
        return (compute, "compute") if compute > memory else (memory, "memory")


class Timer:
    """Medians of ``repeats`` runs after one that is not counted. On a GPU by events, its cache flushed before each."""

    def __init__(self, ops: Any, repeats: int, flush: int = _FLUSH) -> None:
        self._ops, self._repeats = ops, repeats
        self._scratch: Any = ops.empty((flush,), np.uint8) if ops.name == "cuda" else None

    def seconds(self, work: Work) -> float:
        work()
        self._ops.finish()
        return statistics.median(self._once(work) for _ in range(self._repeats))

    def _once(self, work: Work) -> float:
        if self._scratch is None:
            begun = time.perf_counter()
            work()
            return time.perf_counter() - begun
        self._scratch[...] = 0
        return self._ops.elapsed(work)


def put(ops: Any, array: np.ndarray, dtype: Any = None) -> Any:
    """``array`` where ``ops`` computes, in ``dtype`` or the backend's own type of activations."""
    result = ops.empty(array.shape) if dtype is None else ops.empty(array.shape, dtype)
    ops.wait(ops.copy([(result, array.astype(result.dtype))], after=ops.mark()))
    ops.finish()
    return result


def measure_peaks(ops: Any, timer: Timer, size: int, nbytes: int) -> Peaks:
    """A square product of ``size`` and a copy of ``nbytes`` on the device: what BLAS and memory reach here."""
    from slimrt.bench.synthetic import random_tensor

    rng = np.random.default_rng(0)
    kind = "F16" if ops.name == "cuda" else "F32"
    weight = ops.unpacked(ops.weight(random_tensor("square", kind, (size, size), rng)))
    x = put(ops, rng.standard_normal((size, size)).astype(np.float32))
    flops = 2 * size**3 / timer.seconds(lambda: ops.linear(x, weight))
    source, target = ops.empty((nbytes,), np.uint8), ops.empty((nbytes,), np.uint8)
    source[...] = 1

    def copy() -> None:
        target[...] = source

    bandwidth = 2 * nbytes / timer.seconds(copy)
    promised = next((rates for name, rates in _THEORETICAL.items() if name in _device_name(ops)), None)
    if promised is None:
        return Peaks(flops, bandwidth)
    return Peaks(flops, bandwidth, promised[0] * 1e12, promised[1] * 1e9)


def _device_name(ops: Any) -> str:
    return ops.device.name if ops.name == "cuda" else ""
