"""The benchmark's arithmetic, its processes, and how it fails."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import slimrt
from click_cli import cli
from slimrt.bench.contenders import Measurement, Setup, check_installed
from slimrt.bench.library import measure_library
from slimrt.bench.plot import save_png
from slimrt.bench.process import ContenderProcess
from slimrt.bench.ttft import BenchResult, BenchRow, run
from slimrt.errors import ComputeError, ModelFileError, SettingError
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import doubles

IDS = list(range(3, 67))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("bench") / "tiny.gguf", n_layers=4)


@pytest.fixture(scope="module")
def plan(model: Path) -> str:
    path = model.with_name("plan.json")
    stages = (slimrt.Stage(layer=1, keep=0.5),)
    path.write_text(slimrt.PrunePlan(stages=stages, block=16, unit=8, query_window=4).to_json())
    return str(path)


@pytest.fixture(scope="module")
def result(model: Path, plan: str) -> BenchResult:
    seen: list[str] = []
    found = run(
        model,
        lengths=(96, 64, 96),
        repeats=2,
        plans=("off", plan),
        threads=1,
        decode_tokens=3,
        text="hello the world",
        progress=lambda done, total, what: seen.append(f"{done}/{total} {what}"),
    )
    labels = ["slimrt off", f"slimrt {plan}"] * 2
    turns = [f"{length} tokens, {label}" for length in (64, 96) for label in labels]
    assert seen == [*(f"{n}/8 {turn}" for n, turn in enumerate(turns)), "8/8 "], "contenders take turns"
    return found


def test_every_run_is_there(result: BenchResult, plan: str, model: Path) -> None:
    assert [(row.length, row.contender) for row in result.rows] == [
        (length, contender) for length in (64, 96) for contender in ("slimrt off", f"slimrt {plan}")
    ]
    for row in result.rows:
        assert len(row.runs) == 2
        assert row.ttft_range[0] <= row.ttft_s <= row.ttft_range[1]
        assert row.decode_range[0] <= row.decode_tok_s <= row.decode_range[1]
        assert row.ttft_range[0] > 0
        assert row.decode_range[0] > 0
        assert row.peak_bytes > model.stat().st_size
    assert [row.runs[0].kept for row in result.rows] == [(), (32,), (), (48,)]


def test_the_prompt_is_the_text_repeated(result: BenchResult, model: Path) -> None:
    llm = slimrt.load(model, threads=1, prune="off")
    once = llm.tokenize("hello the world")
    ids = (once * 96)[:96]
    assert result.row("slimrt off", 96).runs[0].first_token == llm.logits(ids).argmax()


def test_report_forms(result: BenchResult) -> None:
    data = json.loads(result.to_json())
    assert data["reference"] == "slimrt off"
    assert data["settings"]["lengths"] == [64, 96]
    assert data["settings"]["threads"] == 1
    assert data["environment"]["slimrt"] == slimrt.__version__
    assert data["environment"]["blas"][0]["internal_api"]
    assert len(data["rows"]) == 4
    console = Console(file=io.StringIO(), width=200)
    console.print(result.table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("slimrt off", "1.00x", "kernels", "numpy", "of the peak in products"):
        assert text in shown


def test_the_table_fits_a_terminal_of_80_columns(result: BenchResult) -> None:
    measured = Measurement(1234.5678, 1234.5, 1 << 33, 5, (65536, 32768), (999.123, 5.0), (1 << 30, 1 << 33))
    wide = BenchRow("llama_cpp_best", 128000, (measured,))
    for settings in (
        {"follow_up": 32, "questions": 10, "kv_budget": None},
        {"follow_up": 32, "questions": 1, "kv_budget": 2048},
    ):
        rows = tuple(dataclasses.replace(wide, contender=name) for name in ("llama_cpp_best", "slimrt off"))
        work = {"prefill_operations": {"128000": 1}, "matrix_bytes": 1}
        all_settings = {**result.settings, **settings, "plans": ["off"], "vs": [], "work": work}
        shown = BenchResult(rows, all_settings, result.environment)
        console = Console(file=io.StringIO(), width=80)
        console.print(shown.table())
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= 80
        (row,) = (line for line in lines if "llama_cpp_best" in line)
        for cell in ("128000", "1234.568", "1.00x", "1234.5", "999.123"):
            assert cell in row
        assert ("2238.69" in row) == (settings["questions"] > 1)


def test_several_further_questions(model: Path) -> None:
    found = run(model, (64,), 1, ("off",), (), 1, 1, "hello the world", follow_up=8, questions=3, device="numpy")
    assert found.environment["backend"]["name"] == "numpy"
    (row,) = found.rows
    assert len(row.runs[0].further_s) == 3
    assert row.waiting_s == doubles(row.ttft_s + sum(row.runs[0].further_s))
    console = Console(file=io.StringIO(), width=250)
    console.print(found.table())
    assert "all s" in console.file.getvalue()  # type: ignore[attr-defined]
    # A program that is asked none has no times of them.
    unasked = dataclasses.replace(row, runs=(dataclasses.replace(row.runs[0], further_s=()),))
    shown = Console(file=io.StringIO(), width=250)
    shown.print(dataclasses.replace(found, rows=(unasked,)).table())
    assert f"{row.waiting_s:.2f}" not in shown.file.getvalue() and unasked.follow_up_s is None  # type: ignore[attr-defined]


def test_a_further_question_and_a_budget(model: Path, plan: str) -> None:
    """Longer than the model was trained on: speed is measured, and the table tells what stays resident."""
    found = run(
        model, lengths=(640,), repeats=1, plans=("off", plan), threads=1, decode_tokens=2, text="hello the world",
        follow_up=8, kv_budget=128,
    )  # fmt: skip
    assert all((row.follow_up_s or 0) > 0 for row in found.rows)
    budget, host = found.rows[0].runs[0].kv_bytes or (0, 0)
    assert 0 < budget < host
    console = Console(file=io.StringIO(), width=250)
    console.print(found.table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "again s" in shown and "KV MiB" in shown and f"{host / 2**20:.1f}" in shown
    nbytes, in_time, waits = found.rows[0].runs[0].fetched or (0, 0, 0)
    assert nbytes > in_time >= 0 < waits
    assert f"decode fetched {nbytes / 2**20:.1f} MiB a run, {in_time / nbytes:.0%} of it in time; it waited" in shown


def test_medians_and_ratios() -> None:
    def runs(*pairs: tuple[float, float]) -> tuple[Measurement, ...]:
        return tuple(Measurement(ttft, rate, 1 << 20, 5) for ttft, rate in pairs)

    rows = (
        BenchRow("slimrt off", 512, runs((1.0, 10.0), (9.0, 30.0), (2.0, 20.0))),
        BenchRow("llama_cpp", 512, runs((3.0, 40.0), (4.0, 50.0), (5.0, 60.0))),
    )
    result = BenchResult(rows, {"vs": ["llama_cpp"], "plans": ["off"]}, {})
    assert (rows[0].ttft_s, rows[0].ttft_range) == (2.0, (1.0, 9.0))
    assert (rows[0].decode_tok_s, rows[0].decode_range) == (20.0, (10.0, 30.0))
    assert result.reference == "llama_cpp"
    assert result.speedup(rows[0]) == 2.0
    assert result.speedup(rows[1]) == 1.0


def test_shares_of_the_peak(result: BenchResult, plan: str) -> None:
    """By hand: the tiny model's products and bytes over what was measured beside them."""
    row, peak = result.row("slimrt off", 96), result.environment["peak"]
    shares = result.of_peak(row)
    assert shares is not None
    matrices = 4 * 64 * (2 * 64 + 2 * 32 + 3 * 96)  # layers, width, q and out, k and v, gate, up and down
    vocabulary = (
        result.settings["work"]["matrix_bytes"] // 4 // 64 - matrices // 64
    )  # float32, shared with the embedding
    attention = 4 * 2 * 64 * 96 * 97 // 2
    operations = 2 * (matrices * 96 + attention + 64 * vocabulary)
    assert shares[0] == doubles(operations / row.ttft_s / peak["operations_s"])
    read = 4 * (matrices + 64 * vocabulary) + result.environment["kv_per_token"] * (96 + 1)
    assert shares[1] == doubles(read * row.decode_tok_s / peak["bytes_s"])
    assert result.of_peak(result.row(f"slimrt {plan}", 96)) is None, "a pruned prompt's work is not counted"


def test_picture(result: BenchResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_png(result, tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_draws_the_same_token(model: Path) -> None:
    found = run(model, lengths=(64,), repeats=1, vs=("llama_cpp",), threads=1, decode_tokens=2, text="hello the world")
    assert [row.contender for row in found.rows] == ["slimrt off", "llama_cpp"]
    assert len({row.runs[0].first_token for row in found.rows}) == 1


@pytest.mark.skipif(importlib.util.find_spec("openvino_genai") is None, reason="openvino-genai is not installed")
def test_openvino_draws_the_same_token(default_model: Path) -> None:
    counting = "one two three four five six seven eight nine ten " * 10
    found = run(default_model, (64,), 1, vs=("openvino",), threads=1, decode_tokens=2, text=counting, follow_up=8)
    ours, theirs = (row.runs[0] for row in found.rows)
    assert ours.first_token == theirs.first_token and theirs.ttft_s > 0 and theirs.decode_tok_s > 0
    assert ours.further_s and not theirs.further_s


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_a_program_that_is_not_installed_is_named(model: Path) -> None:
    with pytest.raises(SettingError, match="run 'pip install llama-cpp-python', or leave --vs out"):
        run(model, vs=("llama_cpp",))


def test_an_unknown_program_is_named() -> None:
    with pytest.raises(SettingError, match="--vs 'vllm': not a known program"):
        check_installed("vllm")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"lengths": ()}, r"lengths \[\]: at least one"),
        ({"lengths": (512, 0)}, r"lengths \[512, 0\]"),
        ({"repeats": 0}, "repeats"),
        ({"threads": 0}, "threads"),
        ({"decode_tokens": -1}, "decode_tokens"),
        ({"plans": ()}, "no prune plan"),
        ({"follow_up": -1}, "follow_up"),
        ({"questions": 0}, "questions"),
        ({"questions": 2}, "how many tokens each has"),
        ({"kv_budget": 8}, "KV budget 8"),
        ({"lengths": (64,), "text": ""}, "is empty"),
    ],
)
def test_values_out_of_range_are_refused_at_once(model: Path, options: dict, what: str) -> None:
    with pytest.raises(SettingError, match=what):
        run(model, **options)


def test_a_bad_model_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        run(tmp_path / "nothing.gguf")


def test_errors_of_a_process_reach_the_caller(model: Path) -> None:
    with (
        ContenderProcess("slimrt", Setup(str(model), 128, 1)) as process,
        pytest.raises(SettingError, match="there is no such file"),
    ):
        process.measure(IDS, 2, "nonsense")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_a_killed_process_is_reported(model: Path) -> None:
    with ContenderProcess("slimrt", Setup(str(model), 128, 1)) as process:
        assert process.measure(IDS, 2, "off").first_token >= 0
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ComputeError, match="slimrt: its process ended with exit code -9"):
            process.measure(IDS, 2, "off")


def test_what_the_library_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMRT_CACHE", str(tmp_path / "cache"))
    model, text = write_tiny_llama(tmp_path / "tiny.gguf", n_layers=2, ctx=4096), "the world hello there " * 700
    report = measure_library(model, 2300, ["off"], 1, 1, text, device="numpy")
    (run,) = report.runs["off"]
    assert run.cold_s > max(run.same_s, run.later_s) > 0 and run.nbytes > 2200 * 2 * 2 * 2
    assert json.loads(report.to_json())["of_cold"]["off"]["later_s"] == run.later_s / run.cold_s
    assert "2,300 tokens" in str(report.table().title) and not (tmp_path / "cache").exists()
    command = ["bench", "ttft", "--library", "-m", str(model)]
    short = CliRunner().invoke(cli, [*command, "--length", "1000"])
    assert short.exit_code == 1 and "--length 1000: the library keeps prompts of 2048 tokens" in short.stderr
    there = CliRunner().invoke(cli, [*command, "-o", str(model)])
    assert there.exit_code == 1 and "exists already" in there.stderr
    assert "slimrt alone" in CliRunner().invoke(cli, [*command, "--vs", "llama_cpp"]).stderr
