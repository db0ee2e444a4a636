"""Everything that needs a GPU: ``python3 scripts/gpu.py``, from a checkout, with no network and nothing installed.

    python3 scripts/gpu.py [--only STEP_OR_GROUP[,...]] [--within SECONDS] [--out FILE] [--quick] [--dry]

Needs a Python with CuPy, NumPy, Numba, pytest and slimrt's dependencies; what is missing is said in one line. The
steps come in four groups, ``correctness``, ``operations``, ``prompts`` and ``tokens``, each short enough for a
machine that is lent for minutes; ``docs/results/README.md`` has the order for one that is lent for fifteen in all.
Each step runs in a process of its own within a time of its own and writes what it finds row by row, so a step that
hangs, fails or is cut off costs nothing but its own rest. Checks share the card, measurements have it alone. Results
go to ``--out`` (default: ``docs/results/gpu-<device>-<date>.json``) and are merged into what is there, so that
``--only`` adds to an earlier run. ``--within`` bounds the whole call: what runs then is cut off with what it has
found, what waits is not begun. ``--quick`` measures one prompt length and one context; ``--dry`` walks through all of
it on the CPU's emulation, at tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import gpu_layout

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


CHECKS, MEASURES = "scripts.gpu_checks", "scripts.gpu_measures"
STEPS: dict[str, Step] = {
    "device": Step(MEASURES, "device", "correctness", 60),
    "ptx": Step(CHECKS, "ptx", "correctness", 90, alone=False),
    "kernels": Step(CHECKS, "kernels", "correctness", 150, alone=False),
    "attention": Step(CHECKS, "attention", "correctness", 120, alone=False),
    "sizes": Step(CHECKS, "sizes", "correctness", 120, alone=False),
    "engine": Step(CHECKS, "engine", "correctness", 120, alone=False),
    "shapes": Step(CHECKS, "shapes", "correctness", 150, alone=False),
    "model": Step(CHECKS, "model", "correctness", 120, alone=False),
    "memory": Step(CHECKS, "memory", "correctness", 90),
    "sanitizer": Step(CHECKS, "sanitizer", "correctness", 150, alone=False),
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

    found: dict[str, Any] = {}

    def note(**values: Any) -> None:
        found.update(values)
        if out is not None:
            part = out.with_suffix(".part")
            part.write_text(json.dumps(found, default=_plain))
            part.replace(out)  # a reader never sees half of it

    module, function = (CHECKS, name) if name == "smoke" else (STEPS[name].module, STEPS[name].function)
    step: Callable[..., None] = getattr(import_module(module), function)
    step(note, DRY if dry else QUICK if quick else FULL)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value.item() if hasattr(value, "item") else str(value)


# -- all of them ------------------------------------------------------------------------------------------------------


class Forked:
    """A step of a dry run: a fork of this process, which imports once for all of them. A card's steps are processes
    from scratch, for one that has touched a card cannot be forked."""

    def __init__(self, work: Callable[[], None], log: BinaryIO) -> None:
        self._status: int | None = None
        self._pid = os.fork()
        if self._pid:
            return
        status = 1
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            work()
            status = 0
        except BaseException:  # SystemExit too: a step that fails says why with it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, or None while it runs; as ``subprocess.Popen`` has it."""
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)


@dataclass
class Running:
    """A step under way."""

    name: str
    process: subprocess.Popen[bytes] | Forked
    found: Path
    log: Path
    limit: float
    begun: float = field(default_factory=time.perf_counter)


class Report:
    """What ``--out`` holds: written after each change, merged into what an earlier run left there."""

    def __init__(self, out: Path | None, *, dry: bool) -> None:
        self._out, self.dry = out, dry
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.results: dict[str, Any] = {"date": now, "dry": dry, "steps": {}}
        if out is not None and out.exists():
            self.results["steps"] = json.loads(out.read_text())["steps"]

    def put(self, name: str, step: Mapping[str, Any]) -> None:
        self.results["steps"][name] = dict(step)
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.replace(path)

    @property
    def path(self) -> Path:
        if self._out is not None:
            return self._out
        if self.dry:
            return ROOT / "build" / "gpu-dry.json"
        name = self.results["steps"].get("device", {}).get("results", {}).get("device_name", "unknown")
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return ROOT / "docs" / "results" / f"gpu-{slug}-{self.results['date'][:10]}.json"


def run_all(
    names: Sequence[str], out: Path | None, *, dry: bool = False, quick: bool = False, within: float = math.inf
) -> int:
    """Run the steps, checks together and measurements alone; returns how many neither passed nor were skipped.

    ``within``: seconds that all of it may take.
    """
    report, end = Report(out, dry=dry), time.perf_counter() + within
    waiting, running = list(names), list[Running]()
    ended: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and _may_start(waiting[0], running, dry=dry):
                running.append(_start(waiting.pop(0), Path(folder), dry=dry, quick=quick))
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
                    for other in running:
                        other.process.kill()
                    return 1
    print("\n== results:", report.path)
    for verdict in dict.fromkeys(ended.values()):
        print(f"{verdict}: {', '.join(name for name, how in ended.items() if how == verdict)}")
    return sum(verdict not in ("passed", "skipped") for verdict in ended.values())


def _may_start(name: str, running: Sequence[Running], *, dry: bool) -> bool:
    if not running:
        return True
    limit = 2 if dry else TOGETHER
    return not STEPS[name].alone and not any(STEPS[step.name].alone for step in running) and len(running) < limit


def _start(name: str, folder: Path, *, dry: bool, quick: bool) -> Running:
    found, log = folder / f"{name}.json", folder / f"{name}.log"
    if dry:
        _import_all()
        os.chdir(ROOT)
        with log.open("wb") as stream:
            process = Forked(lambda: run_step(name, found, dry=True, quick=quick), stream)
        return Running(name, process, found, log, DRY_SECONDS)
    command = [sys.executable, __file__, "--step", name, "--out", str(found)]
    command += ["--quick"] * quick
    with log.open("wb") as stream:
        program = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
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
    if late:
        step.process.kill()
        status = step.process.wait()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU emulation, at tiny sizes")
    parser.add_argument("--quick", action="store_true", help="measure one prompt length and one context only")
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"these steps or groups ({', '.join(GROUPS)})")
    parser.add_argument(
        "--within", type=float, metavar="SECONDS", default=math.inf, help="what the call may take in all"
    )
    parser.add_argument("--out", type=Path, help="where the results go, merged into what is there")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        os.chdir(ROOT)
        run_step(options.step, options.out, dry=options.dry, quick=options.quick)
        return
    missing = gpu_layout.missing_packages(cupy=not options.dry)
    if missing:
        sys.exit(gpu_layout.remedy(missing))
    out = None if options.out is None else options.out.resolve()
    names, how = chosen(options.only), {"dry": options.dry, "quick": options.quick, "within": options.within}
    sys.exit(1 if run_all(names, out, **how) else 0)


if __name__ == "__main__":
    main()
