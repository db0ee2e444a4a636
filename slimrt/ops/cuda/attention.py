"""Attention, keys and values, and the scores of blocks on a GPU: the launches of ``attention_*.cu``, ``kv_*.cu``,
``block_scores.cu`` and ``unit_means.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slimrt.errors import DeviceError
from slimrt.ops.cuda.checked import Checked
from slimrt.ops.cuda.memory import Fence
from slimrt.ops.cuda.prefill import PrefillKernel, prefill_kernel
from slimrt.prune.reach import Reach, contiguous

__all__ = ["MAX_GROUP", "Attending"]

Array = Any  # of CuPy

MAX_GROUP = 16  # query heads of one KV head that the decode kernel takes
_TILE_ROWS = 64  # of queries, that the kernels of prefill take at any place
_SPLIT_KEYS = 128  # that one block of the decode kernel should have at least


def _capped(cap: float) -> dict[str, int]:
    """The macro of kernels whose scores are capped softly."""
    return {"CAPPED": 1} if cap else {}


def _limited(first: object, cap: float) -> dict[str, int]:
    """The macros of attention from ``first`` on and under a ``cap``; one that is capped takes windows too."""
    return {"WINDOWED": 1, **_capped(cap)} if first is not None or cap else {}


class Attending(Checked):
    """What ``CupyOps`` does with queries, keys and values."""

    _wgmma: bool
    _counts: Array
    _reaches: dict[tuple[int, ...], Array]
    _held_starts: tuple[np.ndarray, Array] | None = None

    def attend(
        self, q: Array, k: Array, v: Array, out: Array | None = None, reach: Reach = None,
        *, places: np.ndarray | None = None, first: np.ndarray | None = None, cap: float = 0.0, precise: bool = False,
        sinks: Array | None = None,
    ) -> Array:  # fmt: skip
        """Causal grouped-query attention by index: query row t sees key rows 0 .. N-T+t, or 0 .. places[t] (ascending),
        within the heads' ``reach`` or from ``first[t]`` (ascending) on. ``cap``: scores are cap * tanh(score / cap).

        q [T, H, Dh], k and v [Hkv, N, Dh] of one stride -> [T, H, Dh]. ``precise`` changes nothing: all is of one
        element.
        """
        tokens, heads, width = q.shape
        kv_heads, keys, _ = k.shape
        if sinks is not None:
            raise DeviceError("the GPU's kernels have no sinks of attention; use device='cpu'")
        if first is not None and not first.any():
            first = None
        if first is not None and reach is not None and any(reach):
            raise DeviceError("attend: a window by row and one by head; this is a bug")
        self.check_heads("attend", q, k)
        if v.shape != k.shape or v.strides != k.strides:
            raise DeviceError(f"attend: v is {v.shape}, k {k.shape}; they must have one layout; this is a bug")
        if out is None:
            out = self.empty(q.shape)
        self.check("attend", out, self.dtype, (tokens, heads, width))
        if places is not None and np.array_equal(places, np.arange(keys - tokens, keys)):
            places = None
        if places is not None and (tokens == 1 or first is not None or cap or (reach is not None and any(reach))):
            # The kernels have no places for these: a launch for each run of rows, of which they are the last.
            for some in contiguous(places):
                seen = slice(0, int(places[some.stop - 1]) + 1)
                own = None if first is None else first[some]
                self.attend(q[some], k[:, seen], v[:, seen], out[some], reach, first=own, cap=cap)
            return out
        if tokens == 1 and heads // kv_heads <= MAX_GROUP:
            read = keys if first is None else keys - int(first[0])
            start = None if first is None else self._count(int(first[0]))
            return self.attend_one(
                q, k, v, self._count(keys), out, self.splits(kv_heads, read), self._reach(reach), start, cap
            )
        kernel = prefill_kernel(self.device, width, wgmma=self._wgmma)
        if places is not None:
            return self._attend_placed(kernel, q, k, v, out, places)
        grid = (heads, (keys - 1) // kernel.rows - (keys - tokens) // kernel.rows + 1)
        self.kernels.launch(
            kernel.source, kernel.source, grid, kernel.threads,
            q, k, v, out, self._reach(reach), tokens, keys, heads, kv_heads,
            self.stride("attend", q), self.stride("attend", k), self._starts(first), float(cap),
            shared=kernel.shared(width), T=self.half_type, DH=width, **kernel.macros(), **_limited(first, cap),
        )  # fmt: skip
        return out

    def _attend_placed(
        self, kernel: PrefillKernel, q: Array, k: Array, v: Array, out: Array, places: np.ndarray
    ) -> Array:
        """``attend`` of rows at ``places`` [T], in tiles of up to 64 that follow each other."""
        tokens, heads, width = q.shape
        kv_heads, keys, _ = k.shape
        count = kernel.rows // _TILE_ROWS  # tiles that a block takes
        begins = [at for some in contiguous(places) for at in range(some.start, some.stop, _TILE_ROWS)]
        spans = [(at, int(places[at])) for at in begins]
        spans += [(tokens, spans[-1][1])] * (-len(spans) % count + 1)
        self.kernels.launch(
            kernel.source, kernel.source, (heads, (len(spans) - 1) // count), kernel.threads,
            q, k, v, out, None, tokens, keys, heads, kv_heads, self.stride("attend", q), self.stride("attend", k),
            None, 0.0, self.upload(np.array(spans, np.int32)),
            shared=kernel.shared(width), T=self.half_type, DH=width, PLACED=1, **kernel.macros(),
        )  # fmt: skip
        return out

    def splits(self, kv_heads: int, keys: int) -> int:
        """How many blocks share the keys of one KV head in decode: two for each multiprocessor, if there is work."""
        return max(1, min(-(-2 * self.device.multiprocessors // kv_heads), -(-keys // _SPLIT_KEYS)))

    def attend_one(
        self, q: Array, k: Array, v: Array, length: Array, out: Array, splits: int, reach: Array | None = None,
        start: Array | None = None, cap: float = 0.0,
    ) -> Array:  # fmt: skip
        """One query q [1, H, Dh] over the first ``length`` (int32 [1] on the device) rows of k and v, from ``start``
        (the same, None: 0) on, into ``out``."""
        _, heads, width = q.shape
        warps = 2 if width > 128 else 4
        partial = self.empty((heads, splits, width + 2), np.float32)
        self.kernels.launch(
            "attention_decode", "attention_decode", (k.shape[0], splits), 32 * warps,
            q, k, v, None, length, reach, partial, heads, k.shape[0], self.stride("attend", k), 1, start, float(cap),
            shared=128 * warps * width, T=self.half_type, DH=width, **_limited(start, cap),
        )  # fmt: skip
        self.kernels.launch(
            "attention_decode", "attention_combine", (heads,), width, partial, out, splits,
            T=self.half_type, DH=width, **_limited(start, cap),
        )  # fmt: skip
        return out

    def append(self, layer: Array, k: Array, v: Array, start: Array) -> None:
        """Rows k and v [T, Hkv, Dh] go to ``layer`` [2, Hkv, capacity, Dh] from row ``start`` (int32 [1]) on."""
        tokens, kv_heads, width = k.shape
        self.check("append", layer, self.dtype, (2, kv_heads, None, width))
        stride, capacity = self.stride("append", k), layer.shape[2]
        self.kernels.launch(
            "kv_append",
            "kv_append",
            (tokens,),
            128,
            k,
            v,
            layer,
            start,
            kv_heads,
            width,
            stride,
            capacity,
            T=self.half_type,
        )

    fetches_behind = True

    def fetch_blocks(self, layer: Array, blocks: Sequence[tuple[int, np.ndarray]], after: Fence) -> Fence:
        """Bring host ``blocks``, (slot, [2, Hkv, block, Dh] page-locked) each, into rows slot * block and on of
        ``layer`` [2, Hkv, capacity, Dh]: one launch on the copy stream reads them all from the host's memory."""
        _, kv_heads, rows, width = blocks[0][1].shape
        self.check("fetch_blocks", layer, self.dtype, (2, kv_heads, None, width))

        def gather() -> None:
            addresses = self._cupy.asarray(np.array([block.ctypes.data for _, block in blocks], np.uint64))
            slots = self._cupy.asarray(np.array([slot for slot, _ in blocks], np.int32))
            self.kernels.launch(
                "kv_blocks", "blocks_to_layer", (len(blocks), 2 * kv_heads), 128,
                addresses, slots, layer, rows, width, layer.shape[2], None, T=self.half_type,
            )  # fmt: skip

        return self._queued(gather, [(layer, block) for _, block in blocks], after)

    def score_blocks(self, kind: str, q: Array, k: Array, block: int, unit: int) -> np.ndarray:
        """How much the queries q [W, H, Dh] of the last rows want each block of k [Hkv, N, Dh] -> [B] on the host."""
        window, heads, width = q.shape
        kv_heads, rows, _ = k.shape
        self.check_heads("score_blocks", q, k)
        per_block, causal = block, 1
        if kind in ("mean_qk", "unit_softmax"):
            k = self.unit_means(k, unit) if unit > 1 else k
            rows, per_block, causal = k.shape[1], block // unit, 0
        blocks = -(-rows // per_block)
        scores = self.empty((blocks,), np.float32)
        strides = self.stride("score_blocks", q), self.stride("score_blocks", k)
        shared = 128 * width + 16640
        launch = self.kernels.launch
        if kind == "mean_qk":
            sums = self.empty((kv_heads, rows), np.float32)
            grid: tuple[int, ...] = (-(-rows // 64), kv_heads)
            launch("block_scores", "score_products", grid, 128, q, k, sums, window, rows, heads, kv_heads, *strides,
                   shared=shared, T=self.half_type, DH=width)  # fmt: skip
            launch("block_scores", "score_mean", (-(-blocks // 128),), 128, sums, scores, rows, blocks, kv_heads,
                   per_block, 1 / (heads * window), T=self.half_type, DH=width)  # fmt: skip
            return self.to_host(scores)
        stats = self.empty((heads * window, blocks, 2), np.float32)
        norms = self.empty((heads * window, 2), np.float32)
        grid = (-(-blocks // max(1, 64 // per_block)), kv_heads)
        launch("block_scores", "score_stats", grid, 128, q, k, stats, window, rows, heads, kv_heads, *strides,
               per_block, causal, 0.0, None, shared=shared, T=self.half_type, DH=width)  # fmt: skip
        launch("block_scores", "score_norms", (heads * window,), 128, stats, norms, blocks, per_block, None,
               T=self.half_type, DH=width)  # fmt: skip
        launch("block_scores", "score_softmax", (-(-blocks // 128),), 128, stats, norms, scores, window, heads, blocks,
               int(kind != "token_max"), per_block, None, T=self.half_type, DH=width)  # fmt: skip
        return self.to_host(scores)

    def score_captured(self, kind: str, q: Array, means: Array, units: int, counted: Array, scores: Array) -> None:
        """``scores`` [B]: how much the query q [1, H, Dh] wants each block of ``units`` of means [Hkv, U, Dh], of which
        the first ``counted`` (int32 [1]) are there; by ``kind``, but for mean_qk."""
        _, heads, width = q.shape
        kv_heads, room, _ = means.shape
        blocks, launch = room // units, self.kernels.launch
        stats, norms = self.empty((heads, blocks, 2), np.float32), self.empty((heads, 2), np.float32)
        grid = (-(-blocks // max(1, 64 // units)), kv_heads)
        launch("block_scores", "score_stats", grid, 128, q, means, stats, 1, room, heads, kv_heads,
               self.stride("score", q), self.stride("score", means), units, int(kind != "unit_softmax"), 0.0, counted,
               shared=128 * width + 16640, T=self.half_type, DH=width)  # fmt: skip
        launch("block_scores", "score_norms", (heads,), 128, stats, norms, blocks, units, counted,
               T=self.half_type, DH=width)  # fmt: skip
        launch("block_scores", "score_softmax", (-(-blocks // 128),), 128, stats, norms, scores, 1, heads, blocks,
               int(kind != "token_max"), units, counted, T=self.half_type, DH=width)  # fmt: skip

    def choose_blocks(
        self, step: Array, scores: Array, wishes: Array, slots: Array, homes: np.ndarray, source: Array, target: Array,
        moved: Array, sink: int, local: int,
    ) -> None:  # fmt: skip
        """Choose by ``scores`` which blocks lie in ``slots`` [count + 1]; ``source`` and ``target`` [count] have the
        first moved[0] that are missing: see choose.cu. ``homes``: page-locked addresses [blocks]."""
        count = len(slots) - 1
        self.kernels.launch(
            "choose", "choose_blocks", (1,), 256, step, scores, wishes, slots, np.uintp(homes.ctypes.data),
            source, target, moved, count, sink, local, shared=4 * count + len(homes),
        )  # fmt: skip

    def bring_blocks(self, layer: Array, source: Array, target: Array, count: Array, block: int) -> None:
        """The first ``count`` (int32 [1]) blocks at the host's addresses ``source`` into the slots ``target``."""
        _, kv_heads, capacity, width = layer.shape
        self.kernels.launch(
            "kv_blocks", "blocks_to_layer", (len(source), 2 * kv_heads), 128,
            source, target, layer, block, width, capacity, count, T=self.half_type,
        )  # fmt: skip

    def block_mass(
        self, q: Array, k: Array, block: int, causal: bool, cap: float = 0.0, sinks: Array | None = None
    ) -> np.ndarray:
        """Attention of q [W, H, Dh] by block of k [Hkv, N, Dh] -> [W, H, B] on the host; see ``scores.block_mass``."""
        if sinks is not None:
            raise DeviceError("the GPU's kernels have no sinks of attention; use device='cpu'")
        window, heads, width = q.shape
        kv_heads, rows, _ = k.shape
        self.check_heads("block_mass", q, k)
        blocks = -(-rows // block)
        stats = self.empty((heads * window, blocks, 2), np.float32)
        norms = self.empty((heads * window, 2), np.float32)
        grid = (-(-blocks // max(1, 64 // block)), kv_heads)
        launch = self.kernels.launch
        launch("block_scores", "score_stats", grid, 128, q, k, stats, window, rows, heads, kv_heads,
               self.stride("block_mass", q), self.stride("block_mass", k), block, int(causal), float(cap),
               None, shared=128 * width + 16640, T=self.half_type, DH=width, **_capped(cap))  # fmt: skip
        launch("block_scores", "score_norms", (heads * window,), 128, stats, norms, blocks, block, None,
               T=self.half_type, DH=width, **_capped(cap))  # fmt: skip
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
            k, out, rows, unit, width, self.stride("unit_means", k), units * width, T=self.half_type,
        )  # fmt: skip
        return out

    def _count(self, number: int) -> Array:
        """``number`` as int32 [1] on the device, without a transfer."""
        if number >= len(self._counts):
            self._counts = self.upload(np.arange(2 * number, dtype=np.int32))
        return self._counts[number : number + 1]

    def _starts(self, first: np.ndarray | None) -> Array | None:
        """``first`` as int32 on the device; most layers of a pass have the same, so the last ones stay."""
        if first is None:
            return None
        if self._held_starts is None or not np.array_equal(self._held_starts[0], first):
            self._held_starts = first, self.upload(first.astype(np.int32))
        return self._held_starts[1]

    def _reach(self, reach: Reach) -> Array | None:
        if reach is None or not any(reach):
            return None
        key = tuple(reach)
        if key not in self._reaches:
            self._reaches[key] = self.upload(np.asarray(key, np.int32))
        return self._reaches[key]
