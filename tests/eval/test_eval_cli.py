"""``slimrt eval`` as a user runs it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from click_cli import cli
from slimrt.prune.plan import PrunePlan, Stage
from tests.terminal_notes import without_backend_note
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_layers=4, ctx=2048)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(PrunePlan((Stage(1, 0.25),), block=16, min_tokens=1).to_json())
    return path


def run(model: Path, *arguments: str | Path) -> Result:
    settings = ("--model", model, "--task", "text", "--length", "300", "--samples", "2", "--threads", "1")
    return CliRunner().invoke(cli, [str(one) for one in ("eval", *settings, *arguments)])


def test_json_alone_on_stdout_and_the_files(model: Path, plan: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report, picture = tmp_path / "report.json", tmp_path / "front.png"
    result = run(model, "--prune", plan, "--prune", "off", "--json", "-o", report, "--png", picture)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data == json.loads(report.read_text())
    assert list(data["plans"]) == ["dense", "mine", "off"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(cli, ["eval", "--report", str(report), "--json"])
    assert again.exit_code == 0 and json.loads(again.stdout) == data
    refused = run(model, "--report", report, "-o", report, "--force")
    assert refused.exit_code == 1 and report.read_text()


def test_tables(model: Path, plan: Path) -> None:
    result = run(model, "--prune", plan)
    assert result.exit_code == 0, result.output
    for said in ("Quality against the dense run, 300 tokens", "recall", "continuation", "mine", "Time to first token"):
        assert said in result.stdout
    assert "plan mine:" in result.stderr


def test_quality_alone(model: Path, plan: Path, tmp_path: Path) -> None:
    """Nothing is timed: no table of it, and no picture."""
    report = tmp_path / "report.json"
    result = run(model, "--prune", plan, "--ttft-repeats", "0", "-o", report)
    assert result.exit_code == 0, result.output
    assert "Quality against the dense run" in result.stdout and "Time to first token" not in result.stdout
    assert json.loads(report.read_text())["ttft"] == []
    if importlib.util.find_spec("matplotlib"):
        picture = tmp_path / "front.png"
        refused = run(model, "--prune", plan, "--ttft-repeats", "0", "--png", picture)
        assert refused.exit_code == 1 and "--ttft-repeats of at least 1" in refused.stderr
        shown = CliRunner().invoke(cli, ["eval", "--report", str(report), "--png", str(picture)])
        assert shown.exit_code == 1 and "none was measured" in shown.stderr and not picture.exists()


def test_a_budget_of_keys_and_values_is_held_against_unlimited_decode(model: Path) -> None:
    """A budget that holds the whole prompt changes nothing, a small one does; without --prune no plan is run."""
    differences = {}
    for rows in (1024, 128):
        result = run(model, "--kv-budget", str(rows), "--device", "numpy", "--json")
        assert result.exit_code == 0, result.output
        data = json.loads(result.stdout)
        assert list(data["plans"]) == ["dense", f"kv {rows}"]
        differences[rows] = [
            one["metrics"]["kl"] for one in data["results"] if one["plan"] == f"kv {rows}" and "kl" in one["metrics"]
        ]
    assert differences[1024] and not any(differences[1024])
    assert sum(differences[128]) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--task", "nonsense"), "task 'nonsense': known are"),
        (("--prune", "/no/such.json"), "/no/such.json"),
        (("--prune", "off", "--prune", "off"), "a plan named 'off' was given already"),
        (("--length", "100", "--ctx", "120"), "the context holds 120"),
        (("--text", "/no/such.txt"), "text '/no/such.txt': No such file"),
        (("--output", "/no/such/report.json"), "/no/such/report.json: the folder /no/such does not exist"),
        (("--png", "/no/such/front.png"), "/no/such/front.png: the folder"),
        (("--output", __file__), "exists already; choose another name, or replace it with --force"),
        (("--png", "/dev/null", "--force"), "a device or a pipe"),
        (("--text", __file__, "--output", __file__, "--force"), "source and result are the same file"),
        (("--output", "both.json", "--png", "both.json"), "--output and --png both name both.json"),
        (("--samples", "9999"), "9999 samples of"),
    ],
)
def test_what_cannot_work_is_one_line(model: Path, arguments: tuple[str, ...], said: str) -> None:
    result = run(model, *arguments)
    assert result.exit_code == 1 and result.stdout == ""
    told = without_backend_note(result.stderr)
    assert said in told and len(told.strip().splitlines()) == 1
