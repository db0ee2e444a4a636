"""The GPU backend: every operation checks, allocates, sets the grid and launches; ``kernels_cu/`` computes.

Activations, keys and values are float16, the residual stream ``x`` and the logits float32, products accumulate in
float32.
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
from slimrt.errors import DeviceError
from slimrt.ops.cuda.decode import CapturedDecode
from slimrt.ops.cuda.device import CudaDevice, load_cupy, probe
from slimrt.ops.cuda.gemm import InPlaceLayer, multiply
from slimrt.ops.cuda.gemv import FewRows
from slimrt.ops.cuda.memory import Fence, reported
from slimrt.ops.cuda.modules import Kernels
from slimrt.ops.cuda.prefill import prefill_kernel
from slimrt.ops.cuda.weights import CudaWeight, Packed, load_weight, unpack
from slimrt.prune.reach import Reach
from slimrt.weights.gguf import TensorInfo
from slimrt.weights.quants import dequantize

__all__ = ["HEAD_WIDTHS", "ROW_CHUNK", "CupyOps", "row_chunk"]

Array = Any  # of CuPy
Result = TypeVar("Result")

HEAD_WIDTHS = (64, 128)  # that the attention kernels are made for
ROW_CHUNK = 4096  # rows that pass the feed-forward together: bounded scratch, products large enough for any GPU
_LARGE_CHUNK = 1 << 15  # the same where memory is plentiful: a whole prompt of 32k is spared the copies into place
_PLENTIFUL = 40 << 30  # bytes of a GPU
FEW_ROWS = 16  # below so many rows the weights are the work: each is read once, packed, by the GEMV
_MAX_GROUP = 16  # query heads of one KV head that the decode kernel takes
_SPLIT_KEYS = 128  # that one block of the decode kernel should have at least


def _as_llama(c: ModelConfig) -> bool:
    """Whether a model's layers are LLaMA's."""
    scaled = any(scale != 1 for scale in (c.query_scale, c.embedding_scale, c.residual_scale))
    return c.norms == "before" and c.qk_norm == "none" and c.activation == "silu" and not scaled and not c.turns


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


class CupyOps(FewRows, InPlaceLayer):
    """Compute and memory operations on one GPU. Raises DeviceError, here and everywhere, with the remedy."""

    name = "cuda"
    exact_rows = 1  # of a prompt that was read before so many rows run again at least: its last token, for the logits
    each_alone = False  # not looked into: texts of embeddings pass one by one
    rows_in_blocks = False  # what passes together is bounded by ``rows``; attention wants all rows at once
    unpack_rows = FEW_ROWS  # from so many rows on a layer is unpacked once, into scratch
    keeps_unpacked = False  # whether it then stays so, for the next prompt (slimrt.memory.cuda plans for it)

    def __init__(self, device: CudaDevice | None = None, *, wgmma: bool = True) -> None:
        """``wgmma``: prompts attend by attention_wgmma where the device has its instructions; False: by mma.sync."""
        self.device = device or probe()
        self.whole_rows = row_chunk(self.device.total)  # up to so many rows pass a layer in one piece
        super().__init__(load_cupy())
        self._lock = threading.RLock()
        self.kernels = Kernels(self._cupy)
        self._prefill = prefill_kernel(self.device, wgmma=wgmma)
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
        return CudaWeight.of(tuple(parts))

    def vector(self, *parts: TensorInfo | int) -> Array:
        """Small tensors (norms, biases) as one float32 [n]; a number stands for so many zeros."""
        arrays = [np.zeros(p, np.float32) if isinstance(p, int) else dequantize(p).reshape(-1) for p in parts]
        return self.upload(np.concatenate(arrays))

    def unpacked(self, weight: CudaWeight) -> CudaWeight:
        """``weight`` ready for many rows: with a float16 copy, which is kept if ``keeps_unpacked``, else the caller
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
        group, or rotated in part) or its layers are others than LLaMA's, for streamed weights, which move, and under a
        budget: what the cache chooses is not known when a graph begins."""
        c: ModelConfig = model.config
        moves, wide = budget or model.streamed, c.n_heads // c.n_kv_heads > _MAX_GROUP
        part = c.rope.dims != c.head_dim
        return None if moves or wide or part or not _as_llama(c) else CapturedDecode(model, self)

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
        """x float16 [T, in] @ weight.T [in, out] (+ bias float32 [out]) -> float16 [T, out]."""
        self._check("linear", x, self.dtype, (None, weight.shape[1]))
        if len(x) < FEW_ROWS:
            return self.few_linear(x, weight, bias, None, self.empty((len(x), weight.shape[0])))
        out = self.empty((len(x), weight.shape[0]))
        multiply(self._cupy, x, self._dense(weight), out)
        if bias is not None:
            out += bias
        return out

    def add_linear(
        self, x: Array, y: Array, weight: CudaWeight, bias: Array | None = None, out: Array | None = None
    ) -> Array:
        """x float32 [T, out] + y float16 [T, in] @ weight.T (+ bias) -> float32 [T, out], a new array or ``out``, which
        may be x: a residual connection. Nothing is rounded to float16 on the way."""
        self._check("add_linear", x, np.float32, (len(y), weight.shape[0]))
        self._check("add_linear", y, self.dtype, (None, weight.shape[1]))
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
        """x float16 [T, D] @ weight.T [D, V] -> logits float32 [T, V]."""
        self._check("head", x, self.dtype, (None, weight.shape[1]))
        return self.few_linear(x, weight, None, None, self.empty((len(x), weight.shape[0]), np.float32))

    def _dense(self, weight: CudaWeight) -> Array:
        return weight.dense if weight.dense is not None else unpack(weight, self, self.kernels)

    def rmsnorm(self, x: Array, gain: Array, eps: float) -> Array:
        """x float32 [T, D] / sqrt(mean(x^2) + eps) * gain -> float16 [T, D]."""
        self._check("rmsnorm", x, np.float32, (None, len(gain)))
        out = self.empty(x.shape)
        self.kernels.launch("rmsnorm", "rmsnorm", (len(x),), 256, x, gain, out, x.shape[1], eps, T="f16")
        return out

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotate the first 2*cos.shape[1] dimensions of each head of x [T, heads, Dh] in place; rows may be strided."""
        tokens, heads, width = x.shape
        half = cos.shape[1]
        self._check("rope", cos, np.float32, (tokens, half))
        self._check("rope", sin, np.float32, (tokens, half))
        stride = self._stride("rope", x)
        grid = (tokens, -(-heads * half // 256))
        self.kernels.launch("rope", "rope", grid, 256, x, cos, sin, heads, width, half, stride, T="f16")
        return x

    def swiglu(self, gate_up: Array) -> Array:
        """silu(gate) * up; gate_up [T, 2F] with gate first -> [T, F]."""
        self._check("swiglu", gate_up, self.dtype, (None, None))
        return super().swiglu(gate_up)

    def geglu(self, gate_up: Array) -> Array:
        """gelu(gate) * up, by tanh; gate_up [T, 2F] with gate first -> [T, F]."""
        self._check("geglu", gate_up, self.dtype, (None, None))
        return self._gate(gate_up, GELU=1)

    def normed(self, x: Array, gain: Array | None, eps: float) -> Array:
        """x float32 [T, D] as products want it, float16: normed, or as it is."""
        return x.astype(self.dtype) if gain is None else self.rmsnorm(x, gain, eps)

    def norm_heads(self, x: Array, gain: Array | None, eps: float) -> None:
        """Norm x float16 [T, heads, Dh] in place, by head or (``gain`` [heads Dh]) by row."""
        if gain is not None:
            rows = x.astype(np.float32).reshape(-1, len(gain))
            x[...] = self.rmsnorm(rows, gain, eps).reshape(x.shape)

    def attend(
        self, q: Array, k: Array, v: Array, out: Array | None = None, reach: Reach = None,
        *, first: np.ndarray | None = None, cap: float = 0.0, precise: bool = False, sinks: Array | None = None,
    ) -> Array:  # fmt: skip
        """Causal grouped-query attention by index: query row t sees key rows 0 .. N-T+t, within the heads' ``reach``.

        q [T, H, Dh], k and v [Hkv, N, Dh] of one stride -> [T, H, Dh]. ``precise`` changes nothing: all is float16.
        """
        tokens, heads, width = q.shape
        kv_heads, keys, _ = k.shape
        if first is not None or cap or sinks is not None:
            raise DeviceError("the GPU's kernels have no windows by row, no soft caps and no sinks; use device='cpu'")
        self._check_heads("attend", q, k)
        if v.shape != k.shape or v.strides != k.strides:
            raise DeviceError(f"attend: v is {v.shape}, k {k.shape}; they must have one layout; this is a bug")
        if out is None:
            out = self.empty(q.shape)
        self._check("attend", out, self.dtype, (tokens, heads, width))
        if tokens == 1 and heads // kv_heads <= _MAX_GROUP:
            return self.attend_one(q, k, v, self._count(keys), out, self.splits(kv_heads, keys), self._reach(reach))
        kernel = self._prefill
        grid = (heads, (keys - 1) // kernel.rows - (keys - tokens) // kernel.rows + 1)
        self.kernels.launch(
            kernel.source, kernel.source, grid, kernel.threads,
            q, k, v, out, self._reach(reach), tokens, keys, heads, kv_heads,
            self._stride("attend", q), self._stride("attend", k),
            shared=kernel.shared(width), T="f16", DH=width, **kernel.macros(),
        )  # fmt: skip
        return out

    def splits(self, kv_heads: int, keys: int) -> int:
        """How many blocks share the keys of one KV head in decode: two for each multiprocessor, if there is work."""
        return max(1, min(-(-2 * self.device.multiprocessors // kv_heads), -(-keys // _SPLIT_KEYS)))

    def attend_one(
        self, q: Array, k: Array, v: Array, length: Array, out: Array, splits: int, reach: Array | None = None
    ) -> Array:
        """One query q [1, H, Dh] over the first ``length`` (int32 [1] on the device) rows of k and v, into ``out``."""
        _, heads, width = q.shape
        partial = self.empty((heads, splits, width + 2), np.float32)
        self.kernels.launch(
            "attention_decode", "attention_decode", (k.shape[0], splits), 128,
            q, k, v, None, length, reach, partial, heads, k.shape[0], self._stride("attend", k), 1,
            shared=512 * width, T="f16", DH=width,
        )  # fmt: skip
        self.kernels.launch(
            "attention_decode", "attention_combine", (heads,), width, partial, out, splits, T="f16", DH=width
        )
        return out

    def append(self, layer: Array, k: Array, v: Array, start: Array) -> None:
        """Rows k and v [T, Hkv, Dh] go to ``layer`` [2, Hkv, capacity, Dh] from row ``start`` (int32 [1]) on."""
        tokens, kv_heads, width = k.shape
        self._check("append", layer, self.dtype, (2, kv_heads, None, width))
        stride, capacity = self._stride("append", k), layer.shape[2]
        self.kernels.launch(
            "kv_append", "kv_append", (tokens,), 128, k, v, layer, start, kv_heads, width, stride, capacity, T="f16"
        )

    def fetch_blocks(self, layer: Array, blocks: Sequence[tuple[int, np.ndarray]], after: Fence) -> Fence:
        """Bring host ``blocks``, (slot, [2, Hkv, block, Dh] page-locked) each, into rows slot * block and on of
        ``layer`` [2, Hkv, capacity, Dh]: one launch on the copy stream reads them all from the host's memory."""
        _, kv_heads, rows, width = blocks[0][1].shape
        self._check("fetch_blocks", layer, self.dtype, (2, kv_heads, None, width))

        def gather() -> None:
            addresses = self._cupy.asarray(np.array([block.ctypes.data for _, block in blocks], np.uint64))
            slots = self._cupy.asarray(np.array([slot for slot, _ in blocks], np.int32))
            self.kernels.launch(
                "kv_blocks", "blocks_to_layer", (len(blocks), 2 * kv_heads), 128,
                addresses, slots, layer, rows, width, layer.shape[2], T="f16",
            )  # fmt: skip

        return self._queued(gather, [(layer, block) for _, block in blocks], after)

    def score_blocks(self, kind: str, q: Array, k: Array, block: int, unit: int) -> np.ndarray:
        """How much the queries q [W, H, Dh] of the last rows want each block of k [Hkv, N, Dh] -> [B] on the host."""
        window, heads, width = q.shape
        kv_heads, rows, _ = k.shape
        self._check_heads("score_blocks", q, k)
        per_block, causal = block, 1
        if kind in ("mean_qk", "unit_softmax"):
            k = self.unit_means(k, unit) if unit > 1 else k
            rows, per_block, causal = k.shape[1], block // unit, 0
        blocks = -(-rows // per_block)
        scores = self.empty((blocks,), np.float32)
        strides = self._stride("score_blocks", q), self._stride("score_blocks", k)
        shared = 128 * width + 16640
        launch = self.kernels.launch
        if kind == "mean_qk":
            sums = self.empty((kv_heads, rows), np.float32)
            grid: tuple[int, ...] = (-(-rows // 64), kv_heads)
            launch("block_scores", "score_products", grid, 128, q, k, sums, window, rows, heads, kv_heads, *strides,
                   shared=shared, T="f16", DH=width)  # fmt: skip
            launch("block_scores", "score_mean", (-(-blocks // 128),), 128, sums, scores, rows, blocks, kv_heads,
                   per_block, 1 / (heads * window), T="f16", DH=width)  # fmt: skip
            return self.to_host(scores)
        stats = self.empty((heads * window, blocks, 2), np.float32)
        norms = self.empty((heads * window, 2), np.float32)
        grid = (-(-blocks // max(1, 64 // per_block)), kv_heads)
        launch("block_scores", "score_stats", grid, 128, q, k, stats, window, rows, heads, kv_heads, *strides,
               per_block, causal, shared=shared, T="f16", DH=width)  # fmt: skip
        launch("block_scores", "score_norms", (heads * window,), 128, stats, norms, blocks, T="f16", DH=width)
        launch("block_scores", "score_softmax", (-(-blocks // 128),), 128, stats, norms, scores, window, heads, blocks,
               int(kind != "token_max"), T="f16", DH=width)  # fmt: skip
        return self.to_host(scores)

    def block_mass(
        self, q: Array, k: Array, block: int, causal: bool, cap: float = 0.0, sinks: Array | None = None
    ) -> np.ndarray:
        """Attention of q [W, H, Dh] by block of k [Hkv, N, Dh] -> [W, H, B] on the host; see ``scores.block_mass``."""
        if cap or sinks is not None:
            raise DeviceError("the GPU's kernels have no soft caps and no sinks; use device='cpu'")
        window, heads, width = q.shape
        kv_heads, rows, _ = k.shape
        self._check_heads("block_mass", q, k)
        blocks = -(-rows // block)
        stats = self.empty((heads * window, blocks, 2), np.float32)
        norms = self.empty((heads * window, 2), np.float32)
        grid = (-(-blocks // max(1, 64 // block)), kv_heads)
        launch = self.kernels.launch
        launch("block_scores", "score_stats", grid, 128, q, k, stats, window, rows, heads, kv_heads,
               self._stride("block_mass", q), self._stride("block_mass", k), block, int(causal),
               shared=128 * width + 16640, T="f16", DH=width)  # fmt: skip
        launch("block_scores", "score_norms", (heads * window,), 128, stats, norms, blocks, T="f16", DH=width)
        # By block the greatest score m and the sum l of 2^(score - m); by row the same over all blocks.
        found, norm = self.to_host(stats), self.to_host(norms)[:, None]
        mass = found[:, :, 1] * np.exp2(found[:, :, 0] - norm[:, :, 0]) / norm[:, :, 1]
        return np.ascontiguousarray(mass.reshape(heads, window, blocks).transpose(1, 0, 2))

    def unit_means(self, k: Array, unit: int) -> Array:
        """Mean key of each run of ``unit`` rows: k [Hkv, N, Dh] -> [Hkv, ceil(N / unit), Dh]."""
        kv_heads, rows, width = k.shape
        units = -(-rows // unit)
        out = self.empty((kv_heads, units, width))
        self.kernels.launch(
            "unit_means", "unit_means", (units, kv_heads), 64,
            k, out, rows, unit, width, self._stride("unit_means", k), units * width, T="f16",
        )  # fmt: skip
        return out

    def columns(self, x: Array, columns: np.ndarray) -> Array:
        """x[:, columns]: of x [Hkv, N, Dh] some of the N."""
        return self._cupy.ascontiguousarray(x[:, self.upload(columns)])

    def take(self, x: Array, rows: np.ndarray) -> Array:
        """x[rows]: the rows that go on, float32 [M, D]; rows ascending."""
        self._check("take", x, np.float32, (None, None))
        out = self.empty((len(rows), x.shape[1]), np.float32)
        picked = self.upload(rows.astype(np.int32))
        self.kernels.launch("compact", "compact", (len(rows),), 128, x, out, picked, 4 * x.shape[1])
        return out

    # -- checks -----------------------------------------------------------------------------------------------------

    def _check(self, what: str, x: Array, dtype: Any, shape: tuple[int | None, ...]) -> None:
        """RawKernels know neither strides nor types nor devices: what does not match would be misread."""
        if isinstance(x, np.ndarray):
            raise DeviceError(f"{what}: an array lies in host memory; upload it first; this is a bug")
        if x.device.id != 0:
            raise DeviceError(f"{what}: an array lies on GPU {x.device.id}, this runs on GPU 0; this is a bug")
        if x.dtype != dtype:
            raise DeviceError(f"{what}: an array is {x.dtype}, must be {np.dtype(dtype)}; this is a bug")
        if len(x.shape) != len(shape) or any(b not in (None, a) for a, b in zip(x.shape, shape, strict=True)):
            raise DeviceError(f"{what}: an array has shape {x.shape}, must have {shape}; this is a bug")
        if not x.flags.c_contiguous:
            raise DeviceError(f"{what}: an array of shape {x.shape} is not C-contiguous; copy it; this is a bug")

    def _stride(self, what: str, x: Array) -> int:
        """Elements from one entry of the first axis of x [n, m, Dh] to the next; the rest must be contiguous."""
        if isinstance(x, np.ndarray) or x.device.id != 0 or x.dtype != self.dtype:
            raise DeviceError(f"{what}: an array of {x.dtype} must be {self.dtype} on GPU 0; this is a bug")
        inner = (x.shape[2] * x.itemsize, x.itemsize)
        if any(size > 1 and step != want for size, step, want in zip(x.shape[1:], x.strides[1:], inner, strict=True)):
            raise DeviceError(f"{what}: the rows of an array of shape {x.shape} are not contiguous; this is a bug")
        stride = int(x.strides[0]) // int(x.itemsize) if x.shape[0] > 1 else x.shape[1] * x.shape[2]
        if stride % 8:
            raise DeviceError(f"{what}: a stride of {stride} elements; kernels read 8 at a time; this is a bug")
        return stride

    def _check_heads(self, what: str, q: Array, k: Array) -> None:
        tokens, heads, width = q.shape
        kv_heads, keys, other = k.shape
        if width not in HEAD_WIDTHS or width != other:
            raise DeviceError(f"{what}: heads of {width}; the GPU's kernels have {HEAD_WIDTHS}; use device='cpu'")
        if heads % kv_heads or keys < tokens:
            raise DeviceError(f"{what}: {heads} heads on {kv_heads}, {tokens} rows of {keys}; this is a bug")

    def _count(self, number: int) -> Array:
        """``number`` as int32 [1] on the device, without a transfer."""
        if number >= len(self._counts):
            self._counts = self.upload(np.arange(2 * number, dtype=np.int32))
        return self._counts[number : number + 1]

    def _reach(self, reach: Reach) -> Array | None:
        if reach is None or not any(reach):
            return None
        key = tuple(reach)
        if key not in self._reaches:
            self._reaches[key] = self.upload(np.asarray(key, np.int32))
        return self._reaches[key]
