"""Prompt attention by wgmma on a Hopper card: right or not, where it is wrong, and how fast beside the mma.sync kernel.

    python scripts/gpu_attention_check.py --build            # compiles into build/wgmma; needs nvcc 13, no card
    python scripts/gpu_attention_check.py [--out FILE] [--only NAME ...] [--seconds 100]

Needs CuPy, NumPy and the sources, nothing installed; what ``--build`` left is used, the rest is compiled. Probes run in
the order of risk, each result is printed at once. They run in a process of their own: one that hangs or loses the card
costs itself only, the next starts in a fresh process. The exit status is the number of probes that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.wgmma_card import Card
from scripts.wgmma_cases import BUILT, ROOT, Build, all_builds, compile_one
from scripts.wgmma_probes import Note, probes


def child(chosen: list[int]) -> None:
    """Run probes; one line of JSON before and after each. A card that is lost ends the process with status 3."""
    listed = probes()
    card = Card()

    def say(**values: Any) -> None:
        print(json.dumps(values, default=str), flush=True)

    for number in chosen:
        found: dict[str, Any] = {}
        say(begin=number)
        begun, lost = time.perf_counter(), False
        try:
            right = listed[number][2](card, found.update)
        except Exception as error:
            right, lost = False, "CUDA" in type(error).__name__
            found["error"] = f"{type(error).__name__}: {str(error)[-600:]}"
        say(end=number, passed=right, seconds=round(time.perf_counter() - begun, 2), found=found)
        if lost:
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
