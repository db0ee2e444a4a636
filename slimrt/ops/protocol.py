"""The seam to the hardware, as types: what is asked of a backend, and what a backend's decoder asks of a cache.

A new backend is a class that mypy accepts where ``Ops`` is called for, and that passes
``tests/ops/test_conformance.py`` beside the others. Meanings are written in ``numpy/numpy_ops.py`` and
``numpy/memory.py``; shapes use the alphabet of ``slimrt.config``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from slimrt.config import CacheConfig
from slimrt.prune.reach import Reach
from slimrt.weights.gguf import TensorInfo

__all__ = [
    "Array", "Borrower", "Cache", "Decoder", "Fence", "Fetched", "Lender", "Lent", "LentLayer", "Ops", "Pairs", "Part",
    "StreamingOps", "TakenBack", "Weight",
]  # fmt: skip

Array = Any  # the backend's array
Weight = Any  # the backend's handle on matrices [out, in]; nobody else looks into it
Pairs = Sequence[tuple[Array, Array]]  # (destination, source)


class Fence(Protocol):
    """A point in one of the two queues, compute and copies."""

    def done(self) -> bool:
        """Whether the queue has passed it."""


class MemoryOps(Protocol):
    """Memory, and the two queues that meet at fences only; the rules are written in ``numpy/memory.py``."""

    @property
    def kv_type(self) -> Any:
        """The element type of cached keys and values."""

    def empty(self, shape: tuple[int, ...], dtype: Any = ...) -> Array:
        """Uninitialised memory where the backend computes."""

    def pinned(self, shape: tuple[int, ...], dtype: Any = ...) -> Array:
        """Uninitialised host memory that copies reach at full speed."""

    def reserve(self, shape: tuple[int, ...], count: int) -> None:
        """Make ready what ``count`` calls of ``pinned(shape)`` will ask for."""

    def copy(self, pairs: Pairs, after: Any = ...) -> Any:
        """Queue copies (destination, source) to start ``after`` a fence; returns theirs at once."""

    @property
    def fetches_behind(self) -> bool:
        """Whether ``fetch_blocks`` returns before its blocks are there, so that compute may go on meanwhile."""

    def fetch_blocks(self, layer: Array, blocks: Sequence[tuple[int, Array]], after: Any) -> Any:
        """Queue host blocks, (slot, [2, Hkv, block, Dh]) each, into rows slot * block and on of layer
        [2, Hkv, capacity, Dh]; returns their fence."""

    def mark(self) -> Any:
        """A fence that passes when compute has done all that was asked of it so far."""

    def wait(self, fence: Any) -> None:
        """What is computed from here on runs after ``fence``; raises what a copy raised."""

    def finish(self) -> None:
        """Return when both queues have done all that was asked."""

    def to_host(self, x: Array) -> np.ndarray:
        """``x`` as a NumPy array, in the bits that the backend holds."""

    def floats(self, x: Array) -> np.ndarray:
        """``x`` as float32 on the host, whatever the backend's element is."""

    def close(self) -> None:
        """Finish all copies."""


class RowOps(Protocol):
    """The parts of a layer that treat each row alone: written once in ``layer.py``; a backend may be quicker."""

    @property
    def exact_rows(self) -> int:
        """So many last rows of a prompt that was read before run again at least, for the same bits as then."""

    @property
    def unpack_rows(self) -> int:
        """From so many rows on it pays to unpack a layer once."""

    @property
    def each_alone(self) -> bool:
        """Whether a row gets the same bits whatever others pass with it, from ``unpack_rows`` rows on."""

    @property
    def rows_in_blocks(self) -> bool:
        """Whether the rows of a long prompt pass a layer block by block (``slimrt.row_blocks``)."""

    def rows(self, task: Callable[[slice], object], count: int) -> None:
        """Call ``task(slice)`` for slices that cover ``count`` rows once."""

    def qkv(
        self, x: Array, gain: Array | None, eps: float, weight: Any, bias: Array | None, cos: Array, sin: Array,
        heads: tuple[int, int, int], norms: Any = ...,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """Norm, projection, rotation: x [T, D] -> q [T, H, Dh], k and v [T, Hkv, Dh]. heads: H, Hkv, Dh.
        norms: a ``layer.HeadNorms`` or None."""

    def project(self, x: Array, attention: Array, weight: Any, bias: Array | None, merge: Any = ...) -> Array:
        """x [T, D] and attention [T, H, Dh] -> x + attention @ weight.T (+ bias) [T, D]; merge: a ``layer.Merge`` or
        None."""

    def feed_forward(
        self, x: Array, gain: Array | None, eps: float, gate_up: Any, gate_up_bias: Array | None, down: Any,
        down_bias: Array | None, activation: Any = ..., merge: Any = ..., residual: Array | None = ...,
    ) -> Array:  # fmt: skip
        """x [T, D] -> x (or residual) + down(act(gate) * up) of the normed x [T, D]."""

    def experts(self, x: Array, gain: Array, eps: float, experts: Any, activation: Any, merge: Any) -> Array:
        """The same with the experts that a router chooses for each row; experts: a ``layer.Experts``."""

    def centred(self, x: Array) -> Array:
        """x [T, D] less each row's mean."""


class Ops(MemoryOps, RowOps, Protocol):
    """All that a backend does."""

    @property
    def name(self) -> str:
        """numpy, fast or cuda."""

    def weight(self, *parts: TensorInfo, half: int = ...) -> Weight:
        """A handle on ``parts`` [out_i, in] stacked along out; ``half``: see ``NumpyOps.weight``."""

    def vector(self, *parts: TensorInfo | int) -> Array:
        """Small tensors as one float32 [n]; a number stands for so many zeros."""

    def unpacked(self, weight: Any) -> Weight:
        """``weight`` ready for many rows; the caller drops it after use."""

    def decoder(self, model: Any, *, budget: bool = ...) -> Decoder | None:
        """The backend's own way to read one token of ``model`` (a ``models.Llama``), or None."""

    def computing(self) -> AbstractContextManager[None]:
        """Around every pass."""

    def angles(self, table: Any, positions: Array) -> tuple[Array, Array]:
        """positions [T] -> cos and sin [T, dims/2]; table: a ``models.rope.RopeTable``."""

    def embed(self, weight: Any, ids: Array) -> Array:
        """Rows ids [T] of weight [V, D] -> [T, D]."""

    def linear(self, x: Array, weight: Any, bias: Array | None = ...) -> Array:
        """x [T, in] @ weight.T (+ bias [out]) -> [T, out]."""

    def add_linear(self, x: Array, y: Array, weight: Any, bias: Array | None = ...) -> Array:
        """x [T, out] + y [T, in] @ weight.T (+ bias) -> [T, out]."""

    def head(self, x: Array, weight: Any) -> Array:
        """x [T, D] @ weight.T [D, V] -> logits [T, V] float32."""

    def rmsnorm(self, x: Array, gain: Array, eps: float) -> Array:
        """x [T, D] / sqrt(mean(x^2) + eps) * gain [D] -> [T, D]."""

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotate x [T, heads, Dh] in place by the rows' angles, cos and sin [T, half]."""

    def swiglu(self, gate_up: Array) -> Array:
        """silu(gate) * up; gate_up [T, 2F] -> [T, F]."""

    def geglu(self, gate_up: Array) -> Array:
        """gelu(gate) * up, by tanh; gate_up [T, 2F] -> [T, F]."""

    def attend(
        self, q: Array, k: Array, v: Array, out: Array | None = ..., reach: Reach = ...,
        *, places: np.ndarray | None = ..., first: np.ndarray | None = ..., cap: float = ..., precise: bool = ...,
        sinks: Array | None = ...,
    ) -> Array:  # fmt: skip
        """Causal attention by index: q [T, H, Dh], k and v [Hkv, N, Dh] -> [T, H, Dh]. The queries are those of the
        rows at ``places`` [T], ascending (None: the last), and see the keys up to their own; row t sees no key before
        ``first[t]``, scores are capped softly at ``cap`` (0: not). ``precise``: keys are large, so none of the factors
        may be rounded to fewer bits than float16 has. ``sinks`` [H]: a score more in each head's softmax, of no
        value."""

    def score_blocks(self, kind: str, q: Array, k: Array, block: int, unit: int) -> np.ndarray:
        """How much q [W, H, Dh] of the last rows want each block of k [Hkv, N, Dh] -> [B] on the host."""

    def block_mass(
        self, q: Array, k: Array, block: int, causal: bool, cap: float = ..., sinks: Array | None = ...
    ) -> np.ndarray:
        """The attention of q [W, H, Dh] by block of k [Hkv, N, Dh] -> [W, H, B] on the host; ``causal``: q are those of
        the last W rows, and see no later keys; else they see all."""

    def unit_means(self, k: Array, unit: int) -> Array:
        """Mean key of each run of ``unit`` rows: k [Hkv, N, Dh] -> [Hkv, ceil(N / unit), Dh]."""

    def columns(self, x: Array, columns: np.ndarray) -> Array:
        """x[:, columns]."""

    def take(self, x: Array, rows: np.ndarray) -> Array:
        """x[rows], a copy."""


class StreamingOps(Ops, Protocol):
    """A backend that takes weights from host memory, layer by layer."""

    def host_weight(self, *parts: TensorInfo) -> Weight:
        """``parts`` as ``weight`` would hold them, in host memory."""

    def placed_weight(self, parts: Sequence[tuple[str, Array, int]]) -> Weight:
        """A handle on packed rows that lie where the backend computes: (type, bytes, width) of each part."""


@dataclass(frozen=True)
class Fetched:
    """Keys and values that decode asked the host for: bytes, those of them that were there when compute came for them,
    and how often it had to wait for the others."""

    nbytes: int = 0
    in_time: int = 0
    waits: int = 0

    def __add__(self, other: Fetched) -> Fetched:
        return Fetched(self.nbytes + other.nbytes, self.in_time + other.in_time, self.waits + other.waits)

    def since(self, earlier: Fetched) -> Fetched:
        """What came after ``earlier``; all of it, where the cache was made again meanwhile."""
        if self.nbytes < earlier.nbytes:
            return self
        return Fetched(self.nbytes - earlier.nbytes, self.in_time - earlier.in_time, self.waits - earlier.waits)


class Cache(Protocol):
    """Per layer: keys and values [Hkv, N, Dh] (the backend's ``kv_type``) and positions [N], rows in the order of their
    positions.

    Layers may hold different rows (pruning), so each has its own length and positions are data, never offsets. A pass
    goes through the layers in order and calls ``update`` and then ``attended`` once for each; a pass that was broken
    off, wherever that was (Ctrl-C), is followed by ``truncate`` to where it began, as often as it takes.

    A ``Decoder`` that reads several tokens in a pass calls in each layer ``update`` for one after the other, and then
    ``attended``. Each gets what it would get by itself, and the cache, truncated to some of them, is as if the others
    had never come, also in what it chooses and in which order it gives rows.
    """

    @property
    def intact(self) -> bool:
        """False when rows were lost (a copy failed); only ``truncate(0)`` helps then."""

    def update(
        self, layer: int, k: Array, v: Array, positions: np.ndarray, q: Array | None, *, exact: bool = False
    ) -> tuple[Array, Array, np.ndarray]:
        """Append rows k, v [T, Hkv, Dh] at ``positions`` [T]; returns K, V [Hkv, N, Dh] and positions [N] to attend to.

        With T > 1 or ``exact`` these are all rows of the layer, in order. Else a cache may leave out rows that the
        query q [T, H, Dh] hardly wants, and order the rest as it likes (one query sees all of it). The arrays are
        valid until ``attended``. q is None where rows come from elsewhere than a pass.
        """

    def room(self, layer: int, rows: int) -> Array | None:
        """The layer's memory [2, Hkv, capacity, Dh] with room for ``rows`` more behind its last, for a backend that
        writes them itself; it moves when it grows. None where the cache decides what a query reads: ``update`` does it.
        """

    def appended(self, layer: int, positions: np.ndarray) -> None:
        """Rows at ``positions`` have been written behind the layer's last, within its ``room``."""

    def attended(self, layer: int) -> None:
        """The attention of ``layer`` has run: what ``update`` returned may be moved or overwritten."""

    def truncate(self, length: int) -> None:
        """Forget every row whose position is ``length`` or more, and a pass that was under way."""

    def clear(self, first_layer: int) -> None:
        """Forget every row of the layers from ``first_layer`` on; the pass goes on with new rows for them."""

    def length(self, layer: int) -> int:
        """How many rows a layer holds."""

    def positions(self, layer: int) -> np.ndarray:
        """The positions [N] of a layer's rows, ascending."""

    def rows(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All K, V [Hkv, N, Dh] and positions [N] of a layer, in order; valid until the next call.

        They may lie on the device or on the host: the backend's ``to_host`` takes both.
        """

    @property
    def fetched(self) -> Fetched:
        """What decode asked the host for since the cache was made."""

    def layer_nbytes(self, layer: int) -> tuple[int, int]:
        """Of ``nbytes_device`` and ``nbytes_host`` the share of one layer."""

    @property
    def nbytes_device(self) -> int:
        """Bytes of the rows, and what else serves them, that lie where the model computes (slack not counted)."""

    @property
    def nbytes_host(self) -> int:
        """Bytes of the rows that lie in host memory (slack not counted)."""

    def close(self) -> None:
        """Wait for what is under way and let go of the memory; the cache cannot be used any more."""


@dataclass(frozen=True)
class LentLayer:
    """A layer's resident rows: ``store`` [2, Hkv, slots * block, Dh], the block in each of the ``slots`` (the last has
    the newest row), what blocks were wanted for (``wishes``, when the layer had ``wished_at`` rows), where the host
    keeps complete blocks (``homes``, which grows), and their unit means [Hkv, U, Dh], which move when they grow."""

    store: Array
    slots: np.ndarray
    wishes: np.ndarray
    wished_at: int
    homes: Sequence[np.ndarray]
    means: Callable[[], Array]


@dataclass(frozen=True)
class Lent:
    """What a cache lends of each layer, and the settings by which blocks are chosen."""

    config: CacheConfig
    layers: Sequence[LentLayer]


class TakenBack(NamedTuple):
    """Of a layer what ``LentLayer`` has, as it is now; how often blocks were brought, and how many."""

    slots: np.ndarray
    wishes: np.ndarray
    wished_at: int
    swaps: int
    blocks: int


class Borrower(Protocol):
    """Who chooses in the place of a cache."""

    def give_back(self) -> Sequence[TakenBack]:
        """By layer, when all that was asked has been done. It may be asked again until it is told to ``let_go``."""

    def let_go(self) -> None:
        """The rows are the cache's again, or gone: nothing of them may be held any more."""


class Lender(Cache, Protocol):
    """A cache under a budget that lets a backend's decoder choose the blocks, and bring them, where it computes. Rows
    are then written into the last slot, and told by ``appended``."""

    def lend(self, scores: Sequence[str]) -> Lent | None:
        """The resident rows; None while they are not as a decoder needs them: rows that all fit, a score that is none
        of ``scores``."""

    def lent_to(self, borrower: Borrower) -> None:
        """It has them from here on, until anybody else asks for rows: then it is asked to give back."""

    def lends_to(self, borrower: Borrower) -> bool:
        """Whether it still has them."""

    def settled(self) -> None:
        """What is computed from here on runs after the copies of blocks to the host."""


@dataclass(frozen=True)
class Part:
    """Of a step of decode the ``tokens`` that follow each other in one conversation, the first at ``position``.
    ``middle``: a layer whose hidden states are wanted, or None."""

    cache: Cache
    tokens: Sequence[int]
    position: int
    middle: int | None = None


class Decoder(Protocol):
    """Made by a backend's ``decoder(model, budget=...)`` for caches with or without a budget of resident rows; None
    there: the engine goes through the layers as for many tokens."""

    @property
    def most(self) -> int:
        """How many tokens a step reads at once, at most: quicker than one by one, with the same bits."""

    def step(self, parts: Sequence[Part]) -> tuple[np.ndarray, Sequence[Any]]:
        """Read the tokens of ``parts``, ``most`` in all: their keys and values are appended to every layer of their
        caches; each looks at all up to its own, or at those that the cache chooses for it.

        Returns the logits [T, V] of all on the host (finite or not), and for each part the hidden states [T, D] of its
        ``middle`` between attention and feed-forward, where the model computes; new arrays.
        """
