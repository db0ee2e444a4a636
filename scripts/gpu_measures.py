"""What a card does: copies, kernels, time to first token, decode, the ring; each row with the card's clock."""

from __future__ import annotations

import gc
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scripts.gpu_sizes import DRY, Sizes
from slimrt.bench import shaped
from slimrt.bench.peak import prefill_operations
from slimrt.bench.timing import Peaks, Timer, measure_peaks
from slimrt.config import CacheConfig
from slimrt.engine import Engine
from slimrt.ops.cuda.cupy_ops import CupyOps
from slimrt.ops.cuda.device import load_cupy, probe
from slimrt.session import Session

Note = Callable[..., None]


def clock() -> dict[str, str]:
    """The card's clocks, power and temperature as ``nvidia-smi`` tells them now; empty where it cannot."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    done = subprocess.run([tool, f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True)
    if done.returncode or not done.stdout:
        return {}
    return dict(zip(fields.split(","), (part.strip() for part in done.stdout.splitlines()[0].split(",")), strict=False))


def device(note: Note, sizes: Sizes) -> None:
    """What GPU this is, and how fast it copies to and from page-locked host memory."""
    gpu = probe()
    note(device=vars(gpu), device_name=gpu.name, about=str(gpu), **clock())
    for name, rates in links(CupyOps(gpu), sizes).items():
        note(**{f"{name}_gb_s": float(np.median(rates)), f"{name}_gb_s_range": [min(rates), max(rates)]})


def links(ops: CupyOps, sizes: Sizes) -> dict[str, list[float]]:
    """GB/s of copies to (h2d) and from the device, of page-locked memory, five times."""
    there = ops.empty((sizes.copy_bytes,), np.uint8)
    here = ops.pinned((sizes.copy_bytes,), np.uint8)
    here[:] = 1
    found: dict[str, list[float]] = {}
    for name, pair in (("h2d", (there, here)), ("d2h", (here, there))):
        for _ in range(5):
            ops.observed = ([], [])
            ops.copy([pair], after=ops.mark())
            ops.finish()
            found.setdefault(name, []).append(sizes.copy_bytes / ops.total(ops.observed[0]) / 1e9)
    ops.observed = None
    return found


def peaks(ops: Any, sizes: Sizes) -> Peaks:
    """What this card's cuBLAS and memory reach in a large product and a large copy, measured."""
    large = sizes is not DRY
    timer = Timer(ops, 5, *(() if large else (1 << 16,)))
    with ops.computing():
        return measure_peaks(ops, timer, 8192 if large else 128, 1 << 30 if large else 1 << 16)


def bench(note: Note, sizes: Sizes) -> None:
    """``slimrt bench kernels``."""
    from slimrt.bench.kernels import run

    note(**run("cuda", sizes.shape, sizes.kernel_tokens, 7 if sizes is not DRY else 1).to_dict(), **clock())


def peer_kernels(note: Note, sizes: Sizes) -> None:
    """torch's attention kernels at the sizes of ours."""
    from scripts.gpu_peers import attention

    rows: list[dict[str, Any]] = []
    for length in sizes.peer_tokens:
        rows += attention(sizes.shape, length)
        note(rows=rows)
    _skipped(note, rows)


def ttft(note: Note, sizes: Sizes) -> None:
    """Time to first token of the 8B shape; short prompts first, so that a step out of time has those."""
    _ttft(note, sizes, sizes.measured_types[0], sizes.lengths)


def ttft_q4(note: Note, sizes: Sizes) -> None:
    """The same with packed weights."""
    _ttft(note, sizes, sizes.packed_type, sizes.packed_lengths)


def _ttft(note: Note, sizes: Sizes, kind: str, lengths: Sequence[int]) -> None:
    ops = CupyOps()
    best = peaks(ops, sizes)
    engine = shaped.open_engine(ops, sizes.shape, kind)
    rows: list[dict[str, Any]] = []
    note(shape=sizes.shape, type=kind, peaks=vars(best), **shaped.about(ops))
    Session(engine, 1100).prefill([1] * min(1024, lengths[0]))  # everything is compiled, all weights touched
    for length in lengths:
        for plan in sizes.plans:
            try:
                row = vars(shaped.measure(engine, length, plan, repeats=sizes.times(length)))
                if plan == "off":
                    row["peak_share"] = prefill_operations(engine.config, length) / row["ttft_s"] / best.flops
                rows.append(row | clock())
            except Exception as error:
                rows.append({"length": length, "plan": plan, "error": f"{type(error).__name__}: {error}"})
            note(rows=rows)
    _failed(rows)


class Timeline:
    """A trace that marks on the GPU's queue when each layer has ended."""

    def __init__(self) -> None:
        self._cuda, self._marks = load_cupy().cuda, list[Any]()

    def begin(self) -> None:
        self._mark()

    def layer(self, layer: int) -> None:
        self._mark()

    def attention(self, *_: Any) -> None: ...

    def cut(self, *_: Any) -> None: ...

    def _mark(self) -> None:
        event = self._cuda.Event()
        event.record()
        self._marks.append(event)

    def milliseconds(self) -> list[float]:
        """Of each layer, from the end of the one before to its own, whether the GPU computes or waits."""
        self._marks[-1].synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [round(float(self._cuda.get_elapsed_time(a, b)), 3) for a, b in pairs]


def timeline(note: Note, sizes: Sizes) -> None:
    """How long each layer of a prompt takes, dense and under a plan: where a plan's time goes."""
    engine = shaped.open_engine(CupyOps(), sizes.shape, sizes.measured_types[0])
    ids = np.random.default_rng(5).integers(0, engine.config.vocab_size, sizes.ring_length).tolist()
    rows = []
    for plan in sizes.plans[:2]:
        for warm in (False, True):
            session, trace = Session(engine, len(ids) + 8), Timeline()
            begun = time.perf_counter()
            session.prefill(ids, shaped.PLANS[plan], trace=trace)
            took = time.perf_counter() - begun
            if warm:
                rows.append({"plan": plan, "ttft_s": took, "layers_ms": trace.milliseconds()})
            session.context.cache.close()
    note(length=len(ids), rows=rows, **clock())


def peers(note: Note, sizes: Sizes) -> None:
    """Transformers with SDPA and its cache, eager, on random float16 weights of the same shape."""
    from scripts.gpu_peers import Peer

    if sizes is DRY:
        note(skipped="torch does not run on the emulation")
        return
    peer = Peer(sizes.shape)
    if peer.missing:
        note(skipped=peer.missing)
        return
    rows: list[dict[str, Any]] = []
    context = sizes.contexts[0]
    tasks = [(length, lambda n=length: peer.prefill(n, sizes.times(n))) for length in sizes.peer_lengths]
    for length, task in [(context, lambda: peer.decode(context, 32)), *tasks]:
        try:
            rows.append({"length": length, **task(), **clock()})
        except Exception as error:
            rows.append({"length": length, "error": f"{type(error).__name__}: {error}"})
        note(rows=rows)
    _failed(rows)


def decode(note: Note, sizes: Sizes) -> None:
    """Tokens a second behind several contexts, with and without a KV budget, beside the time that reading the weights
    and keys once would take at the measured copy rate."""
    rows: list[dict[str, Any]] = []
    for kind in dict.fromkeys(reversed(sizes.measured_types)):
        ops = CupyOps()
        best = peaks(ops, sizes)
        model = shaped.open_model(ops, sizes.shape, kind)
        matrices = [w for layer in model.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        weights = sum(w.nbytes for w in [*matrices, model.head])
        c, tokens = model.config, sizes.decode_tokens
        runs = [(length, None) for length in sizes.contexts] + [(sizes.contexts[-1], sizes.budget)]
        for length, budget in runs:
            cache = None if budget is None else CacheConfig(length + 2 * sizes.decode_tokens + 16, budget)
            row: dict[str, Any] = {"type": kind, "weight_bytes": weights}
            try:
                engine = Engine(model, ops, cache)
                row |= vars(
                    shaped.measure(engine, length, "off", repeats=sizes.times(2 * length), decode_tokens=tokens)
                )
                read = min(length, budget or length) * 4 * c.n_kv_heads * c.head_dim * c.n_layers
                row["floor_s"] = (weights + read) / best.bandwidth
                row["over_floor"] = 1 / row["decode_tok_s"] / row["floor_s"]
                row |= clock()
            except Exception as error:
                row |= {"length": length, "kv_budget": budget, "error": f"{type(error).__name__}: {error}"}
            rows.append(row)
            note(rows=rows, peaks=vars(best))
        del model, matrices
        gc.collect()
    _failed(rows)


def ring(note: Note, sizes: Sizes) -> None:
    """How much of the copies of a prompt under a KV budget hides behind compute, and the rate they reach."""
    cache = CacheConfig(sizes.ring_length + 16, sizes.budget)
    ops = CupyOps()
    link = float(np.median(links(ops, sizes)["h2d"]))
    engine = shaped.open_engine(ops, sizes.shape, sizes.measured_types[1], cache)
    rows: list[dict[str, Any]] = []
    for plan in sizes.plans:
        try:
            row = shaped.measure(engine, sizes.ring_length, plan, repeats=sizes.repeats)
            rate = row.bytes_moved / row.copy_s / 1e9 if row.copy_s else None
            share = None if rate is None else rate / link
            rows.append(
                {**vars(row), "hidden_share": row.hidden_share, "copy_gb_s": rate, "link_share": share, **clock()}
            )
        except Exception as error:
            rows.append({"plan": plan, "error": f"{type(error).__name__}: {error}"})
        note(rows=rows)
    _failed(rows)


def _failed(rows: list[dict[str, Any]]) -> None:
    """Rows that failed stay in the report, and the step says so."""
    errors = [row["error"] for row in rows if "error" in row]
    if errors or not rows:
        raise SystemExit(f"{len(errors)} of {len(rows)} rows failed: {errors[:3]}")


def _skipped(note: Note, rows: list[dict[str, Any]]) -> None:
    if rows and all("skipped" in row for row in rows):
        note(skipped=rows[0]["skipped"])
