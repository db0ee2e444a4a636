"""Prompt attention by wgmma on a Hopper card: right or not, where it is wrong, and how fast beside the mma.sync kernel.

    python scripts/gpu_attention_check.py --build            # compiles into build/wgmma; needs nvcc 13, no card
    python scripts/gpu_attention_check.py [--out FILE] [--only NAME ...] [--seconds 100]

Needs CuPy, NumPy and the sources, nothing installed; what ``--build`` left is used, the rest is compiled. Probes run in the
order of risk, each result is printed at once. They run in a process of their own: one that hangs, traps or loses the card
costs itself only, the next starts in a fresh process. The exit status is the number of probes that failed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
SOURCES, PROBES = ROOT / "kernels_cu", ROOT / "tests" / "gpu" / "hopper_probes.cu"
BUILT = ROOT / "build" / "wgmma"
WAIT_LIMIT = 300_000_000  # clock cycles, 0.2 s: then a wait for a barrier in shared memory is given up
SINK, RUN = 64, 128  # of slimrt.ops.reach

TOOLS = r"""
#include "ptx.cuh"
__device__ unsigned mixed(unsigned long long x) {  // splitmix64
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return unsigned((x ^ x >> 31) >> 32);
}
extern "C" __global__ void fill(T* out, long long count, unsigned long long seed, float scale) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (long long)blockDim.x) {
        const float u = (mixed(seed + 2 * i) + 0.5f) * 2.3283064e-10f, v = mixed(seed + 2 * i + 1) * 2.3283064e-10f;
        out[i] = from_float<T>(scale * sqrtf(-2.0f * logf(u)) * cospif(2.0f * v));
    }
}
extern "C" __global__ void count_not_finite(const unsigned short* x, long long count, unsigned exponent, unsigned* found) {
    unsigned mine = 0;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (long long)blockDim.x)
        mine += (x[i] & exponent) == exponent;
    if (mine) atomicAdd(found, mine);
}
"""

Note = Callable[..., None]


# -- building ---------------------------------------------------------------------------------------------------------


def pasted(code: str) -> str:
    """``code`` with the headers of ``kernels_cu`` in the place of their first includes."""
    seen: set[str] = set()

    def replace(found: re.Match[str]) -> str:
        name = found[1]
        if name in seen:
            return ""
        seen.add(name)
        return paste((SOURCES / name).read_text())

    def paste(text: str) -> str:
        return re.sub(r'^#include "([\w.]+)"$', replace, text, flags=re.MULTILINE)

    return paste(code)


Build = tuple[str, tuple[tuple[str, object], ...]]  # source, macros


def build_of(source: str, **macros: object) -> Build:
    return source, tuple(sorted(macros.items()))


def path_of(build: Build) -> tuple[Path, str, list[str]]:
    source, macros = build
    code = TOOLS if source == "tools" else (PROBES if source == "probes" else SOURCES / f"{source}.cu").read_text()
    code = pasted(code)
    options = ["-std=c++17", *(f"-D{name}={value}" for name, value in macros)]
    key = hashlib.sha256("\0".join([code, *options]).encode()).hexdigest()[:20]
    return BUILT / f"{source}-{key}.cubin", code, options


def compile_one(build: Build) -> Path:
    """The cubin of ``build``, by nvcc unless it is there."""
    path, code, options = path_of(build)
    if not path.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        text, fresh = path.with_suffix(".cu"), path.with_suffix(".new")
        text.write_text(code)
        command = ["nvcc", "-cubin", *options, "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
        done = subprocess.run([*command, str(text), "-o", str(fresh)], capture_output=True, text=True)
        said = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"nvcc: {build}: {said[-800:]}")
        for line in said.splitlines():  # serialised products, setmaxnreg ignored, registers spilled
            if re.search(r"\(C75|[1-9]\d* bytes spill", line):
                print(f"{build}: {line.strip()}", flush=True)
        fresh.replace(path)
    return path


def all_builds() -> list[Build]:
    builds = [build_of("tools", T=kind) for kind in ("f16", "bf16")]
    builds += [build_of("probes", **macros) for macros in PROBE_SIZES]
    builds += [kernel_of(case) for case in CASES] + [kernel_of(case) for case in LARGE]
    builds += [kernel_of(case, **variant) for case in TIMED for variant in variants(case)]
    builds += [mma_of(case) for case in TIMED]
    return list(dict.fromkeys(builds))


# -- what is run ------------------------------------------------------------------------------------------------------

PROBE_SIZES = [
    {"T": kind, "COLUMNS": columns, "DEPTH": depth}
    for kind, columns, depth in (
        ("f16", 64, 64),
        ("f16", 128, 64),
        ("f16", 64, 128),
        ("f16", 128, 128),
        ("bf16", 128, 128),
    )
]


class Case:
    """One attention problem; ``more``: macros."""

    def __init__(self, tokens: int, keys: int, heads: int, kv_heads: int, dh: int, kind: str,
                 reach: tuple[int, ...] | None = None, **more: object) -> None:  # fmt: skip
        self.tokens, self.keys, self.heads, self.kv_heads = tokens, keys, heads, kv_heads
        self.dh, self.kind, self.reach, self.more = dh, kind, reach, more

    def __str__(self) -> str:
        window = "" if self.reach is None else f" reach {','.join(map(str, self.reach))}"
        more = "".join(f" {name}={value}" for name, value in self.more.items())
        return f"T{self.tokens} N{self.keys} H{self.heads}/{self.kv_heads} Dh{self.dh} {self.kind}{window}{more}"


SIMPLE = {"STAGES": 1, "PING_PONG": 0, "QUERY_REGISTERS": 0}
CASES = [  # small, the simplest machinery first
    Case(128, 128, 1, 1, 64, "f16", **SIMPLE),
    Case(256, 256, 1, 1, 128, "f16", **SIMPLE),
    Case(700, 700, 2, 1, 128, "f16", STAGES=2, PING_PONG=0),
    Case(700, 700, 2, 1, 128, "f16"),
    Case(1000, 1000, 2, 1, 64, "f16"),
    Case(65, 700, 4, 2, 128, "f16"),
    Case(700, 1500, 4, 2, 64, "bf16"),
    Case(130, 1333, 4, 2, 128, "bf16"),
    Case(1, 777, 2, 1, 128, "f16"),
    Case(1500, 1500, 4, 4, 128, "f16", (0, 128, 192, 320)),
    Case(900, 1700, 2, 2, 64, "bf16", (64, 512)),
    Case(700, 700, 2, 1, 128, "f16", STAGES=3),
    Case(700, 700, 2, 1, 128, "f16", QUERY_REGISTERS=1),
    Case(700, 700, 2, 1, 128, "f16", SKIP_RESCALE=1),
]
LARGE = [
    Case(16384, 16384, 32, 8, 128, "f16"),
    Case(16384, 16384, 32, 8, 64, "f16"),
    Case(16301, 16301, 32, 8, 128, "bf16"),
    Case(5003, 16301, 32, 8, 128, "f16"),
    Case(16384, 16384, 32, 8, 128, "f16", (0, 1024, 0, 4096, 64, 128, 2048, 0)),
    Case(65536, 65536, 32, 8, 128, "f16"),
    Case(65536, 65536, 32, 8, 64, "bf16"),
    Case(32771, 65536, 32, 8, 128, "bf16", (0, 1024, 0, 4096, 64, 128, 2048, 0)),
]
LENGTHS = (16384, 32768, 65536)
TIMED = [Case(0, 0, 32, 8, 128, "f16"), Case(0, 0, 32, 8, 128, "bf16"), Case(0, 0, 32, 8, 64, "f16")]


def variants(case: Case) -> list[dict[str, object]]:
    if case.kind == "bf16":
        return [{}]
    found: list[dict[str, object]] = [{}, {"STAGES": 3}, {"QUERY_REGISTERS": 1}, {"SKIP_RESCALE": 1}, {"PING_PONG": 0},
                                      {"QUERY_REGISTERS": 1, "STAGES": 3, "SKIP_RESCALE": 1}]  # fmt: skip
    if case.dh == 128:
        found += [{"QUERY_REGISTERS": 1, "STAGES": 3}, {"SKIP_RESCALE": 1, "STAGES": 3},
                  {"PING_PONG": 0, "STAGES": 3, "SKIP_RESCALE": 1}]  # fmt: skip
    return found


def kernel_of(case: Case, **variant: object) -> Build:
    """For checks: with a limit to waits; where a ``variant`` or no size is given, to be timed: without."""
    macros = {"STAGES": 2, **case.more, **variant}
    if case.keys:
        macros["WAIT_LIMIT"] = WAIT_LIMIT
    return build_of("attention_wgmma", T=case.kind, DH=case.dh, **macros)


def mma_of(case: Case) -> Build:
    return build_of("attention_prefill", T=case.kind, DH=case.dh, TILE=128, STAGES=2)


# -- on the card ------------------------------------------------------------------------------------------------------


class Card:
    """CuPy, kernels by build, and arrays by size."""

    def __init__(self) -> None:
        import cupy

        self.cp = cupy
        spec = importlib.util.spec_from_file_location("slimrt_cubin", ROOT / "slimrt" / "ops" / "cubin.py")
        assert spec is not None and spec.loader is not None
        self.cubin = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.cubin)
        self.modules: dict[Build, Any] = {}

    def kernel(self, build: Build, name: str, shared: int = 0) -> Any:
        if build not in self.modules:
            path, code, options = path_of(build)
            cubin = path.read_bytes() if path.exists() else None
            module = self.cubin.CubinModule(code, (*options, "-arch=sm_90a"), cubin)
            module.compile()
            self.modules[build] = module
        kernel = self.modules[build].get_function(name)
        if shared > 48 << 10:
            kernel.max_dynamic_shared_size_bytes = shared
        return kernel

    def done(self) -> None:
        self.cp.cuda.runtime.deviceSynchronize()

    def normal(self, shape: tuple[int, ...], kind: str, seed: int, scale: float = 1.0) -> Any:
        """Normal numbers of 16 bits, as their bits."""
        out = self.cp.empty(shape, np.uint16)
        args = (out, np.int64(out.size), np.uint64(seed << 40), np.float32(scale))
        self.kernel(build_of("tools", T=kind), "fill")((2048,), (256,), args)
        return out

    def not_finite(self, x: Any, kind: str) -> int:
        found = self.cp.zeros(1, np.uint32)
        exponent = np.uint32(0x7C00 if kind == "f16" else 0x7F80)
        kernel = self.kernel(build_of("tools", T=kind), "count_not_finite")
        kernel((1024,), (256,), (x, np.int64(x.size), exponent, found))
        return int(found.get()[0])


def launch_attention(card: Card, build: Build, case: Case, q: Any, k: Any, v: Any, out: Any, reach: Any) -> None:
    macros = dict(build[1])
    if build[0] == "attention_wgmma":
        tile, threads, shared = 128, 384, 2 * case.dh * (128 + 256 * int(str(macros["STAGES"]))) + 1152
    else:
        tile, threads, shared = 128, 128, 2 * case.dh * (128 + 128 * 2)
    grid = (case.heads, (case.keys - 1) // tile - (case.keys - case.tokens) // tile + 1)
    stride = int(q.strides[0]) // 2
    sizes = (case.tokens, case.keys, case.heads, case.kv_heads, stride, case.keys * case.dh)
    args = (q, k, v, out, np.uintp(0) if reach is None else reach, *(np.int32(n) for n in sizes))
    card.kernel(build, build[0], shared)(grid, (threads,), args, shared_mem=shared)


def full(bits: np.ndarray, kind: str) -> np.ndarray:
    return (
        bits.view(np.float16).astype(np.float32) if kind == "f16" else (bits.astype(np.uint32) << 16).view(np.float32)
    )


def half(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, row: int, reach: int, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Query q [Dh] at ``row`` over k, v [N, Dh]: in float64, and naively in float32 with 16-bit weights and result."""
    first = row // RUN * RUN - reach
    rows: Any = slice(0, row + 1)
    if reach and first > SINK:
        rows = np.r_[0:SINK, first : row + 1]
    k, v = k[rows], v[rows]
    scores = k.astype(np.float64) @ q.astype(np.float64) / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    exact = weights @ v.astype(np.float64) / weights.sum()
    scores32 = (k @ q) / np.float32(np.sqrt(len(q)))
    weights32 = np.exp(scores32 - scores32.max())
    naive = full(half(weights32, kind), kind) @ v / weights32.sum()
    return exact, full(half(naive, kind), kind)


def check_attention(card: Card, case: Case, build: Build, sampled: int | None, scale: float = 1.0) -> tuple[bool, str]:
    """Run into a poisoned output and compare: all rows, or ``sampled`` of them in three of the heads."""
    q = card.normal((case.tokens, case.heads + 1, case.dh), case.kind, 1, scale)  # a row is wider than its heads
    k = card.normal((case.kv_heads, case.keys, case.dh), case.kind, 2, scale)
    v = card.normal((case.kv_heads, case.keys, case.dh), case.kind, 3)
    out = card.cp.full((case.tokens, case.heads, case.dh), 0xFFFF, np.uint16)
    reach = None if case.reach is None else card.cp.asarray(np.array(case.reach, np.int32))
    card.done()
    begun = time.perf_counter()
    launch_attention(card, build, case, q, k, v, out, reach)
    card.done()
    took = f"{1000 * (time.perf_counter() - begun):.1f} ms with the first load"
    rng = np.random.default_rng(case.keys)
    heads, tokens = list(range(case.heads)), np.arange(case.tokens)
    if sampled is not None:
        heads = sorted(rng.choice(case.heads, 3, replace=False).tolist())
        edges = np.array([0, 1, 63, 64, 127, 128, case.tokens - 129, case.tokens - 128, case.tokens - 1])
        tokens = np.unique(np.concatenate([edges[(edges >= 0) & (edges < case.tokens)],
                                           rng.integers(0, case.tokens, sampled)]))  # fmt: skip
    elif case.tokens > 300:
        tokens = np.unique(np.concatenate([rng.integers(0, case.tokens, 200), np.arange(64), [case.tokens - 1]]))
    got, exact, naive = (np.zeros((len(tokens), len(heads), case.dh)) for _ in range(3))
    picked = card.cp.asarray(tokens)
    for i, head in enumerate(heads):
        kv = head // (case.heads // case.kv_heads)
        keys, values = full(k[kv].get(), case.kind), full(v[kv].get(), case.kind)
        queries = full(q[picked, head].get(), case.kind)
        got[:, i] = full(out[picked, head].get(), case.kind)
        for j, token in enumerate(tokens):
            row = case.keys - case.tokens + int(token)
            exact[j, i], naive[j, i] = reference(
                queries[j], keys, values, row, case.reach[kv] if case.reach else 0, case.kind
            )
    bad = card.not_finite(out, case.kind)
    error, allowed = np.abs(got - exact), 3 * np.abs(naive - exact).max()
    worst = float(np.nan_to_num(error, nan=np.inf).max())
    if bad == 0 and worst <= allowed:
        return True, f"error {worst:.2e}, allowed {allowed:.2e}; {took}"
    text = (
        f"error {worst:.2e}, allowed {allowed:.2e}, not finite {bad} of {out.size}; {took} (hundreds: waits given up); "
    )
    return False, text + where_wrong(~(error <= allowed), tokens, heads, got, exact)


def where_wrong(wrong: np.ndarray, tokens: np.ndarray, heads: list[int], got: np.ndarray, exact: np.ndarray) -> str:
    """The pattern of wrong numbers [rows, heads, Dh]: which half tile of 64 rows, which warp, panel, head."""

    def share(by: np.ndarray, axis: int) -> str:
        flags = wrong.mean(axis=tuple(a for a in range(3) if a != axis))
        return " ".join(f"{n}:{flags[by == n].mean():.2f}" for n in np.unique(by)[:16])

    if not wrong.any():
        return "what was sampled is right"
    j, i, d = np.argwhere(wrong)[0]
    ratio = float(np.vdot(got[j, i], exact[j, i]) / max(1e-30, np.vdot(exact[j, i], exact[j, i])))
    return (
        f"wrong {wrong.mean():.3f}; by warpgroup {share(tokens // 64 % 2, 0)}; by warp {share(tokens // 16 % 4, 0)}; "
        f"by row of 8 {share(tokens % 8, 0)}; by panel {share(np.arange(wrong.shape[2]) // 64, 2)}; "
        f"by 16 columns {share(np.arange(wrong.shape[2]) // 16, 2)}; by head {share(np.array(heads), 1)}; "
        f"by 128 tokens {share(tokens // 128, 0)}; first: token {tokens[j]} head {heads[i]} dim {d}: got "
        f"{got[j, i, d]:.5g} for {exact[j, i, d]:.5g}; that row is {ratio:.3f} of what it should be"
    )


def explain_product(got: np.ndarray, want: np.ndarray) -> str:
    """What a wrong product [64, N] looks like: which rows and columns, and whether they were only moved."""
    wrong = ~(got == want)
    text = f"{int(wrong.sum())} of {wrong.size} wrong, NaN {int(np.isnan(got).sum())}, zeros {int((got == 0).sum())}"
    rows, columns = np.flatnonzero(wrong.any(1)), np.flatnonzero(wrong.any(0))
    text += f"; rows {_ranges(rows)}; columns {_ranges(columns)}"
    moved = [next((m for m in range(want.shape[1]) if np.array_equal(got[:, n], want[:, m])), -1) for n in columns]
    if any(m >= 0 for m in moved):
        text += (
            "; columns that hold another's: " + " ".join(f"{n}<-{m}" for n, m in zip(columns, moved, strict=True))[:400]
        )
    moved = [next((m for m in range(64) if np.array_equal(got[n], want[m])), -1) for n in rows]
    if any(m >= 0 for m in moved):
        text += "; rows that hold another's: " + " ".join(f"{n}<-{m}" for n, m in zip(rows, moved, strict=True))[:400]
    first = np.argwhere(wrong)[:4]
    return text + "; " + ", ".join(f"[{r},{c}] {got[r, c]:g} for {want[r, c]:g}" for r, c in first)


def _ranges(numbers: np.ndarray) -> str:
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ",".join(f"{p[0]}-{p[-1]}" for p in parts[:12] if len(p))


# -- probes -----------------------------------------------------------------------------------------------------------

Probe = tuple[str, int, Callable[[Card, Note], bool]]  # name, seconds it may take, what it does


def probe_card(card: Card, note: Note) -> bool:
    device = card.cp.cuda.runtime.getDeviceProperties(0)
    capability = (device["major"], device["minor"])
    note(card=device["name"].decode(), capability=capability, cupy=card.cp.__version__,
         driver=card.cp.cuda.runtime.driverGetVersion(), shared=device["sharedMemPerBlockOptin"])  # fmt: skip
    return bool(capability == (9, 0))


def probe_product(card: Card, note: Note, macros: dict[str, Any], way: int) -> bool:
    n, depth, kind = int(macros["COLUMNS"]), int(macros["DEPTH"]), str(macros["T"])
    rng = np.random.default_rng(way)
    a, b = rng.integers(-4, 5, (64, depth)).astype(np.float32), rng.integers(-4, 5, (n, depth)).astype(np.float32)
    given = np.ascontiguousarray(b if way < 2 else b.T)
    out = card.cp.full((64, n), np.nan, np.float32)
    shared = 1024 + 2 * (64 * depth + n * depth)
    kernel = card.kernel(build_of("probes", **macros), "product", shared)
    args = (card.cp.asarray(half(a, kind)), card.cp.asarray(half(given, kind)), out, np.int32(way))
    kernel((1,), (128,), args, shared_mem=shared)
    card.done()
    got, want = out.get(), a @ b.T
    if np.array_equal(got, want):
        return True
    by_part = {"first half of k": a[:, : depth // 2] @ b[:, : depth // 2].T, "last 16 of k": a[:, -16:] @ b[:, -16:].T,
               "first 16 of k": a[:, :16] @ b[:, :16].T, "first 8 of k": a[:, :8] @ b[:, :8].T}  # fmt: skip
    same = [name for name, part in by_part.items() if np.array_equal(got, part)]
    note(wrong=explain_product(got, want), equals=same)
    return False


def probe_relay(card: Card, note: Note) -> bool:
    macros = PROBE_SIZES[1]
    n, rounds = int(macros["COLUMNS"]), 9
    rng = np.random.default_rng(7)
    a, b = rng.integers(-4, 5, (rounds, 64, 64)).astype(np.float32), rng.integers(-4, 5, (n, 64)).astype(np.float32)
    out, turns = card.cp.full((64, n), np.nan, np.float32), card.cp.zeros(2, np.int32)
    shared = 1024 + 2 * (2 * 64 * 64 + 64 * n)
    kernel = card.kernel(build_of("probes", **macros), "relay", shared)
    args = (card.cp.asarray(half(a, "f16")), card.cp.asarray(half(b, "f16")), out, turns, np.int32(rounds))
    kernel((1,), (256,), args, shared_mem=shared)
    card.done()
    got, want, counts = out.get(), a.sum(0) @ b.T, turns.get().tolist()
    if np.array_equal(got, want) and counts == [rounds, rounds]:
        return True
    note(turns=counts, wrong=explain_product(got, want) if not np.array_equal(got, want) else "")
    return False


def probe_nvrtc(card: Card, note: Note) -> bool:
    """The way the product takes: NVRTC's own cubin."""
    _, code, options = path_of(kernel_of(TIMED[0]))
    begun = time.perf_counter()
    cubin = card.cubin.compile_cubin(code, (*options, "-arch=sm_90a"))
    took = time.perf_counter() - begun
    case = CASES[3]
    build = build_of("attention_wgmma", T=case.kind, DH=case.dh, STAGES=2, FROM="nvrtc")
    module = card.cubin.CubinModule(code, (), cubin)
    module.compile()
    card.modules[build] = module
    right, text = check_attention(card, case, build, None)
    note(compile_s=round(took, 2), cubin_bytes=len(cubin), found=text)
    return right


def probe_case(card: Card, note: Note, case: Case, sampled: int | None) -> bool:
    right, text = check_attention(card, case, kernel_of(case), sampled)
    note(found=text)
    return right


def probe_repeat(card: Card, note: Note) -> bool:
    """A race moves: the same launch thirty times gives the same bits."""
    case = LARGE[2]
    q, k, v = (card.normal(shape, case.kind, seed) for seed, shape in enumerate(
        [(case.tokens, case.heads, case.dh), (case.kv_heads, case.keys, case.dh), (case.kv_heads, case.keys, case.dh)]))  # fmt: skip
    outs = [card.cp.full(q.shape, 0xFFFF, np.uint16) for _ in range(2)]
    differences = 0
    for i in range(30):
        launch_attention(card, kernel_of(TIMED[1]), case, q, k, v, outs[min(i, 1)], None)
        if i:
            differences += int((outs[0] != outs[1]).sum().get() > 0)
            outs[1].fill(0xFFFF)
    note(launches=30, that_differ=differences)
    return differences == 0


def probe_time(card: Card, note: Note, case: Case) -> bool:
    """Medians of five by events, TFLOP/s of the causal half, each variant and the mma.sync kernel first and last."""
    cp, right = card.cp, True
    names: list[tuple[str, Build]] = [("mma.sync", mma_of(case))]
    for variant in variants(case):
        name = "wgmma " + (" ".join(f"{key}={value}" for key, value in variant.items()) or "as it is")
        names.append((name, kernel_of(case, **variant)))
    names.append(("mma.sync again", mma_of(case)))
    rows: dict[str, dict[str, float]] = {name: {} for name, _ in names}
    for length in LENGTHS:
        sized = Case(length, length, case.heads, case.kv_heads, case.dh, case.kind)
        q = card.normal((length, case.heads, case.dh), case.kind, 1)
        k, v = (card.normal((case.kv_heads, length, case.dh), case.kind, seed) for seed in (2, 3))
        out, first = cp.empty(q.shape, np.uint16), None
        for name, build in names:
            out.fill(0xFFFF)
            launch_attention(card, build, sized, q, k, v, out, None)
            card.done()
            sample = full(out[:: max(1, length // 97)].get(), case.kind)
            first = sample if first is None else first
            if not np.abs(sample - first).max() < 0.02:  # the checks above are exact; this is against a broken variant
                note(**{f"WRONG {name} {length}": float(np.abs(sample - first).max())})
                right = False
            times = []
            for _ in range(5):
                begun, ended = cp.cuda.Event(), cp.cuda.Event()
                begun.record()
                launch_attention(card, build, sized, q, k, v, out, None)
                ended.record()
                ended.synchronize()
                times.append(cp.cuda.get_elapsed_time(begun, ended))
            rate = 2 * case.heads * case.dh * length * (length + 1) / np.median(times) / 1e9
            rows[name][str(length)] = round(float(rate), 1)
            rows[name][f"{length} spread"] = round(float((max(times) - min(times)) / np.median(times)), 3)
        del q, k, v, out
    for name, row in rows.items():
        note(**{name: row})
    return right


def probes() -> list[Probe]:
    result: list[Probe] = [("card", 60, probe_card)]
    for macros in PROBE_SIZES:
        for way, words in enumerate(("tiles K-major", "rows K-major", "columns MN-major")):
            name = f"wgmma {words} 64x{macros['COLUMNS']}x{macros['DEPTH']} {macros['T']}"
            result.append((name, 10, lambda card, note, m=macros, w=way: probe_product(card, note, m, w)))  # type: ignore[misc]
    result.append(("relay: cp.async, mbarrier, named barriers, setmaxnreg", 10, probe_relay))
    for case in CASES:
        result.append((f"attention {case}", 15, lambda card, note, c=case: probe_case(card, note, c, None)))  # type: ignore[misc]
    for case in LARGE[:5]:
        result.append((f"attention {case}", 20, lambda card, note, c=case: probe_case(card, note, c, 20)))  # type: ignore[misc]
    for case in TIMED:
        name = f"time Dh{case.dh} {case.kind}"
        result.append((name, 25, lambda card, note, c=case: probe_time(card, note, c)))  # type: ignore[misc]
    for case in LARGE[5:]:
        result.append((f"attention {case}", 20, lambda card, note, c=case: probe_case(card, note, c, 12)))  # type: ignore[misc]
    return [*result, ("the same bits every time", 20, probe_repeat), ("NVRTC's cubin", 40, probe_nvrtc)]


# -- the driver -------------------------------------------------------------------------------------------------------


def child(chosen: list[int]) -> None:
    """Run probes; one line of JSON before and after each. A card that is lost ends the process with status 3."""
    listed, card = probes(), None

    def say(**values: Any) -> None:
        print(json.dumps(values, default=str), flush=True)

    for number in chosen:
        found: dict[str, Any] = {}
        say(begin=number)
        begun, lost = time.perf_counter(), False
        try:
            card = card or Card()
            right = listed[number][2](card, found.update)
        except Exception as error:
            right, lost = False, "CUDA" in type(error).__name__
            found["error"] = f"{type(error).__name__}: {str(error)[-600:]}"
        say(end=number, passed=right, seconds=round(time.perf_counter() - begun, 2), **{"found": found})
        if lost or card is None:
            sys.exit(3)


def check_wgmma(note: Note, only: list[str] | None = None, seconds: float = 100) -> int:
    """Every probe, in child processes; ``note`` gets each result by name as it comes. Returns how many did not pass."""
    listed = probes()
    waiting = [i for i, (name, _, _) in enumerate(listed) if not only or any(word in name for word in only)]
    if shutil.which("nvcc"):
        begun = time.perf_counter()
        print(f"built {build()} cubins in {time.perf_counter() - begun:.1f} s", flush=True)
    failed, stop = 0, time.monotonic() + seconds
    while waiting and time.monotonic() < stop:
        command = [sys.executable, __file__, "--child", *map(str, waiting)]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        lines: queue.Queue[str | None] = queue.Queue()

        def read(process: subprocess.Popen[str] = running, into: queue.Queue[str | None] = lines) -> None:
            assert process.stdout is not None
            for line in process.stdout:
                into.put(line)
            into.put(None)

        threading.Thread(target=read, daemon=True).start()
        now, limit, said = waiting[0], 60.0, ""
        while True:
            try:
                line = lines.get(timeout=max(0.1, min(limit, stop - time.monotonic())))
            except queue.Empty:
                running.kill()
                failed += report(
                    note, listed[now][0], False, {"error": f"no answer in {limit:.0f} s: killed", "said": said}
                )
                break
            if line is None:
                if now in waiting:
                    failed += report(note, listed[now][0], False, {"error": "the process died", "said": said[-600:]})
                break
            try:
                told = json.loads(line)
            except ValueError:
                said += line
                continue
            if "begin" in told:
                now, limit, said = told["begin"], float(listed[told["begin"]][1]), ""
            else:
                waiting.remove(now)
                failed += report(note, listed[now][0], told["passed"], {**told["found"], "seconds": told["seconds"]})
        running.wait()
        if now in waiting:
            waiting.remove(now)
    for number in waiting:
        failed += report(note, listed[number][0], False, {"error": "not run: out of time"})
    return failed


def report(note: Note, name: str, passed: bool, found: dict[str, Any]) -> int:
    print(f"{'ok  ' if passed else 'FAIL'} {name}", flush=True)
    for key, value in found.items():
        if key != "seconds" or float(value) > 1:
            print(f"       {key}: {value}", flush=True)
    note(**{name: {"passed": passed, **found}})
    return int(not passed)


def build() -> int:
    """All cubins, several at a time; a source that does not compile is left for the probe that wants it to report."""

    def attempt(one: Build) -> None:
        try:
            compile_one(one)
        except RuntimeError as error:
            print(error, flush=True)

    builds = all_builds()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(attempt, builds))
    return len(builds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", action="store_true", help="compile everything and stop")
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--only", nargs="+", help="probes whose name holds one of these")
    parser.add_argument("--seconds", type=float, default=100, help="for all probes")
    parser.add_argument("--child", nargs="+", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    if options.build:
        print(f"{build()} cubins in {BUILT}")
        return
    results: dict[str, Any] = {}

    def note(**values: Any) -> None:
        results.update(values)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1, default=str) + "\n")

    failed = check_wgmma(note, options.only, options.seconds)
    print(f"{len(results) - failed} passed, {failed} failed")
    sys.exit(min(failed, 125))


if __name__ == "__main__":
    main()
