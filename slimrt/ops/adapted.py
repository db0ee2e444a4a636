"""Matrices with low-rank changes beside them (LoRA, arXiv 2106.09685): y = x W.T + (x A.T) B.T, never merged.

Around a CPU backend stands an ``AdaptedOps``: layers whose matrices are as they lie in the file go to the backend's own
kernels, the others pass the plain lines of ``layer.py``, whose products add what the adapters change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from slimrt.ops.layer import Activation, HeadNorms, LayerOps, Merge
from slimrt.ops.protocol import Array, Weight

__all__ = ["Adapted", "AdaptedOps", "Delta"]


@dataclass(frozen=True)
class Delta:
    """A change of the outputs from ``first`` on: ``down`` [in, r], ``up`` [r, out'], float32, scales in ``up``; views
    of [r, in] and [out', r], which decode reads row by row."""

    first: int
    down: np.ndarray
    up: np.ndarray


@dataclass(frozen=True)
class Adapted:
    """``base`` [out, in], a backend's handle, and what changes its products."""

    base: Weight
    deltas: tuple[Delta, ...]


class AdaptedOps(LayerOps):
    """The operations of ``ops``, a CPU backend, for weights that may be ``Adapted``."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def unpacked(self, weight: Any) -> Any:
        """``weight`` ready for many rows."""
        if isinstance(weight, Adapted):
            return Adapted(self._ops.unpacked(weight.base), weight.deltas)
        return self._ops.unpacked(weight)

    def linear(self, x: Array, weight: Any, bias: Array | None = None) -> Array:
        """x [T, in] @ weight.T (+ bias) and what the adapters add -> [T, out]."""
        if not isinstance(weight, Adapted):
            return self._ops.linear(x, weight, bias)
        return _add(self._ops.linear(x, weight.base, bias), x, weight)

    def add_linear(self, x: Array, y: Array, weight: Any, bias: Array | None = None) -> Array:
        """x [T, out] + y [T, in] @ weight.T (+ bias) and what the adapters add -> [T, out]."""
        return x + self.linear(y, weight, bias)

    def qkv(
        self, x: Array, gain: Array | None, eps: float, weight: Any, bias: Array | None, cos: Array, sin: Array,
        heads: tuple[int, int, int], norms: HeadNorms | None = None,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """See ``LayerOps``; k and v in the type that the backend caches."""
        if not isinstance(weight, Adapted):
            result: tuple[Array, Array, Array] = self._ops.qkv(
                x, gain, eps, weight, bias, cos, sin, heads, norms
            )  # fmt: skip
            return result
        q, k, v = super().qkv(x, gain, eps, weight, bias, cos, sin, heads, norms)
        kind = self._ops.kv_type
        k, v = k.astype(kind, copy=False), v.astype(kind, copy=False)
        if not (np.isfinite(q).all() and np.isfinite(k).all()):
            q[...] = np.nan  # as the kernels do: it is reported with the logits
        return q, k, v

    def project(self, x: Array, attention: Array, weight: Any, bias: Array | None, merge: Merge | None = None) -> Array:
        """See ``LayerOps``."""
        how: Any = super() if isinstance(weight, Adapted) else self._ops
        return how.project(x, attention, weight, bias, merge)

    def feed_forward(
        self, x: Array, gain: Array | None, eps: float, gate_up: Any, gate_up_bias: Array | None, down: Any,
        down_bias: Array | None, activation: Activation = "silu", merge: Merge | None = None,
        residual: Array | None = None,
    ) -> Array:  # fmt: skip
        """See ``LayerOps``."""
        how: Any = super() if isinstance(gate_up, Adapted) or isinstance(down, Adapted) else self._ops
        return how.feed_forward(x, gain, eps, gate_up, gate_up_bias, down, down_bias, activation, merge, residual)

    def experts(self, *args: Any) -> Array:
        """Those of the backend: experts have no adapters."""
        return self._ops.experts(*args)


def _add(y: Array, x: Array, weight: Adapted) -> Array:
    """``y`` [T, out] with what the adapters make of x [T, in] added, in place."""
    for delta in weight.deltas:
        y[:, delta.first : delta.first + delta.up.shape[1]] += (x @ delta.down) @ delta.up
    return y
