"""The operations on compiled kernels; what they mean is written in ``numpy_ops``.

Weights stay as they lie in the file. Many rows: a layer's matrices are unpacked into panels (``unpacked``), and the
row-wise parts of the layer run as one kernel each. Few rows (decode): products read the packed weights. The cache is
float16, everything that an operation returns float32, except k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slimrt.ops.fast import attend_few, attend_many, gemv
from slimrt.ops.fast.decode import Decoder
from slimrt.ops.fast.dots import FORMATS
from slimrt.ops.fast.fast_weights import FastWeight, as_bfloat16
from slimrt.ops.fast.features import Features, detect
from slimrt.ops.fast.layer_kernels import (
    RESULT_PANELS,
    ROW_GAP,
    WAITING_BYTES,
    feed_forward_kernel,
    head_norm_words,
    linear_kernel,
    qkv_kernel,
)
from slimrt.ops.fast.one_query import OneQuery
from slimrt.ops.fast.panels import PanelMaker, Panels
from slimrt.ops.fast.products import PANEL, packed_shape, shape_of
from slimrt.ops.fast.team import Program, Team, address
from slimrt.ops.layer import Activation, Experts, HeadNorms, Merge, by_expert
from slimrt.ops.numpy.memory import Fence
from slimrt.ops.numpy.numpy_ops import ROW_CHUNK, NumpyOps
from slimrt.prune.reach import Reach
from slimrt.prune.scores import WEIGHT_SCORES
from slimrt.weights.gguf import TensorInfo
from slimrt.weights.quants import dequantize

__all__ = ["FastOps", "FastWeight"]

Array = np.ndarray

_LOG2_E = 1.4426950408889634


class FastOps(NumpyOps):
    """Compute and memory operations for a processor with ``features`` (None: those of this one)."""

    name = "fast"
    exact_rows = 2  # a row alone is computed as in decode
    unpack_rows = 2  # a prompt gives the same bits in whatever parts it is read; a single token is decode's
    each_alone = True
    kv_type = np.float16

    def __init__(self, threads: int | None = None, *, features: Features | None = None) -> None:
        super().__init__(threads, packed=True)
        self.features = detect() if features is None else features
        self.team = Team(self.threads)
        self._shape = shape_of(self.features)
        self._panels = PanelMaker(self.features, self.team)
        self._scratch = np.empty(0, np.uint8)
        self._one_queries: dict[tuple[int, ...], OneQuery] = {}  # by heads, KV heads, width

    # -- weights ----------------------------------------------------------------------------------------------------

    def weight(self, *parts: TensorInfo, half: int = 0) -> FastWeight:  # type: ignore[override]
        """A handle on ``parts``. Types without a dot product of their own are kept as bfloat16."""
        return FastWeight(tuple(part if part.type in FORMATS else as_bfloat16(part) for part in parts))

    def unpacked(self, weight: FastWeight) -> FastWeight:  # type: ignore[override]
        """``weight`` with panels, for many rows; the caller drops it after use."""
        return weight if weight.panels else FastWeight(weight.parts, self._panels.make(weight.parts))

    def _ready(self, weight: FastWeight) -> Panels:
        return weight.panels or self._panels.make(weight.parts)

    def decoder(self, model: Any, *, budget: bool = False) -> Decoder | None:  # type: ignore[override]
        """A program for a whole token, under a budget as well; None for a model with heads of a width that its
        attention does not take."""
        return None if model.config.head_dim % 16 else Decoder(self, model)

    # -- memory -----------------------------------------------------------------------------------------------------

    fetches_behind = False

    def fetch_blocks(self, layer: Array, blocks: Sequence[tuple[int, Array]], after: Fence) -> Fence:
        """See ``NumpyMemory``. The caller copies them: a token's few blocks are there before another thread begins."""
        self.wait(after)
        rows = blocks[0][1].shape[2]
        for slot, block in blocks:
            layer[:, :, slot * rows : (slot + 1) * rows] = block
        return self.mark()

    # -- parallel structure -----------------------------------------------------------------------------------------

    def rows(self, task: Callable[[slice], object], count: int) -> None:
        """``task(slice)`` one slice after the other: the threads share the work within each operation."""
        for lo in range(0, count, ROW_CHUNK):
            task(slice(lo, min(lo + ROW_CHUNK, count)))

    def _slices(self, tokens: int) -> tuple[int, int]:
        """Rows of a slice, in whole blocks, and how many slices: enough for all threads, large enough for the
        panels."""
        # The quicker a panel's products are, the more rows must share its way from memory.
        most = 256 if self.features.amx else 192 if packed_shape(self.features).whole else 128
        blocks = -(-tokens // self._shape.rows)
        slices = -(-blocks // min(-(-most // self._shape.rows), -(-blocks // self.threads)))
        size = -(-blocks // slices) * self._shape.rows  # about as many rows in each: a short one is no quicker
        return size, -(-tokens // size)

    def thread_scratch(self, program: Program, nbytes: int) -> tuple[int, int]:
        """Address of scratch for all threads, and bytes from one to the next, for ``program``.

        Programs run one at a time, so one memory serves all of them; each holds what it was given, for another caller
        may need a larger one before it runs.
        """
        stride = -(-nbytes // 4096) * 4096 + 64
        needed = stride * self.threads + 64
        scratch = self._scratch
        if len(scratch) < needed:
            self._scratch = scratch = np.empty(needed, np.uint8)
        program.hold(scratch)
        return -(-address(scratch) // 64) * 64, stride

    # -- compute ----------------------------------------------------------------------------------------------------

    def embed(self, weight: FastWeight, ids: Array) -> Array:  # type: ignore[override]
        """Rows ``ids`` [T] of ``weight`` [V, D] -> [T, D]."""
        (part,) = weight.parts
        unique, inverse = np.unique(ids, return_inverse=True)
        picked = TensorInfo(part.name, (len(unique), part.shape[-1]), part.type, part.data[unique])
        return dequantize(picked)[inverse]

    def linear(  # type: ignore[override]
        self, x: Array, weight: FastWeight, bias: Array | None = None, out: Array | None = None
    ) -> Array:
        """x [T, in] @ weight.T [in, out] (+ bias [out]) -> [T, out], into ``out`` where given."""
        if _by_packed(x, weight):
            result = gemv.linear_few(self, x, weight)
            if bias is not None:
                result += bias
        else:
            result = self._linear(x, weight, bias, None)
        if out is None:
            return result
        out[...] = result
        return out

    def _linear(self, x: Array, weight: FastWeight, bias: Array | None, residual: Array | None) -> Array:
        panels = self._ready(weight)
        if len(weight.parts) > 1 and any(part.shape[0] % self._shape.columns for part in weight.parts[:-1]):
            # The parts' columns do not follow each other in the product.
            results = [self._linear(x, FastWeight((part,)), None, None) for part in weight.parts]
            joint = np.concatenate(results, axis=1)
            if bias is not None:
                joint += bias
            return joint if residual is None else joint + residual
        x, tokens, out = _plain(x), len(x), np.empty((len(x), weight.shape[0]), np.float32)
        size, items = self._slices(tokens)
        wide = None if bias is None else panels.spread(bias, [part.shape[0] for part in weight.parts])
        program = Program()
        scratch, stride = self.thread_scratch(
            program, size * (_row_bytes(panels, panels.inner) + min(panels.count, RESULT_PANELS) * PANEL * 4)
        )
        program.add(
            linear_kernel(self.features, panels.shape), items,
            address(x), tokens, size, weight.shape[1], panels.inner, panels.address, panels.count, _at(wide),
            _at(residual), weight.shape[0], address(out), scratch, stride,
        )  # fmt: skip
        self.team.run(program)
        return out

    def qkv(
        self,
        x: Array,
        gain: Array | None,
        eps: float,
        weight: FastWeight,
        bias: Array | None,
        cos: Array,
        sin: Array,
        heads: tuple[int, int, int],
        norms: HeadNorms | None = None,
    ) -> tuple[Array, Array, Array]:
        """See ``LayerOps``; k and v float16."""
        count, kv_count, width = heads
        tokens, d = x.shape
        if _by_packed(x, weight):
            q, k, v = super().qkv(x, gain, eps, weight, bias, cos, sin, heads, norms)
            halves = k.astype(np.float16), v.astype(np.float16)
            if not (np.isfinite(q).all() and np.isfinite(halves[0]).all()):
                q[...] = np.nan  # as the kernel does
            return q, *halves
        panels, x = self._ready(weight), _plain(x)
        q = np.empty((tokens, count, width), np.float32)
        k, v = (np.empty((tokens, kv_count, width), np.float16) for _ in range(2))
        size, items = self._slices(tokens)
        wide = None if bias is None else panels.spread(bias, [part.shape[0] for part in weight.parts])
        program = Program()
        nbytes = size * (_row_bytes(panels, panels.inner) + panels.count * PANEL * 4)
        scratch, stride = self.thread_scratch(program, nbytes)
        cos, sin = _plain(cos), _plain(sin)
        q_gain, k_gain, whole = head_norm_words(norms, width)
        program.add(
            qkv_kernel(self.features, panels.shape, norms is not None), items,
            address(x), tokens, size, d, panels.inner, _at(gain), float(eps), panels.address, panels.count,
            _at(wide), panels.columns(1), panels.columns(2), address(cos), address(sin), cos.shape[-1],
            count, kv_count, width, address(q), address(k), address(v), scratch, stride,
            q_gain, k_gain, whole, 0.0 if norms is None else float(norms.eps), 1.0 if norms is None else norms.scale,
        )  # fmt: skip
        self.team.run(program)
        return q, k, v

    def project(
        self, x: Array, attention: Array, weight: FastWeight, bias: Array | None, merge: Merge | None = None
    ) -> Array:
        """See ``LayerOps``."""
        if _by_packed(x, weight):
            return super().project(x, attention, weight, bias, merge)
        attention = attention.reshape(len(x), -1)
        if merge is not None:
            return self.merged(x, self._linear(attention, weight, bias, None), merge)
        return self._linear(attention, weight, bias, _plain(x))

    def feed_forward(
        self,
        x: Array,
        gain: Array | None,
        eps: float,
        gate_up: FastWeight,
        gate_up_bias: Array | None,
        down: FastWeight,
        down_bias: Array | None,
        activation: Activation = "silu",
        merge: Merge | None = None,
        residual: Array | None = None,
    ) -> Array:
        """See ``LayerOps``."""
        if _by_packed(x, gate_up):
            return super().feed_forward(
                x, gain, eps, gate_up, gate_up_bias, down, down_bias, activation, merge, residual
            )
        residual = _plain(x if residual is None else residual)
        to = None if merge is not None else residual
        result = self._feed_forward(x, gain, eps, gate_up, gate_up_bias, down, down_bias, activation, to)
        return result if merge is None else self.merged(residual, result, merge)

    def _feed_forward(
        self,
        x: Array,
        gain: Array | None,
        eps: float,
        gate_up: FastWeight,
        gate_up_bias: Array | None,
        down: FastWeight,
        down_bias: Array | None,
        activation: Activation,
        residual: Array | None,
    ) -> Array:
        """``feed_forward`` on panels, added to ``residual`` or (None) to nothing."""
        tokens, d = x.shape
        first, second, x = self._ready(gate_up), self._ready(down), _plain(x)
        out = np.empty((tokens, d), np.float32)
        size, items = self._slices(tokens)
        half = first.count // 2
        wide = None if gate_up_bias is None else first.spread(gate_up_bias, [part.shape[0] for part in gate_up.parts])
        down_wide = None if down_bias is None else second.spread(down_bias, [d])
        program = Program()
        scratch, stride = self.thread_scratch(
            program,
            size
            * (
                _row_bytes(first, first.inner)
                + _row_bytes(second, half * PANEL)
                + self._shape.panels * 128
                + second.count * PANEL * 4
                + (WAITING_BYTES if second.shape.whole else 0)
            ),
        )
        program.add(
            feed_forward_kernel(self.features, first.shape, second.shape, activation), items,
            address(x), tokens, size, d, first.inner, _at(gain), float(eps), first.address, half, _at(wide),
            second.address, second.count, _at(down_wide), address(out), scratch, stride, _at(residual),
        )  # fmt: skip
        self.team.run(program)
        return out

    def score_blocks(self, kind: str, q: Array, k: Array, block: int, unit: int) -> np.ndarray:
        """See ``NumpyOps``; k float16."""
        if len(q) == 1 and unit == 1 and kind in WEIGHT_SCORES and q.shape[2] % 16 == 0:
            weights = self._one_query(q.shape[1], k.shape[0], q.shape[2]).weigh(q, _rows_together(k))
            return WEIGHT_SCORES[kind](weights[:, None], block)
        return super().score_blocks(kind, q, k.astype(np.float32), block, unit)

    def block_mass(
        self, q: Array, k: Array, block: int, causal: bool, cap: float = 0.0, sinks: Array | None = None
    ) -> np.ndarray:
        """See ``NumpyOps``; k float16."""
        return super().block_mass(q, k.astype(np.float32), block, causal, cap, sinks)

    def _one_query(self, *shape: int) -> OneQuery:
        if shape not in self._one_queries:
            self._one_queries[shape] = OneQuery(self, *shape)
        return self._one_queries[shape]

    def unit_means(self, k: Array, unit: int) -> Array:
        """See ``NumpyOps``; means of float16 rows, in float32."""
        return super().unit_means(k.astype(np.float32), unit)

    def experts(
        self, x: Array, gain: Array, eps: float, experts: Experts, activation: Activation, merge: Merge | None
    ) -> Array:
        """See ``LayerOps``; each expert is unpacked into panels, and its rows pass it in one piece."""
        if len(x) == 1:
            return super().experts(x, gain, eps, experts, activation, merge)
        x, mixed = _plain(x), np.zeros(x.shape, np.float32)
        _, chosen, weights = self.routed(x, gain, eps, experts)
        for expert, rows, share in by_expert(chosen, weights):
            gate_up, down = (self.unpacked(part[expert]) for part in (experts.gate_up, experts.down))
            bias, down_bias = experts.biases(expert)
            result = self._feed_forward(x[rows], gain, eps, gate_up, bias, down, down_bias, activation, None)
            result *= share[:, None]
            mixed[rows] += result
        return x + mixed if merge is None else self.merged(x, mixed, merge)

    def attend(
        self, q: Array, k: Array, v: Array, out: Array | None = None, reach: Reach = None,
        *, places: np.ndarray | None = None, first: np.ndarray | None = None, cap: float = 0.0, precise: bool = False,
        sinks: Array | None = None,
    ) -> Array:  # fmt: skip
        """See ``NumpyOps``; k and v float16, the rows of a head follow each other. Many rows are multiplied in bfloat16
        where the processor does that, but for ``precise`` ones."""
        if len(q) == 1 and places is not None:
            k, v, places = k[:, : int(places[0]) + 1], v[:, : int(places[0]) + 1], None
        if len(q) == 1 and q.shape[2] % 16 == 0:
            if first is not None:  # one query sees a run of keys
                assert reach is None
                k, v = (x[:, max(0, int(first[0])) :] for x in (k, v))
            result = attend_few.attend(self, q, k, v, reach, cap, sinks)
        else:
            features = self.features.without("bf16") if precise else self.features
            k, v = _rows_together(k), _rows_together(v)
            reach = reach or [0] * len(k)
            result = attend_many.attend(self, features, _plain(q), k, v, reach, places, first, cap, sinks)
        if out is None:
            return result
        out[...] = result
        return out


def _by_packed(x: Array, weight: FastWeight) -> bool:
    """Whether a product reads the packed weights: one row, and no panels made for other rows of the same layer."""
    return len(x) == 1 and weight.panels is None


def _row_bytes(panels: Panels, inner: int) -> int:
    """Of a row of ``inner`` factors in a kernel's scratch."""
    return panels.shape.row_bytes(inner) + ROW_GAP


def _at(array: Array | None) -> int:
    """An address, or 0 for nothing."""
    return 0 if array is None else address(array)


def _plain(x: Array) -> Array:
    """``x`` as float32 rows that follow each other, itself where it is that."""
    return np.ascontiguousarray(x, np.float32)


def _rows_together(x: Array) -> Array:
    """k or v with each head's rows one after the other, as every cache holds them; a copy of anything else."""
    row = x.shape[2] * x.itemsize
    return x if x.dtype == np.float16 and x.strides[1:] == (row, x.itemsize) else np.ascontiguousarray(x, np.float16)
