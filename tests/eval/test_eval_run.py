"""The paired evaluation on tiny models: what it reports is what the model does, and settings fail before any work."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from slimrt.errors import ComputeError, ContextError, SettingError, SlimrtError
from slimrt.eval import plot
from slimrt.eval.metrics import bootstrap_interval
from slimrt.eval.plot import save_png
from slimrt.eval.report import MARGINS, EvalReport, Result, Summary, Timing, merged, read_report
from slimrt.eval.run import Response, context_needed, evaluate, judge
from slimrt.eval.sample import Sample, Source
from slimrt.eval.table import quality_tables, ttft_table
from slimrt.eval.tasks import TASKS, samples
from slimrt.eval.text import load_corpus
from slimrt.llm import LLM
from slimrt.load_options import LoadOptions
from slimrt.output import write_atomically
from slimrt.prune.plan import PrunePlan, Stage
from slimrt.weights.gguf import GGUFFile
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import doubles

LENGTHS = (700, 420)
DEEP = PrunePlan((Stage(1, 0.25),), block=16, min_tokens=1)
KEEP_ALL = PrunePlan((Stage(1, 1.0),), block=16, min_tokens=1)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_layers=4, ctx=1024)
    return LLM(GGUFFile(path), LoadOptions(prune="off", threads=1))


@pytest.fixture(scope="module")
def report(llm: LLM) -> EvalReport:
    plans: dict[str, PrunePlan | str | Path] = {"off": "off", "keep": KEEP_ALL, "deep": DEEP}
    return evaluate(llm, plans, ["text", "niah_single_1"], LENGTHS, samples=3, seed=5, ttft_repeats=2)


def row(report: EvalReport, length: int, task: str, metric: str, plan: str) -> Summary:
    (found,) = (
        one for one in report.summaries if (one.length, one.task, one.metric, one.plan) == (length, task, metric, plan)
    )
    return found


def test_a_run_against_itself_differs_by_exactly_nothing(report: EvalReport) -> None:
    rows = [one for one in report.summaries if one.plan in ("off", "keep")]
    assert len(rows) == 2 * 2 * (2 * 3 + 2)  # plans x lengths x (text tasks x metrics + one task and RULER's mean)
    for one in rows:
        assert (one.difference, one.low, one.high, one.verdict) == (0, 0, 0, "")
        assert one.mean == one.dense and one.n == 3


def test_what_is_reported_is_what_the_model_says(llm: LLM, report: EvalReport) -> None:
    source = Source(llm.tokenizer, load_corpus(llm.tokenizer))
    drawn = samples(TASKS["continuation"], source, 700, 3, seed=5)
    for plan, name in (("off", "dense"), (DEEP, "deep")):
        results = [one for one in report.results if (one.length, one.task, one.plan) == (700, "continuation", name)]
        for sample, result in zip(drawn, results, strict=True):
            logprobs = llm.logprobs([*sample.prompt, *sample.continuation], 700, prune=plan)
            # logprobs are float32 of magnitude under 16.
            assert abs(result.metrics["nll"] + logprobs.mean(dtype=np.float64)) < 16 * np.finfo(np.float32).eps
    (needle,) = samples(TASKS["niah_single_1"], source, 700, 1, seed=5)
    answer = llm.generate(list(needle.prompt), prune=DEEP, session=llm.session(), max_tokens=128).text
    (result,) = (
        one
        for one in report.results
        if (one.length, one.task, one.plan, one.index) == (700, "niah_single_1", "deep", 0)
    )
    assert result.answer == answer and result.references == needle.references


def test_a_plan_that_drops_tokens_is_seen(report: EvalReport) -> None:
    for length in LENGTHS:
        one = row(report, length, "continuation", "kl", "deep")
        assert one.mean > 0.001 and one.dense == 0 and one.verdict == ""
    dense, deep = report.timing(700, "dense"), report.timing(700, "deep")
    assert dense.stages == () and len(dense.ttft_s) == 2
    assert len(deep.stages) == 1 and abs(deep.stages[0] - 0.25 * 700) < 16  # a block
    assert deep.kv_bytes < dense.kv_bytes
    assert report.speedup(dense) == 1


def test_the_summary_is_that_of_the_samples(report: EvalReport) -> None:
    values = {
        plan: [
            one.metrics["nll"] for one in report.results if (one.length, one.task, one.plan) == (420, "recall", plan)
        ]
        for plan in ("dense", "deep")
    }
    differences = np.subtract(values["deep"], values["dense"])
    one = row(report, 420, "recall", "nll", "deep")
    assert one.mean == doubles(np.mean(values["deep"]))
    assert one.difference == doubles(differences.mean())
    assert (one.low, one.high) == bootstrap_interval(differences)


def _summary(metric: str, low: float, high: float, at_most: float = 0.0, clusters: int = 9) -> Summary:
    middle = (low + high) / 2
    return Summary(1, "task", metric, "plan", 9, 0, 0, middle, low, high, clusters, at_most, MARGINS[metric], 0, 0)


def test_no_worse_is_shown_by_the_one_sided_bound() -> None:
    assert _summary("nats", -0.1, 0.4, at_most=0.3).no_worse
    assert not _summary("nats", -0.1, 0.4, at_most=0.31).no_worse
    assert not _summary("nats", 0.0, 0.0, clusters=1).no_worse  # one text has no spread, and shows nothing


def test_losses_and_the_worst_samples() -> None:
    losses = {"accuracy": [0.0] * 18 + [-0.5, -0.25], "nats": [0.0] * 18 + [3.0, 1.0]}
    for metric, differences in losses.items():
        results = [
            Result(100, "ask", index, plan, {metric: value}, cluster=index // 2)
            for index, difference in enumerate(differences)
            for plan, value in (("dense", 1.0), ("plan", 1.0 + difference))
        ]
        (row,) = EvalReport("m", "0", {}, 0, 20, {}, (), tuple(results), ()).summaries
        worst = 0.5 if metric == "accuracy" else 3.0
        assert row.clusters == 10 and row.worst == worst
        assert row.worst_tenth == doubles(np.mean(np.abs(differences[-2:])))
        # One cluster of ten holds all the loss: the bound is above the mean loss, by more than independent samples say.
        alone = [dataclasses.replace(result, cluster=result.index) for result in results]
        (free,) = EvalReport("m", "0", {}, 0, 20, {}, (), tuple(alone), ()).summaries
        assert np.mean(np.abs(differences)) < free.at_most < row.at_most


def test_verdicts_know_which_side_is_better() -> None:
    def verdict(metric: str, low: float, high: float) -> str:
        return _summary(metric, low, high).verdict

    assert [verdict("accuracy", *bounds) for bounds in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == [
        "better",
        "worse",
        "",
    ]
    assert [verdict("nll", *bounds) for bounds in ((0.1, 0.2), (-0.2, -0.1), (0, 0.1))] == ["worse", "better", ""]


def test_the_same_seed_gives_the_same_values(llm: LLM, report: EvalReport) -> None:
    # Fewer tasks, lengths and plans, in another order: neither prompts nor values depend on what else is run.
    again = evaluate(llm, {"deep": DEEP}, ["recall"], [420], samples=3, seed=5, ttft_repeats=1)
    wanted = [
        one for one in report.results if (one.length, one.task) == (420, "recall") and one.plan in ("dense", "deep")
    ]
    assert list(again.results) == wanted


def test_rulers_mean_takes_all_its_tasks(llm: LLM) -> None:
    found = evaluate(llm, {"deep": DEEP}, ["niah_single_1", "niah_multikey_2"], [880], samples=2, ttft_repeats=1)
    assert row(found, 880, "ruler", "score", "deep").n == 4
    assert row(found, 880, "niah_multikey_2", "score", "deep").n == 2


def test_the_json_holds_every_value(report: EvalReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.save_json(path)
    data = json.loads(path.read_text())
    assert len(data["results"]) == 2 * 3 * 3 * 4  # lengths x tasks x samples x plans
    assert data["plans"]["dense"]["plan"] is None and data["plans"]["deep"]["plan"]["stages"] == [
        {"layer": 1, "keep": 0.25}
    ]
    assert data["text"]["name"] == "pydoc_data.topics" and len(data["text"]["sha256"]) == 64
    assert {"ttft_s", "median_s", "speedup", "stages", "kv_bytes"} <= data["ttft"][0].keys()
    assert {one["verdict"] for one in data["summary"]} <= {"", "worse", "better"}
    assert "percentile bootstrap" in data["interval"] and data["seed"] == 5
    assert list(tmp_path.iterdir()) == [path]


def test_progress_counts_every_run(llm: LLM) -> None:
    steps: list[tuple[int, int, str]] = []
    evaluate(
        llm,
        {"off": "off"},
        ["recall"],
        [300, 310],
        samples=2,
        ttft_repeats=1,
        progress=lambda *step: steps.append(step),
    )
    total = 2 * (2 * 2 + 2 * 1)  # plans x (lengths x samples + lengths x repeats)
    assert [done for done, _, _ in steps] == list(range(total + 1))
    assert {of for _, of, _ in steps} == {total}


def test_text_of_the_users(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("Call me Ishmael. " * 100)
    found = evaluate(llm, {"off": "off"}, ["text"], [200], samples=2, text=path, ttft_repeats=1)
    assert found.text["name"] == str(path)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"plans": {}}, SettingError, "plans: none was given"),
        ({"plans": {"dense": "off"}}, SettingError, "plan name 'dense'"),
        ({"plans": {"": "off"}}, SettingError, "plan name ''"),
        ({"plans": {"p": PrunePlan((Stage(40, 0.5),))}}, SettingError, "layer 40; this model has layers 0..3"),
        ({"plans": {"p": "/no/such.json"}}, SettingError, "there is no such file"),
        ({"tasks": ["recall", "nonsense"]}, SettingError, "task 'nonsense': known are"),
        ({"lengths": []}, SettingError, "lengths: none"),
        ({"lengths": [300, 0]}, SettingError, "length 0"),
        ({"lengths": [30]}, SettingError, "its shortest has 72"),
        ({"lengths": [1001]}, ContextError, "take 1025, the context holds 1024"),
        ({"samples": 0}, SettingError, "samples 0"),
        ({"ttft_repeats": -1}, SettingError, "ttft_repeats -1"),
        ({"seed": -1}, SettingError, "seed -1"),
        ({"samples": 100_000}, SettingError, "100000 samples of"),
        ({"text": "/no/such.txt"}, SettingError, "text '/no/such.txt': No such file"),
    ],
)
def test_settings_that_cannot_work_fail_before_any_work(
    llm: LLM, changes: dict[str, object], error: type[SlimrtError], said: str
) -> None:
    def no_work(*step: object) -> None:
        raise AssertionError(f"{step} was begun")

    settings = {"plans": {"off": "off"}, "tasks": ["recall"], "lengths": [300], "samples": 2, "progress": no_work}
    with pytest.raises(error, match=said) as caught:
        evaluate(llm, **{**settings, **changes})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_context_that_is_needed() -> None:
    assert context_needed(["recall"], [100, 1000]) == 1024
    assert context_needed(["all"], [1000]) == 1128


def test_logits_that_are_not_finite_are_no_result() -> None:
    sample = Sample("recall", 3, "continuation", (1, 2), continuation=(0,))
    good, bad = Response(logits=np.zeros((1, 4), np.float32)), Response(logits=np.full((1, 4), np.nan, np.float32))
    with pytest.raises(ComputeError, match="task recall, sample 3: nll is nan"):
        judge(sample, good, bad)


def test_tables_fit_a_terminal(report: EvalReport) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in (*quality_tables(report), ttft_table(report)):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    for said in ("700 tokens, 3 samples", "niah_single_1", "KL nats", "too narrow", "all (dense)", "1.00x"):
        assert said in text


def test_the_picture(report: EvalReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import image

    save_png(report, tmp_path / "front.png")
    pixels = image.imread(tmp_path / "front.png")
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1000
    assert [one.name for one in tmp_path.iterdir()] == ["front.png"]


def asked(seed: int, text: str = "one") -> EvalReport:
    """A report of three shapes and two samples each, the second of which loses ``seed`` nats under the plan."""
    results = [
        Result(700, task, index, plan, {"nats": 1.0 + index * seed * (plan != "dense"), "kl": 0.0}, cluster=index)
        for task in ("ask", "ask_first", "quote")
        for index in range(2)
        for plan in ("dense", "cut")
    ]
    timings = [Timing(700, plan, (1.0 + seed, 2.0), (), 5) for plan in ("dense", "cut")]
    plans = {"dense": {"plan": None, "source": "dense"}, "cut": {"plan": {"block": 64}, "source": "given"}}
    return EvalReport("m", "1", {"name": text, "sha256": text}, seed, 2, plans, (), tuple(results), tuple(timings))


def test_runs_of_other_seeds_and_texts_are_one(tmp_path: Path) -> None:
    for seed in (1, 3):
        asked(seed).save_json(tmp_path / f"{seed}.json")
    runs = [read_report(tmp_path / f"{seed}.json") for seed in (1, 3)]
    assert runs == [asked(1), asked(3)]
    both = merged([*runs, asked(3, "other")])
    row = {(row.task, row.metric): row for row in both.summaries}
    each, pooled = row["ask", "nats"], row["questions", "nats"]
    assert (each.n, each.clusters, each.worst) == (6, 6, 3) and each.difference == doubles(7 / 6)
    assert (pooled.n, pooled.worst) == (18, 3) and pooled.difference == doubles(7 / 6)
    assert both.samples == 6 and both.text["name"] == "one, other"
    assert both.timing(700, "cut").ttft_s == (2.0, 2.0, 4.0, 2.0, 4.0, 2.0)
    with pytest.raises(SettingError, match="number 2 repeats the samples"):
        merged([asked(1), asked(1)])
    with pytest.raises(SettingError, match="number 2 is of model other"):
        merged([asked(1), dataclasses.replace(asked(2), model="other")])
    for content in ("{", "[]", '{"model": 1}', None):
        path = tmp_path / "bad.json"
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
        with pytest.raises(SettingError, match=r"bad\.json") as caught:
            read_report(path)
        assert "\n" not in str(caught.value)


def test_the_picture_of_shapes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import image

    save_png(asked(3), tmp_path / "shapes.png")
    assert image.imread(tmp_path / "shapes.png").shape[1] > 1000  # the pooled panel, and the shapes' own


def test_a_picture_without_matplotlib(report: EvalReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install 'slimrt\[bench\]'"):
        plot.check_plotting()
    with pytest.raises(SettingError):
        save_png(report, tmp_path / "front.png")
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(b"old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    plain = tmp_path / "plain"
    plain.touch()
    assert path.read_bytes() == b"new" and path.stat().st_mode == plain.stat().st_mode


def test_median_of_the_repeats() -> None:
    assert Timing(10, "dense", (3.0, 1.0, 2.0), (), 0).median_s == 2
    assert math.isclose(Timing(10, "dense", (3.0, 1.0), (), 0).median_s, 2)
