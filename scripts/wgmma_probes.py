"""The probes of ``gpu_attention_check``, in the order of risk: the simplest machinery first."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from scripts.wgmma_card import Card, check_attention, explain_product, full, half, launch_attention
from scripts.wgmma_cases import (
    CASES,
    LARGE,
    LENGTHS,
    PROBE_SIZES,
    TIMED,
    Build,
    Case,
    build_of,
    kernel_of,
    mma_of,
    path_of,
    variants,
)

Note = Callable[..., None]
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
    q = card.normal((case.tokens, case.heads, case.dh), case.kind, 1)
    k, v = (card.normal((case.kv_heads, case.keys, case.dh), case.kind, seed) for seed in (2, 3))
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
            # Against a broken variant, beside the checks in float64: results in 16 bits differ by their rounding.
            sample = full(out[length // 2 :: max(1, length // 97)].get(), case.kind)
            first = sample if first is None else first
            difference = float(np.linalg.norm(sample - first) / np.linalg.norm(first))
            if not difference < 4 * (2**-11 if case.kind == "f16" else 2**-8):
                note(**{f"WRONG {name} {length}": difference})
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
    """All of them; figures come before the slowest checks, so that a run that is cut off has them."""
    result: list[Probe] = [("card", 30, probe_card)]
    for macros in PROBE_SIZES:
        for way, words in enumerate(("tiles K-major", "rows K-major", "columns MN-major")):
            name = f"wgmma {words} 64x{macros['COLUMNS']}x{macros['DEPTH']} {macros['T']}"
            result.append((name, 15, partial(probe_product, macros=macros, way=way)))
    result.append(("relay: cp.async, mbarrier, named barriers, setmaxnreg", 10, probe_relay))
    result += [(f"attention {case}", 15, partial(probe_case, case=case, sampled=None)) for case in CASES]
    result += [(f"attention {case}", 20, partial(probe_case, case=case, sampled=20)) for case in LARGE[:5]]
    result += [(f"time Dh{case.dh} {case.kind}", 30, partial(probe_time, case=case)) for case in TIMED]
    result += [(f"attention {case}", 25, partial(probe_case, case=case, sampled=12)) for case in LARGE[5:]]
    return [*result, ("the same bits every time", 20, probe_repeat), ("NVRTC's cubin", 40, probe_nvrtc)]
