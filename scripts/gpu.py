"""Everything that needs a GPU, in one command: ``make gpu``, or ``make gpu DRY=1`` on the CPU emulation at tiny sizes.

Each step runs in a process of its own within a time of its own and writes what it has found as it goes, so that a step
that hangs, fails or runs out of time costs nothing but its own rest. Results: ``docs/results/gpu-<device>-<date>.json``
(dry: ``build/gpu-dry.json``); ``scripts/results_table.py`` makes the README's table of them.

    python scripts/gpu.py [--dry] [--only STEP ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

Note = Callable[..., None]  # note(key=value): part of the step's results, on disk at once


@dataclass(frozen=True)
class Sizes:
    """What is measured, and on what."""

    shape: str
    types: tuple[str, ...]
    lengths: tuple[int, ...]
    plans: tuple[str, ...]
    kernel_tokens: int
    decode_context: int
    decode_tokens: int
    budget: int
    ring_length: int
    copy_bytes: int


FULL = Sizes("llama-3.1-8b", ("F16", "Q4_0"), (8192, 16384, 32768, 65536, 131072), ("off", "8k/4k/2k", "1/2,1/4"),
             16384, 4096, 64, 4096, 32768, 1 << 30)  # fmt: skip
DRY = Sizes("tiny", ("Q4_0",), (96, 160), ("off", "tiny"), 64, 160, 2, 128, 176, 1 << 16)


# -- steps ------------------------------------------------------------------------------------------------------------


def device(note: Note, sizes: Sizes) -> None:
    """What GPU this is, and how fast it copies to and from page-locked host memory."""
    from slimrt.ops.cuda.cupy_ops import CupyOps
    from slimrt.ops.cuda.device import probe

    gpu = probe()
    note(device=vars(gpu), device_name=gpu.name, about=str(gpu))
    ops = CupyOps(gpu)
    there = ops.empty((sizes.copy_bytes,), np.uint8)
    here = ops.pinned((sizes.copy_bytes,), np.uint8)
    for name, pair in (("h2d_gb_s", (there, here)), ("d2h_gb_s", (here, there))):
        rates = []
        for _ in range(5):
            ops.observed = ([], [])
            ops.copy([pair], after=ops.mark())
            ops.finish()
            rates.append(sizes.copy_bytes / ops.total(ops.observed[0]) / 1e9)
        note(**{name: max(rates)})


def ptx(note: Note, sizes: Sizes) -> None:
    """The PTX wrappers against NumPy."""
    _pytest(note, ["tests/gpu/test_ptx.py"])


def kernels(note: Note, sizes: Sizes) -> None:
    """Every kernel against NumPy, on the device."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_kernels_*.py"))
    _pytest(note, files if sizes is FULL else [name for name in files if "rows" in name])


def _pytest(note: Note, files: list[str]) -> None:
    import pytest

    class Count:
        passed = failed = skipped = 0

        def pytest_runtest_logreport(self, report: Any) -> None:
            self.passed += report.when == "call" and report.passed
            self.failed += report.failed
            self.skipped += report.skipped

    count = Count()
    status = pytest.main(["-q", "-x", "-p", "tests.gpu.on_device", "-p", "no:cacheprovider", *files], plugins=[count])
    note(passed=count.passed, failed=count.failed, skipped=count.skipped)
    if status:
        raise SystemExit(f"pytest ended with status {int(status)}")


def backend(note: Note, sizes: Sizes) -> None:
    """Logits of the default model, prefill, pruned prefill and decode, against the CPU backend.

    The tolerance is 3 times the error of NumPy rounded to float16 in the same places.
    """
    from slimrt.config import PrunePlan, Stage
    from slimrt.engine import Engine
    from slimrt.hub import store as hub
    from slimrt.models import build, read_config
    from slimrt.ops.cuda.cupy_ops import CupyOps
    from slimrt.ops.numpy.numpy_ops import NumpyOps
    from slimrt.session import Session
    from slimrt.weights.gguf import GGUFFile
    from tests.half_ops import HalfOps
    from tests.tiny_gguf import write_tiny_llama

    path, length = None, 96
    if sizes is FULL:
        length = 700
        try:
            path = hub.default_model_path()
        except Exception as error:  # no network: the synthetic model has to do
            note(model_error=str(error))
    if path is None:
        path = write_tiny_llama(ROOT / "build" / "gpu-tiny.gguf", head_dim=64, type="Q4_0", n_layers=4, seed=3)
    file = GGUFFile(path)
    config = read_config(file)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, length).tolist()
    last = config.n_layers - 2
    plan = PrunePlan((Stage(last - 1, 0.75), Stage(last, 0.5)), block=16, query_window=8)
    found: dict[str, list[np.ndarray]] = {}
    kept: dict[str, list] = {}
    for name, ops in (("float32", NumpyOps()), ("half", HalfOps()), ("cuda", CupyOps())):
        engine = Engine(build(config, file, ops), ops)
        found[name], kept[name] = [], []
        for chosen in (None, plan):
            session = Session(engine, length + 8)
            kept[name].append(session.prefill(ids, chosen).stages)
            found[name].append(session.logits)  # type: ignore[arg-type]
            for token in ids[:3]:
                session.extend([token])
                found[name].append(session.logits)  # type: ignore[arg-type]
    dense = slice(0, 4)  # a pruned run may choose other blocks where scores are close: reported, not judged
    errors = {name: np.abs(np.array(found[name]) - found["float32"]).max(axis=1).tolist() for name in ("half", "cuda")}
    note(model=Path(file.path).name, tokens=length, max_error=errors, kept=kept,
         largest_logit=float(np.abs(np.array(found["float32"])).max()))  # fmt: skip
    if max(errors["cuda"][dense]) > 3 * max(errors["half"][dense]):
        raise SystemExit(
            f"logits differ by {max(errors['cuda'][dense])}, float16 alone by {max(errors['half'][dense])}"
        )


def sanitizer(note: Note, sizes: Sizes) -> None:
    """compute-sanitizer (memcheck, then racecheck) over a short conversation, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        note(skipped="compute-sanitizer is not installed (it comes with the CUDA toolkit)")
        return
    if sizes is DRY:
        note(skipped="nothing to check in the emulation: AddressSanitizer does that in the tests")
        return
    for check in ("memcheck", "racecheck"):
        command = [tool, f"--tool={check}", "--error-exitcode=9", sys.executable, __file__, "--step", "smoke"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        note(**{check: done.returncode, f"{check}_tail": (done.stdout + done.stderr)[-500:]})


def smoke(note: Note, sizes: Sizes) -> None:
    """A short conversation with every kind of operation in it."""
    from slimrt.bench.shaped import run

    run("cuda", "tiny", "Q4_0", (150,), ("off", "tiny"), 128, 1, 2)
    note(done=True)


def bench(note: Note, sizes: Sizes) -> None:
    """``slimrt bench kernels``."""
    from slimrt.bench.kernels import run

    note(**run("cuda", sizes.shape, sizes.kernel_tokens, 5 if sizes is FULL else 1).to_dict())


def peer_kernels(note: Note, sizes: Sizes) -> None:
    """torch's SDPA and flash attention at the sizes of ours, where torch is installed."""
    from scripts.gpu_peers import attention

    note(rows=attention(sizes.shape, (sizes.kernel_tokens, 2 * sizes.kernel_tokens, 4 * sizes.kernel_tokens)))


def ttft(note: Note, sizes: Sizes, kind: str = "F16") -> None:
    """Time to first token of the 8B shape; short prompts first, so that a step out of time has those."""
    from slimrt.bench import shaped
    from slimrt.ops.cuda.cupy_ops import CupyOps
    from slimrt.session import Session

    engine = shaped.open_engine(CupyOps(), sizes.shape, kind)
    Session(engine, 1024).prefill([1] * min(512, sizes.lengths[0]))
    rows: list[dict[str, Any]] = []
    note(shape=sizes.shape, type=kind, **shaped.about(engine.ops))
    for length in sizes.lengths:
        for plan in sizes.plans:
            try:
                row = shaped.measure(engine, length, plan, repeats=3 if length <= 16384 and sizes is FULL else 1)
                rows.append(vars(row))
            except Exception as error:
                rows.append({"length": length, "plan": plan, "error": str(error)})
            note(rows=rows)


def ttft_q4(note: Note, sizes: Sizes) -> None:
    """The same with Q4_0."""
    ttft(note, sizes, "Q4_0")


def peer_ttft(note: Note, sizes: Sizes) -> None:
    """Transformers with SDPA, random weights of the same shape, the same card, where they are installed."""
    from scripts.gpu_peers import prefill

    rows: list[dict[str, Any]] = []
    for length in sizes.lengths:
        rows.append({"length": length, **prefill(sizes.shape, length)})
        note(rows=rows)


def decode(note: Note, sizes: Sizes) -> None:
    """Tokens a second, with and without a KV budget, beside the floor that reading the weights sets."""
    from slimrt.bench import shaped
    from slimrt.config import CacheConfig
    from slimrt.ops.cuda.cupy_ops import CupyOps

    rows: list[dict[str, Any]] = []
    for kind in sizes.types:
        ops = CupyOps()
        longer = 4 * sizes.decode_context
        for budget, length in ((None, sizes.decode_context), (None, longer), (sizes.budget, longer)):
            cache = CacheConfig(longer + 2 * sizes.decode_tokens, budget)
            engine = shaped.open_engine(ops, sizes.shape, kind, cache)
            row = shaped.measure(engine, length, "off", decode_tokens=sizes.decode_tokens)
            model = engine.model
            matrices = [w for layer in model.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)]
            weights = sum(w.nbytes for w in [*matrices, model.head])
            rows.append({"type": kind, **vars(row), "weight_bytes": weights})
            note(rows=rows)
            del engine


def ring(note: Note, sizes: Sizes) -> None:
    """How much of the copies of a prompt under a KV budget hides behind compute, and the rate they reach."""
    from slimrt.bench import shaped
    from slimrt.config import CacheConfig
    from slimrt.ops.cuda.cupy_ops import CupyOps

    cache = CacheConfig(sizes.ring_length + 16, sizes.budget)
    engine = shaped.open_engine(CupyOps(), sizes.shape, sizes.types[-1], cache)
    rows = []
    for plan in sizes.plans:
        row = shaped.measure(engine, sizes.ring_length, plan)
        rate = row.bytes_moved / row.copy_s / 1e9 if row.copy_s else None
        rows.append({**vars(row), "hidden_share": row.hidden_share, "copy_gb_s": rate})
        note(rows=rows)


DRY_SECONDS = 120  # that a dry step may take, on however busy a machine
# name -> (step, seconds it may take); the sum is what ``make gpu`` may take
STEPS: dict[str, tuple[Callable[..., None], int]] = {
    "device": (device, 25),
    "ptx": (ptx, 20),
    "kernels": (kernels, 70),
    "backend": (backend, 40),
    "bench": (bench, 45),
    "ttft": (ttft, 75),
    "peer_ttft": (peer_ttft, 55),
    "ttft_q4": (ttft_q4, 70),
    "decode": (decode, 40),
    "ring": (ring, 30),
    "peer_kernels": (peer_kernels, 20),
    "sanitizer": (sanitizer, 30),
}


# -- the driver -------------------------------------------------------------------------------------------------------


def run_step(name: str, out: Path | None, *, dry: bool) -> None:
    """In the step's own process."""
    if dry:
        import pytest

        from tests.fake_cupy import FakeCupy

        FakeCupy(pytest.MonkeyPatch())
    found: dict[str, Any] = {}

    def note(**values: Any) -> None:
        found.update(values)
        if out is not None:
            out.write_text(json.dumps(found, default=_plain))

    step = smoke if name == "smoke" else STEPS[name][0]
    step(note, DRY if dry else FULL)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else list(value) if isinstance(value, tuple) else str(value)


def run_all(names: list[str], out: Path | None, *, dry: bool) -> int:
    """Every step in turn; the results so far are on disk after each. Returns the number of steps that failed."""
    partial = ROOT / "build" / "gpu-step.json"
    partial.parent.mkdir(exist_ok=True)
    results: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "dry": dry, "steps": {}}
    failures = 0
    for name in names:
        seconds = DRY_SECONDS if dry else STEPS[name][1]
        partial.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--step", name, "--out", str(partial), *(["--dry"] if dry else [])]
        begun = time.perf_counter()
        print(f"== {name}: ", end="", flush=True)
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
            ended, tail = ("passed" if done.returncode == 0 else "failed"), (done.stdout + done.stderr)[-2000:]
        except subprocess.TimeoutExpired:
            ended, tail = "out of time", ""
        found = json.loads(partial.read_text()) if partial.exists() else {}
        failures += ended == "failed"
        took = time.perf_counter() - begun
        results["steps"][name] = {"ended": ended, "seconds": round(took, 1), "results": found}
        if ended == "failed":
            results["steps"][name]["tail"] = tail
        print(f"{ended} in {took:.0f} s" + (f"\n{tail}" if ended == "failed" else ""), flush=True)
        target = out or _target(results, dry)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(results, indent=1, default=_plain) + "\n")
        if name == "device" and ended != "passed":
            print("no step can run without a GPU that works; on the CPU: make gpu DRY=1")
            return failures or 1
    print(f"results: {target}")
    return failures


def _target(results: dict[str, Any], dry: bool) -> Path:
    if dry:
        return ROOT / "build" / "gpu-dry.json"
    name = results["steps"].get("device", {}).get("results", {}).get("device_name", "unknown")
    return (
        ROOT
        / "docs"
        / "results"
        / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{results['date'][:10]}.json"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU emulation, at tiny sizes")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="these steps")
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--step", choices=[*STEPS, "smoke"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.step:
        run_step(options.step, options.out, dry=options.dry)
    else:
        sys.exit(run_all(options.only, options.out, dry=options.dry))


if __name__ == "__main__":
    main()
