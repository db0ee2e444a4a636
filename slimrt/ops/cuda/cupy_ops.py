"""The GPU backend: every operation checks, allocates, sets the grid and launches; ``kernels_cu/`` computes.

Activations, keys and values are float16 or bfloat16 (``element.py``), the residual stream ``x`` and the logits
float32, products accumulate in float32.
The names and meanings are those of ``numpy_ops``, which is the specification of every kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from slimrt.config import ModelConfig
from slimrt.ops.cuda.attention import MAX_GROUP, Attending
from slimrt.ops.cuda.budget_decode import BudgetedDecode
from slimrt.ops.cuda.checked import HEAD_WIDTHS
from slimrt.ops.cuda.decode import CapturedDecode
from slimrt.ops.cuda.device import CudaDevice, load_cupy, probe
from slimrt.ops.cuda.element import ELEMENTS, ElementName
from slimrt.ops.cuda.gemm import InPlaceLayer, multiply
from slimrt.ops.cuda.gemv import FewRows
from slimrt.ops.cuda.memory import reported
from slimrt.ops.cuda.modules import Kernels
from slimrt.ops.cuda.weights import CudaWeight, Packed, load_weight, unpack
from slimrt.ops.layer import Merge
from slimrt.weights.gguf import TensorInfo
from slimrt.weights.quants import dequantize

__all__ = ["HEAD_WIDTHS", "ROW_CHUNK", "CupyOps", "row_chunk"]

Array = Any  # of CuPy
Result = TypeVar("Result")

ROW_CHUNK = 4096  # rows that pass the feed-forward together: bounded scratch, products large enough for any GPU
_LARGE_CHUNK = 1 << 15  # the same where memory is plentiful: a whole prompt of 32k is spared the copies into place
_PLENTIFUL = 40 << 30  # bytes of a GPU
FEW_ROWS = 16  # below so many rows the weights are the work: each is read once, packed, by the GEMV


def _as_llama(c: ModelConfig) -> bool:
    """Whether a model's layers are LLaMA's."""
    scaled = any(scale != 1 for scale in (c.query_scale, c.embedding_scale, c.residual_scale))
    plain = c.norms == "before" and c.qk_norm == "none" and not c.attention_cap
    return plain and c.activation == "silu" and not scaled and not c.turns


def _row_threads(width: int) -> int:
    """Threads for a row of ``width`` numbers that is summed up: whole warps that have work, four numbers a thread."""
    return min(256, 32 * -(-width // 128))


def row_chunk(total: int) -> int:
    """How many rows pass the row-wise part of a layer together on a GPU of ``total`` bytes."""
    return _LARGE_CHUNK if total >= _PLENTIFUL else ROW_CHUNK


@dataclass(frozen=True)
class Captured(Generic[Result]):
    """A recorded graph; ``result`` lies in memory of ``pool``, which is the graph's as long as it lives."""

    graph: Any
    stream: Any
    pool: Any
    result: Result

    def launch(self) -> Result:
        """Queue it; the result is valid until the next launch."""
        with reported():
            self.graph.launch(self.stream)
        return self.result


class CupyOps(FewRows, Attending, InPlaceLayer):
    """Compute and memory operations on one GPU. Raises DeviceError, here and everywhere, with the remedy."""

    name = "cuda"
    exact_rows = 1  # of a prompt that was read before so many rows run again at least: its last token, for the logits
    each_alone = False  # not looked into: texts of embeddings pass one by one
    rows_in_blocks = False  # what passes together is bounded by ``rows``; attention wants all rows at once
    unpack_rows = FEW_ROWS  # from so many rows on a layer is unpacked once, into scratch
    keeps_unpacked = False  # whether it then stays so, for the next prompt (slimrt.memory.cuda plans for it)

    def __init__(
        self, device: CudaDevice | None = None, *, element: ElementName = "f16", wgmma: bool = True,
        budget_graphs: bool = False,
    ) -> None:  # fmt: skip
        """``element``: of activations, keys and values. ``wgmma``: prompts attend by attention_wgmma where the device
        has its instructions; False: by mma.sync. ``budget_graphs``: decode under a KV budget is a captured graph that
        chooses its blocks on the device; False, until a card has shown it right and faster: layer by layer."""
        self.device = device or probe()
        self.whole_rows = row_chunk(self.device.total)  # up to so many rows pass a layer in one piece
        super().__init__(load_cupy(), ELEMENTS[element])
        self._lock = threading.RLock()
        self.kernels = Kernels(self._cupy)
        self._wgmma, self.budget_graphs = wgmma, budget_graphs
        self._counts = self.upload(np.arange(1 << 12, dtype=np.int32))  # a pointer into it is a number in memory
        self._recording: Any = None  # the stream on which graphs are captured
        self._reaches: dict[tuple[int, ...], Array] = {}

    # -- weights ----------------------------------------------------------------------------------------------------

    def weight(self, *parts: TensorInfo, half: int = 0) -> CudaWeight:
        """A handle on ``parts`` [out_i, in] stacked along out, on the device, packed; ``half``: see numpy_ops."""
        return load_weight(self, self.kernels, parts, half=half)

    def host_weight(self, *parts: TensorInfo, half: int = 0) -> CudaWeight:
        """``parts`` as ``weight`` would hold them, in host memory, for a layer that is streamed."""
        return load_weight(self, self.kernels, parts, half=half, host=True)

    def placed_weight(self, parts: Sequence[Packed]) -> CudaWeight:
        """A handle on parts whose data lie on the device."""
        return CudaWeight.of(tuple(parts), self.element)

    def vector(self, *parts: TensorInfo | int) -> Array:
        """Small tensors (norms, biases) as one float32 [n]; a number stands for so many zeros."""
        arrays = [np.zeros(p, np.float32) if isinstance(p, int) else dequantize(p).reshape(-1) for p in parts]
        return self.upload(np.concatenate(arrays))

    def unpacked(self, weight: CudaWeight) -> CudaWeight:
        """``weight`` ready for many rows: with a copy in 16 bits, which is kept if ``keeps_unpacked``, else the caller
        drops it after use."""
        if weight.dense is not None:
            return weight
        dense = unpack(weight, self, self.kernels)
        if self.keeps_unpacked:
            weight.dense = dense
            return weight
        return CudaWeight(weight.parts, dense)

    # -- structure --------------------------------------------------------------------------------------------------

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around every pass: on the compute stream whatever stream the caller works on, one thread at a time, for
        scratch is that of one pass; errors become one line."""
        with self._lock, reported(), self._compute:
            yield

    def rows(self, task: Callable[[slice], object], count: int) -> None:
        """Call ``task(slice)`` for slices that cover ``count`` rows once, one after the other: scratch is bounded."""
        chunks = max(1, -(-count // self.whole_rows))
        size = max(1, -(-count // chunks))
        for lo in range(0, max(1, count), size):
            task(slice(lo, min(lo + size, count)))

    def capture(self, task: Callable[[], Result], pool: Any = None) -> Captured[Result]:
        """A graph of what ``task`` queues. It is run twice: once at once, which compiles its kernels and fills a pool
        of memory that is the graph's own, and once to be recorded. It must not multiply matrices by cuBLAS.

        ``pool``: that of an earlier graph, which is gone, to be used again.
        """
        cuda, ready = self._cupy.cuda, self.mark()
        if pool is None:
            pool = cuda.MemoryPool()
        # The default stream, and whoever uses it, must not be drawn in. One serves all: a pool's memory is a stream's.
        stream = self._recording = self._recording or cuda.Stream(non_blocking=True)
        with reported(), cuda.using_allocator(pool.malloc), stream:
            stream.wait_event(ready.event)
            task()
            stream.synchronize()
            stream.begin_capture()
            try:
                result = task()
            finally:
                graph = stream.end_capture()
        return Captured(graph, self._compute, pool, result)

    def decoder(self, model: Any, *, budget: bool = False) -> CapturedDecode | None:
        """Decode by captured graphs; None where the kernels of a single token do not take the model's heads (many to a
        group), for streamed weights, which move, and under a budget unless ``budget_graphs``."""
        c: ModelConfig = model.config
        if model.streamed or c.n_heads // c.n_kv_heads > MAX_GROUP:
            return None
        if budget and (not self.budget_graphs or c.windows):
            return None
        kind = BudgetedDecode if budget else CapturedDecode
        return kind(model, self, fused=_as_llama(c) and c.rope.dims == c.head_dim)

    # -- compute ----------------------------------------------------------------------------------------------------

    def angles(self, table: Any, positions: np.ndarray | Array) -> tuple[Array, Array]:
        """cos and sin of ``positions`` [T] -> two float32 [T, dims/2]; angles in float64, see models.rope.RopeTable."""
        cp = self._cupy
        turns = cp.asarray(positions).astype(np.float64)[:, None] * cp.asarray(table.frequencies)
        return tuple((wave(turns) * table.gain).astype(np.float32) for wave in (cp.cos, cp.sin))

    def embed(self, weight: CudaWeight, ids: np.ndarray | Array) -> Array:
        """Rows ``ids`` [T] of ``weight`` [V, D] -> float32 [T, D]."""
        (part,) = weight.parts
        ids = self._cupy.asarray(ids, np.int32)
        out = self.empty((len(ids), part.width), np.float32)
        grid = (len(ids),)
        self.kernels.launch("embed", "embed", grid, 128, part.data, ids, out, part.rows, part.width, TYPE=part.type)
        return out

    def linear(self, x: Array, weight: CudaWeight, bias: Array | None = None) -> Array:
        """x 16 bits [T, in] @ weight.T [in, out] (+ bias float32 [out]) -> 16 bits [T, out]."""
        self.check("linear", x, self.dtype, (None, weight.shape[1]))
        if len(x) < FEW_ROWS:
            return self.few_linear(x, weight, bias, None, self.empty((len(x), weight.shape[0])))
        out = self.empty((len(x), weight.shape[0]))
        multiply(self._cupy, x, self._dense(weight), out)
        return out if bias is None else self.shifted(out, bias)

    def wide_linear(self, x: Array, weight: CudaWeight, bias: Array | None = None) -> Array:
        """The same, not rounded to 16 bits: float32 [T, out]."""
        self.check("wide_linear", x, self.dtype, (None, weight.shape[1]))
        out = self.empty((len(x), weight.shape[0]), np.float32)
        if len(x) < FEW_ROWS:
            return self.few_linear(x, weight, bias, None, out)
        multiply(self._cupy, x, self._dense(weight), out)
        if bias is not None:
            out += bias
        return out

    def add_linear(
        self, x: Array, y: Array, weight: CudaWeight, bias: Array | None = None, out: Array | None = None
    ) -> Array:
        """x float32 [T, out] + y 16 bits [T, in] @ weight.T (+ bias) -> float32 [T, out], a new array or ``out``, which
        may be x: a residual connection. Nothing is rounded to 16 bits on the way."""
        self.check("add_linear", x, np.float32, (len(y), weight.shape[0]))
        self.check("add_linear", y, self.dtype, (None, weight.shape[1]))
        if out is None:
            out = self.empty(x.shape, np.float32)
        if len(x) < FEW_ROWS:
            return self.few_linear(y, weight, bias, x, out)
        if out is not x:
            out[...] = x
        multiply(self._cupy, y, self._dense(weight), out, add=True)
        if bias is not None:
            out += bias
        return out

    def head(self, x: Array, weight: CudaWeight) -> Array:
        """x 16 bits [T, D] @ weight.T [D, V] -> logits float32 [T, V]."""
        self.check("head", x, self.dtype, (None, weight.shape[1]))
        return self.few_linear(x, weight, None, None, self.empty((len(x), weight.shape[0]), np.float32))

    def _dense(self, weight: CudaWeight) -> Array:
        return weight.dense if weight.dense is not None else unpack(weight, self, self.kernels)

    def rmsnorm(self, x: Array, gain: Array, eps: float) -> Array:
        """x float32 [T, D] / sqrt(mean(x^2) + eps) * gain -> 16 bits [T, D]."""
        self.check("rmsnorm", x, np.float32, (None, len(gain)))
        out = self.empty(x.shape)
        block = _row_threads(x.shape[1])
        self.kernels.launch("rmsnorm", "rmsnorm", (len(x),), block, x, gain, out, x.shape[1], eps, T=self.half_type)
        return out

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotate the first 2*cos.shape[1] dimensions of each head of x [T, heads, Dh] in place; rows may be strided."""
        tokens, heads, width = x.shape
        half = cos.shape[1]
        self.check("rope", cos, np.float32, (tokens, half))
        self.check("rope", sin, np.float32, (tokens, half))
        stride = self.stride("rope", x)
        grid = (tokens, -(-heads * half // 256))
        self.kernels.launch("rope", "rope", grid, 256, x, cos, sin, heads, width, half, stride, T=self.half_type)
        return x

    def swiglu(self, gate_up: Array) -> Array:
        """silu(gate) * up; gate_up [T, 2F] with gate first -> [T, F]."""
        self.check("swiglu", gate_up, self.dtype, (None, None))
        return super().swiglu(gate_up)

    def geglu(self, gate_up: Array) -> Array:
        """gelu(gate) * up, by tanh; gate_up [T, 2F] with gate first -> [T, F]."""
        self.check("geglu", gate_up, self.dtype, (None, None))
        return self._gate(gate_up, GELU=1)

    def normed(self, x: Array, gain: Array | None, eps: float) -> Array:
        """x float32 [T, D] as products want it, in 16 bits: normed, or as it is."""
        return self.narrowed(x) if gain is None else self.rmsnorm(x, gain, eps)

    def norm_heads(self, x: Array, gain: Array | None, eps: float) -> None:
        """Norm x [T, heads, Dh] in place, by head or (``gain`` [heads Dh]) by row; rows may be strided."""
        if gain is not None:
            self._norm_heads(x, len(gain), gain, eps, 1.0)

    def scale_heads(self, x: Array, by: float) -> None:
        """Multiply x [T, heads, Dh] with ``by``, in place; rows may be strided."""
        self._norm_heads(x, x.shape[2], None, 0.0, by)

    def _norm_heads(self, x: Array, width: int, gain: Array | None, eps: float, scale: float) -> None:
        tokens, heads, dh = x.shape
        stride = self.stride("norm_heads", x)
        grid = (tokens, heads * dh // width)
        self.kernels.launch(
            "norm_heads",
            "norm_heads",
            grid,
            _row_threads(width),
            x,
            gain,
            float(eps),
            float(scale),
            width,
            stride,
            T=self.half_type,
        )

    def merge_into(self, x: Array, y: Array, merge: Merge) -> None:
        """x float32 [T, D] += y float32 [T, D] as ``merge`` says."""
        self.check("merge", x, np.float32, y.shape)
        self.check("merge", y, np.float32, (None, None))
        self.kernels.launch(
            "merge", "merge", (len(x),), _row_threads(x.shape[1]),
            x, y, merge.gain, x.shape[1], float(merge.eps), float(merge.scale),
        )  # fmt: skip

    def shifted(self, x: Array, bias: Array) -> Array:
        """x 16 bits [T, n] + bias float32 [n], in place."""
        self.check("shift", x, self.dtype, (None, len(bias)))
        grid = (len(x), -(-x.shape[1] // 2048))
        self.kernels.launch("elements", "shift", grid, 256, x, bias, x.shape[1], T=self.half_type)
        return x

    def narrowed(self, x: Array) -> Array:
        """x float32 [T, n] rounded to 16 bits, a new array."""
        self.check("narrow", x, np.float32, (None, None))
        out = self.empty(x.shape)
        grid = (len(x), -(-x.shape[1] // 2048))
        self.kernels.launch("elements", "narrow", grid, 256, x, out, x.shape[1], T=self.half_type)
        return out

    def columns(self, x: Array, columns: np.ndarray) -> Array:
        """x[:, columns]: of x [Hkv, N, Dh] some of the N."""
        return self._cupy.ascontiguousarray(x[:, self.upload(columns)])

    def take(self, x: Array, rows: np.ndarray) -> Array:
        """x[rows]: the rows that go on, float32 [M, D]."""
        self.check("take", x, np.float32, (None, None))
        out = self.empty((len(rows), x.shape[1]), np.float32)
        picked = self.upload(rows.astype(np.int32))
        self.kernels.launch("compact", "compact", (len(rows),), 128, x, out, picked, 4 * x.shape[1])
        return out
