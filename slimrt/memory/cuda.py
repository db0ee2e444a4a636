"""How much of a GPU's memory a model will take, worked out before anything is loaded. Pure arithmetic.

The terms follow ``Engine.prefill`` on ``CupyOps`` line by line: what is alive at its peak, with the whole context as
the prompt.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from slimrt.config import CacheConfig, ModelConfig
from slimrt.kv.host_blocks import host_slabs
from slimrt.memory.plan import MemoryRow
from slimrt.models.stream import SLOTS, layer_bytes
from slimrt.ops.cuda.checked import HEAD_WIDTHS
from slimrt.ops.cuda.cupy_ops import ROW_CHUNK, row_chunk
from slimrt.ops.cuda.device import CudaDevice
from slimrt.ops.cuda.element import ELEMENTS, ElementName, element_of
from slimrt.ops.cuda.weights import PACKED_TYPES, packed_nbytes
from slimrt.weights.gguf import GGUFFile

__all__ = ["CudaPlan", "Weights", "fit", "largest_context", "place_weights", "plan", "unsupported"]

_HALF, _FLOAT = 2, 4  # bytes: activations, keys, values; the residual stream and the logits
_CONTEXT = 800 << 20  # of CUDA, its modules and cuBLAS's workspace
_SLACK = 1.03  # the pool rounds sizes up and splits what it gives out


@dataclass(frozen=True)
class CudaPlan:
    """Bytes that a model takes on one GPU, for a prompt that fills the context of ``ctx`` tokens.

    ``element``: the type of activations, keys and values. ``weights``: packed. ``unpacked``: one layer of them in that
    type, while a prompt is read, or where memory is plentiful (``keeps``) all that do not have it anyway, which then
    stay for the next prompt. ``kv``: keys
    and values on the device, all or (under a budget) the resident ones with the means of units; ``ring``: the staging
    slots of a budget. ``boundary``: the hidden states that a pruned prompt leaves for further questions. ``rows``: what
    a prompt's tokens hold while they pass a layer; ``scratch``: what the rows that pass the feed-forward together take
    besides. ``context``: CUDA itself. ``host``: page-locked host memory for keys and values, ``streamed``: the same for
    weights. ``available``: free memory of the device.
    """

    ctx: int
    weights: int
    unpacked: int
    keeps: bool
    kv: int
    ring: int
    boundary: int
    rows: int
    streamed: int
    scratch: int
    context: int
    host: int
    available: int
    element: ElementName = "f16"

    @property
    def total(self) -> int:
        """Bytes of the device."""
        parts = self.weights + self.unpacked + self.kv + self.ring + self.boundary + self.rows + self.scratch
        return self.context + int(parts * _SLACK)

    def fits(self) -> bool:
        return self.total <= self.available

    def table(self) -> list[MemoryRow]:
        """The plan as the lines of a table, the total last."""
        verdict, words = "fits into" if self.fits() else "exceeds", ELEMENTS[self.element].words
        return [
            MemoryRow("weights", self.weights, "two layers at a time" if self.streamed else "packed"),
            MemoryRow(
                "layers unpacked" if self.keeps else "one layer unpacked",
                self.unpacked,
                f"{words}, kept from prompt to prompt" if self.keeps else f"{words}, while a prompt is read",
            ),
            MemoryRow(
                "KV cache",
                self.kv,
                f"{self.ctx} tokens, {words}" if not self.host else f"what the budget keeps resident, {words}",
            ),
            MemoryRow("staging slots", self.ring, "through which the other keys and values pass"),
            MemoryRow("hidden states", self.boundary, "of a pruned prompt, for further questions"),
            MemoryRow("rows", self.rows, "of a prompt of the whole context, within a layer"),
            MemoryRow("scratch", self.scratch, "of the rows that pass the feed-forward together"),
            MemoryRow("CUDA", self.context, "context, modules, cuBLAS"),
            MemoryRow("total", self.total, f"{verdict} the {self.available / 2**30:.1f} GiB that are free"),
            MemoryRow("host memory", self.host + self.streamed, "page-locked, for keys, values, streamed weights"),
        ]

    def refusal(self, room: int) -> str:
        """Why this plan cannot be carried out, in one line; ``room``: the largest context that fits, 0 if none does."""
        gib = {name: getattr(self, name) / 2**30 for name in ("weights", "kv", "ring", "boundary", "rows", "scratch")}
        parts = ", ".join(f"{name} {size:.1f}" for name, size in gib.items())
        if room:
            remedy = f"a context of {room} fits (ctx={room}, --ctx {room})"
        elif self.weights + self.context > self.available:
            stream = "" if self.streamed else "stream them (stream_weights=True, --stream-weights), "
            remedy = f"its weights alone exceed the GPU; {stream}use a smaller model or quantisation, or device='cpu'"
        else:
            remedy = "use a smaller model or quantisation, or device='cpu'"
        if room and not self.host:
            remedy += ", and so may this one with a KV budget (kv_budget=4096, --kv-budget 4k)"
        return (
            f"the model needs {self.total / 2**30:.1f} GiB of the GPU at a context of {self.ctx} ({parts}), "
            f"{self.available / 2**30:.1f} GiB are free; {remedy}"
        )


def plan(
    config: ModelConfig,
    weights: Weights,
    cache: CacheConfig,
    available: int,
    chunk: int = ROW_CHUNK,
    *,
    keeps: bool = False,
    element: ElementName = "f16",
) -> CudaPlan:
    """The plan for a context of ``cache.ctx`` tokens, ``chunk`` of which pass the feed-forward together; ``keeps``:
    with all layers unpacked."""
    c, tokens = config, cache.ctx
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    chunk = min(tokens, chunk)
    # project: x, the attention's result, q, k, v. The next layer's qkv: x, and q, k, v twice.
    x, qkv = _FLOAT * c.d_model, _HALF * (q + 2 * kv)
    rows = tokens * (x + max(_HALF * q + qkv, 2 * qkv) + _FLOAT * c.rope.dims)
    feed_forward = _HALF * (c.d_model + 2 * c.d_ff + c.d_ff)
    joint = _HALF * (c.d_model + q + 2 * kv)
    kv_row = 2 * _HALF * kv
    if cache.budget is None:
        resident, ring, host = c.n_layers * kv_row * tokens, 0, 0
    else:
        kept = min(cache.slots * cache.block, tokens)
        # Mean keys of units and of groups of blocks; their room doubles when it grows.
        means = 2 * (-(-tokens // cache.unit) + tokens // cache.block // cache.group) * kv_row // 2
        resident = c.n_layers * (kept * kv_row + means)
        whole = -(-tokens // cache.block) * cache.block
        ring = (1 + cache.lookahead) * whole * kv_row
        blocks, slabs = host_slabs(cache)
        host = c.n_layers * slabs * blocks * cache.block * kv_row if cache.offloads else 0
    return CudaPlan(
        ctx=tokens,
        weights=weights.device,
        streamed=weights.host,
        unpacked=weights.unpacked if keeps else _HALF * c.d_model * (2 * q + 2 * kv + 3 * c.d_ff),
        keeps=keeps,
        kv=resident,
        ring=ring,
        boundary=tokens * x,
        rows=rows,
        scratch=chunk * max(feed_forward, joint) + _FLOAT * c.vocab_size,
        context=_CONTEXT,
        host=host,
        available=available,
        element=element,
    )


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights on the device, and in page-locked host memory where the layers are streamed. ``unpacked``:
    what the layers' matrices that are not of the element take in it."""

    device: int
    host: int = 0
    unpacked: int = 0


def place_weights(file: GGUFFile, *, stream: bool = False, element: ElementName = "f16") -> Weights:
    """What the tensors take: packed, or in 16 bits where there is no kernel for their type."""
    resident, unpacked, layers = 0, 0, dict[str, list[int]]()
    for name, tensor in file.tensors.items():
        matrix = len(tensor.shape) > 1
        if not matrix:
            nbytes = _FLOAT * math.prod(tensor.shape)
        elif tensor.type in PACKED_TYPES:
            nbytes = packed_nbytes(tensor.type.name, *tensor.shape)
        else:
            nbytes = _HALF * math.prod(tensor.shape)
        layer = matrix and name.startswith("blk.")
        if layer and tensor.type in PACKED_TYPES and tensor.type.name != ELEMENTS[element].weights:
            unpacked += _HALF * math.prod(tensor.shape)
        if stream and layer:
            layers.setdefault(name.split(".")[1], []).append(nbytes)
        else:
            resident += nbytes
    sizes = [layer_bytes(parts) for parts in layers.values()]
    return Weights(resident + SLOTS * max(sizes, default=0), sum(sizes), unpacked)


def largest_context(
    config: ModelConfig, weights: Weights, cache: CacheConfig, available: int, chunk: int = ROW_CHUNK
) -> int:
    """The most tokens below ``cache.ctx``, in steps of 256, whose plan fits; 0 if not even 256 do."""
    steps = range(0, cache.ctx, 256)

    def exceeds(tokens: int) -> bool:
        smaller = CacheConfig(tokens, cache.budget, block=cache.block, unit=cache.unit) if tokens else None
        return smaller is not None and not plan(config, weights, smaller, available, chunk).fits()

    first = bisect.bisect_left(steps, True, key=exceeds)
    return steps[first - 1] if first else 0


def unsupported(config: ModelConfig) -> str | None:
    """Why the GPU's kernels cannot run a model of these sizes, in one line, or None."""
    for lacking, what in (
        (config.parallel, "attention and feed-forward side by side"),
        (config.experts, "mixtures of experts"),
        (config.sinks, "sinks of attention"),
        (config.query_growth, "queries that grow with their position"),
    ):
        if lacking:
            return f"the GPU backend lacks {what}, which {config.arch} has; use device='cpu' (--device cpu)"
    if config.head_dim not in HEAD_WIDTHS:
        return (
            f"the model's heads are {config.head_dim} wide, the GPU's attention kernels take "
            f"{', '.join(map(str, HEAD_WIDTHS))}; use device='cpu' (--device cpu)"
        )
    for name, width in (("hidden states", config.d_model), ("feed-forward", config.d_ff)):
        if width % 32:
            return f"the model's {name} are {width} wide, the GPU's kernels take multiples of 32; use device='cpu'"
    return None


def fit(
    config: ModelConfig, file: GGUFFile, cache: CacheConfig, gpu: CudaDevice, *, stream: bool = False
) -> tuple[CudaPlan, str | None]:
    """The plan of a model on ``gpu``, and in one line why it cannot be carried out there, or None."""
    element = element_of(file)
    weights = place_weights(file, stream=stream, element=element)
    chunk = row_chunk(gpu.total)
    chosen = plan(config, weights, cache, gpu.free, chunk, element=element)
    if weights.unpacked and not stream:
        plentiful = plan(config, weights, cache, gpu.free, chunk, keeps=True, element=element)
        chosen = plentiful if plentiful.fits() else chosen
    problem = unsupported(config)
    if problem is None and not chosen.fits():
        problem = chosen.refusal(largest_context(config, weights, cache, gpu.free, chunk))
    return chosen, problem
