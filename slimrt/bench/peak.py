"""What the machine can do at best, measured: products and the reading of weights, to hold a model's speed against.

Both are measured with the backend's own kernels on data of the friendliest size, so a percentage of them says how much
of a model's time goes into its products or into reading its weights, and how much into everything else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from slimrt.config import ModelConfig
from slimrt.weights.gguf import GGUFFile, TensorInfo

__all__ = ["Peak", "decode_bytes", "matrix_bytes", "measure_peak", "prefill_operations"]

_TRIES = 5
_READ_BYTES = 256 << 20  # more than any cache that two cores have to themselves


@dataclass(frozen=True)
class Peak:
    """``operations_s``: multiplications and additions a second in products of many rows; ``bytes_s``: weights read."""

    operations_s: float
    bytes_s: float


def measure_peak(ops: Any) -> Peak:
    """The best of some tries on ``ops``, a CPU backend; takes about a second."""
    rng = np.random.default_rng(0)
    rows, columns, inner = 1024 * ops.threads, 512, 512
    x = rng.standard_normal((rows, inner)).astype(np.float32)
    weight = ops.unpacked(ops.weight(_matrix(rng.standard_normal((columns, inner)).astype(np.float32))))
    large = ops.weight(_matrix(np.zeros((_READ_BYTES // 2 // 4096, 4096), np.float16)))
    one = rng.standard_normal((1, 4096)).astype(np.float32)

    def products() -> None:
        ops.project(x[:, :columns], x, weight, None)

    with ops.computing():
        return Peak(
            2 * rows * columns * inner / _quickest(products),
            large.nbytes / _quickest(lambda: ops.linear(one, large)),
        )


def _matrix(values: np.ndarray) -> TensorInfo:
    kind = GGMLQuantizationType.F32 if values.dtype == np.float32 else GGMLQuantizationType.F16
    return TensorInfo("peak", values.shape, kind, values)


def _quickest(work: Callable[[], Any]) -> float:
    work()
    times = []
    for _ in range(_TRIES):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def prefill_operations(c: ModelConfig, tokens: int) -> int:
    """Multiplications and additions of a dense prompt: the layers' matrices, causal attention, one row of logits."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    matrices = c.n_layers * c.d_model * (2 * q + 2 * kv + 3 * c.d_ff_computed)
    attention = c.n_layers * 2 * q * tokens * (tokens + 1) // 2
    return 2 * (matrices * tokens + attention + c.d_model * c.vocab_size)


def matrix_bytes(file: GGUFFile) -> int:
    """Bytes of the matrices that a token reads: all but the embedding, unless that is the output too, and of experts
    those that are used."""
    embedding = "token_embd.weight" if "output.weight" in file.tensors else None
    used = file.get(f"{file.get('general.architecture', str)}.expert_used_count", int, 1)
    plain = sum(t.nbytes for name, t in file.tensors.items() if name != embedding and len(t.shape) == 2)
    return plain + sum(t.nbytes // t.shape[0] * used for t in file.tensors.values() if len(t.shape) == 3)


def decode_bytes(matrix_bytes: int, kv_per_token: int, length: int) -> int:
    """Bytes that one token reads behind ``length`` others: the matrices, keys and values."""
    return matrix_bytes + kv_per_token * length
