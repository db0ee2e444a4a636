"""Windows limit what a prompt's rows read, never what generated tokens do, however many rows are resident."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slimrt
from slimrt import PrunePlan
from slimrt.prune.plan import Window
from slimrt.prune.schedule import Windows
from tests.tiny_gguf import write_tiny_llama

PLAN = PrunePlan(windows=tuple(Window(layer, (64, 0)) for layer in range(3)), full_rows=100)


@pytest.mark.parametrize("budget", [None, 384])
@pytest.mark.parametrize("device", ["cpu", "numpy"])
def test_a_generated_token_sees_all_that_its_cache_gives(tmp_path: Path, device: str, budget: int | None) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", n_layers=3)
    llm = slimrt.load(path, ctx=2048, rope_scaling="none", device=device, kv_budget=budget, prune="off")
    ids = np.random.default_rng(5).integers(3, 200, 900).tolist()
    found = []
    for forget in (False, True):
        with llm.session() as session:
            session.prefill(ids, PLAN)
            assert session.context.windows.rows == 768 > (budget or 0)
            if forget:
                session.context.windows = Windows()
            for token in (5, 6, 7):
                session.extend([token])
            found.append(session.logits)
    assert np.array_equal(*found)
