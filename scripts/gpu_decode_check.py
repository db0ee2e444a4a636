"""One token on a card: whether the products are right at real sizes, and how fast they and a whole token are.

    python3 scripts/gpu_decode_check.py [--only right,speed,variants,token] [--types Q4_0,F16] [--old FOLDER]
                                        [--out FILE] [--dry]

Works from a checkout with CuPy, NumPy and gguf, within a minute. Each row is printed, and written to ``--out``, when
it is known; a failure is reported, the rest goes on, and the exit status says so. ``--old``: a folder with an earlier
``gemv.cu`` and ``quant.cuh``, which read the file's bytes, to be timed beside today's. ``--dry``: on the emulation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import gpu_layout

gpu_layout.install()

Array = Any
POOL = 500  # different rows of a matrix, which repeat: all rows are checked
SHAPES = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (128256, 4096))
TYPES = ("Q4_0", "Q4_K", "F16", "Q8_0", "Q6_K", "Q4_1", "Q5_0", "Q5_1", "Q5_K", "BF16")
BEYOND_CACHE = 200 << 20  # bytes that the matrices of one timing have together


class Report:
    """Rows, printed and written one by one."""

    def __init__(self, out: Path | None) -> None:
        self._out, self._rows, self.failures = out, list[dict[str, Any]](), 0

    def row(self, what: str, **values: Any) -> None:
        shown = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        print(f"{what:9s} {shown}", flush=True)
        self._rows.append({"what": what, **values})
        if self._out is not None:
            self._out.write_text(json.dumps(self._rows, indent=1, default=str))

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.failures += 1
            self.row("FAILED", step=what, error=f"{type(error).__name__}: {error}"[:400])
            traceback.print_exc(limit=4)


class Bench:
    """The backend and what is measured on it."""

    def __init__(self, report: Report, dry: bool) -> None:
        from slimrt.ops.cuda.cupy_ops import CupyOps

        self.ops, self.report, self.dry = CupyOps(), report, dry
        self.shapes = ((48, 256), (32, 512)) if dry else SHAPES
        self.random = np.random.default_rng(0)
        self.copy_rate = 1.0
        self._pools: dict[tuple[str, int], Any] = {}

    # -- ingredients ------------------------------------------------------------------------------------------------

    def pool(self, kind: str, width: int) -> Any:
        """A tensor [POOL, width] of random bits and random scales."""
        from tests.packed_weights import packed

        if (kind, width) not in self._pools:
            self._pools[kind, width] = packed(kind, POOL, width)
        return self._pools[kind, width]

    def exact(self, kind: str, width: int) -> Array:
        """The pool as gguf dequantises it, float32 [POOL, width]."""
        from gguf.quants import dequantize

        tensor = self.pool(kind, width)
        data = np.asarray(tensor.data).reshape(POOL, -1)
        return dequantize(data if kind == "F16" else data.view(np.uint8), tensor.type).reshape(POOL, width)

    def packed(self, kind: str, rows: int, width: int, half: int = 8) -> Any:
        """A matrix whose row i is row i % POOL of the pool, on the device."""
        from slimrt.ops.cuda.weights import CELLS, Packed, packed_nbytes

        ops, tensor = self.ops, self.pool(kind, width)
        data = ops.empty((packed_nbytes(kind, rows, width),), np.uint8)
        lines = np.ascontiguousarray(tensor.data).reshape(POOL, -1).view(np.uint8)
        staged = ops.upload(lines.reshape(-1))
        for first in range(0, rows, POOL):
            count = min(POOL, rows - first)
            if kind in CELLS:
                grid = (-(-count * width // 32 // 128),)
                ops.kernels.launch(
                    "repack", "repack", grid, 128, staged, data, first, count, rows, width, half, TYPE=kind
                )
            else:
                data[first * lines.shape[1] : (first + count) * lines.shape[1]] = staged[: count * lines.shape[1]]
        return Packed(kind, data, rows, width, half)

    def copies(self, part: Any) -> list[Any]:
        """``part`` and copies of it, more than a cache holds."""
        import dataclasses

        count = 2 if self.dry else max(2, min(64, -(-BEYOND_CACHE // part.data.nbytes)))
        return [part, *(dataclasses.replace(part, data=self.ops.copied(part.data)) for _ in range(count - 1))]

    def seconds(self, launches: list[Callable[[], Any]]) -> float:
        """Of one launch, in a graph of all of them in turn; the median of 7 replays, each 8 ms or more long."""
        ops = self.ops
        graph = ops.capture(lambda: [launch() for launch in launches])
        once = ops.elapsed(graph.launch)
        times = 1 if self.dry else max(1, int(8e-3 / max(once, 1e-6)))
        runs = [
            ops.elapsed(lambda: [graph.launch() for _ in range(times)]) / times for _ in range(1 if self.dry else 7)
        ]
        return statistics.median(runs) / len(launches)

    # -- steps ------------------------------------------------------------------------------------------------------

    def limits(self) -> None:
        ops, size = self.ops, 1 << (16 if self.dry else 30)
        a, b = ops.empty((size,), np.uint8), ops.empty((size,), np.uint8)
        a[...] = 1

        def copy() -> None:
            b[...] = a

        copy()
        self.copy_rate = 2 * size / statistics.median(ops.elapsed(copy) for _ in range(9))
        self.report.row("limits", device=str(ops.device), copy_gb_s=self.copy_rate / 1e9)

    def right(self, kind: str) -> None:
        """Every row of every shape against gguf's dequantisation in float64; three ways through a layer."""
        from slimrt.ops.cuda.weights import CudaWeight, unpack

        ops = self.ops
        for rows, width in self.shapes:
            weights = self.exact(kind, width)
            x = self.random.standard_normal(width).astype(np.float16)
            part = self.packed(kind, rows, width)
            out = ops.empty((1, rows), np.float32)
            out[...] = np.float32(np.nan)
            ops.few_linear(ops.upload(x[None]), CudaWeight((part,)), None, None, out)
            exact = weights.astype(np.float64) @ x.astype(np.float64)
            # Naive: weights rounded to 16 bits, summed in float32; F16 is exact there but for the sum.
            unit = np.abs(weights.astype(np.float16).astype(np.float32) @ x.astype(np.float32) - exact).max()
            exact = exact[np.arange(rows) % POOL]
            error = np.abs(ops.to_host(out)[0] - exact)
            relative = float(np.linalg.norm(error) / np.linalg.norm(exact))
            row = {"type": kind, "shape": [rows, width], "error": float(error.max()), "naive": float(unit)}
            good = bool(
                error.max() <= max(3 * unit, 1e-5 * np.abs(exact).max())
            )  # what is not finite compares as wrong
            many = ops.to_host(unpack(CudaWeight((part,)), ops, ops.kernels)[: 2 * POOL])
            with np.errstate(over="ignore"):
                half = weights.astype(np.float16)[np.arange(len(many)) % POOL]
            good &= bool(np.array_equal(many, half))
            self.report.row(
                "right", **row, relative=relative, dequantized=bool(np.array_equal(many, half)), verdict=good
            )
            self.report.failures += not good
        self._gated(kind)

    def _gated(self, kind: str) -> None:
        """norm, gate and up, and their product, in one launch, against float64."""
        from slimrt.ops.cuda.weights import CudaWeight

        ops = self.ops
        count, width = (24, 256) if self.dry else (14336, 4096)
        weights = self.exact(kind, width)
        x, gain = (self.random.standard_normal(width).astype(np.float32) for _ in range(2))
        gain /= np.float32(weights.std() * np.sqrt(width))  # so that results are about 1
        weight = CudaWeight((self.packed(kind, 2 * count, width, count),))
        found = ops.to_host(ops.normed_gated(ops.upload(x[None]), ops.upload(gain), 1e-5, weight, None))[0]
        normed = x / np.sqrt((x.astype(np.float64) ** 2).mean() + 1e-5) * gain
        y = (weights.astype(np.float64) @ normed)[np.arange(2 * count) % POOL]
        exact = y[:count] / (1 + np.exp(-y[:count])) * y[count:]
        error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        good = error < 2e-3  # 16-bit rounding of x and of the result: 2e-4 to 7e-4
        self.report.row("right", type=kind, shape=f"gated {count}", relative=error, verdict=good)
        self.report.failures += not good

    def speed(self, kind: str, old: Callable[..., Any] | None = None) -> None:
        """One launch for each shape; several copies of the matrix in turn, so that none is found in the cache."""
        from slimrt.ops.cuda.weights import CudaWeight

        ops = self.ops
        for rows, width in self.shapes:
            parts = self.copies(self.packed(kind, rows, width))
            x = ops.upload(self.random.standard_normal((1, width)).astype(np.float16))
            out = ops.empty((1, rows), np.float32)
            weights = [CudaWeight((part,)) for part in parts]
            took = self.seconds([partial(ops.few_linear, x, w, None, None, out) for w in weights])
            nbytes = parts[0].data.nbytes
            row = {"type": kind, "shape": [rows, width], "us": took * 1e6, "gb_s": nbytes / took / 1e9,
                   "of_copy": nbytes / took / self.copy_rate}  # fmt: skip
            if old is not None:
                before = self.seconds([partial(old, p, x, out) for p in parts])
                row |= {"old_us": before * 1e6, "old_of_copy": nbytes / before / self.copy_rate}
            self.report.row("speed", **row)

    def old_kernel(self, folder: Path) -> Callable[..., Any]:
        """A launch of an earlier gemv.cu, which takes rows as in the file: the bytes that are there, whatever they
        mean to it, are as many."""
        import re

        import cupy

        def paste(name: str) -> str:
            here = folder / name
            text = (here if here.exists() else gpu_layout.ROOT / "kernels_cu" / name).read_text()
            return re.sub(r'^#include "([\w.]+)"$', lambda found: paste(found[1]), text, flags=re.MULTILINE)

        text, modules = paste("gemv.cu"), dict[str, Any]()

        def launch(part: Any, x: Array, out: Array) -> None:
            if part.type not in modules:
                options = ("-std=c++17", f"-DTYPE={part.type}", "-DT=f16", "-DOUT=float")
                modules[part.type] = cupy.RawModule(code=text, options=options).get_function("gemv")
            null, size = np.uintp(0), np.int32
            modules[part.type](
                (-(-part.rows // 16), 1), (256,),
                (part.data, x, null, null, out, size(part.rows), size(part.width), size(part.rows), size(1)),
            )  # fmt: skip

        return launch

    def variants(self, kind: str) -> None:
        """Blocks a multiprocessor and stages of the ring."""
        from slimrt.ops.cuda import gemv
        from slimrt.ops.cuda.weights import CudaWeight

        ops, before = self.ops, (gemv.BLOCKS, dict(gemv.STAGES))
        for rows, width in self.shapes[:2]:
            weights = [CudaWeight((part,)) for part in self.copies(self.packed(kind, rows, width))]
            x = ops.upload(self.random.standard_normal((1, width)).astype(np.float16))
            out = ops.empty((1, rows), np.float32)
            try:
                for blocks in (1, 2, 3):
                    for stages in (2, 3, 4, 6):
                        gemv.BLOCKS, gemv.STAGES[kind] = blocks, stages
                        if gemv.stages(kind, width, ops.device.shared_per_block) != (stages, blocks):
                            continue  # there is no room for it
                        took = self.seconds([partial(ops.few_linear, x, w, None, None, out) for w in weights])
                        share = weights[0].nbytes / took / self.copy_rate
                        self.report.row("variants", type=kind, shape=[rows, width], blocks=blocks, stages=stages,
                                        us=took * 1e6, of_copy=share)  # fmt: skip
            finally:
                gemv.BLOCKS, gemv.STAGES = before[0], dict(before[1])

    def token(self, kind: str) -> None:
        """A token of the 8B shape behind 4096 others: as the graph has it, its parts, and as the caller sees it."""
        from slimrt.bench import shaped
        from slimrt.engine import Engine

        ops = self.ops
        shape, held = ("tiny", 40) if self.dry else ("llama-3.1-8b", 4096)
        begun = time.perf_counter()
        engine = shaped.open_engine(ops, shape, kind)
        c, model = engine.config, engine.model
        context = engine.new_context()
        noise = self.random.standard_normal((2, c.n_kv_heads, held, c.head_dim)).astype(np.float16)
        for layer in range(c.n_layers):
            context.cache.room(layer, held + 300)[:, :, :held] = ops.upload(noise)
            context.cache.appended(layer, np.arange(held))
        context.length = held
        loaded = time.perf_counter() - begun

        count, launch = [0], ops.kernels.launch

        def counted(*args: Any, **kwargs: Any) -> None:
            count[0] += 1
            launch(*args, **kwargs)

        ops.kernels.launch = counted  # type: ignore[method-assign]
        try:
            by_graph = engine.decode_one_token(context, 7)
        finally:
            ops.kernels.launch = launch  # type: ignore[method-assign]
        launches = count[0] // 2  # capturing runs it twice
        runs = []
        for token in range(2 if self.dry else 24):
            begun = time.perf_counter()
            engine.decode_one_token(context, token)
            runs.append(time.perf_counter() - begun)
        step = statistics.median(runs)
        graph = engine._decoder._graph  # type: ignore[union-attr]
        times = 1 if self.dry else 10
        device = statistics.median(
            ops.elapsed(lambda: [graph.launch() for _ in range(times)]) / times for _ in range(5)
        )

        decoder: Any = engine._decoder
        stores = [context.cache.room(layer, 1) for layer in range(c.n_layers)]
        angles = decoder._device[decoder._angles_at :].view(np.float32).reshape(2, -1)
        start, length = decoder._word(0, 0), decoder._word(0, 1)

        def linears() -> None:
            x = ops.begin(model.embedding, decoder._host, decoder._device)
            for layer, store in zip(model.layers, stores, strict=True):
                q = ops.normed_heads(x, layer.attn_norm, c.norm_eps, layer.qkv, None, *angles, start, store, c.n_heads)
                x = ops.add_linear(x, q.reshape(1, -1), layer.out)
                hidden = ops.normed_gated(x, layer.ffn_norm, c.norm_eps, layer.gate_up, None)
                x = ops.add_linear(x, hidden, layer.down, None)
            ops.normed_head(x, model.norm, c.norm_eps, model.head, decoder._logits)

        def attention() -> None:
            q = ops.empty((1, c.n_heads, c.head_dim))
            for store in stores:
                ops.attend_one(
                    q, store[0], store[1], length, ops.empty(q.shape), ops.splits(c.n_kv_heads, store.shape[2])
                )

        products, attends = (self.seconds([work]) for work in (linears, attention))
        matrices = [w for layer in model.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        weights = sum(w.nbytes for w in [*matrices, model.head])
        keys = engine.kv_bytes_per_token * held
        floor = (weights + keys) / self.copy_rate
        self.report.row(
            "token", type=kind, shape=shape, held=held, step_ms=step * 1e3, graph_ms=device * 1e3, floor_ms=floor * 1e3,
            over_floor=device / floor, products_ms=products * 1e3, products_of_copy=weights / products / self.copy_rate,
            attention_ms=attends * 1e3, attention_of_copy=keys / attends / self.copy_rate,
            rest_ms=(device - products - attends) * 1e3, host_ms=(step - device) * 1e3, launches=launches,
            launches_per_layer=launches / c.n_layers, load_s=loaded,
        )  # fmt: skip
        # The same token, layer by layer: the fused kernels keep in float32 what the others round to 16 bits.
        context.truncate(held)
        plain = Engine(model, ops, whole_tokens=False).decode_one_token(context, 7)
        error = float(np.linalg.norm(plain - by_graph) / np.linalg.norm(plain))
        self.report.row("token", type=kind, graph_against_layers=error, verdict=error < 1e-2)
        self.report.failures += not error < 1e-2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="right,speed,variants,token", help="steps, by commas")
    parser.add_argument("--types", default=",".join(TYPES), help="of single matrices, by commas")
    parser.add_argument("--old", type=Path, help="a folder with an earlier gemv.cu and quant.cuh, timed beside today's")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU's emulation")
    options = parser.parse_args()
    if options.dry:
        import pytest

        from tests.fake_cupy import FakeCupy

        FakeCupy(pytest.MonkeyPatch())
    report, steps, types = Report(options.out), options.only.split(","), options.types.split(",")
    begun = time.perf_counter()
    bench = Bench(report, options.dry)
    report.attempt("limits", bench.limits)
    if "right" in steps:
        for kind in types:
            report.attempt(f"right {kind}", partial(bench.right, kind))
    if "speed" in steps:
        old = bench.old_kernel(options.old) if options.old else None
        for kind in types:
            report.attempt(f"speed {kind}", partial(bench.speed, kind, old))
    if "variants" in steps:
        for kind in [kind for kind in ("Q4_0", "Q4_K", "F16", "Q8_0") if kind in types]:
            report.attempt(f"variants {kind}", partial(bench.variants, kind))
    if "token" in steps:
        for kind in [kind for kind in ("Q4_0", "F16") if kind in types]:
            report.attempt(f"token {kind}", partial(bench.token, kind))
    report.row("done", seconds=time.perf_counter() - begun, failures=report.failures)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
