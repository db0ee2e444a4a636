"""How much memory a model will take, worked out before anything is loaded, and how much there is. Pure arithmetic."""

from __future__ import annotations

import bisect
import ctypes
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from slimrt.config import CacheConfig, ModelConfig
from slimrt.errors import SettingError
from slimrt.ops import control_groups
from slimrt.ops.numpy.attention import KEY_TILE, MASKED_SCORES, QUERY_TILE
from slimrt.ops.numpy.numpy_ops import ROW_CHUNK
from slimrt.ops.numpy.workers import available_cores
from slimrt.row_blocks import STEP, block_row_floats, row_blocks, rows_at_a_time
from slimrt.weights.gguf import GGUFFile

__all__ = ["DEFAULT_CTX", "MemoryPlan", "MemoryRow", "available_memory", "largest_context", "plan"]

DEFAULT_CTX = 8192  # not the trained context: 128k of it would take the memory of a short question's user
_ADVISED = 0.95  # share of the free memory that an advised context takes
# What a process takes besides the model: interpreter, libraries, compiled kernels; and for each token of the
# vocabulary. Measured with Python 3.11 on Linux; a test holds the whole plan against what a process takes.
_RUNTIME, _FAST_RUNTIME, _TOKEN = 125 << 20, 175 << 20, 1024
_FLOATS = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
_FLOAT = 4  # bytes of the float32 that everything is computed in


@dataclass(frozen=True)
class MemoryRow:
    """One line of the plan: ``part``, its ``nbytes``, and ``note``, what it depends on."""

    part: str
    nbytes: int
    note: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model takes on a CPU backend, for a prompt that fills the context of ``ctx`` tokens.

    ``fast``: on compiled kernels, else NumPy. ``weights``: float32 where they are unpacked, else (``packed``) the bytes
    of the file, mapped. ``kv_per_token``: keys and values of one token over all layers; ``kv``: those of ``ctx``
    tokens, or under a budget those that stay resident, with the mean keys of all units; ``kv_host``: then those of
    ``ctx`` tokens, and the staging slots that they pass through. ``boundary``: the hidden states that a pruned prompt
    leaves for further questions. ``scratch``: what prefill of the whole context takes besides. ``runtime``:
    interpreter, libraries, kernels and vocabulary. ``available``: free memory when the plan was made, None where that
    is unknown.
    """

    ctx: int
    fast: bool
    packed: bool
    weights: int
    kv_per_token: int
    kv: int
    boundary: int
    scratch: int
    available: int | None
    kv_host: int = 0
    runtime: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.kv_host + self.boundary + self.scratch + self.runtime

    def fits(self) -> bool:
        """Whether ``total`` is available; True where it is unknown what is."""
        return self.available is None or self.total <= self.available

    def rows(self) -> list[MemoryRow]:
        """The plan as the lines of a table, the total last."""
        if self.available is None:
            note = "free memory unknown on this system"
        else:
            note = f"{'fits into' if self.fits() else 'exceeds'} the {self.available / 2**30:.1f} GiB that are free"
        return [
            MemoryRow("weights", self.weights, "packed as in the file" if self.packed else "unpacked to float32"),
            MemoryRow(
                "KV cache, 1k tokens",
                1024 * self.kv_per_token,
                f"{'float16' if self.fast else 'float32'}; part of the next line",
            ),
            *self._kv_rows(),
            MemoryRow("hidden states", self.boundary, "of a pruned prompt, for further questions"),
            MemoryRow("scratch", self.scratch, "while a prompt of the whole context is read"),
            MemoryRow("runtime", self.runtime, "interpreter, libraries, kernels, vocabulary"),
            MemoryRow("total", self.total, note),
        ]

    def _kv_rows(self) -> list[MemoryRow]:
        grows = f"{self.ctx} tokens; grows as they come"
        if not self.kv_host:
            return [MemoryRow("KV cache, whole context", self.kv, grows)]
        return [
            MemoryRow("KV cache, resident", self.kv, "the budget, and mean keys of all units"),
            MemoryRow("KV cache, behind it", self.kv_host, grows),
        ]


def plan(
    config: ModelConfig,
    file: GGUFFile,
    ctx: int,
    *,
    threads: int | None = None,
    packed: bool | None = None,
    available: int | None = None,
    fast: bool = False,
    kv_budget: int | None = None,
) -> MemoryPlan:
    """The memory plan of a model on a CPU backend.

    ``threads`` None: all cores. ``fast``: compiled kernels, which keep weights packed, else NumPy. ``packed`` None:
    weights are unpacked if their float32 form takes at most half of the memory that is free. ``available`` None: ask
    the system. ``kv_budget``: rows of each layer that stay resident (None: all). Raises SettingError if ``ctx`` is
    below 1 or the budget too small.
    """
    if ctx < 1:
        raise SettingError(f"ctx {ctx}: must be at least 1")
    available = available_memory() if available is None else available
    dense = config.n_params * _FLOAT
    if fast:
        packed = True
    elif packed is None:
        packed = available is not None and dense > available / 2
    threads = threads or available_cores()
    kv_per_token = config.kv_bytes_per_token // (2 if fast else 1)
    cache = CacheConfig(ctx, kv_budget)
    budgeted = cache.budget is not None
    scratch = (
        _fast_scratch(config, ctx, threads, budgeted, _factor_bytes(file))
        if fast
        else _prefill_scratch(config, ctx, threads, packed, budgeted) * _FLOAT
    )
    kv, kv_host = _budgeted(config, cache, kv_per_token)
    return MemoryPlan(
        ctx=ctx,
        fast=fast,
        packed=packed,
        weights=_packed_weights(file, fast) if packed else dense,
        kv_per_token=kv_per_token,
        kv=kv,
        kv_host=kv_host,
        boundary=ctx * config.d_model * _FLOAT,
        scratch=scratch,
        available=available,
        runtime=(_FAST_RUNTIME if fast else _RUNTIME) + config.vocab_size * _TOKEN,
    )


def _packed_weights(file: GGUFFile, fast: bool) -> int:
    """Bytes of the tensors as they lie in the file, but for matrices that compiled kernels hold as bfloat16."""
    if not fast:
        return sum(tensor.nbytes for tensor in file.tensors.values())
    from slimrt.ops.fast.dots import FORMATS

    total = 0
    for tensor in file.tensors.values():
        widened = len(tensor.shape) > 1 and tensor.type not in FORMATS
        total += 2 * math.prod(tensor.shape) if widened else tensor.nbytes
    return total


def _budgeted(config: ModelConfig, cache: CacheConfig, kv_per_token: int) -> tuple[int, int]:
    """Bytes of resident keys, values and means, and of those behind them: nothing without a budget, or within it."""
    if not cache.offloads:
        return cache.ctx * kv_per_token, 0
    means = cache.ctx // cache.unit + cache.ctx // cache.block // cache.group
    # Layers with windows of their own keep all rows where the model computes.
    layer, budgeted = kv_per_token // config.n_layers, len(config.sees_all())
    resident = cache.slots * cache.block * layer * budgeted + means * layer * budgeted // 2  # means of keys only
    resident += cache.ctx * layer * (config.n_layers - budgeted)
    staging = (1 + cache.lookahead) * cache.ctx * layer if budgeted else 0
    return resident, cache.ctx * layer * budgeted + staging


def largest_context(
    config: ModelConfig,
    file: GGUFFile,
    ctx: int,
    *,
    threads: int | None = None,
    available: int | None = None,
    fast: bool = False,
    kv_budget: int | None = None,
) -> int:
    """The most tokens below ``ctx``, in steps of 256, whose plan fits with a little to spare; 0 if not even 256 do.

    To spare, since it is advised to somebody who will try it a moment later, when a little less may be free.
    """
    steps = range(0, ctx, 256)
    available = available_memory() if available is None else available
    if available is not None:
        available = int(available * _ADVISED)

    def fits(size: int) -> bool:
        budget = None if kv_budget is None or kv_budget >= size else kv_budget
        return plan(config, file, size, threads=threads, available=available, fast=fast, kv_budget=budget).fits()

    # Plans grow with the context, so the first that does not fit can be searched by halves.
    first = bisect.bisect_left(
        steps,
        True,
        key=lambda size: size > 0 and not fits(size),
    )
    return steps[first - 1] if first else 0


def _prefill_scratch(c: ModelConfig, ctx: int, threads: int, packed: bool, budgeted: bool) -> int:
    """Floats alive at the peak of ``Engine.prefill`` with T = ctx, weights and cache excluded."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    angles = c.rope.dims * (2 if c.local_rope else 1)
    # While the layer attends: x, q, k, v, the result, the keys with their extra column, angles. In the feed-forward:
    # x before and after, q, k, v, angles.
    if len(row_blocks(ctx, rows_at_a_time(c))) == 1:
        attending = c.d_model + 2 * q + 2 * kv + c.n_kv_heads * (c.head_dim + 1) + angles
        rows = ctx * max(attending, 2 * c.d_model + q + 2 * kv)
    else:
        rows = ctx * (_whole_row(c, budgeted) + c.n_kv_heads * (c.head_dim + 1) + angles) + _block(c)
    group = c.n_heads // c.n_kv_heads
    tile = QUERY_TILE * group * (KEY_TILE + 4 * c.head_dim)
    chunk = min(ctx, ROW_CHUNK) * (4 * c.d_ff + 3 * c.d_model)
    if c.windows or c.attention_cap or c.sinks:  # scores of a mask of its own, and what the softmax makes of them
        tile = max(tile, 3 * MASKED_SCORES)
    if c.experts:  # all rows normed and mixed, and those of one expert on their way
        rows += ctx * (2 * c.d_model + 4 * c.d_ff + 2 * c.d_model)
    unpacked = 0
    if packed:
        unpacked = c.d_model * (2 * q + 2 * kv + 3 * c.d_ff)
    return rows + threads * max(tile, chunk) + c.vocab_size + unpacked


def _whole_row(c: ModelConfig, budgeted: bool) -> int:
    """Floats of each row of a prompt that passes a layer in blocks: x, and in layers under a budget all of q, k, v as
    well; in a mixture x before and after."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return max(c.d_model * (2 if c.experts else 1), c.d_model + q + 2 * kv if budgeted else 0)


def _block(c: ModelConfig) -> int:
    """Floats of the largest block of rows on its way through a layer."""
    return (rows_at_a_time(c) + STEP - 1) * block_row_floats(c)


def _factor_bytes(file: GGUFFile) -> int:
    """Of a number in the panels that compiled kernels make of a layer's matrices, for the widest of these."""
    from slimrt.ops.fast.dots import FORMATS
    from slimrt.ops.fast.features import detect
    from slimrt.ops.fast.products import packed_shape, shape_of

    matrices = [t for t in file.tensors.values() if t.name.startswith("blk.") and len(t.shape) > 1]
    kinds = {t.type for t in matrices if not t.name.endswith("ffn_gate_inp.weight")}  # routers are small
    packed = kinds <= FORMATS - _FLOATS
    return (packed_shape if packed else shape_of)(detect()).element_bytes


def _fast_scratch(c: ModelConfig, ctx: int, threads: int, budgeted: bool, factor: int) -> int:
    """Bytes alive at the peak of ``Engine.prefill`` on compiled kernels; ``factor``: of a number in a layer's panels.
    Rows of factors are counted as float32, the widest kind."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    # While the layer attends: x, q, the result, angles, k and v in float16, their panels. In the feed-forward: x before
    # and after in place of one of q and the result, no panels.
    angles = c.rope.dims * (2 if c.local_rope else 1)
    if len(row_blocks(ctx, rows_at_a_time(c))) == 1:
        row, block = _FLOAT * (max(c.d_model + 2 * q, 2 * c.d_model + q) + angles + 3 * kv), 0
    else:
        row, block = _FLOAT * (_whole_row(c, budgeted) + angles + 2 * kv), _FLOAT * _block(c)
    if c.experts:  # all rows normed and mixed, those of one expert, and its result
        row += _FLOAT * 4 * c.d_model
    panels = factor * c.d_model * (2 * q + 2 * kv + 3 * c.d_ff)
    tile = KEY_TILE * c.n_heads // c.n_kv_heads * (2 * c.head_dim + 2)
    slice_ = ROW_CHUNK * (2 * c.d_model + max(c.d_ff, q + 2 * kv))
    return ctx * row + block + panels + _FLOAT * (threads * max(tile, slice_) + c.vocab_size)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take without swapping, None where the system does not say.

    Linux: the least of /proc/meminfo's MemAvailable and what the control groups (v1 and v2) leave, caches that can be
    dropped counted as free. Windows: free physical memory. Elsewhere (macOS) the standard library knows the installed
    memory only, and that is returned. ``root``: where /proc and /sys lie.
    """
    if sys.platform == "win32":
        return _windows_memory()
    meminfo = _numbers(root / "proc/meminfo")
    if "MemAvailable" in meminfo:
        return max(0, min([meminfo["MemAvailable"] * 1024, *_control_group_room(root)]))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _control_group_room(root: Path) -> list[int]:
    """Room left in each memory control group that the process is in (a child's limit may be above its parent's)."""
    room: list[int] = []
    for version, folder in control_groups.folders("memory", root):
        if version == 2:
            limit, usage, droppable = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage, droppable = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        most, used = control_groups.read(folder / limit).strip(), control_groups.read(folder / usage).strip()
        if most.isdigit() and used.isdigit():
            room.append(int(most) - int(used) + _numbers(folder / "memory.stat").get(droppable, 0))
    return room


def _numbers(path: Path) -> dict[str, int]:
    """Lines such as ``MemAvailable:  1024 kB`` or ``inactive_file 1024`` -> {name: number}."""
    fields = (line.replace(":", " ").split() for line in control_groups.read(path).splitlines())
    return {field[0]: int(field[1]) for field in fields if len(field) > 1 and field[1].isdigit()}


def _windows_memory() -> int | None:
    class Status(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = (("length", ctypes.c_uint32), ("load", ctypes.c_uint32), ("sizes", ctypes.c_uint64 * 7))

    status = Status(length=ctypes.sizeof(Status))
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009  # absent from the type stubs of other systems
    return int(status.sizes[1]) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None
