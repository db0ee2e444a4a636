"""What ``scripts/gpu.py`` does where a run meets trouble: reports of others, interrupts, kills, packages that miss."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest

from scripts import gpu, gpu_layout, gpu_measures, gpu_processes, gpu_report
from scripts.results_table import gpu_reports

ROOT = Path(__file__).parents[2]
STEP = {"ended": "passed", "seconds": 1.0, "results": {"rows": [1]}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{bro", r"is not a report of scripts/gpu.py \(Expecting .*; move it away"),
        ("[1]", "is not a report of scripts/gpu.py; move it away"),
        ('{"steps": {"ring": 3}}', "is not a report of scripts/gpu.py; move it away"),
        (json.dumps({"dry": False, "steps": {"ring": STEP}}), "holds a card's results, to which a dry run's cannot"),
    ],
)
def test_a_file_that_is_no_report_stays_as_it_is(tmp_path: Path, text: str, said: str) -> None:
    out = tmp_path / "results.json"
    out.write_text(text)
    with pytest.raises(SystemExit, match=said) as caught:
        gpu.run_all(["device"], out, dry=True)
    assert str(caught.value).startswith(f"--out {out}: ") and "\n" not in str(caught.value)
    assert out.read_text() == text and list(tmp_path.iterdir()) == [out]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "results.json", Path("/dev/null")):
        with pytest.raises(SystemExit, match=r"--out .*: (is not a file|cannot be written)") as caught:
            gpu.run_all(["device"], out, dry=True)
        assert "\n" not in str(caught.value)


def test_a_step_that_has_only_begun_leaves_what_an_earlier_run_found(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    gpu.Report(out, dry=True).put("ring", STEP)
    report = gpu.Report(out, dry=True)
    report.put("ring", {"ended": "cut off", "seconds": 0.5, "results": {}})
    assert json.loads(out.read_text())["steps"] == {"ring": STEP}
    report.put("ring", {"ended": "cut off", "seconds": 0.5, "results": {"rows": [2]}})
    report.put("bench", {"ended": "cut off", "seconds": 0.5, "results": {}})
    assert {name: step["ended"] for name, step in json.loads(out.read_text())["steps"].items()} == {
        "ring": "cut off", "bench": "cut off",
    }  # fmt: skip


def test_the_usual_place_is_one_for_all_calls_of_a_day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The card's name is asked before, so that a later call adds; without a card nothing comes to docs/results."""
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.Report(None, dry=False).path == tmp_path / "build" / "gpu-no-card.json"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200'\n")
    for name in ("device", "ring"):
        gpu.Report(None, dry=False).put(name, STEP)
    (path,) = (tmp_path / "docs" / "results").iterdir()
    assert re.fullmatch(r"gpu-nvidia-h200-\d{4}-\d\d-\d\d\.json", path.name)
    assert list(json.loads(path.read_text())["steps"]) == ["device", "ring"]
    path.with_name("gpu-a.json").write_text(json.dumps({"dry": False, "steps": {"device": {"results": {}}}}))
    assert len(gpu_reports(path.parent)) == 1  # the one that has found nothing is no table's


@pytest.mark.parametrize("text", ["nan", "0", "-3", "soon"])
def test_a_time_that_is_none(text: str) -> None:
    with pytest.raises(SystemExit, match=f"--within {text}: must be a number of seconds above 0"):
        gpu._seconds(text)
    assert gpu._seconds("inf") == math.inf


def test_an_interrupted_run_ends_its_steps_and_keeps_what_they_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = list[gpu.Running]()

    def start(name: str, folder: Path, processes: gpu_processes.Processes, **_: bool) -> gpu.Running:
        found, log = folder / f"{name}.json", folder / "log"
        found.write_text('{"rows": [1]}')
        with log.open("wb") as stream:
            sleep = processes.start(["sleep", "60"], folder, stream)
        started.append(gpu.Running(name, sleep, found, log, 60))
        return started[-1]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "_start", start)
    monkeypatch.setattr("scripts.gpu.time.sleep", interrupt)
    assert gpu.run_all(["ttft", "decode"], tmp_path / "results.json") == 2
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {name: (step["ended"], step["results"]) for name, step in steps.items()} == {
        "ttft": ("cut off", {"rows": [1]})
    }
    assert [step.process.poll() for step in started] == [-signal.SIGKILL]
    said = capsys.readouterr().out
    assert "cut off: ttft\n" in said and "not begun: decode\n" in said


STARTER = """
import subprocess, sys, tempfile, time
from pathlib import Path
from scripts.gpu_processes import Processes, end_with_the_run

def work():
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)

if sys.argv[1] == "step":
    end_with_the_run()
    work()
processes = Processes()
command = [sys.executable, __file__, "step"]
steps = [processes.start(command, Path.cwd(), sys.stdout), processes.fork(work, sys.stdout)]
print(*(step.pid for step in steps), flush=True)
time.sleep(60)
"""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_steps_and_what_they_have_started_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "starter.py"
    script.write_text(STARTER)
    run = subprocess.Popen(
        [sys.executable, script, "run"], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.stdout is not None
    pids = [int(pid) for _ in range(3) for pid in run.stdout.readline().split()]
    assert len(pids) == 4 and all(map(_runs, pids))
    run.kill()
    run.wait()
    until = time.monotonic() + 20
    while any(map(_runs, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(_runs, pids))


def test_what_packages_need_in_turn_is_named_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(distribution: str) -> set[str]:
        entries = [
            entry for entry in requires(distribution) or () if not re.search(r"extra ==|win32|Windows|< ?.3", entry)
        ]
        return {re.split(r"[^\w.-]", entry, maxsplit=1)[0].lower().replace("_", "-") for entry in entries}

    def absent(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gpu_layout, "distribution", absent)
    missing = gpu_layout.missing_packages(cupy=False)
    assert len(missing) == len(set(missing)) and {"pytest", "pluggy", "llvmlite", "mdurl"} <= set(missing)
    for name in missing:
        assert names(name) <= set(missing), name


def test_clocks_that_the_drivers_tool_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 9\n")
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_measures.clock() == {}
    tool.write_text("#!/bin/sh\necho '1980 MHz, 3201 MHz, 70 W, 30'\n")
    assert gpu_measures.clock()["clocks.sm"] == "1980 MHz"
