"""K-quants written here against llama.cpp's quantisers, whose errors are golden, unpacked by the gguf package."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from slimrt.weights import kquants
from slimrt.weights.kquants import quantize_k
from tests.goldens.kquants.cases import KINDS, errors, importance, of_the_model, random_cases

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens/kquants/llama_cpp.json").read_text())
BITS = {GGMLQuantizationType.Q4_K: 4, GGMLQuantizationType.Q5_K: 5, GGMLQuantizationType.Q6_K: 6}


def unpacked(x: np.ndarray, kind: GGMLQuantizationType, counts: np.ndarray | None = None) -> np.ndarray:
    return gguf.dequantize(quantize_k(x, kind, counts), kind)


@pytest.fixture(scope="module")
def cases(default_model: Path) -> dict[str, np.ndarray]:
    return {**random_cases(), **of_the_model(default_model)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_errors_are_no_worse_than_llama_cpps(
    name: str, kind: GGMLQuantizationType, cases: dict[str, np.ndarray]
) -> None:
    """Plain and weighted; and by an importance matrix, weighted by it."""
    x = cases[name]
    ours, theirs = errors(x, unpacked(x, kind), kind), GOLDEN[name][kind.name]
    assert ours[0] <= theirs[0] and ours[1] <= theirs[1], (ours, theirs)
    counts = importance(x.shape[1])
    counted = errors(x, unpacked(x, kind, counts), kind, counts)
    assert counted[1] <= GOLDEN[name][f"{kind.name} importance"][1]
    assert counted[1] < errors(x, unpacked(x, kind), kind, counts)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_threads_change_nothing(kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_cases()["normal"][:40]
    counts = importance(x.shape[1])
    once = quantize_k(x, kind), quantize_k(x, kind, counts)
    monkeypatch.setattr(kquants, "_CHUNK", 7)
    for workers in (1, 3):
        monkeypatch.setattr(kquants, "_WORKERS", workers)
        assert np.array_equal(quantize_k(x, kind), once[0])
        assert np.array_equal(quantize_k(x, kind, counts), once[1])
    assert np.array_equal(quantize_k(x.reshape(5, 8, -1), kind), once[0].reshape(5, 8, -1))


@pytest.mark.parametrize("kind", KINDS)
@given(
    x=arrays.arrays(
        np.float32,
        (1, 256),
        elements=st.floats(-60000, 60000, width=32),
        fill=st.sampled_from([0.0, 1.0, -2.5, 1e-30, 3e-8]),
    ),
    sparse=st.booleans(),
)
@settings(max_examples=60)
def test_any_finite_weights(kind: GGMLQuantizationType, x: np.ndarray, sparse: bool) -> None:
    """What is written is finite, and nowhere off by more than a step of the coarsest grid that the block can need."""
    y = unpacked(x, kind, importance(256) if sparse else None)
    assert np.isfinite(y).all()
    if not sparse:
        # The widest sub-block's range in its steps, half as much again for rounding the scale to its bits, and what
        # float16 cannot tell from 0.
        span = float(x.max(initial=0) - x.min(initial=0))
        bound = 2.5 * span / (1 << BITS[kind]) + 1e-5
        assert np.abs(x - y).max() <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_grid_holds_exactly(kind: GGMLQuantizationType) -> None:
    top = (1 << BITS[kind]) - 1
    grid = np.tile(np.arange(256) % (top + 1), (2, 1)).astype(np.float32)
    x = grid - 32 if kind == GGMLQuantizationType.Q6_K else grid
    if kind == GGMLQuantizationType.Q6_K:
        x = np.sign(x) * np.minimum(np.abs(x), 31)
        x[:, ::16] = -32  # each sub-block spans the grid
    # A block's scale is a half: as many units in its last place is every number off.
    naive = np.finfo(np.float16).eps / 2 * np.abs(x).max()
    assert np.abs(unpacked(x, kind) - x).max() <= 2 * naive
    zeros = np.zeros((1, 512), np.float32)
    assert np.array_equal(unpacked(zeros, kind), zeros)


def test_what_is_not_for_it() -> None:
    with pytest.raises(ValueError, match="Q4_K with rows of 320"):
        quantize_k(np.zeros((1, 320), np.float32), GGMLQuantizationType.Q4_K)
    with pytest.raises(ValueError, match="Q3_K with rows"):
        quantize_k(np.zeros((1, 256), np.float32), GGMLQuantizationType.Q3_K)
