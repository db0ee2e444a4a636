"""Converted checkpoints compute and tokenise what Transformers computes and tokenises with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import slimrt
from slimrt.convert import convert_checkpoint
from tests.convert_cases import ALL_FOLDERS, GOLDENS, checkpoint

# float32 rounding differs with the order of sums. Transformers' own float32 error against float64 is the yardstick; the
# largest ratio seen over these 30 cases is 2.1.
K = 4


@pytest.mark.parametrize("name", ALL_FOLDERS)
def test_logits_and_tokens(name: str, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint(name), tmp_path / "model.gguf", "f32")
    llm = slimrt.load(tmp_path / "model.gguf", ctx=128, prune="off", device="numpy")
    with np.load(GOLDENS / "expected.npz") as expected:
        for i in range(3):
            exact = expected[f"{name}/logits{i}"]
            tolerance = K * np.abs(expected[f"{name}/logits32_{i}"] - exact).max()
            error = np.abs(llm.logits(expected[f"{name}/ids{i}"].tolist()) - exact).max()
            assert error <= tolerance, f"{error:g} > {tolerance:g} for ids{i}"
    texts = json.loads((GOLDENS / "expected.json").read_text())[name]
    assert {text: llm.tokenize(text) for text in texts} == texts
