"""A naive computation in the GPU's precision: its error is the unit in which the GPU backend's error is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from slimrt.ops.numpy.numpy_ops import NumpyOps, Weight
from slimrt.prune.reach import Reach
from slimrt.weights.gguf import TensorInfo
from tests.kernel_cases import rounded


def half(x: np.ndarray) -> np.ndarray:
    """``x`` rounded to float16, held as float32."""
    return x.astype(np.float16).astype(np.float32)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """``x`` rounded to bfloat16, held as float32."""
    return rounded(x, "bf16")


class HalfOps(NumpyOps):
    """NumPy that rounds to the element, float16 or bfloat16, whatever the GPU backend stores in it; products are summed
    in float32."""

    def __init__(self, threads: int = 1, element: str = "f16") -> None:
        super().__init__(threads)
        self._half = half if element == "f16" else bfloat16

    def _unpack(self, parts: Sequence[TensorInfo]) -> np.ndarray:
        return self._half(super()._unpack(parts))

    def linear(self, x: np.ndarray, weight: Weight, bias: Any = None, out: Any = None) -> np.ndarray:
        return self._half(super().linear(x, weight, bias, out))

    def head(self, x: np.ndarray, weight: Weight) -> np.ndarray:
        return super().linear(x, weight)

    def rmsnorm(self, x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
        return self._half(super().rmsnorm(x, gain, eps))

    def rope(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        x[...] = self._half(super().rope(x, cos, sin))
        return x

    def norm_heads(self, x: np.ndarray, gain: Any, eps: float) -> None:
        super().norm_heads(x, gain, eps)
        x[...] = self._half(x)

    def scale_heads(self, x: np.ndarray, by: float) -> None:
        super().scale_heads(x, by)
        x[...] = self._half(x)

    def swiglu(self, gate_up: np.ndarray) -> np.ndarray:
        return self._half(super().swiglu(gate_up))

    def geglu(self, gate_up: np.ndarray) -> np.ndarray:
        return self._half(super().geglu(gate_up))

    def unit_means(self, k: np.ndarray, unit: int) -> np.ndarray:
        return self._half(super().unit_means(k, unit))

    def attend(  # type: ignore[override]
        self, q: Any, k: Any, v: Any, out: Any = None, reach: Reach = None, *, places: Any = None, first: Any = None,
        cap: float = 0.0, precise: bool = False,
    ) -> np.ndarray:  # fmt: skip
        assert reach is None or not any(reach)
        tokens, heads, width = q.shape
        kv_heads, keys, _ = k.shape
        result = np.empty_like(q)
        places = np.arange(keys - tokens, keys) if places is None else places
        later = np.arange(keys)[None, :] > places[:, None]
        if first is not None:
            later |= np.arange(keys)[None, :] < np.asarray(first)[:, None]
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = q[:, head] @ k[group].T * np.float32(1 / math.sqrt(width))
            if cap:
                scores = np.float32(cap) * np.tanh(scores / np.float32(cap))
            scores[later] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            result[:, head] = self._half(self._half(weights) @ v[group] / weights.sum(axis=1, keepdims=True))
        return result
