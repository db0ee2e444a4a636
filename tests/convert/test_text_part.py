"""Checkpoints that see images as well give the file of their language model; experts in MXFP4 give what they hold."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slimrt.convert import convert_checkpoint
from slimrt.errors import ModelFileError
from slimrt.weights.gguf import GGUFFile
from slimrt.weights.quants import dequantize
from tests.families import config, weights, write_checkpoint

# As Transformers 5 and 4 name them.
LAYOUTS = {
    "new": ("model.language_model.", "lm_head.weight", "model.vision_tower.patch_conv.weight"),
    "old": ("language_model.model.", "language_model.lm_head.weight", "vision_tower.patch_conv.weight"),
}


def with_images(name: str, whole: str, layout: str, folder: Path) -> Path:
    """The case ``name`` as the language model of a checkpoint of the class ``whole``."""
    prefix, head, other = LAYOUTS[layout]
    write_checkpoint(name, folder)
    plain = config(name)
    inner = {key: value for key, value in plain.items() if key not in ("architectures", "tie_word_embeddings")}
    (folder / "config.json").write_text(
        json.dumps({"architectures": [whole], "text_config": inner, "vision_config": {"hidden_size": 8}})
    )
    tensors = {}
    for key, tensor in weights(name).items():
        tensors[head if key == "lm_head.weight" else prefix + key.removeprefix("model.")] = tensor
    tensors[other] = np.ones((4, 4), np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "whole"),
    [("gemma3", "Gemma3ForConditionalGeneration"), ("ministral3", "Mistral3ForConditionalGeneration")],
)
def test_the_language_model_is_taken(
    name: str, whole: str, layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    convert_checkpoint(write_checkpoint(name, folder), tmp_path / "plain.gguf", "f32")
    with caplog.at_level(logging.WARNING):
        convert_checkpoint(with_images(name, whole, layout, folder), tmp_path / "model.gguf", "f32")
    assert "1 tensors of the part that sees images are left out" in caplog.text
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_experts_in_mxfp4_keep_their_numbers(tmp_path: Path) -> None:
    """Against the definition: twice an e2m1 number times 2 ** (scale - 128), two neighbours in a byte."""
    convert_checkpoint(write_checkpoint("gpt-oss-mxfp4", tmp_path / "model"), tmp_path / "model.gguf", "f16")
    file, stored = GGUFFile(tmp_path / "model.gguf"), weights("gpt-oss-mxfp4")
    assert file.get("general.file_type", int) == 38
    numbers = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
    for part, names in (("gate_up", ("ffn_gate_exps", "ffn_up_exps")), ("down", ("ffn_down_exps",))):
        at = f"model.layers.1.mlp.experts.{part}_proj"
        codes = np.stack([stored[f"{at}_blocks"] & 15, stored[f"{at}_blocks"] >> 4], axis=-1)
        scales = np.ldexp(np.float32(1), stored[f"{at}_scales"].astype(np.int32) - 128)
        exact = numbers[codes].reshape(*scales.shape, 32) * scales[..., None]
        exact = exact.reshape(*exact.shape[:2], -1)
        for number, name in enumerate(names):
            tensor = file.tensor(f"blk.1.{name}.weight")
            assert tensor.type == gguf.GGMLQuantizationType.MXFP4
            np.testing.assert_array_equal(dequantize(tensor), exact[:, number :: len(names)])
            bias = file.tensor(f"blk.1.{name}.bias").data
            np.testing.assert_array_equal(bias, stored[f"{at}_bias"][:, number :: len(names)])


def test_floats_become_mxfp4_as_ggufs(tmp_path: Path) -> None:
    folder = write_checkpoint("gpt-oss", tmp_path / "model")
    convert_checkpoint(folder, tmp_path / "f32.gguf", "f32")
    convert_checkpoint(folder, tmp_path / "model.gguf", "mxfp4_moe")
    exact, file = GGUFFile(tmp_path / "f32.gguf"), GGUFFile(tmp_path / "model.gguf")
    for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        packed = gguf.quants.quantize(exact.tensor(f"blk.0.{name}.weight").data, gguf.GGMLQuantizationType.MXFP4)
        assert file.tensor(f"blk.0.{name}.weight").data.tobytes() == packed.tobytes()
    assert file.tensor("blk.0.attn_q.weight").type == gguf.GGMLQuantizationType.Q8_0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit is 5.0; GGUF's gpt-oss means 7"),
        ({"num_local_experts": 4}, r"experts.gate_up_proj_bias has shape \(5, 64\); the configuration says \(4, 64\)"),
        ({"num_local_experts": 0}, "num_local_experts is missing or 0; gpt-oss has experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "already quantised"),
        ("nan", r"down_proj_scales.*holds the scale 255"),
        ("lost", "layers.1.mlp.experts.down_proj_scales is missing"),
        ("floats", "down_proj_blocks has type BF16; blocks and scales are bytes|has type"),
    ],
)
def test_bad_mxfp4(change: Any, expected: str, tmp_path: Path) -> None:
    folder = write_checkpoint("gpt-oss-mxfp4", tmp_path / "model")
    path = folder / "model.safetensors"
    if isinstance(change, dict):
        (folder / "config.json").write_text(json.dumps(config("gpt-oss-mxfp4") | change))
    else:
        tensors = load_file(path)
        name = "model.layers.1.mlp.experts.down_proj_scales"
        if change == "nan":
            tensors[name][2, 3] = 255
        elif change == "lost":
            del tensors[name]
        else:
            tensors[name] = tensors[name].astype(np.float32)
        save_file(tensors, path)
    with pytest.raises(ModelFileError, match=expected):
        convert_checkpoint(folder, tmp_path / "model.gguf", "f16")
    assert not (tmp_path / "model.gguf").exists()
