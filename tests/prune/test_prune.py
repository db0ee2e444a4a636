"""Pruned prefill: what stays, that nothing changes where nothing is cut, and that follow-up questions are right."""

from __future__ import annotations

import dataclasses
import json
import pydoc_data.topics
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimrt
from slimrt import PrunePlan, Stage, Window
from slimrt.engine import Engine
from slimrt.errors import SettingError
from slimrt.models import build, read_config
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.prune.asked import ASKED
from slimrt.prune.presets import choose_plan, fingerprint, preset_path
from slimrt.prune.schedule import Cut, Schedule, schedule
from slimrt.prune.select import select_rows
from slimrt.weights.gguf import GGUFFile
from tests.tiny_gguf import write_tiny_llama

HALVES = PrunePlan(stages=(Stage(4, 0.5), Stage(7, 0.25)), block=32)
WINDOWED = dataclasses.replace(HALVES, windows=(Window(0, (128, 0, 64)), Window(3, (64, 64, 192))), full_rows=60)
ASKING = dataclasses.replace(HALVES, score=ASKED, stages=(Stage(4, 0.6), Stage(7, 0.55)), sure=0.9, most=0.7)


@pytest.fixture(scope="module")
def llm(default_model: Path) -> slimrt.LLM:
    return slimrt.load(default_model, ctx=4096, prune="off")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads and weight type of the default model, a third of its layers and a sixth of its width."""
    options = {"n_layers": 10, "n_heads": 9, "n_kv_heads": 3, "head_dim": 64, "d_model": 96, "type": "Q4_1"}
    return write_tiny_llama(tmp_path_factory.mktemp("prune") / "small.gguf", ctx=4096, **options)


@pytest.fixture(scope="module")
def small(small_model: Path) -> slimrt.LLM:
    return slimrt.load(small_model, ctx=4096, prune="off")


@pytest.fixture(scope="module")
def document(small: slimrt.LLM) -> list[int]:
    """Bytes, mostly: ids that the default model has as well."""
    return small.tokenize(pydoc_data.topics.topics["compound"])[:700]


def test_keeping_everything_is_dense_bit_for_bit(llm: slimrt.LLM, document: list[int]) -> None:
    plan = PrunePlan(stages=(Stage(3, 1.0), Stage(14, 1.0), Stage(22, 1.0)))
    dense, pruned = llm.session(), llm.session()
    dense.prefill(document[:450], None)
    assert pruned.prefill(document[:450], plan).stages == (450,) * 3
    for _ in range(4):  # and what is decoded
        assert np.array_equal(dense.logits, pruned.logits)
        for session in (dense, pruned):
            session.extend([int(session.logits.argmax())])


def test_kept_tokens_and_bytes(small: slimrt.LLM, document: list[int]) -> None:
    result = small.generate(document, max_tokens=1, prune=HALVES)
    first, second = result.timings.stages
    ragged = len(document) % 32
    # ceil(350 / 32) and ceil(175 / 32) blocks, the last of them ragged
    assert (first, second) == (10 * 32 + ragged, 5 * 32 + ragged)
    rows = 5 * len(document) + 3 * first + 2 * second
    assert result.timings.kv_bytes_device == rows * small.engine.kv_bytes_per_token // small.config.n_layers


class _Attending(NumpyOps):
    """Notes where the rows lie that attend without the others of their layer."""

    def __init__(self) -> None:
        super().__init__(1)
        self.places: list[np.ndarray] = []

    def attend(self, *args: Any, places: np.ndarray | None = None, **how: Any) -> np.ndarray:
        if places is not None:
            self.places.append(places)
        return super().attend(*args, places=places, **how)


def test_at_a_cut_only_what_goes_on_attends(small_model: Path, document: list[int]) -> None:
    """And at the first one for another question, what the question before it did not choose."""
    file, ops = GGUFFile(small_model), _Attending()
    engine = Engine(build(read_config(file), file, ops), ops)
    plan = PrunePlan((Stage(1, 0.4), Stage(2, 0.2)), block=16, query_window=8)
    context, attended, held = engine.new_context(1), set[int](), 0
    for tokens in (document[:300], document[400:450]):
        held += len(tokens)
        ops.places.clear()
        _, kept = engine.prefill(context, tokens, schedule(plan, held))
        late = np.setdiff1d(kept[0].positions, list(attended))
        assert len(late) and np.array_equal(np.concatenate(ops.places[:-1]), late)
        assert np.array_equal(kept[0].positions[ops.places[-1]], kept[1].positions)
        attended |= set(kept[0].positions.tolist())
        assert context.boundary is not None and set(np.flatnonzero(context.boundary.attended).tolist()) == attended
    assert len(late) < len(kept[0].positions)  # some were chosen twice


def test_rope_positions_stay(small: slimrt.LLM, document: list[int]) -> None:
    session = small.session()
    session.prefill(document, HALVES)
    cache = session.context.cache
    kept = cache.rows(8)[2]
    assert (np.diff(kept) > 0).all()
    assert kept[0] == 0 and kept[-1] == len(document) - 1
    assert set(kept) <= set(cache.rows(5)[2]) < set(range(len(document)))
    assert np.array_equal(cache.rows(4)[2], np.arange(len(document)))


@pytest.mark.parametrize("plan", [HALVES, WINDOWED, ASKING], ids=["cuts", "windows and cuts", "what is asked"])
def test_another_question_equals_a_fresh_prefill(small_model: Path, document: list[int], plan: PrunePlan) -> None:
    # On NumPy: elsewhere decode, whose rows the session goes on with, computes in another precision than prefill.
    llm = slimrt.load(small_model, ctx=4096, prune="off", device="numpy")
    session = llm.session()
    session.prefill(document, plan)
    for _ in range(4):
        session.extend([int(session.logits.argmax())])
    for question in (
        " What is a coroutine? And what is a generator, then? Say it shortly.",
        "?",
    ):  # the last is shorter than the query window
        conversation = session.tokens + llm.tokenize(question)
        limited = session.context.windows.rows
        reading = session.prefill(conversation, plan)
        fresh_rows = len(llm.asking(conversation).tail) if plan.score == ASKED else plan.query_window
        reused = len(conversation) - max(fresh_rows, len(llm.tokenize(question)))
        # What saw everything when it was the last of the prompt runs again where it is under windows now.
        moved = plan.windows and session.context.windows.rows > limited
        assert reading.reused == (limited if moved else reused)
        assert ("under windows now" in reading.note) == bool(moved)
        fresh = llm.logits(conversation, prune=plan)
        dense = llm.logits(conversation)
        # Chunks of other sizes sum in another order: what that alone does to dense logits is the unit.
        chunked = llm.session()
        chunked.prefill(conversation[: reading.reused])
        chunked.extend(conversation[reading.reused :])
        unit = np.abs(chunked.logits - dense).max()
        assert np.abs(session.logits - fresh).max() <= 4 * unit
        assert np.abs(fresh - dense).max() > 100 * unit  # so the comparison tells pruned from dense


def test_windows_change_what_is_read_and_only_where_they_are(small: slimrt.LLM, document: list[int]) -> None:
    # Of 700 rows whole runs of 128 are limited, and the last of them begins at 512.
    wide = PrunePlan(windows=(Window(0, (512, 512, 0)), Window(9, (0, 0, 0))), full_rows=0)
    assert np.array_equal(small.logits(document, prune=wide), small.logits(document))
    narrow = dataclasses.replace(wide, windows=(Window(0, (64, 64, 64)),))
    full = dataclasses.replace(narrow, full_rows=573)  # 127 rows are left to the windows, no whole run
    assert np.array_equal(small.logits(document, prune=full), small.logits(document))
    assert not np.array_equal(small.logits(document, prune=narrow), small.logits(document))
    late = dataclasses.replace(narrow, min_tokens=701)
    assert np.array_equal(small.logits(document, prune=late), small.logits(document))
    # A window ends at its layer: the layer before it and its own keys are the dense run's.
    session, dense = small.session(), small.session()
    session.prefill(document, PrunePlan(windows=(Window(3, (64, 64, 64)),), full_rows=100))
    dense.prefill(document)
    for layer, same in ((3, True), (4, False)):
        assert np.array_equal(session.context.cache.rows(layer)[0], dense.context.cache.rows(layer)[0]) == same
    # Of 700 rows the last 188 saw everything in layer 3, and their keys in layer 4 tell; the first 256 have no row out.
    changed = session.context.cache.rows(4)[0] != dense.context.cache.rows(4)[0]
    assert np.flatnonzero(changed.any(axis=(0, 2))).tolist() == list(range(256, 512))


def test_plan_changes_start_anew(small: slimrt.LLM, document: list[int]) -> None:
    session = small.session()
    session.prefill(document, HALVES)
    reading = session.prefill([*document, 5], None)
    assert (reading.reused, reading.note) == (0, "the last conversation was pruned otherwise")
    assert np.array_equal(session.logits, small.logits([*document, 5]))


def test_short_prompts_run_dense(small: slimrt.LLM, document: list[int]) -> None:
    plan = PrunePlan(stages=(Stage(4, 512), Stage(7, 256)))
    assert small.generate(document[:250], max_tokens=1, prune=plan).timings.stages == ()
    assert small.generate(document[:400], max_tokens=1, prune=plan).timings.stages == (
        208,
    )  # four blocks, the last ragged
    waiting = PrunePlan(stages=(Stage(4, 0.5),), min_tokens=500)
    assert small.generate(document[:499], max_tokens=1, prune=waiting).timings.stages == ()
    for length in (1, 63, 64):
        assert np.array_equal(small.logits(document[:length], prune=HALVES), small.logits(document[:length]))


@given(
    tokens=st.integers(1, 5000),
    keep=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4),
    block=st.sampled_from([16, 32, 64]),
    sink=st.integers(0, 3),
    local=st.integers(1, 3),
    window=st.integers(1, 200),
    follow=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_always_stays(
    tokens: int, keep: list[float], block: int, sink: int, local: int, window: int, follow: float, seed: int
) -> None:
    plan = PrunePlan(
        stages=tuple(Stage(i, k) for i, k in enumerate(keep)),
        block=block,
        unit=8,
        sink_blocks=sink,
        local_blocks=local,
        query_window=window,
        follow=follow,
    )
    rng = np.random.default_rng(seed)
    active = np.arange(tokens)
    for cut in schedule(plan, tokens).cuts:
        blocks = -(-len(active) // block)
        scores = rng.random(blocks).astype(np.float32)
        rows, _ = select_rows(schedule(plan, tokens), cut, scores, len(active))
        assert (np.diff(rows) > 0).all()
        assert len(set(rows // block)) == cut.blocks
        assert set(range(min(len(active), sink * block))) <= set(rows)
        assert set(range(max(0, len(active) - max(window, local * block)), len(active))) <= set(rows)
        # No block that stays because it is wanted is wanted less than one that leaves.
        wanted = [max(scores[b], follow * float(scores[b - 1]) if b else 0) for b in range(blocks)]
        free = range(sink, blocks)
        left = [wanted[b] for b in free if b * block not in set(rows)]
        chosen = [
            wanted[b]
            for b in free
            if b * block in set(rows) and (b + 1) * block <= len(active) - max(window, local * block)
        ]
        if left and chosen:
            assert min(chosen) >= max(left)
        active = active[rows]


def test_best_blocks_stay() -> None:
    scores = np.array([0, 5, 1, 9, 1, 7, 2, 0], np.float32)
    for follow, blocks, kept in (
        (0, 4, [0, 3, 5, 7]),
        (1, 4, [0, 3, 4, 7]),  # the one behind 9 goes on with it
        (1, 6, [0, 3, 4, 5, 6, 7]),
        (0.5, 5, [0, 1, 3, 5, 7]),  # 5 beats half of 9
    ):
        plan = PrunePlan(stages=(Stage(0, 256),), query_window=1, follow=follow)
        rows, _ = select_rows(Schedule(plan), Cut(0, blocks), scores, 512)
        assert sorted(set(rows // 64)) == kept


def test_no_fraction_leaves_fewer_tokens_than_the_least() -> None:
    plan = PrunePlan((Stage(3, 0.5), Stage(5, 0.25), Stage(7, 128)), min_keep=640)
    assert [cut.blocks for cut in schedule(plan, 6400).cuts] == [50, 25, 2]
    assert [(cut.layer, cut.blocks) for cut in schedule(plan, 1600).cuts] == [(3, 13), (5, 10), (7, 2)]
    assert [(cut.layer, cut.blocks) for cut in schedule(plan, 640).cuts] == [
        (7, 2)
    ]  # what is named in tokens is kept to


def test_plans_are_checked(tmp_path: Path, llm: slimrt.LLM) -> None:
    for stages, message in (
        ((Stage(14, 0.0),), "keeps 0.0"),
        ((Stage(14, 1.5),), "keeps 1.5"),
        ((Stage(14, 0),), "fewer than its sink and local"),
        ((Stage(14, 100),), "fewer than its sink and local"),
        ((Stage(22, 0.5), Stage(14, 0.25)), "ascending"),
        ((Stage(14, 0.5), Stage(14, 0.25)), "ascending"),
        ((Stage(-1, 0.5),), "non-negative"),
    ):
        with pytest.raises(SettingError, match=message):
            PrunePlan(stages=stages)
    for options in ({"block": 0}, {"unit": 7}, {"query_window": 0}, {"local_blocks": 0}, {"sink_blocks": -1}):
        with pytest.raises(SettingError):
            PrunePlan(**options)
    with pytest.raises(SettingError, match="layer 29; this model has layers"):
        llm.logits([1, 2], prune=PrunePlan(stages=(Stage(29, 0.5),)))
    for window in (Window(30, (64, 64, 64)), Window(3, (64, 64))):
        with pytest.raises(SettingError, match=r"layers 0\.\.29 and 3 KV heads"):
            llm.logits([1, 2], prune=PrunePlan(windows=(window,)))
    with pytest.raises(SettingError, match="score 'best'"):
        llm.logits([1, 2], prune=PrunePlan(stages=(Stage(9, 0.5),), score="best"))
    with pytest.raises(SettingError, match="no such file"):
        llm.logits([1, 2], prune="fastest")
    with pytest.raises(SettingError, match="unknown keys"):
        PrunePlan.from_dict({"stages": [], "blocks": 64})
    for data in (
        {"stages": [{"layer": "x"}]},
        {"stages": [{"layer": "x", "keep": 0.5}]},
        {"stages": [{"layer": 1, "keep": None}]},
        {"stages": [{"layer": 1, "keep": True}]},
        {"stages": [{"layer": 1, "keep": 0.5, "why": 1}]},
        {"stages": 5},
        {"stages": [3]},
        {"block": "64"},
        {"block": 64.0},
        {"score": None},
        {"min_tokens": -1},
        {"full_rows": -1},
        {"min_keep": -1},
        {"min_keep": 0.5},
        {"follow": -0.5},
        {"follow": 1.5},
        {"follow": True},
        {"follow": "all"},
        {"windows": 3},
        {"windows": [3]},
        {"windows": [{"layer": 1}]},
        {"windows": [{"layer": 1, "reach": 64}]},
        {"windows": [{"layer": 1, "reach": [64.0]}]},
        {"windows": [{"layer": 1, "reach": [-64]}]},
        {"windows": [{"layer": 1, "reach": [100]}]},
        {"windows": [{"layer": 2, "reach": [64]}, {"layer": 1, "reach": [64]}]},
        {"windows": [{"layer": 9, "reach": [64]}], "stages": [{"layer": 8, "keep": 0.5}]},
    ):
        with pytest.raises(SettingError, match="prune plan"):
            PrunePlan.from_dict(data)
    broken = tmp_path / "plan.json"
    broken.write_text("{")
    with pytest.raises(SettingError, match="no prune plan"):
        llm.logits([1, 2], prune=str(broken))


def test_json_both_ways(tmp_path: Path, small: slimrt.LLM, document: list[int]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(WINDOWED.to_json())
    assert PrunePlan.from_dict(json.loads(path.read_text())) == WINDOWED
    assert np.array_equal(small.logits(document, prune=str(path)), small.logits(document, prune=WINDOWED))


def test_the_default_model_comes_with_presets(llm: slimrt.LLM, default_model: Path) -> None:
    bounds = {"auto": (0.05, 0.01, 0.02), "fast": (0.2, 0.02, 0.08)}  # KL, recall, nats: what the README promises
    shipped = json.loads(resources.files("slimrt.plans").joinpath("smollm2-135m.slim.json").read_text())
    for name, limits in bounds.items():
        choice = choose_plan(name, llm.file, llm.config)
        assert choice.plan is not None and choice.source == f"'{name}' shipped for this model"
        assert choice.plan == PrunePlan.from_dict(shipped["presets"][name]["plan"])
        measured = shipped["presets"][name]["measured"]
        losses = [measured[key] for key in ("kl", "recall_drop", "nll_rise")]
        assert all(loss <= limit for loss, limit in zip(losses, limits, strict=True))
    assert slimrt.load(default_model, ctx=512).plan.source == "'auto' shipped for this model"


def test_other_weights_of_the_default_sizes_run_dense(monkeypatch: pytest.MonkeyPatch, llm: slimrt.LLM) -> None:
    own = fingerprint(llm.file, llm.config)
    monkeypatch.setattr("slimrt.prune.presets.fingerprint", lambda file, config: {**own, "norms": "0" * 64})
    choice = choose_plan("auto", llm.file, llm.config)
    assert choice.plan is None and "sizes of smollm2-135m, but not its weights" in choice.source


def test_presets(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    write_tiny_llama(model, n_layers=8)
    loaded = slimrt.load(model)
    assert loaded.plan.plan is None and "run dense" in loaded.plan.source
    cautious = PrunePlan(stages=(Stage(6, 0.5),), score=ASKED, min_tokens=1024)
    assert choose_plan("fast", loaded.file, loaded.config).plan == cautious
    data = {
        "model": fingerprint(loaded.file, loaded.config),
        "presets": {
            "auto": {"plan": {"stages": [{"layer": 2, "keep": 0.5}]}},
            "fast": {"plan": {"stages": [{"layer": 1, "keep": 0.25}]}},
        },
    }
    preset_path(model).write_text(json.dumps(data))
    assert choose_plan("fast", loaded.file, loaded.config).plan == PrunePlan(stages=(Stage(1, 0.25),))
    assert slimrt.load(model).plan.plan == PrunePlan(stages=(Stage(2, 0.5),))
    # Presets of the model serve it under adapters too; those calibrated under adapters serve under the same ones only.
    assert choose_plan("auto", loaded.file, loaded.config, "two").plan == PrunePlan(stages=(Stage(2, 0.5),))
    under = tmp_path / "under.slim.json"
    under.write_text(json.dumps({**data, "model": fingerprint(loaded.file, loaded.config, "two")}))
    assert choose_plan(under, loaded.file, loaded.config, "two").plan == PrunePlan(stages=(Stage(2, 0.5),))
    for adapters in ("", "three"):
        with pytest.raises(SettingError, match="calibrated under adapters that are not applied now"):
            choose_plan(under, loaded.file, loaded.config, adapters)
    # Another model of the same sizes is told that the plan is not its own; another file of the same model has it.
    other = tmp_path / "other.gguf"
    write_tiny_llama(other, n_layers=8, seed=8)
    preset_path(other).write_text(json.dumps(data))
    with pytest.raises(SettingError, match="calibrated on another model"):
        slimrt.load(other)
    data["model"]["n_layers"] = 7
    preset_path(model).write_text(json.dumps(data))
    with pytest.raises(SettingError, match="calibrated on another model"):
        slimrt.load(model)
