"""Mixes of K-quants: which tensor gets which type, and files of them end to end."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import slimrt
from slimrt.convert import quantize_file
from slimrt.convert.mixes import choose_types, parse_type
from slimrt.weights.gguf import GGUFFile
from tests.goldens.kquants.cases import LINEAR, MIXED, mixed_shapes
from tests.tiny_gguf import write_tiny_llama

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens/kquants/mixes.json").read_text())


def types(name: str, of: dict[str, tuple[int, ...]], arch: str = "llama") -> dict[str, str]:
    return {tensor: kind.name for tensor, kind in choose_types(of, parse_type(name), arch).items()}


@pytest.mark.parametrize("kind", GOLDEN["32 layers"])
@pytest.mark.parametrize("case", MIXED)
def test_mixes_are_those_of_llama_cpp(case: str, kind: str) -> None:
    golden = GOLDEN[case][kind]
    (most,) = golden[""]
    expected = {name: of for of, names in golden.items() for name in names if of}
    for name, found in types(kind, mixed_shapes(**MIXED[case])).items():
        if name.endswith(("_norm.weight", "gate_inp.weight")):
            assert found == "F32"
        else:
            assert found == expected.get(name, most), name


# Layers of 32 that a file of Llama 3.1 8B in Q4_K_M has in Q6_K (attn_v and ffn_down), as published ones show.
MORE = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}


@pytest.mark.parametrize(
    ("name", "base", "more", "layers"),
    [
        ("q4_k_m", "Q4_K", "Q6_K", {"attn_v": MORE, "ffn_down": MORE}),
        ("q4_k", "Q4_K", "Q6_K", {"attn_v": MORE, "ffn_down": MORE}),
        ("q5_k_m", "Q5_K", "Q6_K", {"attn_v": MORE, "ffn_down": MORE}),
        ("q4_k_s", "Q4_K", "Q5_K", {"attn_v": {0, 1, 2, 3}, "ffn_down": {0, 1, 2, 3}}),
        ("q5_k_s", "Q5_K", "Q5_K", {}),
        ("q6_k", "Q6_K", "Q6_K", {}),
    ],
)
def test_mixes_of_32_layers(name: str, base: str, more: str, layers: dict[str, set[int]]) -> None:
    found = types(name, mixed_shapes(32, 512))
    assert found["output.weight"] == "Q6_K" and found["token_embd.weight"] == base
    for layer in range(32):
        assert found[f"blk.{layer}.attn_norm.weight"] == "F32"
        for part in LINEAR:
            expected = more if layer in layers.get(part, ()) else base
            assert found[f"blk.{layer}.{part}.weight"] == expected, (layer, part)


def test_a_tied_embedding_is_the_output() -> None:
    assert types("q4_k_m", mixed_shapes(4, 512, tied=True))["token_embd.weight"] == "Q6_K"


def test_experts() -> None:
    found = types("q4_k_m", mixed_shapes(32, 512, experts=16), "qwen3moe")
    assert found["blk.0.ffn_gate_inp.weight"] == "F32"
    assert found["blk.0.ffn_down_exps.weight"] == "Q6_K" and found["blk.5.ffn_down_exps.weight"] == "Q4_K"
    assert found["blk.5.ffn_up_exps.weight"] == "Q4_K" and found["blk.5.attn_output.weight"] == "Q4_K"
    eight = types("q4_k_m", mixed_shapes(32, 512, experts=8))  # Mixtral
    assert {eight["blk.5.attn_v.weight"], eight["blk.5.attn_k.weight"]} == {"Q8_0"}
    assert eight["blk.5.attn_output.weight"] == "Q5_K" and eight["blk.5.attn_q.weight"] == "Q4_K"


def test_values_of_70b() -> None:
    found = types("q4_k_m", mixed_shapes(80, 512))
    assert "Q4_K" not in {found[f"blk.{layer}.attn_v.weight"] for layer in range(80)}


def test_rows_that_do_not_divide(caplog: pytest.LogCaptureFixture) -> None:
    """SmolLM2's width of 576 takes blocks of 32, a width of 40 none."""
    with caplog.at_level(logging.WARNING):
        found = types("q4_k_m", mixed_shapes(32, 576))
    assert found["output.weight"] == found["blk.0.ffn_down.weight"] == "Q8_0"
    assert found["token_embd.weight"] == found["blk.5.attn_q.weight"] == "Q5_0"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # one for each type and width, not one for each of 226 tensors
    assert "and 192 more: rows of 576 do not divide into Q4_K blocks of 256; written as Q5_0" in messages[0]
    assert types("q5_k_s", mixed_shapes(32, 576))["blk.5.attn_q.weight"] == "Q5_1"
    assert types("q4_k_m", mixed_shapes(32, 40))["blk.5.attn_q.weight"] == "F16"


@pytest.mark.parametrize("name", ["q4_k_m", "q6_k"])
def test_a_file_of_a_mix_runs_and_is_near(name: str, tmp_path: Path) -> None:
    exact = write_tiny_llama(tmp_path / "exact.gguf", d_model=256, d_ff=512, n_layers=2)
    quantize_file(exact, tmp_path / "model.gguf", name)
    file = GGUFFile(tmp_path / "model.gguf")
    assert file.get("general.file_type", int) == {"q4_k_m": 15, "q6_k": 18}[name]
    kinds = {tensor.type for tensor in file.tensors.values()}
    assert GGMLQuantizationType[name.upper()[:4]] in kinds
    with slimrt.load(exact, device="numpy") as one, slimrt.load(tmp_path / "model.gguf", device="numpy") as two:
        a, b = one.logits([1, 2, 3, 4, 5]), two.logits([1, 2, 3, 4, 5])
    # The same with the package's own quantiser of as many bits or fewer, which is the measure of what is lost.
    quantize_file(exact, tmp_path / "other.gguf", {"q4_k_m": "q4_0", "q6_k": "q5_1"}[name])
    with slimrt.load(tmp_path / "other.gguf", device="numpy") as other:
        c = other.logits([1, 2, 3, 4, 5])
    assert np.abs(a - b).mean() < np.abs(a - c).mean()
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert {tensor.name for tensor in reader.tensors} == set(file.tensors)
