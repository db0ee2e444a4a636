"""The whole engine on the GPU backend, its kernels run on the CPU: what a model says there and on NumPy is the same.

A tolerance is ``SLACK`` times the error that the same engine makes on ``HalfOps``, NumPy rounded to float16 or
bfloat16 wherever the GPU stores that. Both errors are measured against float64 where nothing is pruned, else against
NumPy in float32, whose error is some thousand times smaller.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimrt.config import CacheConfig
from slimrt.engine import Engine
from slimrt.errors import ComputeError, DeviceError
from slimrt.models import build, read_config
from slimrt.ops.cuda.cupy_ops import CupyOps
from slimrt.ops.cuda.element import element_of
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.prune.asked import Asked
from slimrt.prune.plan import PrunePlan, Stage
from slimrt.prune.schedule import schedule
from slimrt.session import Session
from slimrt.session_file import SavedTalk, read_session, write_session
from slimrt.weights.gguf import GGUFFile
from tests import emulation, reference
from tests.fake_cupy import FakeCupy
from tests.half_ops import HalfOps
from tests.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="running CUDA sources on the CPU needs g++")

SLACK = 3  # both round to float16 in the same places; the order of sums and the running maximum differ

SHAPES: dict[str, dict[str, Any]] = {
    "F16": {"type": "F16"},
    "BF16": {"type": "BF16", "tied": False},
    "Q4_0": {"type": "Q4_0", "n_heads": 6, "n_kv_heads": 2, "d_model": 96},
    "Q8_0": {"type": "Q8_0", "head_dim": 128, "n_heads": 2, "n_kv_heads": 1},
    "Q2_K": {"type": "Q2_K", "d_model": 256, "d_ff": 256, "n_layers": 2},  # no kernel: float16 on the device
    "qwen2": {"arch": "qwen2", "type": "Q5_1"},
    "llama3": {"type": "Q6_K", "d_model": 256, "d_ff": 256, "n_layers": 2, "rope_freqs": True},
}


def tiny(path: Path, **options: Any) -> GGUFFile:
    settings = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 64, "d_ff": 96, "head_dim": 64}
    metadata = {"llama.rope.scaling.type": "llama3"} if options.get("rope_freqs") else {}
    return GGUFFile(write_tiny_llama(path / "tiny.gguf", **(settings | options), **metadata))


def engine(file: GGUFFile, ops: Any, cache: CacheConfig | None = None) -> Engine:
    return Engine(build(read_config(file), file, ops), ops, cache)


def ids(file: GGUFFile, count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, read_config(file).vocab_size, count).tolist()


def asking(ids: list[int]) -> Asked:
    """The last eight tokens ask, and two before the document."""
    return Asked(head=(0.5,) * 5 + (1.0,) * 2 + (0.0,) * 40, tail=(0.5,) * 4 + (1.0,) * 4)


class Chosen:
    """A trace that notes the rows of every cut."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def begin(self) -> None: ...

    def layer(self, layer: int) -> None: ...

    def attention(self, layer: int, q: Any, keys: Any) -> None: ...

    def cut(
        self, layer: int, positions: np.ndarray, scores: np.ndarray, rows: np.ndarray, by: np.ndarray | None
    ) -> None:
        self.rows.append(rows.tolist())


def beyond_float16(path: Path) -> GGUFFile:
    """A model stored in bfloat16 whose keys have a bias beyond 65504, and its activations between gate and down too.
    The biased pair of a head is one that queries do not look at: rounding it costs nothing, infinity would be seen."""
    file = tiny(path, arch="qwen2", type="BF16")
    for name, tensor in list(file.tensors.items()):
        data = np.array(tensor.data)
        if name.endswith(("ffn_up.weight", "ffn_down.weight")):  # times 2^20 and 2^-20: so much more in the exponent
            data.view(np.uint16)[...] += np.uint16(20 << 7) if "up" in name else np.uint16(-20 << 7 & 0xFFFF)
        elif name.endswith("attn_k.bias"):
            data.reshape(2, 64)[:, [31, 63]] = 1e5
        elif "attn_q." in name:
            data.reshape(4, 64, -1)[:, [31, 63]] = 0
        file.tensors[name] = dataclasses.replace(tensor, data=data)
    return file


@pytest.mark.parametrize("name", SHAPES)
def test_prefill_and_decode_against_float64(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    FakeCupy(monkeypatch)
    file = tiny(tmp_path, **SHAPES[name])
    tokens = ids(file, 133)
    truth = reference.logits(file, read_config(file), tokens, np.float64)
    for length in (1, 7, 133):  # one row, few rows, a whole tile and a ragged one
        errors = {}
        for ops in (HalfOps(), CupyOps()):
            session = Session(engine(file, ops), 512)
            session.prefill(tokens[: max(1, length - 3)])
            found = [session.logits]
            for token in tokens[max(1, length - 3) : length]:
                session.extend([token])
                found.append(session.logits)
            wanted = truth[length - len(found) : length]
            errors[ops.name] = np.abs(np.array(found) - wanted).max()
        assert 0 < errors["cuda"] <= SLACK * errors["numpy"], (length, errors)


@pytest.mark.parametrize("score", ["token_mass", "token_max", "unit_softmax", "mean_qk", "asked"])
def test_pruned_prefill_and_a_second_question(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, score: str) -> None:
    FakeCupy(monkeypatch)
    file = tiny(tmp_path, n_layers=5, type="Q8_0")
    plan = PrunePlan((Stage(1, 0.6), Stage(3, 64)), block=16, unit=8, score=score, query_window=8)
    document, questions = ids(file, 200), [ids(file, 20, 2), ids(file, 9, 3)]
    found: dict[str, list[np.ndarray]] = {}
    rows: dict[str, list] = {}
    for kind, ops in (("true", NumpyOps(1)), ("half", HalfOps()), ("cuda", CupyOps())):
        session, chosen = Session(engine(file, ops), 512, asking), Chosen()
        found[kind] = []
        for question in questions:
            reading = session.prefill(document + question, plan, trace=chosen)
            found[kind].append(session.logits)  # type: ignore[arg-type]
            session.extend(ids(file, 1, 4))
            found[kind].append(session.logits)  # type: ignore[arg-type]
        assert reading.reused == 200 and len(reading.stages) == 2
        rows[kind] = chosen.rows
    assert rows["cuda"] == rows["true"] == rows["half"]  # else the logits could not be compared
    unit = np.abs(np.array(found["half"]) - found["true"]).max()
    assert np.abs(np.array(found["cuda"]) - found["true"]).max() <= SLACK * unit


def test_decode_by_captured_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pruned conversation, its layers of different lengths, past several captures; then a second question."""
    monkeypatch.setattr("slimrt.ops.cuda.decode._ROOM", 5)
    monkeypatch.setattr("slimrt.kv.cache._GROWTH", 3)
    fake = FakeCupy(monkeypatch)
    file = tiny(tmp_path, n_layers=3, type="Q4_0")
    plan = PrunePlan((Stage(0, 0.5), Stage(1, 48)), block=16, query_window=8)
    document = ids(file, 120)
    found: dict[str, list[np.ndarray]] = {}
    launches: dict[str, int] = {}
    for kind in ("true", "half", "plain", "graph", "unfused", "late"):
        # Other families than LLaMA pass a layer in the graph as a prompt's rows do.
        monkeypatch.setattr("slimrt.ops.cuda.cupy_ops._as_llama", lambda _, kind=kind: kind != "unfused")
        if kind == "late":
            fake = FakeCupy(monkeypatch, copies="late", compute="late")
        ops = NumpyOps(1) if kind == "true" else HalfOps() if kind == "half" else CupyOps()
        session = Session(Engine(build(read_config(file), file, ops), ops, whole_tokens=kind != "plain"), 512)
        found[kind] = []
        answer = ids(file, 8, 5)
        for question in (document, document + answer + ids(file, 9, 3)):
            session.prefill(question, plan)
            before = len(fake.launches)
            for token in answer:
                session.extend([token])
                found[kind].append(session.logits)  # type: ignore[arg-type]
            launches[kind] = len(fake.launches) - before
    assert fake.graphs == 3 and fake.pools == 1  # room is made ahead; a graph's memory serves the next one
    unit = np.abs(np.array(found["half"]) - found["true"]).max()
    for kind in ("plain", "graph", "unfused"):
        assert np.abs(np.array(found[kind]) - found["true"]).max() <= SLACK * unit, kind
    assert np.array_equal(found["late"], found["graph"])
    assert launches["graph"] < launches["plain"]  # the kernels of a replay are not launched one by one


def test_calibration_tries_plans_behind_the_boundary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One dense run, then plans whose first cut may come later than the kept hidden states, as in calibration."""
    FakeCupy(monkeypatch)
    file = tiny(tmp_path, n_layers=4, type="Q8_0")
    prompt = ids(file, 120)
    found: dict[str, list[np.ndarray]] = {}
    for kind, ops in (("true", NumpyOps(1)), ("half", HalfOps()), ("cuda", CupyOps())):
        one = engine(file, ops)
        context = one.new_context(0)
        one.prefill(context, prompt)
        found[kind] = []
        for layer in (0, 1, 2):
            plan = PrunePlan((Stage(layer, 0.5),), block=16, query_window=8)
            context.truncate(len(prompt) - 8)
            hidden, _ = one.prefill(context, prompt[-8:], schedule(plan, len(prompt)))
            following = one.extend(context, [5, 6], wanted=2)
            with ops.computing():
                rows = np.concatenate([hidden, following])
            found[kind].append(one.logits(rows))
    unit = np.abs(np.array(found["half"]) - found["true"]).max()
    assert np.abs(np.array(found["cuda"]) - found["true"]).max() <= SLACK * unit


def test_rows_in_several_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each row is treated alone, so how many pass together must not show."""
    fake = FakeCupy(monkeypatch)
    file = tiny(tmp_path, type="Q8_0")
    ops = CupyOps()
    found = []
    for rows in (1 << 15, 40):
        monkeypatch.setattr(ops, "whole_rows", rows)
        session = Session(engine(file, ops), 512)
        before = len(fake.launches)
        session.prefill(ids(file, 100))
        found.append((session.logits, len(fake.launches) - before))
    assert np.array_equal(found[0][0], found[1][0])  # type: ignore[arg-type]
    assert found[1][1] > found[0][1]


def test_a_plan_that_keeps_all_is_the_dense_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeCupy(monkeypatch)
    file = tiny(tmp_path, type="Q4_0", n_layers=3)
    tokens = ids(file, 140)
    one = engine(file, CupyOps())
    dense, pruned = Session(one, 512), Session(one, 512)
    dense.prefill(tokens)
    pruned.prefill(tokens, PrunePlan((Stage(0, 1.0), Stage(1, 1.0)), block=16))
    assert np.array_equal(dense.logits, pruned.logits)  # type: ignore[arg-type]


def budget_run(ops: Any, file: GGUFFile, cache: CacheConfig | None) -> tuple[list[np.ndarray], Session]:
    """A long prompt, decode, a follow-up that continues it, one that departs from it, decode."""
    session = Session(engine(file, ops, cache), 1024)
    found = []
    first = ids(file, 200)
    for prompt, decoded in ((first, 17), (first + ids(file, 40, 2), 2), (first[:150] + ids(file, 30, 3), 17)):
        session.prefill(prompt)
        found.append(session.logits)
        for token in ids(file, decoded, 5):  # 17: one block and one row
            session.extend([token])
            found.append(session.logits)
    return found, session  # type: ignore[return-value]


BUDGET = CacheConfig(1024, 128, block=16, unit=8, local_blocks=2)


def test_a_kv_budget_on_streams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The KV manager on streams that are as early, or as late, as their events allow; the answers do not change."""
    file, runs = tiny(tmp_path, type="Q8_0"), []
    for copies, compute in (("late", "early"), ("early", "late"), ("late", "late")):
        fake = FakeCupy(monkeypatch, copies=copies, compute=compute)
        found, session = budget_run(CupyOps(), file, BUDGET)
        runs.append(np.array(found))
        cache: Any = session.context.cache
        assert cache.transfers.bytes_to_host > 0 and cache.transfers.bytes_to_device > 0
        assert session.kv_bytes_host == 2 * (len(session.tokens) // 16 * 16) * 2 * 2 * 64 * 2  # float16
        assert fake.pinned_calls == 1  # all of it at load, in one piece
    assert all(np.array_equal(run, runs[0]) for run in runs)
    truth, half = (np.array(budget_run(ops, file, BUDGET)[0]) for ops in (NumpyOps(1), HalfOps()))
    assert np.abs(runs[0] - truth).max() <= SLACK * np.abs(half - truth).max()


def test_a_copy_without_its_event_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stand-in must show what it is for: waits that are left out, either way, change the answers."""
    file = tiny(tmp_path, type="Q8_0")
    FakeCupy(monkeypatch)

    def run(ops: Any) -> np.ndarray:
        """A prompt, decode until a block goes to the host, and a prompt that reads that block from there."""
        session = Session(engine(file, ops, BUDGET), 1024)
        session.prefill(ids(file, 200))
        for token in ids(file, 17, 5):
            session.extend([token])
        session.prefill([*session.tokens, *ids(file, 40, 2)])
        assert session.logits is not None
        return session.logits

    right = run(CupyOps())
    for copies, compute, breaks in (("late", "early", "wait"), ("early", "late", "mark")):
        FakeCupy(monkeypatch, copies=copies, compute=compute)
        ops = CupyOps()
        if breaks == "wait":
            monkeypatch.setattr(ops, "wait", lambda fence: None)
        else:
            passed = ops.mark()
            monkeypatch.setattr(ops, "mark", lambda passed=passed: passed)
        try:
            wrong = run(ops)
        except ComputeError:  # NaN in the logits
            continue
        assert not np.array_equal(wrong, right), breaks


def test_a_failing_copy_is_never_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whichever copy of a conversation is refused: an error in one line, and the session is right afterwards."""
    file = tiny(tmp_path, type="Q8_0", n_layers=2)
    tokens = ids(file, 150)
    FakeCupy(monkeypatch)
    ops = CupyOps()
    session = Session(engine(file, ops, BUDGET), 1024)
    session.prefill(tokens)
    right = [session.logits]
    for token in tokens[:17]:
        session.extend([token])
        right.append(session.logits)
    fake = FakeCupy(monkeypatch)
    one = engine(file, CupyOps(), BUDGET)
    failures = 0
    for number in range(1, 60, 14):
        session = Session(one, 1024)
        fake.copy_count, fake.fail_at = 0, number
        try:
            session.prefill(tokens)
            found = [session.logits]
            for token in tokens[:17]:
                session.extend([token])
                found.append(session.logits)
            session.context.cache.close()
        except (DeviceError, ComputeError) as error:
            failures += 1
            assert "\n" not in str(error) and "cudaErrorInvalidValue" in str(error)
            fake.fail_at = None
            session.reset()
            session.prefill(tokens)
            found = [session.logits]
        fake.fail_at = None
        assert np.array_equal(np.array(found), np.array(right[: len(found)]))
    assert failures > 2


def test_a_lost_gpu_says_so_and_the_cpu_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeCupy(monkeypatch)
    file = tiny(tmp_path, type="Q8_0")
    session = Session(engine(file, CupyOps()), 512)
    session.prefill(ids(file, 30))
    fake.lost = "cudaErrorIllegalAddress: an illegal memory access was encountered"
    with pytest.raises(
        DeviceError, match=r"CUDA failed .*cudaErrorIllegalAddress.* start it again, or use device='cpu'"
    ):
        session.extend([3])
    other = Session(engine(file, NumpyOps(1)), 512)
    other.prefill(ids(file, 30))
    assert np.isfinite(other.logits).all()  # type: ignore[arg-type]


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeCupy(monkeypatch)
    file = tiny(tmp_path, type="Q8_0")
    session = Session(engine(file, CupyOps()), 4096)
    fake.room = fake.used + (300 << 10)
    with pytest.raises(DeviceError, match=r"the GPU's memory does not suffice .*--kv-budget"):
        session.prefill(ids(file, 1000))
    fake.room = None
    session.prefill(ids(file, 50))
    fake.pinnable = 1 << 10
    with pytest.raises(DeviceError, match=r"MiB of host memory cannot be pinned .*ulimit.*device='cpu'"):
        engine(file, CupyOps(), BUDGET)


def test_nan_in_a_weight_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeCupy(monkeypatch)
    file = tiny(tmp_path, type="F16")
    ops = CupyOps()
    one = engine(file, ops)
    one.model.layers[1].attn_norm[:1] = np.nan
    session = Session(one, 512)
    with pytest.raises(ComputeError, match="logits are not finite"):
        session.prefill(ids(file, 40))


def test_a_saved_session_goes_on_on_either_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeCupy(monkeypatch, copies="late")
    file = tiny(tmp_path, type="Q8_0")
    for cache in (None, BUDGET):
        gpu = engine(file, CupyOps(), cache)
        session = Session(gpu, 1024)
        session.prefill(ids(file, 200))
        write_session(tmp_path / "talk", session, file, SavedTalk([], None, None))
        restored, host = Session(gpu, 1024), Session(engine(file, NumpyOps(1), cache), 1024)
        for other in (restored, host):
            read_session(tmp_path / "talk", other, file)
            assert np.array_equal(other.logits, session.logits)  # type: ignore[arg-type]
        twin = session.fork()
        for other in (restored, host, twin):  # float16 numbers, also where NumPy holds them
            for layer in range(2):
                for one, two in zip(session.context.cache.rows(layer), other.context.cache.rows(layer), strict=True):
                    one, two = (side.get() if hasattr(side, "get") else side for side in (one, two))
                    assert np.array_equal(one, two)
        if cache is None:  # under a budget a restored layer keeps its latest blocks resident, not the chosen ones
            for one in (session, restored, twin):
                one.extend([5])
            assert np.array_equal(session.logits, restored.logits)  # type: ignore[arg-type]
            assert np.array_equal(session.logits, twin.logits)  # type: ignore[arg-type]


def test_a_model_stored_in_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Numbers beyond float16 in keys and activations: prompt, graphs, follow-up, saved session, under a budget and
    without one, as near NumPy as plain bfloat16 is."""
    FakeCupy(monkeypatch, copies="late", compute="late")
    assert element_of(tiny(tmp_path, type="F16")) == "f16"
    file = beyond_float16(tmp_path)
    assert element_of(file) == "bf16"
    with pytest.raises(ComputeError, match="not finite"):
        Session(engine(file, CupyOps()), 512).prefill(ids(file, 40))
    plan = PrunePlan((Stage(0, 0.5),), block=16, query_window=8)
    for cache in (None, dataclasses.replace(BUDGET, budget=64)):
        found: dict[str, np.ndarray] = {}
        for kind, ops in (
            ("true", NumpyOps(1)), ("naive", HalfOps(1, "bf16")), ("cuda", CupyOps(element="bf16")),
        ):  # fmt: skip
            one, logits = engine(file, ops, cache), []
            session = Session(one, 1024)
            for prompt in (ids(file, 100), ids(file, 100) + ids(file, 20, 2)):
                session.prefill(prompt, None if cache else plan)
                logits.append(session.logits)
                for token in ids(file, 3, 5):
                    session.extend([token])
                    logits.append(session.logits)
            found[kind] = np.array(logits)
            assert cache is None or session.context.cache.transfers.bytes_to_device > 0  # type: ignore[attr-defined]
            write_session(tmp_path / "talk", session, file, SavedTalk([], None, None))
            restored = Session(one, 1024)
            read_session(tmp_path / "talk", restored, file)
            for layer in range(2):
                for a, b in zip(session.context.cache.rows(layer), restored.context.cache.rows(layer), strict=True):
                    assert np.array_equal(ops.to_host(a), ops.to_host(b))
            if cache is None:
                for side in (session, restored):
                    side.extend([5])
                assert np.array_equal(session.logits, restored.logits)  # type: ignore[arg-type]
        unit = np.abs(found["naive"] - found["true"]).max()
        assert 0 < unit < found["true"].std() / 2
        assert np.abs(found["cuda"] - found["true"]).max() <= SLACK * unit
