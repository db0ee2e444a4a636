"""Linear layers for one token and for few: the launches of ``gemv*.cu`` and ``gemm_few.cu``."""

from __future__ import annotations

from slimrt.ops.cuda.weights import CELLS

__all__ = ["shared_bytes"]

_WARPS = 8
_PLAIN = (2048, 64)  # bytes and columns of a cell of F16 and BF16, which are not packed


def shared_bytes(kind: str, width: int, stages: int) -> int:
    """Dynamic shared memory of the kernels of gemv.cuh for weights of ``kind`` and ``width`` columns."""
    size, columns = CELLS.get(kind, _PLAIN)
    padded = -(-width // columns) * columns
    sums = 0 if kind not in CELLS else 4 * padded // (16 if kind == "Q6_K" else 32)
    return _WARPS * stages * size + 64 + 2 * padded + sums
