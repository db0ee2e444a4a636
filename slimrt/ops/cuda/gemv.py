"""Linear layers for one token and for few: the launches of ``gemv*.cu`` and ``gemm_few.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimrt.errors import DeviceError
from slimrt.ops.cuda.checked import Checked
from slimrt.ops.cuda.weights import CELLS, CudaWeight, Packed

__all__ = ["BLOCKS", "STAGES", "FewRows", "shared_bytes", "stages"]

Array = Any  # of CuPy

BLOCKS = 2  # blocks of gemv.cuh that a multiprocessor holds at once, where its shared memory allows
# Cells that a warp's ring holds: with two blocks there are at least 50 KB under way on each multiprocessor.
STAGES = {"Q8_0": 3, "Q4_K": 3, "Q5_K": 3, "Q6_K": 3}
_STAGES = 4  # of the other types
_WARPS = 8
_PLAIN = (2048, 64)  # bytes and columns of a cell of F16 and BF16, which are not packed
_TAKEN, _RESERVED = 2304, 1024  # bytes of shared memory that a block takes besides; of them for the system


def shared_bytes(kind: str, width: int, stages: int) -> int:
    """Dynamic shared memory of the kernels of gemv.cuh for weights of ``kind`` and ``width`` columns."""
    size, columns = CELLS.get(kind, _PLAIN)
    padded = -(-width // columns) * columns
    sums = 0 if kind not in CELLS else 4 * padded // (16 if kind == "Q6_K" else 32)
    return _WARPS * stages * size + 64 + 2 * padded + sums


def stages(kind: str, width: int, shared: int) -> tuple[int, int]:
    """Stages and blocks a multiprocessor that ``shared`` bytes of shared memory have room for.

    Raises DeviceError where the row x itself leaves none.
    """
    wanted = STAGES.get(kind, _STAGES)
    for blocks in (BLOCKS, 1):
        for count in range(wanted, 1, -1):
            if blocks * (shared_bytes(kind, width, count) + _TAKEN) <= shared + _RESERVED:
                return count, blocks
    raise DeviceError(f"a matrix has rows of {width}; this GPU's shared memory is too small; use device='cpu'")


class FewRows(Checked):
    """What ``CupyOps`` does for fewer rows than matrix products are made for."""

    def few_linear(self, x: Array, weight: CudaWeight, bias: Array | None, residual: Array | None, out: Array) -> Array:
        """``out`` [T, out], float32 or of 16 bits = x [T, in] @ weight.T (+ bias) (+ residual, float32 [T, out])."""
        kind = "float" if out.dtype == np.float32 else self.half_type
        at, stride = 0, weight.shape[0]
        for part in weight.parts:
            columns = slice(at, at + part.rows)
            shift = None if bias is None else bias[columns]
            rest = None if residual is None else residual[:, columns]
            if len(x) == 1:
                self._one("gemv", part, self.half_type, x, None, 0.0, shift, rest, out[:, columns], part.rows,
                          part.width, part.half, OUT=kind)  # fmt: skip
            else:
                self.kernels.launch(
                    "gemm_few", "gemm_few", (-(-part.rows // 16), -(-len(x) // 16)), 256,
                    part.data, x, shift, rest, out[:, columns], part.rows, part.width, part.half, stride, len(x),
                    TYPE=part.type, T=self.half_type, OUT=kind,
                )  # fmt: skip
            at += part.rows
        return out

    # One token's ways through a layer, for a captured graph: each norms the residual stream x [1, D] itself.

    def normed_head(self, x: Array, gain: Array, eps: float, weight: CudaWeight, out: np.ndarray) -> None:
        """Logits of x float32 [1, D] into ``out`` [V], page-locked host memory."""
        at = 0
        for part in weight.parts:
            address = np.uintp(out[at : at + part.rows].ctypes.data)
            self._one("gemv", part, "float", x, gain, eps, None, None, address, part.rows, part.width, part.half,
                      OUT="float")  # fmt: skip
            at += part.rows

    def normed_heads(
        self,
        x: Array,
        gain: Array,
        eps: float,
        weight: CudaWeight,
        bias: Array | None,
        cos: Array,
        sin: Array,
        start: Array,
        layer: Array,
        heads: int,
    ) -> Array:
        """Rotated queries [1, H, Dh] of x [1, D]; rotated key and value go to row ``start`` (int32 [1]) of ``layer``
        [2, Hkv, capacity, Dh]. ``weight`` [(H + 2 Hkv) Dh, D], loaded with half = Dh / 2."""
        _, kv_heads, capacity, width = layer.shape
        q = self.empty((1, heads, width))
        at = 0
        for part in weight.parts:
            shift = None if bias is None else bias[at : at + part.rows]
            self._one("gemv_heads", part, "float", x, gain, eps, shift, cos, sin, start, q, layer, part.rows,
                      part.width, width, at // width, heads, kv_heads, capacity)  # fmt: skip
            at += part.rows
        return q

    def normed_gated(self, x: Array, gain: Array, eps: float, weight: CudaWeight, bias: Array | None) -> Array:
        """silu(gate) * up [1, F] of x [1, D]; ``weight`` [2 F, D], gate first, loaded with half = F."""
        first = weight.parts[0]
        if len(weight.parts) == 1 and 2 * first.half == first.rows:
            out = self.empty((1, first.half))
            self._one("gemv_gated", first, "float", x, gain, eps, bias, out, first.half, first.width)
            return out
        joint = self.empty((1, weight.shape[0]))  # gate and up of different types do not meet in a tile
        at = 0
        for part in weight.parts:
            shift = None if bias is None else bias[at : at + part.rows]
            self._one("gemv", part, "float", x, gain, eps, shift, None, joint[:, at : at + part.rows], part.rows,
                      part.width, part.half, OUT=self.half_type)  # fmt: skip
            at += part.rows
        return self.swiglu(joint)

    def swiglu(self, gate_up: Array) -> Array:
        """silu(gate) * up; gate_up [T, 2F] with gate first -> [T, F]."""
        return self._gate(gate_up)

    def _gate(self, gate_up: Array, **macros: Any) -> Array:
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = self.empty((tokens, width))
        grid = (tokens, -(-width // 2048))
        self.kernels.launch("swiglu", "swiglu", grid, 256, gate_up, out, width, T=self.half_type, **macros)
        return out

    def begin(self, weight: CudaWeight, host: np.ndarray, device: Array) -> Array:
        """Copy ``host``, page-locked words of 32 bits, to ``device``, and embed its first, a token -> [1, D]."""
        (part,) = weight.parts
        out = self.empty((1, part.width), np.float32)
        self.kernels.launch("embed", "begin", (1,), 256, part.data, np.uintp(host.ctypes.data), device, out, part.rows,
                            part.width, len(host), TYPE=part.type)  # fmt: skip
        return out

    def _one(self, kernel: str, part: Packed, source: str, *args: Any, **macros: object) -> None:
        """A kernel of gemv.cuh, on as many blocks as the GPU holds at once; ``source``: the type of x."""
        count, blocks = stages(part.type, part.width, self.device.shared_per_block)
        grid = (min(-(-part.rows // 16), blocks * self.device.multiprocessors),)
        self.kernels.launch(
            kernel, kernel, grid, 32 * _WARPS, part.data, *args, shared=shared_bytes(part.type, part.width, count),
            TYPE=part.type, T=self.half_type, FROM=source, STAGES=count, **macros,
        )  # fmt: skip
