"""Correctness on a card: kernels at their real sizes, the engine's paths against each other, models against NumPy.

A tolerance is ``SLACK`` times the error that the same computation makes in NumPy rounded to float16 wherever the GPU
stores float16 (``tests.half_ops``), both against float32 or float64. Where two runs must be the same, bits are
compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize as reference_dequantize

from scripts.gpu_layout import ROOT
from scripts.gpu_sizes import DRY, Sizes
from slimrt.bench.synthetic import SHAPES, SyntheticModel, random_tensor
from slimrt.config import CacheConfig
from slimrt.engine import Engine
from slimrt.errors import DeviceError
from slimrt.models.llama import Llama
from slimrt.ops.cuda.cupy_ops import CupyOps
from slimrt.ops.cuda.device import probe
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.prune.plan import PrunePlan, Stage
from slimrt.prune.reach import SINK, first_row
from slimrt.session import Session
from tests.half_ops import HalfOps
from tests.half_ops import half as rounded

Note = Callable[..., None]  # note(key=value): part of the step's results, on disk at once
Array = Any

SLACK = 3.0  # both round in the same places; the order of sums and the running maximum differ
ALLOWED_SKIPS = ("a mode of the emulation", "passes addresses of the host's memory")
PARTS = ROOT / ".model"  # where the default model's parts are put, on a machine without a network
SPLIT = "split -b 50M SmolLM2-135M-Instruct.Q4_1.gguf .model/part"
_CHECK_VOCAB = 4096  # rows of the head where whole models are compared: the head has a check of its own


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
    _pytest(note, files if sizes is not DRY else [name for name in files if "rows" in name], sizes)


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
    window: int = 0, cap: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    q, layer = bits((rows, heads, width), 2, 1), bits((2, kv_heads, keys, width), -1, 2)
    with ops.computing():
        there, out = ops.upload(layer), ops.upload(np.full(q.shape, np.nan, np.float16))
        first = np.maximum(0, np.arange(keys - rows, keys) + 1 - window) if window else None
        got = ops.to_host(ops.attend(ops.upload(q), there[0], there[1], out, reach=reach, first=first, cap=cap))
    edges = [row for row in (0, 1, 63, 64, 127, 128, rows - 2, rows - 1) if 0 <= row < rows]
    drawn = np.random.default_rng(3).integers(0, rows, samples)
    picked = np.unique([*edges, *drawn])[: samples + len(edges)]
    at = picked + keys - rows
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
    gain = rng.standard_normal(c.d_model, np.float32)
    gate_up = bits((tokens, 2 * c.d_ff), 0, 10)
    heads = bits((tokens, c.n_heads + c.n_kv_heads, c.head_dim), 0, 11)
    angle = rng.uniform(0, 6, (tokens, c.head_dim // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    with ops.computing():
        got = {
            "rmsnorm": ops.to_host(ops.rmsnorm(ops.upload(x), ops.upload(gain), 1e-5)),
            "swiglu": ops.to_host(ops.swiglu(ops.upload(gate_up))),
            "rope": ops.to_host(ops.rope(ops.upload(heads), ops.upload(cos), ops.upload(sin))),
        }

    def on(backend: Any) -> dict[str, Array]:
        return {
            "rmsnorm": backend.rmsnorm(x[picked], gain, 1e-5),
            "swiglu": backend.swiglu(gate_up[picked].astype(np.float32)),
            "rope": backend.rope(heads[picked].astype(np.float32), cos[picked], sin[picked]),
        }

    exact, naive = on(exact_ops), on(half_ops)
    found = {name: judged(got[name][picked], naive[name], exact[name]) for name in got}
    ok = all(one["ok"] for one in found.values()) and all(all_written(array) for array in got.values())
    return {"ok": ok, **found}


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


# -- whole models -----------------------------------------------------------------------------------------------------


def small(shape: str, layers: int) -> Any:
    """``shape`` with few layers and a short head."""
    c = SHAPES[shape]
    return dataclasses.replace(c, n_layers=layers, vocab_size=min(c.vocab_size, _CHECK_VOCAB))


def talk(engine: Engine, ids: Sequence[int], plan: PrunePlan | None = None, decoded: int = 3) -> Array:
    """Logits [1 + decoded, V] after a prompt and after each of some tokens."""
    session = Session(engine, len(ids) + decoded + 8)
    session.prefill(ids, plan)
    found = [session.logits]
    for token in ids[:decoded]:
        session.extend([token])
        found.append(session.logits)
    session.context.cache.close()
    return np.array(found)


def _model(config: Any, kind: str, ops: Any, **options: Any) -> Llama:
    return Llama(config, SyntheticModel(config, kind), ops, **options)  # type: ignore[arg-type]


def shapes(note: Note, sizes: Sizes) -> None:
    """Prefill and decode of the real shape in each type, a few layers of it, against NumPy."""
    checks, config = Checks(note), small(sizes.shape, sizes.check_layers)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, sizes.check_tokens).tolist()
    threads = os.cpu_count() or 1

    def compare(kind: str) -> dict[str, Any]:
        element: Any = "bf16" if kind == "BF16" else "f16"
        found = [talk(Engine(_model(config, kind, ops), ops), ids) for ops in (
            NumpyOps(threads), HalfOps(threads, element), CupyOps(element=element))]  # fmt: skip
        return judged(found[2], found[1], found[0])

    for kind in sizes.types:
        checks.run(f"{config.name} {kind}", lambda kind=kind: compare(kind))
    checks.finish()


def engine(note: Note, sizes: Sizes) -> None:
    """The engine's ways to the same answer: captured graphs, streamed weights, a KV budget, plans, follow-ups."""
    checks, config = Checks(note), small(sizes.shape, max(3, sizes.check_layers))
    rng, threads = np.random.default_rng(2), os.cpu_count() or 1
    ids = rng.integers(0, config.vocab_size, sizes.check_tokens).tolist()
    kind = sizes.measured_types[1]
    truth, half = (talk(Engine(_model(config, kind, ops), ops), ids) for ops in (NumpyOps(threads), HalfOps(threads)))
    unit = float(np.abs(half - truth).max())
    note(unit=unit, largest_logit=float(np.abs(truth).max()))
    ops = CupyOps()
    model = _model(config, kind, ops)
    plain = Engine(model, ops)

    def against_truth(engine: Engine) -> dict[str, Any]:
        return judged(talk(engine, ids), half, truth)

    checks.run("decode by captured graphs", lambda: against_truth(plain))
    checks.run("decode layer by layer", lambda: against_truth(Engine(model, ops, whole_tokens=False)))
    checks.run("streamed weights", lambda: against_truth(Engine(_model(config, kind, ops, stream=True), ops)))

    document = rng.integers(0, config.vocab_size, sizes.long).tolist()
    block = 64 if sizes is not DRY else 16
    last = rng.integers(0, config.vocab_size, 40).tolist()

    def close(one: Array, other: Array) -> dict[str, Any]:
        difference = float(np.abs(one - other).max())
        return {"ok": difference <= SLACK * unit, "difference": difference, "allowed": SLACK * unit}

    dense = talk(plain, document)

    def keep_all() -> dict[str, Any]:
        plan = PrunePlan((Stage(0, 1.0), Stage(1, 1.0)), block=block)
        same = np.array_equal(talk(plain, document, plan), dense)
        return {"ok": bool(same), "same_bits": bool(same)}

    def budget() -> dict[str, Any]:
        # Beyond the budget decode reads less by design; a prompt reads everything, so its logits must not move.
        cache = CacheConfig(len(document) + 64, max(sizes.budget, 8 * block), block=block, unit=8, local_blocks=2)
        found = talk(Engine(model, ops, cache), document, decoded=1)
        return close(found[:1], dense[:1]) | {"same_bits": bool(np.array_equal(found[0], dense[0]))}

    def roomy() -> dict[str, Any]:
        cache = CacheConfig(len(ids) + 64, len(ids) + 64, block=block, unit=8, local_blocks=2)
        return against_truth(Engine(model, ops, cache))

    def follow_up(plan: PrunePlan | None) -> dict[str, Any]:
        one, other = Session(plain, len(document) + 64), Session(plain, len(document) + 64)
        one.prefill(document[:-20], plan)
        reading = one.prefill(document + last, plan)
        fresh = other.prefill(document + last, plan)
        same_rows = reading.stages == fresh.stages
        found = close(one.logits, other.logits) | {"reused": reading.reused, "kept": list(reading.stages)}
        return found | {"ok": bool(found["ok"] and same_rows and reading.reused > 0)}

    checks.run(f"a plan that keeps all of {len(document)} tokens", keep_all)
    checks.run("graph against layer by layer, long", lambda: close(
        dense, talk(Engine(model, ops, whole_tokens=False), document)))  # fmt: skip
    checks.run("a prompt under a KV budget", budget)
    checks.run("decode under a budget that holds everything", roomy)
    checks.run("a follow-up, dense", lambda: follow_up(None))
    cut = PrunePlan((Stage(0, 0.5), Stage(1, 0.25)), block=block)
    checks.run("a follow-up, pruned", lambda: follow_up(cut))
    checks.finish()


def model(note: Note, sizes: Sizes) -> None:
    """Logits of the default model, prefill and decode, against NumPy; a pruned run's are reported beside them."""
    from slimrt.models import build, read_config
    from slimrt.weights.gguf import GGUFFile
    from tests.tiny_gguf import write_tiny_llama

    if sizes is not DRY:
        path = default_model()
        if path is None:
            note(skipped=f"the default model is not here; where it is: {SPLIT}; then bring .model/part* here")
            return
        length = 700
    else:
        path, length = (
            write_tiny_llama(ROOT / "build" / "gpu-tiny.gguf", head_dim=64, type="Q4_0", n_layers=4, seed=3),
            96,
        )
    file = GGUFFile(path)
    config = read_config(file)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, length).tolist()
    last = config.n_layers - 2
    plan = PrunePlan((Stage(max(0, last - 1), 0.75), Stage(last, 0.5)), block=16, query_window=8)
    found, pruned = {}, {}
    for name, ops in (("float32", NumpyOps()), ("half", HalfOps(os.cpu_count() or 1)), ("cuda", CupyOps())):
        engine = Engine(build(config, file, ops), ops)
        found[name], pruned[name] = talk(engine, ids), talk(engine, ids, plan)
        note(done=name)
    verdict = judged(found["cuda"], found["half"], found["float32"])
    beside = {name: float(np.abs(pruned[name] - pruned["float32"]).max()) for name in ("half", "cuda")}
    note(model=Path(file.path).name, tokens=length, **verdict, pruned_error=beside)
    if not verdict["ok"]:
        raise SystemExit(f"logits differ by {verdict['error']}, allowed are {verdict['allowed']}")


def default_model() -> Path | None:
    """The default model, from the user's cache or joined from its parts; None if it is not here. Nothing is fetched."""
    from slimrt.hub import store as hub

    held = hub.held(hub.DEFAULT_MODEL)
    joined, entry = PARTS / "model.gguf", hub.CATALOG[hub.DEFAULT_MODEL]
    if held is not None or joined.exists():
        return held or joined
    parts = sorted(PARTS.glob("part*"))
    if sum(part.stat().st_size for part in parts) != entry.size:
        return None
    data = b"".join(part.read_bytes() for part in parts)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise SystemExit(f"the parts in {PARTS} do not make the default model; cut it again: {SPLIT}")
    joined.write_bytes(data)
    return joined


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(note: Note, sizes: Sizes) -> None:
    """Prompts in turn take no more memory than the first ones; a full card gives one line and the CPU as the remedy."""
    from slimrt.ops.cuda.device import load_cupy

    checks, config = Checks(note), small(sizes.shape, max(3, sizes.check_layers))
    ops = CupyOps()
    engine = Engine(_model(config, sizes.measured_types[1], ops), ops)
    runtime = load_cupy().cuda.runtime
    lengths = [sizes.long, sizes.long // 2, sizes.long // 4]
    plan = PrunePlan((Stage(0, 0.5), Stage(1, 0.25)), block=64 if sizes is not DRY else 16)

    def turns(decoded: int) -> dict[str, Any]:
        free = []
        for number in range(sizes.prompts):
            length = lengths[number % len(lengths)]
            ids = np.random.default_rng(number).integers(0, config.vocab_size, length).tolist()
            talk(engine, ids, plan if number % 2 else None, decoded)
            ops.finish()
            free.append(int(runtime.memGetInfo()[0]))
        warm = min(len(lengths) * 2, sizes.prompts - 1)  # each length under each plan was there once
        grown = free[warm] - free[-1]
        return {"ok": grown <= 0, "grown_bytes": grown, "free_bytes": free}

    def full() -> dict[str, Any]:
        ids = np.random.default_rng(99).integers(0, config.vocab_size, sizes.long).tolist()
        load_cupy().get_default_memory_pool().free_all_blocks()
        hog = ops.empty((int(runtime.memGetInfo()[0]) - (128 << 20),), np.uint8)
        try:
            talk(engine, ids)
            message = "no error"
        except DeviceError as error:
            message = str(error)
        del hog
        load_cupy().get_default_memory_pool().free_all_blocks()
        after = talk(engine, ids)
        ok = "\n" not in message and "device='cpu'" in message and bool(np.isfinite(after).all())
        return {"ok": ok, "message": message}

    checks.run(f"{sizes.prompts} prompts in turn", lambda: turns(0))
    checks.run(f"{sizes.prompts} prompts in turn, and decode", lambda: turns(3))
    if sizes is not DRY:  # the emulation's card has no end; there tests do this
        checks.run("a full card", full)
    checks.finish()


# -- compute-sanitizer ------------------------------------------------------------------------------------------------


def sanitizer(note: Note, sizes: Sizes) -> None:
    """compute-sanitizer's memcheck and racecheck over a short conversation, with the memory pool off."""
    tool = shutil.which("compute-sanitizer")
    if sizes is DRY:
        note(skipped="nothing to check in the emulation: AddressSanitizer does that in the tests")
        return
    if tool is None:
        note(skipped="compute-sanitizer is not installed (it comes with the CUDA toolkit)")
        return

    def check(name: str) -> str | None:
        command = [tool, f"--tool={name}", "--error-exitcode=9", sys.executable, "scripts/gpu.py", "--step", "smoke"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        output = done.stdout + done.stderr
        clean = done.returncode == 0 and "0 errors" in output and "smoke done" in output
        note(**{name: "clean" if clean else "errors", f"{name}_tail": output[-3000:]})
        return None if clean else f"{name}: status {done.returncode}: {output[-1500:]}"

    with ThreadPoolExecutor() as pool:
        found = [verdict for verdict in pool.map(check, ("memcheck", "racecheck")) if verdict]
    if found:
        raise SystemExit("\n".join(found))


def smoke(note: Note, sizes: Sizes) -> None:
    """A short conversation with every kind of operation in it, every array an allocation of its own."""
    from slimrt.bench.shaped import run
    from slimrt.ops.cuda.device import load_cupy

    load_cupy().cuda.set_allocator(None)  # a pool's slack would hide what lies past an array
    for budget in (None, 128):
        run("cuda", "tiny", "Q4_0", (150,), ("off", "tiny"), budget, 1, 2)
    print("smoke done")
