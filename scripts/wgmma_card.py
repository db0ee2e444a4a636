"""Attention on a card and in float64, and words for the difference."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import numpy as np

from scripts.wgmma_cases import ROOT, Build, Case, build_of, path_of

Array = np.ndarray
SINK, RUN = 64, 128  # of slimrt.ops.reach


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
    null = np.uintp(0)
    args = (q, k, v, out, null if reach is None else reach, *(np.int32(n) for n in sizes), null, np.float32(0))
    card.kernel(build, build[0], shared)(grid, (threads,), args, shared_mem=shared)


def full(bits: Array, kind: str) -> Array:
    return (
        bits.view(np.float16).astype(np.float32) if kind == "f16" else (bits.astype(np.uint32) << 16).view(np.float32)
    )


def half(x: Array, kind: str) -> Array:
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def reference(q: Array, kv: tuple[Array, ...], row: int, reach: int, kind: str) -> tuple[Array, Array]:
    """Query q [Dh] at ``row`` over ``kv``, keys and values [N, Dh] in float64 and the same in float32: the result in
    float64, and a naive one with 16-bit weights and result."""
    first = row // RUN * RUN - reach
    rows: Any = slice(0, row + 1)
    if reach and first > SINK:
        rows = np.r_[0:SINK, first : row + 1]
    k64, v64, k32, v32 = (x[rows] for x in kv)
    scores = k64 @ q.astype(np.float64) / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    exact = weights @ v64 / weights.sum()
    scores32 = (k32 @ q) / np.float32(np.sqrt(len(q)))
    weights32 = np.exp(scores32 - scores32.max())
    naive = full(half(weights32, kind), kind) @ v32 / weights32.sum()
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
        floats = full(k[kv].get(), case.kind), full(v[kv].get(), case.kind)
        both = (*(x.astype(np.float64) for x in floats), *floats)
        queries = full(q[picked, head].get(), case.kind)
        got[:, i] = full(out[picked, head].get(), case.kind)
        for j, token in enumerate(tokens):
            row = case.keys - case.tokens + int(token)
            reaches = case.reach[kv] if case.reach else 0
            exact[j, i], naive[j, i] = reference(queries[j], both, row, reaches, case.kind)
    bad = card.not_finite(out, case.kind)
    error, allowed = np.abs(got - exact), 3 * np.abs(naive - exact).max()
    worst = float(np.nan_to_num(error, nan=np.inf).max())
    if bad == 0 and worst <= allowed:
        return True, f"error {worst:.2e}, allowed {allowed:.2e}; {took}"
    text = (
        f"error {worst:.2e}, allowed {allowed:.2e}, not finite {bad} of {out.size}; {took} (hundreds: waits given up); "
    )
    return False, text + where_wrong(~(error <= allowed), tokens, heads, got, exact)


def where_wrong(wrong: Array, tokens: Array, heads: list[int], got: Array, exact: Array) -> str:
    """The pattern of wrong numbers [rows, heads, Dh]: which half tile of 64 rows, which warp, panel, head."""

    def share(by: Array, axis: int) -> str:
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


def explain_product(got: Array, want: Array) -> str:
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


def _ranges(numbers: Array) -> str:
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ",".join(f"{p[0]}-{p[-1]}" for p in parts[:12] if len(p))
