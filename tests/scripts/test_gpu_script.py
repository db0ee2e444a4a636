"""``make gpu DRY=1`` walks every step; results become the README's table by a script."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution, files, requires
from pathlib import Path
from typing import Any

import pytest

from scripts import gpu, gpu_layout
from scripts.results_gpu import NOTHING
from scripts.results_table import (
    BEGIN,
    CPU_BEGIN,
    CPU_END,
    DETAILS_BEGIN,
    DETAILS_END,
    END,
    GPU_BEGIN,
    GPU_END,
    QUALITY_BEGIN,
    QUALITY_END,
    detailed,
    library_table,
    newest,
    quality_table,
    serve_table,
    summary_table,
    updated,
)
from tests import emulation

ROOT = Path(__file__).parents[2]


def needed() -> set[str]:
    """The distributions that a lent machine has, or that travel with the checkout, and what they require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, open_ = set[str](), [*project["dependencies"], *gpu_layout.FOR_TESTS]
    while open_:
        entry = open_.pop()
        name = re.split(r"[^\w.-]", entry, maxsplit=1)[0]
        if name in found or "extra ==" in entry:
            continue
        try:
            open_ += requires(name) or []
        except PackageNotFoundError:  # for another system or version of Python
            continue
        found.add(name)
    return found


def lent_machine(folder: Path) -> tuple[Path, Path]:
    """A copy of the checkout, and a Python with just those packages: without slimrt, without a network."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder / "env")
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    for name in sorted(needed()):
        for top in {file.parts[0] for file in files(name) or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    (site / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*_, **__): raise OSError('this machine has no network')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
    )
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in filter(None, tracked.split("\0")):
        if not file.startswith("tests/goldens") and (ROOT / file).exists():
            (folder / "checkout" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / "checkout" / file)
    # What either compiles the other has.
    emulation.CACHE.mkdir(parents=True, exist_ok=True)
    (folder / "checkout" / "build").mkdir()
    (folder / "checkout" / "build" / "emulation").symlink_to(emulation.CACHE)
    return folder / "env" / "bin" / "python", folder / "checkout"


@pytest.mark.skipif(emulation.compiler() is None, reason="running CUDA sources on the CPU needs g++")
def test_a_rehearsal_on_a_machine_that_has_never_seen_the_project(tmp_path: Path) -> None:
    """Every step, dry, from a copy of the checkout: nothing installed, no network, no home."""
    python, checkout = lent_machine(tmp_path)
    out = tmp_path / "out" / "results.json"
    done = subprocess.run(
        [python, "scripts/gpu.py", "--dry", "--out", out],
        cwd=checkout, capture_output=True, text=True, env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert results["dry"] and list(results["steps"]) == list(gpu.STEPS)
    ended = {name: step["ended"] for name, step in results["steps"].items()}
    assert {name for name, how in ended.items() if how != "passed"} == {
        "sanitizer", "peer_kernels", "peers",
    }, ended  # fmt: skip
    found = {name: step["results"] for name, step in results["steps"].items()}
    assert found["ptx"]["passed"] > 5 and found["kernels"]["passed"] == 5
    assert found["device"]["h2d_gb_s"] > 0
    for step in ("attention", "sizes", "engine", "shapes", "memory", "budget"):
        assert found[step]["checks"] and all(row["ok"] for row in found[step]["checks"])
    assert 0 < found["model"]["error"] <= found["model"]["allowed"]
    lengths = [(row["length"], row["plan"]) for row in found["ttft"]["rows"]]
    assert lengths == [(96, "off"), (96, "tiny"), (160, "off"), (160, "tiny")]
    assert all(row["decode_tok_s"] > 0 and row["floor_s"] > 0 for row in found["decode"]["rows"])
    assert all(row["bytes_moved"] > 0 for row in found["ring"]["rows"])
    assert [row["graphs"] for row in found["budget"]["rows"]] == [False, True]
    table = updated(f"before\n{BEGIN}\nold\n{END}\nafter", results)
    assert table is not None and table.startswith("before\n") and table.endswith("\nafter") and "old" not in table
    assert "| 160 |" in table and "Q4_0 dense" in table and "Emulated GPU" in table


def test_missing_packages_are_named_with_the_way_they_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        if name in ("gguf", "platformdirs"):
            raise PackageNotFoundError(name)

    monkeypatch.setattr(gpu_layout, "distribution", absent)
    missing = gpu_layout.missing_packages(cupy=False)
    assert missing == ["gguf", "platformdirs"]
    line = gpu_layout.remedy(missing)
    assert "\n" not in line and "gguf platformdirs" in line and "--no-index" in line


def test_each_group_fits_a_call_of_ten_minutes() -> None:
    """Limits are for a slow day; a group's longest steps that run alone, and its checks four at a time, add up."""
    for group in gpu.GROUPS:
        steps = [step for step in gpu.STEPS.values() if step.group == group]
        alone = sum(step.seconds for step in steps if step.alone)
        together = sum(step.seconds for step in steps if not step.alone)
        assert alone + together / gpu.TOGETHER < 10 * 60, group


def test_only_names_steps_and_groups() -> None:
    assert gpu.chosen("prompts,ring") == ["ttft", "timeline", "peers", "ring"]
    with pytest.raises(SystemExit, match=r"--only tff: not a step or group; groups: correctness, operations"):
        gpu.chosen("tff")


def test_a_call_ends_within_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs is cut off with what it has found; what waits is not begun."""

    def start(name: str, folder: Path, *_: object, **__: bool) -> gpu.Running:
        found = folder / f"{name}.json"
        found.write_text('{"rows": [1]}')
        (folder / "log").touch()
        sleep = subprocess.Popen(["sleep", "60"], process_group=0)
        return gpu.Running(name, sleep, found, folder / "log", 60)

    monkeypatch.setattr(gpu, "_start", start)
    assert gpu.run_all(["ttft", "decode"], tmp_path / "results.json", within=0.1) == 2
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert list(steps) == ["ttft"] and steps["ttft"]["ended"] == "out of time" and steps["ttft"]["results"]["rows"]


def test_only_merges_into_an_earlier_report(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    gpu.Report(out, dry=True).put("bench", {"ended": "passed", "results": {"rows": [1]}})
    gpu.Report(out, dry=True).put("ring", {"ended": "failed", "results": {}})
    steps = json.loads(out.read_text())["steps"]
    assert {name: step["ended"] for name, step in steps.items()} == {"bench": "passed", "ring": "failed"}


def test_a_step_that_hangs_or_fails_costs_only_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The driver runs its own file for each step; here another one stands in for it."""
    script = tmp_path / "step.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "name, out = sys.argv[sys.argv.index('--step') + 1], pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "out.write_text('{\"rows\": [1]}')\n"
        "if name == 'bench': time.sleep(60)\n"
        "if name == 'ttft': sys.exit('broken')\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    step = gpu.Step("", "", "operations", 3)
    monkeypatch.setattr(gpu, "STEPS", dict.fromkeys(("device", "bench", "ttft", "ring"), step))
    out = tmp_path / "results.json"
    assert gpu.run_all(list(gpu.STEPS), out) == 2
    steps = json.loads(out.read_text())["steps"]
    assert {name: step["ended"] for name, step in steps.items()} == {
        "device": "passed", "bench": "out of time", "ttft": "failed", "ring": "passed",
    }  # fmt: skip
    assert all(step["results"] == {"rows": [1]} for step in steps.values()) and "broken" in steps["ttft"]["tail"]


def test_without_a_gpu_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "DRY_SECONDS", 60)
    step = gpu.Step("scripts.gpu_measures", "device", "correctness", 60)
    monkeypatch.setattr(gpu, "STEPS", {"device": step, "ttft": step})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    printed: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    assert gpu.run_all(["device", "ttft"], tmp_path / "results.json", dry=False) == 1
    assert "python3 scripts/gpu.py --dry" in printed[-1]


def test_the_table() -> None:
    def step(results: dict[str, Any], ended: str = "passed") -> dict[str, Any]:
        return {"ended": ended, "seconds": 1.0, "results": results}

    results = {
        "date": "2031-05-06T07:08:09", "dry": False,
        "steps": {
            "device": step({"about": "A card"}),
            "ttft": step({"type": "F16", "shape": "llama-3.1-8b", "rows": [
                {"length": 8192, "plan": "off", "ttft_s": 1.234},
                {"length": 8192, "plan": "8k/4k/2k", "ttft_s": 0.5},
                {"length": 16384, "plan": "off", "error": "memory"},
            ]}, "out of time"),
            "peers": step({"rows": [{"length": 8192, "ttft_s": 2.0, "program": "transformers 5"}]}),
        },
    }  # fmt: skip
    made = updated(f"{BEGIN}\n{END}\n", results)
    assert made is not None and made.splitlines()[1:4] == [
        "| prompt, first token | F16 dense | F16 pruned | Transformers |",
        "|---:|---:|---:|---:|",
        "| 8,192 | 1.23 s | 0.50 s (2.5x) | 2.00 s |",
    ]
    decode = [{"type": "Q4_0", "length": 4096, "kv_budget": budget, "decode_tok_s": 400.0, "over_floor": 1.52}
              for budget in (None, 1024)]  # fmt: skip
    results["steps"]["decode"] = step({"rows": decode})
    lines = (updated(f"{BEGIN}\n{END}\n", results) or "").splitlines()
    assert lines[5:8] == ["| context, tokens/s (over floor) | Q4_0 |", "|---:|---:|", "| 4,096 | 400 (1.5x) |"]
    every = detailed(f"{GPU_BEGIN}\n{GPU_END}\n", None, [], [results])
    assert "F16 8k/4k/2k" in every and "Q4_0, KV budget 1024" in every
    assert "did not end well: ttft" in made
    assert NOTHING in (updated(f"{BEGIN}\n{END}\n", None) or "")
    assert updated("no place", results) is None


def test_dry_results_never_reach_the_table(tmp_path: Path) -> None:
    (tmp_path / "gpu-a.json").write_text(json.dumps({"dry": True, "date": "2031"}))
    assert newest(tmp_path) is None
    real = {"dry": False, "date": "2030", "steps": {"device": {"results": {"about": "A card"}}}}
    (tmp_path / "gpu-b.json").write_text(json.dumps(real))
    assert newest(tmp_path) == real


def test_the_script_on_a_copy_of_the_readme(tmp_path: Path) -> None:
    copy, results = tmp_path / "README.md", tmp_path / "results.json"
    results.write_text(json.dumps({"dry": False, "date": "2031-01-01", "steps": {}}))
    copy.write_text((ROOT / "README.md").read_text() + f"\n{BEGIN}\n{END}\n")
    command = [sys.executable, "scripts/results_table.py", "--readme", str(copy), "--results", str(results)]
    assert subprocess.run([*command, "--check"], cwd=ROOT).returncode == 1
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert subprocess.run([*command, "--check"], cwd=ROOT).returncode == 0


def test_the_table_of_cpu_results() -> None:
    def row(contender: str, length: int, seconds: float) -> dict[str, object]:
        return {"contender": contender, "length": length, "ttft_s": seconds, "ttft_range_s": [seconds / 2, seconds * 2],
                "decode_tok_s": 50.4, "decode_range_tok_s": [40.0, 60.6], "follow_up_s": 0.25}  # fmt: skip

    contenders = (("slimrt off", 1000.0), ("x", 100.0))
    cpu = {
        "rows": [row(name, length, length / rate) for length in (512, 8000) for name, rate in contenders],
        "environment": {"cpu": "a CPU", "load": 0.5, "date": "2026-11-24T10:00:00", "backend": {"why": "kernels"}},
        "settings": {
            "model": "/there/m.gguf", "threads": 2, "repeats": 3, "lengths": [512, 8000], "plans": ["off"], "vs": ["x"],
            "follow_up": 32,
        },
    }  # fmt: skip
    readme = f"a\n{CPU_BEGIN}\nold\n{CPU_END}\nb\n{BEGIN}\n{END}\n"
    made = updated(readme, None, cpu)
    assert made is not None and "old" not in made and "/there" not in made
    assert "| slimrt, dense | 8.00 s | 0.25 s | 50 | - |" in made and "| x | 80.00 s | 0.25 s | 50 | - |" in made
    assert all(len(line) <= 80 for line in made.splitlines() if line.startswith("|"))
    made = detailed(f"{DETAILS_BEGIN}\nold\n{DETAILS_END}\n", cpu, [])
    assert "old" not in made
    assert "| 8000 | 8.00 (4.00..16.00) | 50 (40..61) | 80.00 (40.00..160.00) | 50 (40..61) |" in made
    assert "`slimrt bench ttft --length 512 --length 8000 --prune off --vs x --follow-up 32 --repeats 3`" in made
    assert updated(f"{BEGIN}\n{END}\n", None, cpu) == updated(f"{BEGIN}\n{END}\n", None)


def test_the_table_of_quality() -> None:
    def summary(task: str, metric: str, dense: float, mean: float) -> dict[str, object]:
        return {"plan": "auto", "length": 4000, "task": task, "metric": metric, "dense": dense, "mean": mean,
                "low": mean - dense - 0.01, "high": mean - dense + 0.01, "n": 3}  # fmt: skip

    rows = [summary("recall", "accuracy", 0.8, 0.75), summary("recall", "kl", 0, 0.04),
            summary("continuation", "nll", 2, 2.5), summary("continuation", "kl", 0, 0.02)]  # fmt: skip
    times = [{"plan": plan, "length": 4000, "speedup": rate} for plan, rate in (("dense", 1.0), ("auto", 2.0))]
    report = {"plans": {"dense": {}, "auto": {}}, "summary": rows, "ttft": times,
              "samples": 3, "seed": 5, "text": {"name": "a.txt"}}  # fmt: skip
    change = "0.800 -> 0.750 (-0.060 to -0.040) | 2.000 -> 2.500 (+0.490 to +0.510)"
    assert f"| `auto` | 4,000 | {change} | 0.040 / 0.020 | 2.00x faster |" in quality_table(report).splitlines()
    assert quality_table(report).splitlines()[0].endswith(" | KL, nats (recall / continuation) | first token |")
    assert "; 3 samples a task, seed 5, text `a.txt`" in quality_table(report)
    longer = [{**row, "length": 8000, "n": 2} for row in rows]
    untimed = {**report, "summary": [*rows, *longer], "ttft": []}  # --ttft-repeats 0
    assert f"| `auto` | 8,000 | {change} | 0.040 / 0.020 |" in quality_table(untimed).splitlines()
    assert "; 3 and 2 samples a task" in quality_table(untimed) and "first token" not in quality_table(untimed)
    report["summary"] = [summary("niah_single", "score", 0.5, 0.25), summary("ruler", "score", 0.5, 0.25)]
    assert quality_table(report).splitlines()[0] == "| plan | prompt | RULER, mean score | first token |"
    assert "| `auto` | 4,000 | 0.500 -> 0.250 (-0.260 to -0.240) | 2.00x faster |" in quality_table(report)
    made = detailed(f"{QUALITY_BEGIN}\nold\n{QUALITY_END}\n", None, [report])
    assert "old" not in made and "`auto`" in made


def test_the_summary_has_speed_and_quality() -> None:
    row = {"contender": "slimrt auto", "length": 8000, "ttft_s": 1.5, "decode_tok_s": 70.0, "follow_up_s": 0.5}
    cpu = {
        "rows": [row, {**row, "contender": "llama_cpp", "ttft_s": 40.0, "follow_up_s": None}],
        "environment": {"cpu": "a CPU", "date": "2026-11-24"},
        "settings": {"model": "m.gguf", "threads": 2, "repeats": 3, "follow_up": 32},
    }
    found = {"plan": "auto", "task": "recall", "metric": "accuracy", "dense": 0.7, "low": -0.02, "high": 0.01, "n": 24}
    quality = {
        "summary": [{**found, "length": 4000, "mean": 0.5}, {**found, "length": 7900, "mean": 0.695}],
    }
    made = summary_table(cpu, [quality])
    assert "| slimrt `auto` (default) | 1.50 s | 0.50 s | 70 | 0.695 (-0.020 to +0.010) |" in made
    assert "| llama.cpp, the same file | 40.00 s | - | 70 | - |" in made
    assert "24 prompts of 7,900 tokens" in made and "follow-up of 32 tokens" in made
    cpu["settings"]["questions"] = 10  # type: ignore[index]
    for one, waiting in zip(cpu["rows"], (9.26, 40.0), strict=True):
        one["waiting_s"] = waiting  # type: ignore[index]
    made = summary_table(cpu, [quality])
    assert "| follow-up | 11 questions | tokens/s |" in made
    assert "| slimrt `auto` (default) | 1.50 s | 0.50 s | 9.3 s | 70 |" in made
    assert "| llama.cpp, the same file | 40.00 s | - | - | 70 |" in made  # it was asked no further question


def test_the_tables_of_the_library_and_of_servers() -> None:
    def read(soon: float | None) -> dict[str, object]:
        return {"cold_s": 10.0, "same_s": 0.2, "at_once_s": 2.5, "soon_s": soon, "later_s": 0.3, "nbytes": 2**20,
                "whole_s": 8.0, "soon_after_s": 3.0}  # fmt: skip

    where = {"cpu": "a CPU", "load": 0.5, "date": "2026-11-24T10:00:00"}
    report = {"runs": {"auto": [read(0.9), read(None)]}, "length": 8000, "model": "m", "threads": 2}
    made = library_table({**report, "environment": where})
    assert "| `auto` | 10.0 s | 0.20 s (2.0 %) | 2.50 s (25.0 %) | 0.90 s (9.0 %) | 0.30 s (3.0 %) | 1 MiB |" in made
    assert "medians of 2 runs" in made and "3 and 8 s (`auto`)" in made and "busy" not in made
    assert "busy" in library_table({**report, "environment": {**where, "load": 3.0}})
    beside = [{"median_s": 0.08, "longest_s": 0.2, "ttft_s": 18.0}, {"median_s": 0.1, "longest_s": 0.4, "ttft_s": 20.0}]
    crowds = {"4": [{"tokens_per_s": 60.0, "ttft_s": 1.0}, {"tokens_per_s": 70.0, "ttft_s": 3.0}]}
    setting = {"length": 8000, "clients": [4], "prompt": 64, "tokens": 32, "prune": "auto", "repeats": 2, "threads": 2}
    served = {"crowds": {"slimrt": crowds}, "standstills": {"slimrt": beside}, "environment": where}
    made = serve_table({**served, "setting": {**setting, "model": "m"}})
    assert "| the longest, s | 0.30 (0.20..0.40) |" in made
    assert "| tokens/s of 4 clients together | 65 (60..70) |" in made
    assert "a token, median" not in serve_table({**served, "setting": {**setting, "model": "m", "length": 0}})


def test_the_committed_tables_are_those_of_the_newest_results() -> None:
    assert subprocess.run([sys.executable, "scripts/results_table.py", "--check"], cwd=ROOT).returncode == 0
