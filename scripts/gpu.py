"""Everything that needs a GPU: ``python3 scripts/gpu.py``, from a checkout, with no network and nothing installed.

    python3 scripts/gpu.py [--only STEP_OR_GROUP[,...]] [--within SECONDS] [--out FILE] [--quick] [--dry]

Needs a Python with CuPy, NumPy, Numba, pytest and slimrt's dependencies; what is missing is said in one line. The
steps come in four groups, ``correctness``, ``operations``, ``prompts`` and ``tokens``, each short enough for a
machine that is lent for minutes; ``docs/results/README.md`` has the order for one that is lent for fifteen in all.
Each step runs in a process of its own within a time of its own and writes what it finds row by row, so a step that
hangs, fails or is cut off costs nothing but its own rest; however the run ends, its steps end with it. Checks share the
card, measurements have it alone. Results go to ``--out`` (default: ``docs/results/gpu-<device>-<date>.json``) and are
merged into what is there, so that ``--only`` adds to an earlier run. ``--within`` bounds the whole call: what runs then
is cut off with what it has found, what waits is not begun. ``--quick`` measures one prompt length and one context;
``--dry`` walks through all of it on the CPU's emulation, at tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if sys.version_info < (3, 11):  # noqa: UP036  a lent machine's may be older
    sys.exit(
        f"Python {sys.version.split()[0]}: slimrt needs 3.11 or newer; run this with another one (python3.11, ...)"
    )

from scripts import gpu_layout, gpu_processes
from scripts.gpu_report import Report

ROOT = gpu_layout.ROOT
DRY_SECONDS = 240  # that a dry step may take, on however busy a machine
TOGETHER = 6  # checks that share a card
POLL_S = 0.5  # between two looks at the running steps: what they found is then on disk


@dataclass(frozen=True)
class Step:
    """``function`` of ``module``; ``seconds``: its limit, with room for a cold import and for pinning memory;
    ``alone``: whether it must have the card to itself."""

    module: str
    function: str
    group: str
    seconds: int
    alone: bool = True


CHECKS, MODELS, MEASURES = "scripts.gpu_checks", "scripts.gpu_model_checks", "scripts.gpu_measures"
STEPS: dict[str, Step] = {
    "device": Step(MEASURES, "device", "correctness", 60),
    "ptx": Step(CHECKS, "ptx", "correctness", 90, alone=False),
    "kernels": Step(CHECKS, "kernels", "correctness", 150, alone=False),
    "attention": Step(CHECKS, "attention", "correctness", 120, alone=False),
    "sizes": Step(CHECKS, "sizes", "correctness", 120, alone=False),
    "engine": Step(MODELS, "engine", "correctness", 120, alone=False),
    "shapes": Step(MODELS, "shapes", "correctness", 150, alone=False),
    "model": Step(MODELS, "model", "correctness", 120, alone=False),
    "memory": Step(MODELS, "memory", "correctness", 90),
    "sanitizer": Step(MODELS, "sanitizer", "correctness", 150, alone=False),
    "bench": Step(MEASURES, "bench", "operations", 120),
    "peer_kernels": Step(MEASURES, "peer_kernels", "operations", 60),
    "ttft": Step(MEASURES, "ttft", "prompts", 180),
    "timeline": Step(MEASURES, "timeline", "prompts", 60),
    "peers": Step(MEASURES, "peers", "prompts", 150),
    "ttft_q4": Step(MEASURES, "ttft_q4", "tokens", 150),
    "ring": Step(MEASURES, "ring", "tokens", 90),
    "decode": Step(MEASURES, "decode", "tokens", 120),
    "budget": Step("scripts.gpu_budget", "budget", "tokens", 120),
}
GROUPS = tuple(dict.fromkeys(step.group for step in STEPS.values()))


# -- a step, in its own process ---------------------------------------------------------------------------------------


def run_step(name: str, out: Path | None, *, dry: bool, quick: bool) -> None:
    """Run one step here; what it notes is in ``out`` at once."""
    gpu_layout.install()
    if dry:
        import pytest

        from tests.fake_cupy import FakeCupy

        FakeCupy(pytest.MonkeyPatch())
    from scripts.gpu_sizes import DRY, FULL, QUICK
    from slimrt.errors import DeviceError

    found: dict[str, Any] = {}

    def note(**values: Any) -> None:
        found.update(values)
        if out is not None:
            part = out.with_suffix(".part")
            part.write_text(json.dumps(found, default=_plain))
            part.replace(out)  # a reader never sees half of it

    module, function = (MODELS, name) if name == "smoke" else (STEPS[name].module, STEPS[name].function)
    step: Callable[..., None] = getattr(import_module(module), function)
    try:
        step(note, DRY if dry else QUICK if quick else FULL)
    except DeviceError as error:
        raise SystemExit(str(error)) from error


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value.item() if hasattr(value, "item") else str(value)


# -- all of them ------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A step under way."""

    name: str
    process: subprocess.Popen[bytes] | gpu_processes.Forked
    found: Path
    log: Path
    limit: float
    begun: float = field(default_factory=time.perf_counter)


def run_all(
    names: Sequence[str], out: Path | None, *, dry: bool = False, quick: bool = False, within: float = math.inf
) -> int:
    """Run the steps, checks together and measurements alone; returns how many neither passed nor were skipped.

    ``within``: seconds that all of it may take.
    """
    report, end = Report(out, dry=dry), time.perf_counter() + within
    waiting, running = list(names), list[Running]()
    ended: dict[str, str] = {}
    processes = gpu_processes.Processes()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and _may_start(waiting[0], running, dry=dry):
                    running.append(_start(waiting.pop(0), Path(folder), processes, dry=dry, quick=quick))
                time.sleep(POLL_S)
                if time.perf_counter() > end:
                    for step in running:
                        step.limit = 0
                    ended |= dict.fromkeys(waiting, "not begun")
                    waiting.clear()
                for step in list(running):
                    verdict = _look(step, report)
                    if verdict is None:
                        continue
                    running.remove(step)
                    ended[step.name] = verdict
                    if step.name == "device" and verdict != "passed":
                        print("no step can run without a GPU that works; on the CPU: python3 scripts/gpu.py --dry")
                        return 1
        except KeyboardInterrupt:
            print("\ninterrupted; what was found is kept")
            ended |= {step.name: _look(step, report) or "cut off" for step in running}
            ended |= dict.fromkeys(waiting, "not begun")
        finally:
            for step in running:
                gpu_processes.end(step.process)
            processes.close()
    print("\n== results:", report.path)
    for verdict in dict.fromkeys(ended.values()):
        print(f"{verdict}: {', '.join(name for name, how in ended.items() if how == verdict)}")
    return sum(verdict not in ("passed", "skipped") for verdict in ended.values())


def _may_start(name: str, running: Sequence[Running], *, dry: bool) -> bool:
    if not running:
        return True
    limit = 2 if dry else TOGETHER
    return not STEPS[name].alone and not any(STEPS[step.name].alone for step in running) and len(running) < limit


def _start(name: str, folder: Path, processes: gpu_processes.Processes, *, dry: bool, quick: bool) -> Running:
    found, log = folder / f"{name}.json", folder / f"{name}.log"
    with log.open("wb") as stream:
        if dry:
            _import_all()
            os.chdir(ROOT)
            forked = processes.fork(lambda: run_step(name, found, dry=True, quick=quick), stream)
            return Running(name, forked, found, log, DRY_SECONDS)
        command = [sys.executable, __file__, "--tied", "--step", name, "--out", str(found)]
        program = processes.start([*command, *["--quick"] * quick], ROOT, stream)
        return Running(name, program, found, log, STEPS[name].seconds)


def _import_all() -> None:
    """What the steps import, for those that are forked."""
    gpu_layout.install()
    for module in ("pytest", "tests.fake_cupy", *(step.module for step in STEPS.values())):
        import_module(module)


def _look(step: Running, report: Report) -> str | None:
    """Put what ``step`` has found so far into the report; its verdict once it has ended."""
    took = time.perf_counter() - step.begun
    status = step.process.poll()
    late = status is None and took > step.limit
    if late or status is not None:  # what it has started ends with it
        status = gpu_processes.end(step.process)
    results = json.loads(step.found.read_text()) if step.found.exists() else {}
    row: dict[str, Any] = {"ended": "cut off", "seconds": round(took, 1), "results": results}
    if status is None:
        report.put(step.name, row)
        return None
    skipped = status == 0 and "skipped" in results
    row["ended"] = "out of time" if late else "failed" if status else "skipped" if skipped else "passed"
    tail = step.log.read_text(errors="replace")[-4000:]
    if row["ended"] not in ("passed", "skipped"):
        row["tail"] = tail
    report.put(step.name, row)
    reason = f": {results['skipped']}" if skipped else ""
    print(f"== {step.name}: {row['ended']} in {took:.0f} s{reason}", flush=True)
    if "tail" in row:
        print(tail, flush=True)
    return row["ended"]


def chosen(only: str | None) -> list[str]:
    """The steps that ``--only`` names, by their own names or their groups'; without it all."""
    if only is None:
        return list(STEPS)
    names = [name for part in only.split(",") for name in _named(part.strip())]
    return [name for name in STEPS if name in names]


def _named(part: str) -> list[str]:
    if part in STEPS:
        return [part]
    if part in GROUPS:
        return [name for name, step in STEPS.items() if step.group == part]
    raise SystemExit(f"--only {part}: not a step or group; groups: {', '.join(GROUPS)}; steps: {', '.join(STEPS)}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:  # NaN is not
        raise SystemExit(f"--within {text}: must be a number of seconds above 0")
    return seconds


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU emulation, at tiny sizes")
    parser.add_argument("--quick", action="store_true", help="measure one prompt length and one context only")
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"these steps or groups ({', '.join(GROUPS)})")
    parser.add_argument(
        "--within", type=_seconds, metavar="SECONDS", default=math.inf, help="what the call may take in all"
    )
    parser.add_argument("--out", type=Path, help="where the results go, merged into what is there")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--tied", action="store_true", help=argparse.SUPPRESS)  # a step of a run, which ends with it
    options = parser.parse_args()
    if options.step:
        if options.tied:
            gpu_processes.end_with_the_run()
        os.chdir(ROOT)
        run_step(options.step, options.out, dry=options.dry, quick=options.quick)
        return
    missing = gpu_layout.missing_packages(cupy=not options.dry)
    if missing:
        sys.exit(gpu_layout.remedy(missing))
    out = None if options.out is None else options.out.resolve()
    names, how = chosen(options.only), {"dry": options.dry, "quick": options.quick, "within": options.within}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    sys.exit(1 if run_all(names, out, **how) else 0)


if __name__ == "__main__":
    main()
