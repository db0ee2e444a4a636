"""Matrix products of many rows by cuBLAS, with what CuPy's ``matmul`` has no word for: results in float32 from operands
of 16 bits, and products added to what is there."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from slimrt.ops.cuda.element import ELEMENTS
from slimrt.ops.cuda.memory import reported
from slimrt.ops.layer import Activation, LayerOps, Merge

__all__ = ["InPlaceLayer", "multiply"]

Array = Any  # of CuPy

_NONE, _TRANSPOSED = 0, 1  # cublasOperation_t
_TYPES = {np.dtype(np.float32): 0, **{kind.dtype: kind.cublas for kind in ELEMENTS.values()}}  # cudaDataType_t
_SUM_IN_FLOAT32, _TENSOR_CORES = 68, 99  # cublasComputeType_t, cublasGemmAlgo_t
_ONE, _ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)  # read on the host, while the product is queued


def multiply(cupy: Any, x: Array, weight: Array, out: Array, *, add: bool = False) -> None:
    """``out`` [T, n] = x [T, k] @ weight [n, k].T, or with ``add`` += it, on the current stream.

    x and weight are of one 16-bit type, out of that or float32; all C-contiguous. Sums are float32, rounded once.
    """
    cublas = import_module("cupy_backends.cuda.libs.cublas")
    (rows, inner), columns = x.shape, weight.shape[0]
    kind = _TYPES[x.dtype]
    with reported():
        # cuBLAS counts columns first, so to it out is [n, T] = weight.T.T x.T.
        cublas.gemmEx(
            cupy.cuda.device.get_cublas_handle(), _TRANSPOSED, _NONE, columns, rows, inner, _ONE.ctypes.data,
            weight.data.ptr, kind, inner, x.data.ptr, kind, inner, (_ONE if add else _ZERO).ctypes.data,
            out.data.ptr, _TYPES[out.dtype], columns, _SUM_IN_FLOAT32, _TENSOR_CORES,
        )  # fmt: skip


class InPlaceLayer(LayerOps):
    """``LayerOps`` whose ``project`` and ``feed_forward`` leave their result where x was, and return it: the product is
    added to the residual stream as it is computed."""

    def project(
        self: Any, x: Array, attention: Array, weight: Any, bias: Array | None, merge: Merge | None = None
    ) -> Array:
        attention = attention.reshape(len(x), -1)

        def part(at: slice) -> None:
            rows = x[at]
            self._joined(rows, attention[at], weight, bias, merge)

        self.rows(part, len(x))
        return x

    def feed_forward(
        self: Any,
        x: Array,
        gain: Array | None,
        eps: float,
        gate_up: Any,
        gate_up_bias: Array | None,
        down: Any,
        down_bias: Array | None,
        activation: Activation = "silu",
        merge: Merge | None = None,
        residual: Array | None = None,
    ) -> Array:
        if residual is not None:
            return LayerOps.feed_forward(
                self, x, gain, eps, gate_up, gate_up_bias, down, down_bias, activation, merge, residual
            )

        def part(at: slice) -> None:
            rows = x[at]
            hidden = self.gated(self.linear(self.normed(rows, gain, eps), gate_up, gate_up_bias), activation)
            self._joined(rows, hidden, down, down_bias, merge)

        self.rows(part, len(x))
        return x

    def _joined(self: Any, x: Array, y: Array, weight: Any, bias: Array | None, merge: Merge | None) -> None:
        if merge is None:
            self.add_linear(x, y, weight, bias, out=x)
        else:
            self.merge_into(x, self.wide_linear(y, weight, bias), merge)
