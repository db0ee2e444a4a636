"""Calibration on a tiny model: it measures what the engine computes, keeps to its bounds, and survives being killed."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from click_cli import cli
from slimrt.calibrate import candidates as candidates_module
from slimrt.calibrate import search as search_module
from slimrt.calibrate.candidates import candidates, first_layer, recomputed, scoring, work
from slimrt.calibrate.finding import Findings, observe
from slimrt.calibrate.heads import head_losses, quiet, with_windows
from slimrt.calibrate.journal import Journal
from slimrt.calibrate.losses import Bounds, Measured, finalists, survivors
from slimrt.calibrate.probe import probing
from slimrt.calibrate.rounds import cut_in_rounds
from slimrt.calibrate.search import calibrate
from slimrt.config import ModelConfig
from slimrt.errors import ContextError, SettingError
from slimrt.eval.run import judge, respond
from slimrt.eval.sample import Sample, Source
from slimrt.eval.tasks import TASKS, samples
from slimrt.eval.text import load_corpus
from slimrt.llm import LLM
from slimrt.load_options import LoadOptions
from slimrt.prune.plan import PrunePlan, Stage, Window, check_plan
from slimrt.prune.presets import choose_plan, preset_path
from slimrt.weights.gguf import GGUFFile
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import doubles, kl_apart, logits_apart

LENGTH = 1100
BOUNDS = {"auto": Bounds(0.05, 0.01, 0.02), "fast": Bounds(0.2, 0.02, 0.08)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Two heads: attention over prompts of 1,100 tokens is most of what these tests cost.
    options = {"n_layers": 6, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16}
    return write_tiny_llama(tmp_path_factory.mktemp("calibrate") / "tiny.gguf", ctx=2048, **options)


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    # NumPy: what is compared below must not differ by the precision of decode.
    return LLM(GGUFFile(model), LoadOptions(ctx=1280, prune="off", device="numpy", threads=1))


def drawn(llm: LLM, task: str = "continuation") -> Sample:
    return samples(TASKS[task], Source(llm.tokenizer, load_corpus(llm.tokenizer)), LENGTH, 1, seed=3)[0]


def measured(plan: PrunePlan, kl: float, recall: float = 0.0, work: float = 0.5) -> Measured:
    return Measured(plan, 8, work, kl, recall, (recall - 0.01, recall + 0.01), 0.0, (0.0, 0.0))


# -- candidates --------------------------------------------------------------------------------------------------------


def found(layers: range, best: int, samples: int = 5) -> Findings:
    """Layer ``best`` finds everything among a tenth of the blocks; others need the more the farther off they are."""
    one = {str(layer): min(1, 0.1 + 0.15 * abs(layer - best)) for layer in layers} | {"accuracy": 1, "before": 0}
    return Findings([one] * samples)


@pytest.mark.parametrize("layers", [4, 8, 30])
def test_every_candidate_can_run_on_the_model(llm: LLM, layers: int) -> None:
    config = dataclasses.replace(llm.config, n_layers=layers)
    watched = scoring(config)
    check_plan(watched, config)
    assert watched.keeps_all and watched.score == "asked"
    at = range(watched.stages[0].layer, watched.stages[-1].layer + 1)
    assert at[0] == first_layer(config)
    plans = candidates(config, watched, found(at, at[len(at) // 2]), 3000, lambda plan: plan)
    costs = [work(config, plan, 8192) for plan in plans]
    for plan, cost in zip(plans, costs, strict=True):
        check_plan(plan, config)
        assert plan.stages[0].layer >= at[0] and plan.score == watched.score and plan.sure and plan.most < 1
        assert 0 < cost <= 0.9 and recomputed(config, plan, 8192) <= 0.5
        assert plan.min_keep == -(-3000 * plan.stages[-1].keep // 1)  # a shorter prompt keeps no less
    assert len(set(plans)) == len(plans) <= 35
    assert max(costs) - min(costs) > (0.25 if layers > 4 else 0.05)  # cheap ones and dear ones


def test_candidates_cut_where_the_scores_find(llm: LLM) -> None:
    config = dataclasses.replace(llm.config, n_layers=30)
    findings = found(range(6, 25), 16)
    for plan in candidates(config, scoring(config), findings, 3000, lambda plan: plan):
        assert all(12 <= stage.layer <= 20 for stage in plan.stages)  # nine layers around 16
        assert plan.late == 0  # no question before a document was seen


def test_what_is_dropped_counts_in_full_and_what_just_stays_in_part() -> None:
    seen = [{"3": 0.2, "5": 0.6, "accuracy": 1.0, "before": 0}, {"3": 0.1, "5": 0.1, "accuracy": 0.5, "before": 0}]
    findings = Findings(seen)
    assert findings.loss([Stage(3, 0.4)]) == doubles((0.5**2 + 0.5 * 0.25**2) / 2)
    assert findings.loss([Stage(3, 0.4), Stage(5, 0.5)]) == doubles((1 + 0.5 * 0.25**2) / 2)
    assert findings.layers(0.5, 1) == [3] and findings.layers(0.5, 9) == [3, 5]


def test_layers_that_do_not_know_a_question_before_the_document_come_late_for_it(llm: LLM) -> None:
    behind = {"3": 0.1, "5": 0.2, "7": 0.2, "accuracy": 1.0, "before": 0}
    before = {"3": 0.9, "5": 0.15, "7": 0.1, "accuracy": 1.0, "before": 1}
    findings = Findings([behind, before])
    assert Findings([behind]).late(0.5) == 0 and findings.late(0.5) == 5
    assert findings.loss([Stage(3, 0.5)], late=5) == doubles(0.2**2 / 2)  # it is not cut there
    assert findings.loss([Stage(3, 0.5)]) == doubles((0.2**2 + 1) / 2)
    assert findings.layers(0.5, 1) == [3]  # the best one for questions behind a document
    config = dataclasses.replace(llm.config, n_layers=10)
    plans = candidates(config, scoring(config), findings, 3000, lambda plan: plan)
    assert {plan.late for plan in plans if plan.stages[0].layer == 3} == {5}
    assert {plan.late for plan in plans if plan.stages[0].layer > 3} == {0}


def test_a_further_question_does_again_what_lies_behind_the_first_cut(llm: LLM) -> None:
    config = dataclasses.replace(llm.config, n_layers=10)
    plan = PrunePlan((Stage(3, 0.5),))
    before = work(config, plan, 8192) * (1 - recomputed(config, plan, 8192))
    other = PrunePlan((Stage(3, 0.25), Stage(7, 0.1)))
    assert work(config, other, 8192) * (1 - recomputed(config, other, 8192)) < before  # of layer 3 the cut is a part
    assert recomputed(config, other, 8192) < recomputed(config, plan, 8192) < 1
    assert recomputed(config, PrunePlan(), 8192) == 0


def test_a_model_that_is_too_shallow_is_refused(llm: LLM) -> None:
    with pytest.raises(SettingError, match="2 layers"):
        first_layer(dataclasses.replace(llm.config, n_layers=2))


def test_work_counts_the_rows_that_each_layer_sees() -> None:
    config = ModelConfig("llama", "m", 4, 64, 4, 4, 16, 128, 100, 8192, 1e-5, None)  # type: ignore[arg-type]
    tokens = 6400  # 100 blocks
    assert work(config, PrunePlan(), tokens) == 1
    # One layer (and of the second the QKV products and attention) dense, the rest on half of the rows.
    qkv, out, feed, attend = 64 * 3 * 64, 64 * 64, 3 * 64 * 128, 64 * tokens
    dense, half = qkv + attend, (qkv + attend / 2) / 2
    expected = (2 * dense + (out + feed) + 3 * (out + feed) / 2 + 2 * half) / (4 * (dense + out + feed))
    assert work(config, PrunePlan((Stage(1, 0.5),)), tokens) == doubles(expected)


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["recall", "continuation", "ask_raw"])
def test_a_probe_measures_what_a_fresh_prefill_gives(llm: LLM, task: str) -> None:
    sample = drawn(llm, task)
    heads = llm.config.n_kv_heads
    limited = (Window(1, (128,) * heads), Window(4, (64,) * heads))
    plans = [
        PrunePlan((Stage(4, 0.5),), query_window=32),
        PrunePlan((Stage(3, 0.5), Stage(4, 0.2)), local_blocks=2),
        PrunePlan((Stage(4, 0.5),), windows=limited),
        PrunePlan((Stage(4, 0.25),), windows=limited[:1]),  # the same as before up to the boundary, layer 3
        PrunePlan(windows=limited),
        PrunePlan(windows=limited[1:]),
        PrunePlan((Stage(4, 0.4),), score="asked", sure=0.5, most=0.6),
    ]
    dense = respond(llm, sample, "off")
    apart = logits_apart(llm, list(sample.prompt[:256]))  # a probe goes on from the boundary: other rows in a product
    loss = "nats" if sample.forced else "nll"
    with probing(llm.engine, sample, 3, llm.asking(sample.prompt)) as probe:
        for plan in (*plans, plans[0]):
            fresh = judge(sample, dense, respond(llm, sample, plan))
            losses = probe.measure(plan)
            assert abs(losses["kl"] - fresh["kl"]) <= kl_apart(fresh["kl"], apart) < fresh["kl"] / 2
            assert abs(losses[loss] - fresh[loss] + judge(sample, dense, dense)[loss]) <= 2 * apart


@pytest.mark.parametrize("task", ["recall", "ask_raw", "ask_first"])
def test_observing_ranks_what_an_answer_is_taken_from(llm: LLM, task: str) -> None:
    """Keeping as much as was seen to be needed keeps the passage, keeping one block less does not."""
    sample = drawn(llm, task)
    passage = tuple(sample.prompt[row] for row in sample.evidence)
    if task == "recall":
        assert passage == sample.continuation
    else:
        assert llm.detokenize(sample.continuation).strip() in llm.detokenize(passage)
    score = scoring(llm.config)
    shares = observe(llm.engine, sample, score, llm.asking(sample.prompt))
    assert 0 <= shares["accuracy"] <= 1 and shares["before"] == (task == "ask_first")
    blocks = -(-len(sample.prompt) // score.block)
    for stage in score.stages:
        needed = round(shares[str(stage.layer)] * blocks)
        for more, all_there in ((0, True), (-1, False)):
            keep = (needed + more) * score.block
            if not 8 * score.block < keep < blocks * score.block * 7 // 8:
                continue  # what always stays; a cut that is not worth it
            session = llm.session()
            session.prefill(sample.prompt, dataclasses.replace(score, stages=(Stage(stage.layer, keep),)))
            positions = session.context.cache.rows(llm.config.n_layers - 1)[2]
            assert np.isin(sample.evidence, positions).all() == all_there


def test_keeping_everything_loses_nothing(llm: LLM) -> None:
    sample = drawn(llm)
    with probing(llm.engine, sample, 3) as probe:
        losses = probe.measure(PrunePlan((Stage(4, 1.0),)))
    apart = logits_apart(llm, list(sample.prompt[:256]))  # of NumPy, which went on from the boundary
    assert losses["accuracy"] == 0 and losses["kl"] <= kl_apart(0, apart) and abs(losses["nll"]) <= 2 * apart


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_survivors_are_possible_and_lie_between_cheap_and_safe() -> None:
    plans = [PrunePlan((Stage(layer, 0.5),)) for layer in range(1, 8)]
    tried = [measured(plan, kl=0.08 / n, work=0.1 * n) for n, plan in enumerate(plans, 1)]  # dearer loses less
    tried.append(measured(PrunePlan((Stage(9, 0.5),)), kl=0.5, work=0.55))  # and this one is dear and loses much
    assert survivors(tried, Bounds(0.03, 0.02, 0.1), 3) == [plans[2], plans[4], plans[6]]  # .08/2 is too far off
    assert survivors(tried, Bounds(0.03, 0.02, 0.1), 9) == plans[2:]
    assert survivors(tried, Bounds(0.001, 0.0, 0.0), 4) == [plans[6]]


def test_finalists_lie_around_the_cheapest_within_the_bounds() -> None:
    plans = [PrunePlan((Stage(layer, 0.5),)) for layer in range(1, 9)]
    tried = [measured(plan, kl=0.12 / n, recall=-0.02, work=0.1 * n) for n, plan in enumerate(plans, 1)]
    bounds = Bounds(0.03, 0.02, 0.1)  # plan 4 has .03 and could still be within, plan 5 has .024 and is
    assert finalists(tried, bounds, 4) == [plans[3:7], plans[7:]]
    assert finalists(tried, bounds, 2) == [plans[3:5], plans[5:7], plans[7:]]
    assert finalists(tried, bounds, 20) == [plans[3:]]
    assert finalists(tried, Bounds(0.0155, 0.02, 0.1), 2) == [plans[6:]]  # none is within yet
    assert finalists(tried, Bounds(0.001, 0.0, 0.0), 4) == [plans[7:]]


def test_windows_go_to_the_heads_that_lose_least_as_far_as_the_bound_allows(llm: LLM) -> None:
    cut = PrunePlan((Stage(3, 0.5),))
    losses = {(layer, head): 0.002 for layer in range(6) for head in range(llm.config.n_kv_heads)}
    losses |= {(1, 0): 0.0005, (4, 0): 0.0}
    assert quiet(losses, 0.0004) == [(4, 0)] and quiet(losses, 0.0026) == [(4, 0), (1, 0), (0, 0)]
    assert set(quiet(losses, 1)) == set(losses)
    plan = with_windows(llm.config, cut, quiet(losses, 0.0026))
    assert plan.windows == (Window(0, (1024, 0)), Window(1, (1024, 0)))  # layer 4 lies behind the cut
    assert with_windows(llm.config, PrunePlan(), quiet(losses, 0.0026)).windows[-1] == Window(4, (1024, 0))
    check_plan(plan, llm.config)
    assert dataclasses.replace(plan, windows=()) == cut
    assert work(llm.config, plan, 8000) < work(llm.config, cut, 8000)
    assert with_windows(llm.config, plan, []) == cut


def test_heads_are_looked_at_one_by_one_only_where_their_layer_loses_something(llm: LLM) -> None:
    asked: list[PrunePlan] = []

    def measure(plans: list[PrunePlan]) -> list[float]:
        asked.extend(plans)
        return [0.01 if plan.windows[0].layer == 2 and plan.windows[0].reach[1] else 0.0001 for plan in plans]

    losses = head_losses(llm.config, PrunePlan(), 0.05, measure)
    assert losses[2, 1] == 0.01 and losses[2, 0] == 0.0001 and losses[3, 0] == 0.0001 / llm.config.n_kv_heads
    assert len(asked) == llm.config.n_layers - 1 + llm.config.n_kv_heads
    for plan in asked:
        check_plan(plan, llm.config)


def test_a_preset_keeps_its_bounds_with_something_to_spare() -> None:
    bounds = Bounds(0.05, 0.01, 0.02)
    one = Measured(PrunePlan((Stage(1, 0.5),)), 8, 0.5, 0.04, 0.0, (-0.02, 0.02), 0.01, (0.0, 0.02))
    assert one.is_within(bounds)
    bounds = dataclasses.replace(bounds, answer=0.3, worst=2.0)
    assert not dataclasses.replace(one, answer_worst=2.1).may_be_within(bounds)
    for change in (
        {"kl": 0.046},
        {"recall_interval": (-0.02, 0.05)},
        {"nll_interval": (0.0, 0.06)},
        {"answer_loss": 0.25, "answer_interval": (0.1, 0.5)},
    ):
        assert not dataclasses.replace(one, **change).is_within(bounds)
        assert dataclasses.replace(one, **change).may_be_within(bounds)


def test_rounds_take_every_sample_once_and_both_tasks() -> None:
    for count in (8, 9, 40, 61):
        cut = cut_in_rounds(list(range(count)))  # type: ignore[arg-type]
        assert [sample for one in cut for sample in one] == list(range(count))
        assert all(len(one) >= 2 for one in cut)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bounds_are_checked(value: float) -> None:
    with pytest.raises(SettingError, match="bound kl"):
        Bounds(value, 0.1, 0.1)


def test_prompts_must_fit_and_be_long_enough_to_prune(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="context holds 1280"):
        calibrate(llm, BOUNDS, tmp_path / "journal", length=1270, samples=8)
    with pytest.raises(SettingError, match="at least 1024"):
        calibrate(llm, BOUNDS, tmp_path / "journal", length=1000, samples=8)
    with pytest.raises(SettingError, match="samples 4"):
        calibrate(llm, BOUNDS, tmp_path / "journal", length=LENGTH, samples=4)
    assert list(tmp_path.iterdir()) == []


def few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer candidates and survivors than a calibration has: the same way, in less time."""
    monkeypatch.setattr(candidates_module, "_BINS", 2)
    monkeypatch.setattr(candidates_module, "_KINDS", 1)
    monkeypatch.setattr(search_module, "_SURVIVORS", (2, 2))


# -- being killed ------------------------------------------------------------------------------------------------------


def test_a_broken_off_calibration_goes_on_and_finds_the_same(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_plans(monkeypatch)
    monkeypatch.setattr(search_module, "_TTFT_REPEATS", 1)

    class KilledError(Exception):
        pass

    def kill(done: int, total: int, what: str, at: int = 24) -> None:
        if done == at:
            raise KilledError

    whole, journal = calibrate(llm, BOUNDS, tmp_path / "one", length=LENGTH, samples=8, seed=1)
    assert journal.resumed == 0
    with pytest.raises(KilledError):
        calibrate(llm, BOUNDS, tmp_path / "two", length=LENGTH, samples=8, seed=1, progress=kill)
    (unfinished,) = tmp_path.glob("two-*")
    with unfinished.open("a") as file:
        file.write('{"sample": "recall')  # killed within a line
    with pytest.raises(KilledError):  # other settings in between cost nothing
        soon = functools.partial(kill, at=3)
        calibrate(llm, BOUNDS, tmp_path / "two", length=LENGTH, samples=8, seed=2, progress=soon)
    resumed, journal = calibrate(llm, BOUNDS, tmp_path / "two", length=LENGTH, samples=8, seed=1)
    assert journal.resumed == 24
    assert [one.plan for one in resumed.measured] == [one.plan for one in whole.measured]
    apart = logits_apart(llm, list(drawn(llm).prompt[:256]))  # resumed within a prompt: rounded otherwise
    for again, once in zip(resumed.measured, whole.measured, strict=True):
        assert abs(again.kl - once.kl) <= kl_apart(once.kl, apart) and again.samples == once.samples
    for name, found in whole.presets.items():
        other = resumed.presets[name]
        assert (found and found.plan) == (other and other.plan)
        assert found is None or (found.is_within(BOUNDS[name]) and found.excess(BOUNDS[name]) <= 0)
    assert all(np.isfinite(one.kl) for one in whole.measured)


def test_measurements_of_other_settings_are_not_taken_up(tmp_path: Path) -> None:
    plan = PrunePlan((Stage(1, 0.5),))
    journal = Journal(tmp_path / "journal", {"seed": 1})
    journal.add("recall #1", plan, {"kl": 0.5})
    assert Journal(tmp_path / "journal", {"seed": 1}).get("recall #1", plan) == {"kl": 0.5}
    assert Journal(tmp_path / "journal", {"seed": 2}).get("recall #1", plan) is None
    assert Journal(tmp_path / "journal", {"seed": 1}).get("recall #1", plan) == {"kl": 0.5}


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_presets_that_loading_takes(model: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    few_plans(monkeypatch)
    arguments = ["calibrate", str(model), "--length", str(LENGTH), "--samples", "8", "--max-kl", "1", "--json"]
    result = CliRunner().invoke(cli, [*arguments, "--max-recall-drop", "1", "--max-nll-rise", "1"])
    assert result.exit_code == 0, result.output
    beside = preset_path(model)
    try:
        data = json.loads(beside.read_text())
        assert json.loads(result.stdout) == data
        for name in ("auto", "fast"):
            choice = choose_plan(name, llm.file, llm.config)
            assert choice.source == f"'{name}' of {beside.name}"
            assert choice.plan == PrunePlan.from_dict(data["presets"][name]["plan"])
            assert data["presets"][name]["measured"]["samples"] == 3  # of text that no choice was made by
            assert data["presets"][name]["plan"]["questions"] == (2 if name == "auto" else 0)
            assert len(data["presets"][name]["ttft_s"]["plan"]) == 3
        assert not list(model.parent.glob(".*journal"))
    finally:
        beside.unlink()


def test_the_command_says_what_it_keeps_and_what_it_goes_on_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "mine.slim.json"
    arguments = ["calibrate", str(model), "--length", str(LENGTH), "--samples", "8", "-o", str(target)]
    add, limit = Journal.add, 5

    def stopped(self: Journal, *entry: Any) -> None:
        add(self, *entry)
        if len(self) == limit:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", stopped)
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 130 and "5 measurements are kept; the same command goes on" in result.stderr
    target.write_text("mine")
    refused = CliRunner().invoke(cli, arguments)
    assert refused.exit_code == 1 and "exists already" in refused.stderr and target.read_text() == "mine"
    limit = 9
    result = CliRunner().invoke(cli, [*arguments, "--force"])
    assert "goes on after 5 measurements of an unfinished calibration" in result.stderr


def test_no_plan_within_the_bounds_means_dense(
    model: Path, tmp_path: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_plans(monkeypatch)
    target = tmp_path / "strict.slim.json"
    options = ["--length", str(LENGTH), "--samples", "8", "--max-kl", "0", "-o", str(target)]
    result = CliRunner().invoke(cli, ["calibrate", str(model), *options])
    assert result.exit_code == 0 and "no plan stays within the bounds" in result.output
    assert choose_plan(target, llm.file, llm.config).plan is None


def test_an_output_that_cannot_be_written_is_refused_first(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["calibrate", str(model), "-o", str(tmp_path / "none" / "x.slim.json")])
    assert (
        result.exit_code != 0
        and "does not exist; create it first" in result.output
        and len(result.output.splitlines()) == 1
    )
