"""Mixtures of experts: which experts a token passes, and that no other one's weights are read in decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from slimrt.config import CacheConfig
from slimrt.convert import convert_checkpoint
from slimrt.engine import Engine
from slimrt.models import build, read_config
from slimrt.ops import layer
from slimrt.ops.layer import by_expert, chosen_experts
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.session import Session
from slimrt.weights.gguf import GGUFFile, TensorInfo
from tests.families import config, weights, write_checkpoint
from tests.tolerance import EPS32, SLACK


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    folder = tmp_path_factory.mktemp("experts")
    convert_checkpoint(write_checkpoint("qwen3moe", folder / "qwen3moe"), folder / "model.gguf", "q8_0")
    return GGUFFile(folder / "model.gguf")


def test_the_likeliest_are_chosen() -> None:
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]], np.float32))
    chosen, weights = chosen_experts(logits, 2, False)
    assert chosen.tolist() == [[1, 3], [0, 1]]
    # The logarithms are rounded to float32: e to the power of them is off by so much, the largest being log .1.
    off = SLACK * EPS32 * -np.log(0.1)
    assert np.abs(weights - [[0.4, 0.3], [0.25, 0.25]]).max() <= off
    assert np.abs(chosen_experts(logits, 2, True)[1] - [[4 / 7, 3 / 7], [0.5, 0.5]]).max() <= off


def test_every_row_passes_each_of_its_experts_once() -> None:
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(7)[:3] for _ in range(20)])
    weights = rng.random((20, 3))
    seen = {(row, expert): share for expert, rows, shares in by_expert(chosen, weights)
            for row, share in zip(rows.tolist(), shares.tolist(), strict=True)}  # fmt: skip
    assert seen == {(r, e): w for r in range(20) for e, w in zip(chosen[r].tolist(), weights[r].tolist(), strict=True)}


class Poisoned:
    """A file whose experts hold NaN, but for the ``kept`` of each layer."""

    def __init__(self, file: GGUFFile, kept: list[set[int]]) -> None:
        self.path, self.metadata, self.tensors = file.path, file.metadata, dict(file.tensors)
        for name, tensor in file.tensors.items():
            if "_exps." in name:
                data = tensor.data.copy()
                gone = [expert for expert in range(len(data)) if expert not in kept[int(name.split(".")[1])]]
                data[gone] = 0xFF  # of a block's scale: NaN
                self.tensors[name] = TensorInfo(name, tensor.shape, tensor.type, data)

    get, tensor = GGUFFile.get, GGUFFile.tensor


def decoded(file: Any, ops: NumpyOps, token: int) -> np.ndarray:
    session = Session(Engine(build(read_config(file), file, ops), ops, CacheConfig(16)), 16)
    session.extend([token])
    assert session.logits is not None
    return session.logits


@pytest.mark.parametrize("backend", ["numpy", "fast"])
def test_decode_reads_the_chosen_experts_only(file: GGUFFile, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[set[int]] = []

    def recorded(logits: np.ndarray, used: int, normalised: bool) -> tuple[np.ndarray, np.ndarray]:
        result = chosen_experts(logits, used, normalised)
        chosen.append(set(result[0][0].tolist()))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(layer, "chosen_experts", recorded)
        plain = decoded(file, NumpyOps(1, packed=True), 7)
    assert [len(one) for one in chosen] == [2, 2, 2]
    if backend == "numpy":
        np.testing.assert_array_equal(decoded(Poisoned(file, chosen), NumpyOps(1, packed=True), 7), plain)
        return
    pytest.importorskip("numba")
    from slimrt.ops.fast.fast_ops import FastOps
    from slimrt.ops.fast.features import detect

    if not detect().avx2:
        pytest.skip("this processor has no fast path")
    whole = decoded(file, FastOps(2), 7)
    np.testing.assert_array_equal(decoded(Poisoned(file, chosen), FastOps(2), 7), whole)


def test_stacked_checkpoints_are_the_same(file: GGUFFile, tmp_path: Path) -> None:
    """Checkpoints with all experts of a layer in one tensor, gate and up together, under Transformers 5's names."""
    folder = write_checkpoint("qwen3moe", tmp_path / "stacked")
    tensors, settings = weights("qwen3moe"), config("qwen3moe")
    for number in range(settings["num_hidden_layers"]):
        at = f"model.layers.{number}.mlp.experts"
        parts = {
            part: np.stack([tensors.pop(f"{at}.{e}.{part}_proj.weight") for e in range(settings["num_experts"])])
            for part in ("gate", "up", "down")
        }
        tensors[f"{at}.gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
        tensors[f"{at}.down_proj"] = parts["down"]
    settings["num_local_experts"] = settings.pop("num_experts")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    convert_checkpoint(folder, tmp_path / "stacked.gguf", "q8_0")
    other = GGUFFile(tmp_path / "stacked.gguf")
    assert other.tensors.keys() == file.tensors.keys()
    assert all(np.array_equal(other.tensors[name].data, one.data) for name, one in file.tensors.items())
    assert other.get("qwen3moe.expert_count", int) == 6
