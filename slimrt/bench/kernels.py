"""How fast each operation of a backend is, against the roofline of its machine: the same names on CPU and GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from slimrt.bench.shaped import about
from slimrt.bench.synthetic import SHAPES, random_tensor
from slimrt.bench.timing import Peaks, Timer, Work, measure_peaks, put
from slimrt.config import ModelConfig
from slimrt.errors import SettingError
from slimrt.ops.backend import open_backend
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.ops.protocol import Ops
from slimrt.output import counted

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["KernelResult", "KernelRow", "run"]

TYPES = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
FAST_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "IQ3_S")  # besides, on compiled kernels: a GPU unpacks them
_WINDOW, _BLOCK, _UNIT = 16, 64, 8  # of a prune plan's defaults

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Case:
    """One measurement: ``prepare`` makes the inputs and returns the work; ``flops`` and ``nbytes`` that it needs."""

    kernel: str
    shape: str
    flops: float
    nbytes: float
    prepare: Callable[[], Work]


@dataclass(frozen=True)
class KernelRow:
    """``seconds``: the median. ``rate`` is in ``unit`` (TFLOP/s or GB/s, whichever bounds the kernel); ``peak_share``:
    of the machine's peak in that; ``roofline_s``: what the work takes at least."""

    kernel: str
    shape: str
    seconds: float
    flops: float
    nbytes: float
    rate: float
    unit: str
    bound: str
    peak_share: float
    roofline_s: float


@dataclass(frozen=True)
class KernelResult:
    """``rows`` in the order of a layer; ``settings``, ``environment`` and ``peaks`` are plain data."""

    rows: tuple[KernelRow, ...]
    peaks: Peaks
    settings: dict[str, Any]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "settings": self.settings,
            "environment": self.environment,
            "peaks": dataclasses.asdict(self.peaks),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Table:
        """A rich table: time, rate, share of the peak, the roofline; the environment as its caption."""
        from rich.table import Table
        from rich.text import Text

        s = self.settings
        title = f"Kernels on {s['backend']}, {s['shape']}, {s['tokens']} tokens"
        table = Table(
            title=Text(title), title_justify="left", caption=Text(self._caption()), caption_justify="left", box=None,
            padding=(0, 1, 0, 0), pad_edge=False,
        )  # fmt: skip
        for heading in ("kernel", "shape", "time us", "rate", "", "% of peak", "roofline us", "bound by"):
            left = heading in ("kernel", "shape", "", "bound by")
            table.add_column(heading, justify="left" if left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.kernel,
                Text(row.shape),
                f"{row.seconds * 1e6:.1f}",
                f"{row.rate:.3g}",
                row.unit,
                f"{100 * row.peak_share:.1f}",
                f"{row.roofline_s * 1e6:.1f}",
                row.bound,
            )
        return table

    def _caption(self) -> str:
        peaks = self.peaks
        measured = (
            f"{peaks.flops / 1e12:.3g} TFLOP/s (a large product), {peaks.bandwidth / 1e9:.3g} GB/s (a large copy)"
        )
        lines = [f"medians of {counted(self.settings['repeats'], 'run')}; measured here: {measured}"]
        if peaks.theoretical_flops is not None and peaks.theoretical_bandwidth is not None:
            promised = f"{peaks.theoretical_flops / 1e12:.0f} TFLOP/s and {peaks.theoretical_bandwidth / 1e9:.0f} GB/s"
            lines.append(f"peak and roofline: {promised}, from the data sheet; the cache is flushed before each run")
        else:
            lines.append("peak and roofline: what was measured; a kernel whose data stay in the cache can exceed it")
        env = self.environment
        lines.append(f"{env['device']}; slimrt {env['slimrt']}, numpy {env['numpy']}, python {env['python']}")
        lines.append(f"{env['date']}, {env['system']}")
        return "\n".join(lines)


def run(
    device: str = "auto",
    shape: str = "smollm2-135m",
    tokens: int = 2048,
    repeats: int = 5,
    kernels: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> KernelResult:
    """Time the operations of ``device``'s backend at the sizes of ``shape`` (of ``SHAPES``) with ``tokens`` rows.

    ``kernels``: names to measure (none: all). Raises SettingError for values out of range or a name that is not known,
    DeviceError for a device that does not work.
    """
    if shape not in SHAPES:
        raise SettingError(f"shape {shape!r}: must be one of {', '.join(SHAPES)}")
    for name, value, least in (("tokens", tokens, _BLOCK), ("repeats", repeats, 1), ("threads", threads or 1, 1)):
        if value < least:
            raise SettingError(f"{name} {value}: must be at least {least}")
    ops = open_backend(device, threads=threads).ops
    config = SHAPES[shape]
    listed = list(_cases(ops, config, tokens, threads))
    known = list(dict.fromkeys(case.kernel for case in listed))
    for name in kernels:
        if name not in known:
            raise SettingError(f"kernel {name!r}: must be one of {', '.join(known)}")
    chosen = [case for case in listed if not kernels or case.kernel in kernels]
    large = shape != "tiny"
    timer = Timer(ops, repeats, *(() if large else (1 << 16,)))
    with ops.computing():
        cuda = ops.name == "cuda"
        peaks = measure_peaks(ops, timer, (8192 if cuda else 2048) if large else 128, (1 << 28) if large else 1 << 16)
        rows = []
        for number, case in enumerate(chosen):
            if progress:
                progress(number, len(chosen), f"{case.kernel} {case.shape}")
            rows.append(_row(case, timer.seconds(case.prepare()), peaks))
    if progress:
        progress(len(chosen), len(chosen), "")
    settings = {"backend": ops.name, "shape": shape, "tokens": tokens, "repeats": repeats, "kernels": list(kernels)}
    return KernelResult(tuple(rows), peaks, settings, about(ops))


def _row(case: Case, seconds: float, peaks: Peaks) -> KernelRow:
    least, bound = peaks.roofline(case.flops, case.nbytes)
    work, unit = (case.flops / 1e12, "TFLOP/s") if bound == "compute" else (case.nbytes / 1e9, "GB/s")
    return KernelRow(
        kernel=case.kernel,
        shape=case.shape,
        seconds=seconds,
        flops=case.flops,
        nbytes=case.nbytes,
        rate=work / seconds,
        unit=unit,
        bound=bound,
        peak_share=least / seconds,
        roofline_s=least,
    )


def _cases(ops: Ops, c: ModelConfig, tokens: int, threads: int | None) -> Iterator[Case]:
    """Every operation of a layer, at the sizes of ``c`` and with ``tokens`` rows."""
    rng = np.random.default_rng(0)
    item, kv_item = ops.empty((1,)).dtype.itemsize, np.dtype(ops.kv_type).itemsize
    # On NumPy weights lie unpacked; what unpacking costs shows where they do not.
    packs = ops.name != "numpy"
    packing = ops if packs else NumpyOps(threads, packed=True)
    q, kv, D, F = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.d_model, c.d_ff
    types = [
        kind
        for kind in (*TYPES, *(FAST_TYPES if ops.name == "fast" else ()))
        if D % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0
    ]

    def normal(*shape: int, dtype: Any = None) -> Any:
        row = rng.standard_normal(min(1 << 20, int(np.prod(shape)))).astype(np.float32)
        return put(ops, np.resize(row, shape), dtype)

    def keys(rows: int) -> tuple[Any, Any]:
        both = normal(2, c.n_kv_heads, rows, c.head_dim, dtype=ops.kv_type)
        return both[0], both[1]

    def matrix(kind: str, backend: Any, rows: int, columns: int) -> Any:
        return backend.weight(random_tensor("weight", kind, (rows, columns), rng))

    def embed() -> Work:
        weight = matrix("Q8_0", ops, c.vocab_size, D)
        ids = rng.integers(0, c.vocab_size, tokens)
        return lambda: ops.embed(weight, ids)

    yield Case("embed", f"[{tokens}, {D}] Q8_0", 0, tokens * D * (34 / 32 + 4), embed)

    def rmsnorm() -> Work:
        x, gain = normal(tokens, D, dtype=np.float32), normal(D, dtype=np.float32)
        return lambda: ops.rmsnorm(x, gain, 1e-5)

    yield Case("rmsnorm", f"[{tokens}, {D}]", 4 * tokens * D, tokens * D * (4 + item), rmsnorm)

    def rope() -> Work:
        x = normal(tokens, c.n_heads + c.n_kv_heads, c.head_dim)
        cos, sin = (normal(tokens, c.head_dim // 2, dtype=np.float32) for _ in range(2))
        return lambda: ops.rope(x, cos, sin)

    yield Case("rope", f"[{tokens}, {c.n_heads + c.n_kv_heads}, {c.head_dim}]", 3 * tokens * (q + kv),
               2 * item * tokens * (q + kv) + 4 * tokens * c.head_dim, rope)  # fmt: skip

    def swiglu() -> Work:
        x = normal(tokens, 2 * F)
        return lambda: ops.swiglu(x)

    yield Case("swiglu", f"[{tokens}, {F}]", 5 * tokens * F, 3 * item * tokens * F, swiglu)

    for kind in types:

        def dequantize(kind: str = kind) -> Work:
            weight = matrix(kind, packing, F, D)
            return lambda: packing.unpacked(weight)

        packed = random_tensor("weight", kind, (32, D), rng).nbytes * F // 32
        if kind != "F16" or ops.name != "cuda":  # float16 is what a GPU multiplies: nothing to unpack
            yield Case("dequantize", f"[{F}, {D}] {kind}", 0, packed + F * D * item, dequantize)

    for kind in types if packs else ["F32"]:

        def gemv(kind: str = kind) -> Work:
            weight, x = matrix(kind, ops, F, D), normal(1, D)
            return lambda: ops.linear(x, weight)

        held = random_tensor("weight", kind, (32, D), rng).nbytes * F // 32
        yield Case("gemv", f"[{F}, {D}] {kind}", 2 * F * D, held + item * (F + D), gemv)

    def gemm() -> Work:
        weight, x = ops.unpacked(matrix("F16", ops, F, D)), normal(tokens, D)
        return lambda: ops.linear(x, weight)

    yield Case("gemm", f"[{tokens}, {D}] x [{F}, {D}]", 2 * tokens * F * D, item * (tokens * (D + F) + F * D), gemm)

    def prefill() -> Work:
        (k, v), x = keys(tokens), normal(tokens, c.n_heads, c.head_dim)
        return lambda: ops.attend(x, k, v)

    yield Case("attention_prefill", f"[{tokens}, {c.n_heads}/{c.n_kv_heads}, {c.head_dim}] causal",
               2 * tokens * (tokens + 1) * q, 2 * tokens * (item * q + kv_item * kv), prefill)  # fmt: skip

    def decode() -> Work:
        (k, v), x = keys(tokens), normal(1, c.n_heads, c.head_dim)
        return lambda: ops.attend(x, k, v)

    yield Case("attention_decode", f"[1, {c.n_heads}/{c.n_kv_heads}, {c.head_dim}] x {tokens}", 4 * tokens * q,
               2 * kv_item * tokens * kv, decode)  # fmt: skip

    def means() -> Work:
        k, _ = keys(tokens)
        return lambda: ops.unit_means(k, _UNIT)

    yield Case("unit_means", f"[{c.n_kv_heads}, {tokens}, {c.head_dim}]", tokens * kv,
               tokens * kv * (kv_item + item / _UNIT), means)  # fmt: skip

    for score in ("token_mass", "unit_softmax"):

        def scores(score: str = score) -> Work:
            (k, _), x = keys(tokens), normal(_WINDOW, c.n_heads, c.head_dim)
            return lambda: ops.score_blocks(score, x, k, _BLOCK, _UNIT)

        seen = tokens if score == "token_mass" else tokens / _UNIT
        yield Case(
            "block_scores", f"{score}, {_WINDOW} x {tokens}", 2 * _WINDOW * seen * q, kv_item * tokens * kv, scores
        )

    def compact() -> Work:
        x, rows = normal(tokens, D, dtype=np.float32), np.arange(0, tokens, 2)
        return lambda: ops.take(x, rows)

    yield Case("compact", f"[{tokens}, {D}] to {-(-tokens // 2)}", 0, 2 * 4 * -(-tokens // 2) * D, compact)
