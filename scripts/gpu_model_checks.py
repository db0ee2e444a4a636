"""Correctness on a card of whole models: the engine's ways against each other, models against NumPy, memory, and what
compute-sanitizer says. The rule of tolerance is that of ``gpu_checks``."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from scripts.gpu_checks import SLACK, Array, Checks, Note, judged
from scripts.gpu_layout import ROOT
from scripts.gpu_sizes import DRY, Sizes
from slimrt.bench.synthetic import SHAPES, SyntheticModel
from slimrt.config import CacheConfig
from slimrt.engine import Engine
from slimrt.errors import DeviceError
from slimrt.models.llama import Llama
from slimrt.ops.cuda.cupy_ops import CupyOps
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.prune.plan import PrunePlan, Stage
from slimrt.session import Session
from tests.half_ops import HalfOps

PARTS = ROOT / ".model"  # where the default model's parts are put, on a machine without a network
SPLIT = "split -b 50M SmolLM2-135M-Instruct.Q4_1.gguf .model/part"
_CHECK_VOCAB = 4096  # rows of the head where whole models are compared: the head has a check of its own


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
    if held is not None or (joined.exists() and joined.stat().st_size == entry.size):  # else a join was cut off
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
