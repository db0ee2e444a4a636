"""The CPU backend in NumPy: the executable specification of every kernel, tuned as far as NumPy goes.

Weights lie as float32 rows where memory allows, else packed as in the file. All arithmetic is float32; shapes use the
alphabet of ``slimrt.config``. Every array an operation returns is new unless it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimrt.ops.layer import LayerOps
from slimrt.ops.numpy.attention import FEW_ROWS, NumpyAttention
from slimrt.ops.numpy.memory import NumpyMemory
from slimrt.ops.numpy.workers import Workers, available_cores, single_threaded_blas
from slimrt.prune.scores import BLOCK_SCORES, block_mass, unit_means
from slimrt.weights.gguf import TensorInfo
from slimrt.weights.pages import let_go
from slimrt.weights.quants import dequantize

__all__ = ["NumpyOps", "Weight"]

Array = np.ndarray

ROW_CHUNK = 256  # tokens that go through the row-wise part of a layer together
_SPLIT_BYTES = 16 << 20  # of a matrix: below this a second thread costs more than it saves
GELU = 2 * math.sqrt(2 / math.pi)
GATE_LIMIT, GATE_SLOPE = 7.0, 1.702  # of gpt-oss's gate


@dataclass(frozen=True)
class Weight:
    """A matrix [out, in], or several stacked along ``out``; opaque to everything but this backend.

    ``dense`` is the float32 matrix, or None where only the packed ``parts`` are held (views of the mapped file).
    """

    parts: tuple[TensorInfo, ...]
    dense: Array | None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[-1]

    @property
    def nbytes(self) -> int:
        return self.dense.nbytes if self.dense is not None else sum(part.nbytes for part in self.parts)


class NumpyOps(NumpyMemory, NumpyAttention, LayerOps):
    """Compute and memory operations on NumPy arrays.

    ``threads``: how many cores to use (None: all that the process may). ``packed``: keep weights as they lie in the
    file and unpack them on use, a layer at a time in prefill: slow, for models whose float32 form exceeds the memory.
    """

    name = "numpy"
    exact_rows = 1  # of a prompt that was read before so many rows run again at least, for the same bits as then
    unpack_rows = 16  # from so many rows on it pays to unpack a packed layer once, into scratch
    each_alone = False  # a BLAS library sums in an order that depends on how many rows there are
    rows_in_blocks = True  # a long prompt passes a layer block by block, so that scratch is bounded
    whole_rows = 1  # up to so many rows pass a layer in one piece

    def __init__(self, threads: int | None = None, *, packed: bool = False) -> None:
        super().__init__()
        self.threads = threads or available_cores()
        self.packed = packed
        self._workers = Workers(self.threads)

    # -- weights ----------------------------------------------------------------------------------------------------

    def weight(self, *parts: TensorInfo, half: int = 0) -> Weight:
        """A handle on ``parts`` [out_i, in] stacked along out. ``half``: in decode rows i and i + half of each 2 half
        are wanted together (0: none are), which a backend may make use of."""
        if self.packed:
            return Weight(parts, None)
        dense = self._unpack(parts)
        for part in parts:  # what the file holds is not read again: else it would count beside the unpacked matrix
            let_go(part.data)
        return Weight(parts, dense)

    def vector(self, *parts: TensorInfo | int) -> Array:
        """Small tensors (norms, biases) as one float32 [n]; a number stands for so many zeros."""
        arrays = [np.zeros(p, np.float32) if isinstance(p, int) else dequantize(p).reshape(-1) for p in parts]
        return np.concatenate(arrays)

    def unpacked(self, weight: Weight) -> Weight:
        """``weight`` ready for many rows: itself if dense, else an unpacked copy that the caller drops after use."""
        return weight if weight.dense is not None else Weight(weight.parts, self._unpack(weight.parts))

    def _unpack(self, parts: Sequence[TensorInfo]) -> Array:
        stacked = np.empty((sum(part.shape[0] for part in parts), parts[0].shape[-1]), np.float32)
        at = 0
        for part in parts:
            dequantize(part, out=stacked[at : at + part.shape[0]])
            at += part.shape[0]
        return stacked

    def decoder(self, model: Any, *, budget: bool = False) -> None:
        """None: a token goes through the layers one operation after the other, see ``slimrt.ops.protocol``."""

    # -- parallel structure -----------------------------------------------------------------------------------------

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around every pass: this team's threads in place of the BLAS library's, no warnings of overflow.

        A BLAS library's threads wait for each other in a spin; where another program has one of the cores, decode
        was measured at 2 to 20 tokens/s with them and at 35 to 53 without. Damaged weights may overflow anywhere:
        that is reported once, with the logits, and not as a warning by each operation.
        """
        with single_threaded_blas, np.errstate(over="ignore", invalid="ignore"):
            yield

    def rows(self, task: Callable[[slice], object], count: int) -> None:
        """Call ``task(slice)`` for slices that cover ``count`` rows once, in parallel.

        Everything in a layer but attention treats each token alone, so the engine runs it this way: a slice goes
        through all of its products while it is warm in the cache, and scratch is bounded by the slice.
        """
        if count <= FEW_ROWS:
            task(slice(0, count))
            return
        if count >= 4 * ROW_CHUNK:  # BLAS rounds by the rows of a product: the same ones in whatever blocks they come
            self._workers.map(task, [slice(lo, min(lo + ROW_CHUNK, count)) for lo in range(0, count, ROW_CHUNK)])
            return
        # Equal slices: a last slice much shorter than the others would leave threads idle.
        chunks = -(-count // ROW_CHUNK)
        chunks = -(-chunks // self.threads) * self.threads
        size = -(-count // chunks)
        self._workers.map(task, [slice(lo, min(lo + size, count)) for lo in range(0, count, size)])

    # -- compute ----------------------------------------------------------------------------------------------------

    def angles(self, table: Any, positions: Array) -> tuple[Array, Array]:
        """cos and sin of ``positions`` [T] -> two [T, dims/2]; ``table``: a RopeTable."""
        return table(positions)

    def embed(self, weight: Weight, ids: Array) -> Array:
        """Rows ``ids`` [T] of ``weight`` [V, D] -> [T, D]."""
        if weight.dense is not None:
            return weight.dense[ids]
        (part,) = weight.parts
        unique, inverse = np.unique(ids, return_inverse=True)
        picked = TensorInfo(part.name, (len(unique), part.shape[-1]), part.type, part.data[unique])
        return dequantize(picked)[inverse]

    def linear(self, x: Array, weight: Weight, bias: Array | None = None, out: Array | None = None) -> Array:
        """x [T, in] @ weight.T [in, out] (+ bias [out]) -> [T, out], into ``out`` where given."""
        if weight.dense is not None and (len(x) > FEW_ROWS or weight.nbytes < _SPLIT_BYTES):
            out = np.matmul(x, weight.dense.T, out=out)
        elif weight.dense is not None:
            out = self._linear_few(x, weight.dense, out)
        else:
            if out is None:
                out = np.empty((x.shape[0], weight.shape[0]), np.float32)
            at = 0
            for part in weight.parts:
                step = max(1, (1 << 22) // part.shape[-1])  # 16 MiB of float32 at a time
                for lo in range(0, part.shape[0], step):
                    block = dequantize(part, slice(lo, lo + step))
                    np.matmul(x, block.T, out=out[:, at : at + len(block)])
                    at += len(block)
        if bias is not None:
            out += bias
        return out

    def add_linear(self, x: Array, y: Array, weight: Weight, bias: Array | None = None) -> Array:
        """x [T, out] + y [T, in] @ weight.T (+ bias) -> [T, out]: a residual connection."""
        return x + self.linear(y, weight, bias)

    def head(self, x: Array, weight: Weight) -> Array:
        """x [T, D] @ weight.T [D, V] -> logits [T, V]."""
        return self.linear(x, weight)

    def _linear_few(self, x: Array, matrix: Array, out: Array | None) -> Array:
        """Few rows x [T, in], large ``matrix`` [out, in]: reading it is the work, so the threads share its rows."""
        result = np.empty((len(x), len(matrix)), np.float32) if out is None else out
        step = -(-len(matrix) // (2 * self.threads))

        def part(lo: int) -> None:
            np.matmul(x, matrix[lo : lo + step].T, out=result[:, lo : lo + step])

        self._workers.map(part, range(0, len(matrix), step))
        return result

    def rmsnorm(self, x: Array, gain: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * gain over the last axis (arXiv 1910.07467); x [T, D]."""
        square = np.einsum("td,td->t", x, x)
        square /= x.shape[-1]
        square += eps
        np.sqrt(square, out=square)
        normed = x / square[:, None]
        normed *= gain
        return normed

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotate the first 2*cos.shape[1] dimensions of each head in place: pairs (i, i + half) by the row's angle.

        x [T, heads, Dh], cos and sin [T, half]. Weights of the interleaved layout are reordered to this one at load.
        """
        half = cos.shape[-1]
        cos, sin = cos[:, None], sin[:, None]
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = a * sin
        a *= cos
        a -= b * sin
        b *= cos
        b += turned
        return x

    def swiglu(self, gate_up: Array) -> Array:
        """silu(gate) * up; gate_up [T, 2F] with gate first -> [T, F]."""
        gate, up = np.split(gate_up, 2, axis=-1)
        with np.errstate(over="ignore"):  # exp(-gate) = inf for gate < -88 gives the right limit, gate / inf = 0
            denominator = np.exp(-gate)
        denominator += 1
        result = gate / denominator
        result *= up
        return result

    def geglu(self, gate_up: Array) -> Array:
        """gelu(gate) * up, gelu in its tanh form (arXiv 1606.08415): gate * sigmoid(2 sqrt(2 / pi) (gate + 0.044715
        gate^3)); gate_up [T, 2F] with gate first -> [T, F]."""
        gate, up = np.split(gate_up, 2, axis=-1)
        with np.errstate(over="ignore"):
            denominator = np.exp(-(gate + gate * gate * gate * np.float32(0.044715)) * np.float32(GELU))
        denominator += 1
        result = gate / denominator
        result *= up
        return result

    def clamped(self, gate_up: Array) -> Array:
        """gpt-oss's gate: with g = min(gate, 7) and u = up within -7 .. 7, g * sigmoid(1.702 g) * (u + 1); gate_up [T,
        2F] with gate first -> [T, F]."""
        gate, up = np.split(gate_up, 2, axis=-1)
        gate = np.minimum(gate, np.float32(GATE_LIMIT))
        with np.errstate(over="ignore"):
            denominator = np.exp(gate * np.float32(-GATE_SLOPE))
        denominator += 1
        result = gate / denominator
        result *= np.clip(up, np.float32(-GATE_LIMIT), np.float32(GATE_LIMIT)) + np.float32(1)
        return result

    def score_blocks(self, kind: str, q: Array, k: Array, block: int, unit: int) -> np.ndarray:
        """How much the queries q [W, H, Dh] of the last rows want each block of k [Hkv, N, Dh] -> [B] on the host."""
        return BLOCK_SCORES[kind](q, k, block, unit)

    def block_mass(
        self, q: Array, k: Array, block: int, causal: bool, cap: float = 0.0, sinks: Array | None = None
    ) -> np.ndarray:
        """Attention of q [W, H, Dh] by block of k [Hkv, N, Dh] -> [W, H, B] on the host; see ``scores.block_mass``."""
        return block_mass(q, k, block, causal, cap, sinks)

    def unit_means(self, k: Array, unit: int) -> Array:
        """Mean key of each run of ``unit`` rows: k [Hkv, N, Dh] -> [Hkv, ceil(N / unit), Dh]."""
        return unit_means(k, unit)

    def columns(self, x: Array, columns: np.ndarray) -> Array:
        """x[:, columns]: of x [Hkv, N, Dh] some of the N."""
        return x.take(columns, axis=1)

    def take(self, x: Array, rows: Array) -> Array:
        """x[rows]: the rows that go on, a copy."""
        return x[rows]
