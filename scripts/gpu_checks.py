"""Correctness on a card, of kernels: the test suite's, and at real sizes. Whole models are in ``gpu_model_checks``.

A tolerance is ``SLACK`` times the error that the same computation makes in NumPy rounded to float16 wherever the GPU
stores float16 (``tests.half_ops``), both against float32 or float64. Where two runs must be the same, bits are
compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gguf.quants import dequantize as reference_dequantize

from scripts.gpu_layout import ROOT
from scripts.gpu_sizes import DRY, Sizes
from slimrt.bench.synthetic import SHAPES, random_tensor
from slimrt.ops.cuda.cupy_ops import CupyOps
from slimrt.ops.cuda.device import probe
from slimrt.ops.layer import Merge
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.prune.reach import SINK, first_row
from tests.half_ops import HalfOps
from tests.half_ops import half as rounded

Note = Callable[..., None]  # note(key=value): part of the step's results, on disk at once
Array = Any

SLACK = 3.0  # both round in the same places; the order of sums and the running maximum differ
ALLOWED_SKIPS = ("a mode of the emulation", "passes addresses of the host's memory")


class Checks:
    """Named checks of one step, each on disk when it is done; ``finish`` fails the step if one of them has failed."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self.rows: list[dict[str, Any]] = []

    def run(self, name: str, check: Callable[[], dict[str, Any]]) -> None:
        """``check`` returns its figures, with ``ok``; what it raises is a failure, and the next one runs all the
        same."""
        try:
            row = {"check": name, **check()}
        except Exception as error:
            row = {"check": name, "ok": False, "error_raised": f"{type(error).__name__}: {error}"}
        self.rows.append(row)
        print(row, flush=True)
        self._note(checks=self.rows)

    def finish(self) -> None:
        failed = [row["check"] for row in self.rows if not row["ok"]]
        if failed or not self.rows:
            raise SystemExit(f"{len(failed)} of {len(self.rows)} checks failed: {'; '.join(failed)}")


def judged(got: Array, naive: Array, exact: Array, slack: float = SLACK) -> dict[str, Any]:
    """The largest error of ``got`` beside what is allowed of it."""
    error = float(np.abs(got.astype(np.float64) - exact).max())
    allowed = slack * float(np.abs(naive.astype(np.float64) - exact).max())
    return {"ok": bool(error <= allowed), "error": error, "allowed": allowed, "largest": float(np.abs(exact).max())}


# -- the kernel tests, on the card ------------------------------------------------------------------------------------


def ptx(note: Note, sizes: Sizes) -> None:
    """The PTX wrappers against NumPy."""
    _pytest(note, ["tests/gpu/test_ptx.py"], sizes)


def kernels(note: Note, sizes: Sizes) -> None:
    """Every kernel against NumPy, at the small sizes of the test suite."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_kernels_*.py"))
    _pytest(note, files if sizes is not DRY else [name for name in files if "memory" in name], sizes)


def _pytest(note: Note, files: list[str], sizes: Sizes) -> None:
    import importlib.util

    import pytest

    class Count:
        passed = failed = skipped = 0
        unexpected: list[str] = []  # noqa: RUF012

        def pytest_runtest_logreport(self, report: Any) -> None:
            self.passed += report.when == "call" and report.passed
            self.failed += report.failed
            self.skipped += report.skipped
            if report.skipped and not any(reason in str(report.longrepr) for reason in ALLOWED_SKIPS):
                self.unexpected.append(report.nodeid)

    if sizes is not DRY:
        probe()  # without a card one line says so, not each test
    count = Count()
    workers = ["-n", "4"] if sizes is not DRY and importlib.util.find_spec("xdist") else []
    status = pytest.main(
        ["-q", "--tb=short", "-p", "tests.gpu.on_device", "-p", "no:cacheprovider", *workers, *files], plugins=[count]
    )
    note(passed=count.passed, failed=count.failed, left_out=count.skipped, unexpected_skips=count.unexpected[:20])
    if status or count.failed or count.unexpected or not count.passed:
        raise SystemExit(
            f"pytest ended with status {int(status)}: {count.passed} passed, {count.failed} failed, "
            f"{len(count.unexpected)} skipped that should not be"
        )


# -- kernels at their real sizes --------------------------------------------------------------------------------------


def attention(note: Note, sizes: Sizes) -> None:
    """Attention of prompts and single tokens at real lengths, into poisoned outputs, sampled rows against float64."""
    ops, checks, c = CupyOps(), Checks(note), SHAPES[sizes.shape]
    heads, kv_heads = c.n_heads, c.n_kv_heads
    for number, (width, keys, rows) in enumerate(sizes.attention):
        name = f"attention_prefill {rows} x {keys}, Dh {width}"
        checks.run(name, lambda w=width, k=keys, r=rows: _prefill(ops, heads, kv_heads, w, k, r, sizes.sampled_rows))
        if number == 0:
            reach = tuple(0 if head % 4 == 0 else RUN_ROWS * (1 + head % 3) for head in range(kv_heads))
            checks.run(f"{name}, windows", lambda w=width, k=keys, r=rows, reach=reach: _prefill(
                ops, heads, kv_heads, w, k, r, sizes.sampled_rows, reach))  # fmt: skip
        if number < 2:
            checks.run(f"{name}, every fourth block of queries", lambda w=width, k=keys: _prefill(
                ops, heads, kv_heads, w, k, k, sizes.sampled_rows, some=True))  # fmt: skip
        checks.run(f"attention_decode x {keys}, Dh {width}", lambda w=width, k=keys: _prefill(
            ops, heads, kv_heads, w, k, 1, 1))  # fmt: skip
    for width, keys, window, cap in sizes.windowed:
        for rows, what in ((keys, "prefill"), (1, "decode")):
            name = f"attention_{what} x {keys}, Dh {width}, the last {window} keys" + f", capped at {cap:g}" * bool(cap)
            checks.run(name, lambda w=width, k=keys, r=rows, more=(window, cap): _prefill(
                ops, heads, kv_heads, w, k, r, min(r, sizes.sampled_rows), None, *more))  # fmt: skip
    checks.finish()


def sizes(note: Note, sizes: Sizes) -> None:
    """Every other operation at the sizes of a real model, sampled rows against float64."""
    ops, checks, c = CupyOps(), Checks(note), SHAPES[sizes.shape]
    for kind in sizes.weights:
        checks.run(f"weights {kind}", lambda kind=kind: _weights(ops, kind, c.d_ff, c.d_model))
    checks.run("head", lambda: _weights(ops, "Q4_0", c.vocab_size, c.d_model))
    checks.run("gemm", lambda: _gemm(ops, c.d_ff, c.d_model, min(sizes.long, 4096)))
    checks.run("row-wise operations", lambda: _row_wise(ops, c, sizes.long // 4, sizes.sampled_rows))
    checks.run("append and compact", lambda: _moves(ops, c, sizes.long, sizes.sampled_rows))
    for kind in ("token_mass", "token_max", "unit_softmax", "mean_qk"):
        checks.run(f"score_blocks {kind}", lambda kind=kind: _scores(ops, c, kind, sizes.long))
    checks.finish()


RUN_ROWS = 128  # windows are multiples of it


def bits(shape: tuple[int, ...], exponent: int, seed: int) -> Array:
    """Random float16 of random sign and of sizes in [2^e, 2^(e+1)), e = ``exponent``; quick for 10^9 of them."""
    words = np.random.default_rng(seed).integers(0, 1 << 16, shape, np.uint16)
    words &= np.uint16(0x83FF)
    words |= np.uint16((exponent + 15) << 10)
    return words.view(np.float16)


def all_written(x: Array) -> bool:
    """Whether no element of float16 ``x`` is NaN or infinite."""
    return not bool(((x.view(np.uint16) & 0x7C00) == 0x7C00).any())


def _prefill(
    ops: Any, heads: int, kv_heads: int, width: int, keys: int, rows: int, samples: int, reach: Any = None,
    window: int = 0, cap: float = 0.0, some: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """``some``: of the queries every fourth block of 64 and the last row."""
    places = np.arange(keys - rows, keys)
    if some:
        places = places[(places // 64 % 4 == 1) | (places == keys - 1)]
        rows = len(places)
    q, layer = bits((rows, heads, width), 2, 1), bits((2, kv_heads, keys, width), -1, 2)
    with ops.computing():
        there, out = ops.upload(layer), ops.upload(np.full(q.shape, np.nan, np.float16))
        first = np.maximum(0, places + 1 - window) if window else None
        how = {"places": places} if some else {}
        got = ops.to_host(ops.attend(ops.upload(q), there[0], there[1], out, reach=reach, first=first, cap=cap, **how))
    edges = [row for row in (0, 1, 63, 64, 127, 128, rows - 2, rows - 1) if 0 <= row < rows]
    drawn = np.random.default_rng(3).integers(0, rows, samples)
    picked = np.unique([*edges, *drawn])[: samples + len(edges)]
    at = places[picked]
    exact, naive = _attention_rows(q[picked], layer[0], layer[1], at, reach, window, cap)
    found = judged(got[picked], naive, exact)
    return found | {"ok": found["ok"] and all_written(got), "all_written": all_written(got), "sampled": len(picked)}


def _attention_rows(
    q: Array, k: Array, v: Array, positions: Array, reach: Any, window: int = 0, cap: float = 0.0
) -> tuple[Array, Array]:
    """Attention of rows q [S, H, Dh] at ``positions`` in float64, and naively with weights and result in float16."""
    heads, kv_heads = q.shape[1], k.shape[0]
    group = heads // kv_heads
    exact, naive = np.empty(q.shape), np.empty(q.shape, np.float32)
    index = np.arange(k.shape[1])
    for kv in range(kv_heads):
        own = slice(kv * group, (kv + 1) * group)
        hidden = index[None, :] > positions[:, None]
        if window:
            hidden |= index[None, :] <= positions[:, None] - window
        if reach is not None and reach[kv]:
            first = np.array([first_row(reach[kv], int(row)) for row in positions])[:, None]
            hidden |= (first > 0) & (index[None, :] < first) & (index[None, :] >= SINK)
        for real, result in ((np.float64, exact), (np.float32, naive)):
            keys, values = k[kv].astype(real), v[kv].astype(real)
            for row in range(len(q)):
                scores = q[row, own].astype(real) @ keys.T / real(np.sqrt(q.shape[2]))
                scores = real(cap) * np.tanh(scores / real(cap)) if cap else scores
                scores[:, hidden[row]] = -np.inf
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                total = weights.sum(axis=1, keepdims=True)
                if real is np.float32:
                    weights = weights.astype(np.float16).astype(np.float32)
                mixed = weights @ values / total
                result[row, own] = mixed.astype(np.float16) if real is np.float32 else mixed
    return exact, naive


def _weights(ops: Any, kind: str, rows: int, columns: int) -> dict[str, Any]:
    """One token and three times ``kind``, and unpacking, which must give the numbers of ``gguf`` in float16."""
    tensor = random_tensor("weight", kind, (rows, columns), np.random.default_rng(4))
    x = np.random.default_rng(5).standard_normal((3, columns), np.float32).astype(np.float16)
    picked = np.unique(np.r_[0:128, rows // 2 : rows // 2 + 64, rows - 128 : rows] % rows)
    data = np.ascontiguousarray(tensor.data[picked])
    values = (
        data.astype(np.float32)
        if kind == "F16"
        else (data.astype(np.uint32) << 16).view(np.float32)
        if kind == "BF16"
        else reference_dequantize(data, tensor.type)
    )
    as_half = values.astype(np.float16)
    with ops.computing():
        weight = ops.weight(tensor)
        dense = ops.to_host(ops.unpacked(weight).dense)[picked]
        products = [ops.to_host(ops.linear(ops.upload(x[:count]), weight)) for count in (1, 3)]
    exact = x.astype(np.float64) @ values.astype(np.float64).T
    naive = (x.astype(np.float32) @ as_half.astype(np.float32).T).astype(np.float16)
    found = judged(products[1][:, picked], naive, exact)
    one = judged(products[0][:, picked], naive[:1], exact[:1])
    same = bool(np.array_equal(dense, as_half))  # as numbers: a zero may have either sign
    written = all(all_written(product) for product in products)
    apart = np.abs(dense.astype(np.float32) - as_half.astype(np.float32)).max()
    return found | {
        "ok": found["ok"] and one["ok"] and same and written,
        "one_token_error": one["error"],
        "unpacked_same": same,
        "unpacked_largest_difference": float(apart),
    }


def _gemm(ops: Any, rows: int, columns: int, tokens: int) -> dict[str, Any]:
    tensor = random_tensor("weight", "F16", (rows, columns), np.random.default_rng(6))
    x = bits((tokens, columns), -1, 7)
    residual = np.random.default_rng(8).standard_normal((tokens, rows), np.float32)
    picked = np.unique(np.linspace(0, tokens - 1, 16).astype(int))
    with ops.computing():
        weight = ops.unpacked(ops.weight(tensor))
        got = ops.to_host(ops.linear(ops.upload(x), weight))
        added = ops.to_host(ops.add_linear(ops.upload(residual), ops.upload(x), weight))
    exact = x[picked].astype(np.float64) @ tensor.data.astype(np.float64).T
    naive = (x[picked].astype(np.float32) @ tensor.data.astype(np.float32).T).astype(np.float16)
    plain = judged(got[picked], naive, exact)
    joined = judged(added[picked], naive + residual[picked], exact + residual[picked])
    return plain | {"ok": plain["ok"] and joined["ok"] and all_written(got), "with_residual": joined["error"]}


def _row_wise(ops: Any, c: Any, tokens: int, samples: int) -> dict[str, Any]:
    rng = np.random.default_rng(9)
    exact_ops, half_ops = NumpyOps(1), HalfOps()
    picked = np.unique(np.r_[0, tokens - 1, rng.integers(0, tokens, samples)])
    x = np.resize(rng.standard_normal(1 << 20, np.float32), (tokens, c.d_model))
    gain, head_gain = rng.standard_normal(c.d_model, np.float32), rng.standard_normal(c.head_dim, np.float32)
    gate_up, bias = bits((tokens, 2 * c.d_ff), 0, 10), rng.standard_normal(2 * c.d_ff, np.float32)
    heads = bits((tokens, c.n_heads + c.n_kv_heads, c.head_dim), 0, 11)
    angle = rng.uniform(0, 6, (tokens, c.head_dim // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    with ops.computing():
        normed, merged = ops.upload(heads), ops.upload(x)
        ops.norm_heads(normed, ops.upload(head_gain), 1e-5)
        ops.merge_into(merged, ops.upload(x), Merge(ops.upload(gain), 1e-5, 0.5))
        got = {
            "rmsnorm": ops.rmsnorm(ops.upload(x), ops.upload(gain), 1e-5),
            "norm_heads": normed,
            "swiglu": ops.swiglu(ops.upload(gate_up)),
            "geglu": ops.geglu(ops.upload(gate_up)),
            "rope": ops.rope(ops.upload(heads), ops.upload(cos), ops.upload(sin)),
            "shifted": ops.shifted(ops.upload(gate_up), ops.upload(bias)),
            "merge": merged,
        }
        got = {name: ops.to_host(array) for name, array in got.items()}
        narrow = ops.to_host(ops.narrowed(ops.upload(x)))

    def on(backend: Any) -> dict[str, Array]:
        by_head = heads[picked].astype(np.float32)
        backend.norm_heads(by_head, head_gain, 1e-5)
        return {
            "rmsnorm": backend.rmsnorm(x[picked], gain, 1e-5),
            "norm_heads": by_head,
            "swiglu": backend.swiglu(gate_up[picked].astype(np.float32)),
            "geglu": backend.geglu(gate_up[picked].astype(np.float32)),
            "rope": backend.rope(heads[picked].astype(np.float32), cos[picked], sin[picked]),
        }

    exact, naive = on(exact_ops), on(half_ops)
    exact["shifted"] = gate_up[picked].astype(np.float32) + bias
    naive["shifted"] = rounded(exact["shifted"])
    wide = x[picked].astype(np.float64)
    exact["merge"] = wide + 0.5 * gain * wide / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + 1e-5)
    naive["merge"] = x[picked] + np.float32(0.5) * exact["rmsnorm"]  # in float32, as the stream is
    found = {name: judged(got[name][picked], naive[name], exact[name]) for name in got}
    written = all(all_written(array) for array in got.values() if array.dtype == np.float16)
    same = bool(np.array_equal(narrow, x.astype(np.float16)))
    return {"ok": all(one["ok"] for one in found.values()) and written and same, "narrowed_same": same, **found}


def _moves(ops: Any, c: Any, tokens: int, samples: int) -> dict[str, Any]:
    rng, start = np.random.default_rng(12), 70
    joint = bits((tokens, c.n_heads + 2 * c.n_kv_heads, c.head_dim), 0, 13)
    x = np.resize(rng.standard_normal(1 << 20, np.float32), (tokens, c.d_model))
    kept = np.flatnonzero(rng.random(tokens) < 0.4)
    with ops.computing():
        there = ops.upload(joint)
        layer = ops.upload(np.full((2, c.n_kv_heads, tokens + 100, c.head_dim), np.nan, np.float16))
        k, v = there[:, c.n_heads : -c.n_kv_heads], there[:, -c.n_kv_heads :]
        ops.append(layer, k, v, ops.upload(np.array([start], np.int32)))
        stored, taken = ops.to_host(layer), ops.to_host(ops.take(ops.upload(x), kept))
    rows = np.unique(np.r_[0, tokens - 1, rng.integers(0, tokens, samples)])
    keys, values = joint[:, c.n_heads : -c.n_kv_heads], joint[:, -c.n_kv_heads :]
    same = all(
        np.array_equal(stored[plane][:, start + rows].transpose(1, 0, 2).view(np.uint16), part[rows].view(np.uint16))
        for plane, part in enumerate((keys, values))
    )
    outside = (
        np.isnan(stored[:, :, :start].astype(np.float32)).all()
        and np.isnan(stored[:, :, start + tokens :].astype(np.float32)).all()
    )
    return {"ok": bool(same and outside and np.array_equal(taken, x[kept])), "same": bool(same), "kept": len(kept)}


def _scores(ops: Any, c: Any, kind: str, tokens: int) -> dict[str, Any]:
    k, q = bits((c.n_kv_heads, tokens, c.head_dim), -1, 14), bits((16, c.n_heads, c.head_dim), 1, 15)
    with ops.computing():
        got = ops.score_blocks(kind, ops.upload(q), ops.upload(k), 64, 8)
    queries, keys, numpy = q.astype(np.float32), k.astype(np.float32), NumpyOps()
    exact = numpy.score_blocks(kind, queries, keys, 64, 8)
    naive = exact
    if kind in ("unit_softmax", "mean_qk"):  # a GPU keeps the units' mean keys in float16
        naive = numpy.score_blocks(kind, queries, rounded(numpy.unit_means(keys, 8)), 8, 1)
    # A score is a sum of float32 weights: two orders of the sum differ by some units in the last place of its largest.
    unit = float(np.abs(naive - exact).max()) + 64 * float(np.spacing(np.float32(np.abs(exact).max())))
    error = float(np.abs(got - exact).max())
    return {"ok": error <= SLACK * unit, "error": error, "allowed": SLACK * unit, "largest": float(exact.max())}
