"""Long prompts pass a layer block by block on a CPU: the same bits, less memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import slimrt
from slimrt.config import ModelConfig
from slimrt.prune.plan import PrunePlan, Stage, Window
from slimrt.row_blocks import STEP, row_blocks, rows_at_a_time
from slimrt.session import Session
from tests.tiny_gguf import write_tiny_llama

CTX = 4096
LENGTH = 3 * STEP + 77
CUT = PrunePlan(stages=(Stage(1, 0.5), Stage(2, 0.3)), block=32, min_tokens=256)
WINDOWS = PrunePlan(windows=(Window(0, (256, 0)), Window(2, (128, 512))), min_tokens=256)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("blocks") / "tiny.gguf", n_layers=4, ctx=CTX)


def read(path: Path, rows: int | None, plan: PrunePlan | str, **options: object) -> list[np.ndarray]:
    """Logits after a prompt, after a further question, after tokens decoded, and of a text's last 1,100 tokens, read
    in blocks of ``rows``."""
    ids = np.random.default_rng(1).integers(3, 200, LENGTH + 50).tolist()
    with slimrt.load(path, ctx=CTX, prune=plan, threads=2, **options) as llm:  # type: ignore[arg-type]
        llm.engine._pass._block_rows = rows
        session = Session(llm.engine, CTX)
        found = []
        for length in (LENGTH, LENGTH + 50):
            session.prefill([*ids[: LENGTH - 20], *ids[length - 20 : length]], llm.plan.plan)
            assert session.logits is not None
            found.append(session.logits.copy())
        for token in ids[:3]:
            session.extend([token])
        assert session.logits is not None
        states = llm.engine.prefill(llm.engine.new_context(), ids[:LENGTH], wanted=1100)[0]
        return [*found, session.logits.copy(), llm.engine.logits(states[::50])]


CASES: dict[str, tuple[PrunePlan | str, dict[str, int]]] = {
    "dense": ("off", {}),
    "cut": (CUT, {}),
    "windows": (WINDOWS, {}),
    "budget": ("off", {"kv_budget": 512}),
    "cut-budget": (CUT, {"kv_budget": 512}),
}


@pytest.mark.parametrize(
    "device, case", [*(("cpu", case) for case in CASES), ("numpy", "windows"), ("numpy", "cut-budget")]
)
def test_the_same_bits(path: Path, device: str, case: str) -> None:
    plan, options = CASES[case]
    whole = read(path, None, plan, device=device, **options)
    assert all(map(np.array_equal, read(path, STEP, plan, device=device, **options), whole))


def test_blocks_cover_all_rows_and_none_is_short() -> None:
    for size in (STEP, 4 * STEP):
        for count in (1, STEP, size, size + 1, size + STEP - 1, size + STEP, 5 * size + 77, 5 * size + STEP):
            blocks = row_blocks(count, size)
            assert np.array_equal(np.concatenate([np.arange(b.start, b.stop) for b in blocks]), np.arange(count))
            lengths = [b.stop - b.start for b in blocks]
            assert max(lengths) < size + STEP
            assert len(blocks) == 1 or min(lengths) >= STEP


def test_the_larger_a_row_the_fewer_pass_together(path: Path) -> None:
    tiny = slimrt.load(path, device="numpy", ctx=64).config
    large = ModelConfig(**{**vars(tiny), "d_model": 4096, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128})
    assert rows_at_a_time(large) == 3 * STEP
    assert rows_at_a_time(tiny) > 100 * STEP


def test_announced_and_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a long prompt takes at its peak, in blocks, is what the plan says; in one piece it is more."""
    monkeypatch.setattr("slimrt.row_blocks._BLOCK_BYTES", 1)
    ids = np.random.default_rng(2).integers(3, 200, 4000).tolist()
    peaks = []
    for rows in (STEP, None):
        with slimrt.load(path, device="numpy", ctx=CTX, prune="off", threads=1) as llm:
            assert llm.engine._pass._block_rows == STEP
            llm.engine._pass._block_rows = rows
            llm.engine.prefill(llm.engine.new_context(), ids[:300])
            tracemalloc.start()
            try:
                llm.engine.prefill(llm.engine.new_context(), ids)
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
            planned = llm.memory
    assert peaks[0] <= planned.kv + planned.scratch <= 1.5 * peaks[0]  # type: ignore[union-attr]
    assert peaks[0] < peaks[1]
