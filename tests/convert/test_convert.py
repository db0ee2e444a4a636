"""Converted checkpoints against llama.cpp's converter, the safetensors library and gguf's quantisers."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from slimrt.convert import OUTPUT_TYPES, convert_checkpoint
from slimrt.convert.safetensors_reader import read_safetensors
from slimrt.weights.gguf import GGUFFile
from tests.convert_cases import ALL_FOLDERS, GOLDENS, HF_FOLDERS, checkpoint, edit_json

REFERENCE = json.loads((GOLDENS / "reference.json").read_text())

# Keys that llama.cpp's converter leaves to its reader's defaults and slimrt states.
ADDED = {
    "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.add_space_prefix", "qwen2.rope.dimension_count", "qwen2.vocab_size",
    "qwen2.rope.scaling.attn_factor", "slimrt.tokenizer.strip_stated", "slimrt.tokenizer.space_prefix",
    "slimrt.tokenizer.normalizer",
}  # fmt: skip
# Where slimrt differs on purpose, and why.
DIFFERENT = {
    ("hf-llama-gqa", "tokenizer.ggml.add_sep_token"): "it says False for a role that the vocabulary does not have",
    ("hf-qwen2-yarn-factor", "qwen2.rope.scaling.yarn_attn_factor"): "no reader multiplies this key; attn_factor works",
    (
        "hf-llama-linear",
        "tokenizer.ggml.scores",
    ): "it writes -1000 for every piece, slimrt derives them from the merges",
    ("hf-llama-linear", "tokenizer.ggml.tokens"): "it does not pad to the embedding",
    ("hf-llama-linear", "tokenizer.ggml.token_type"): "it does not pad to the embedding",
}


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return "sha256 of JSON: " + hashlib.sha256(json.dumps(value).encode()).hexdigest()
    return value


@pytest.mark.parametrize("name", HF_FOLDERS)
def test_metadata_and_tensors_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint(name), tmp_path / "model.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    metadata = {k: _short(field.contents()) for k, field in reader.fields.items() if not k.startswith("GGUF.")}
    expected = REFERENCE[name]["metadata"]
    different = {key for folder, key in DIFFERENT if folder == name}
    assert metadata.keys() - expected.keys() <= ADDED
    assert {k: metadata.get(k) for k in expected if k not in different} == {
        k: v for k, v in expected.items() if k not in different
    }

    tensors = {
        t.name: [[int(n) for n in t.shape][::-1], t.tensor_type.name, hashlib.sha256(t.data.tobytes()).hexdigest()]
        for t in reader.tensors
    }
    wanted = dict(REFERENCE[name]["tensors"])
    if "rope_freqs.weight" in wanted:  # rounded once here and at every step there; see the test of its values
        assert tensors.pop("rope_freqs.weight")[:2] == wanted.pop("rope_freqs.weight")[:2]
    assert tensors == wanted


def test_llama3_rope_divisors(tmp_path: Path) -> None:
    convert_checkpoint(checkpoint("hf-llama3-rope-tied-shards"), tmp_path / "model.gguf")
    divisors = GGUFFile(tmp_path / "model.gguf").tensor("rope_freqs.weight").data
    # Llama 3.1's rule written out: base 10000, head width 16, factor 8, original context 32, factors 1 and 4.
    expected = []
    for pair in range(8):
        wavelength = 2 * np.pi * 10000.0 ** (2 * pair / 16)
        if wavelength < 32 / 4:
            expected.append(1.0)
        elif wavelength > 32 / 1:
            expected.append(8.0)
        else:
            smooth = (32 / wavelength - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert {1.0, 8.0} < set(expected)  # all three cases occur
    np.testing.assert_array_equal(divisors, np.array(expected, np.float32))


@pytest.mark.parametrize("kind", [kind for kind in OUTPUT_TYPES if "_k" not in kind])
def test_every_type_is_that_of_gguf_quantizers(kind: str, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint("hf-llama-gqa"), tmp_path / "f32.gguf", "f32")
    convert_checkpoint(checkpoint("hf-llama-gqa"), tmp_path / "model.gguf", kind)
    exact, file = GGUFFile(tmp_path / "f32.gguf"), GGUFFile(tmp_path / "model.gguf")
    assert file.get("general.file_type", int) == {
        "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32,
        "mxfp4_moe": 38,
    }[kind]  # fmt: skip
    for name, tensor in file.tensors.items():
        wanted = GGMLQuantizationType[kind.upper() if kind != "mxfp4_moe" else "Q8_0"]  # there are no experts
        if len(tensor.shape) == 1:
            wanted = GGMLQuantizationType.F32
        elif kind.startswith(("q4", "q5")) and name in ("token_embd.weight", "output.weight"):
            wanted = GGMLQuantizationType.Q8_0
        assert tensor.type == wanted, name
        assert tensor.data.tobytes() == quants.quantize(exact.tensors[name].data, wanted).tobytes(), name


@pytest.mark.parametrize("name", HF_FOLDERS)
def test_safetensors_are_read_as_the_library_reads_them(name: str) -> None:
    from safetensors import safe_open

    for shard in checkpoint(name).glob("*.safetensors"):
        ours = read_safetensors(shard)
        with safe_open(shard, framework="numpy") as theirs:
            assert ours.keys() == set(theirs.keys())
            for key, tensor in ours.items():
                assert list(tensor.shape) == theirs.get_slice(key).get_shape()
                assert tensor.kind == theirs.get_slice(key).get_dtype()
                if tensor.kind != "BF16":  # NumPy has no bfloat16, so the library cannot hand it out
                    whole = theirs.get_tensor(key).astype(np.float32)
                    np.testing.assert_array_equal(tensor.rows(1, tensor.shape[0]), whole[1:])


@pytest.mark.parametrize("name", ALL_FOLDERS)
def test_small_chunks_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_checkpoint(checkpoint(name), tmp_path / "whole.gguf", "q8_0")
    monkeypatch.setattr("slimrt.convert.writer._CHUNK_VALUES", 100)  # about three rows: chunks cut heads and shards
    convert_checkpoint(checkpoint(name), tmp_path / "chunks.gguf", "q8_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "chunks.gguf").read_bytes()


def test_rows_that_do_not_divide_into_blocks_become_f16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Cut every feed-forward matrix from 64 to 48: down's rows no longer divide by 32.
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("hf-llama-linear"), folder)
    weights = load_file(folder / "model.safetensors")
    for key, weight in weights.items():
        if "gate_proj" in key or "up_proj" in key:
            weights[key] = np.ascontiguousarray(weight[:48])
        elif "down_proj" in key:
            weights[key] = np.ascontiguousarray(weight[:, :48])
    save_file(weights, folder / "model.safetensors")
    edit_json(folder / "config.json", intermediate_size=48)
    with caplog.at_level(logging.WARNING):
        convert_checkpoint(folder, tmp_path / "model.gguf", "q4_0")
    file = GGUFFile(tmp_path / "model.gguf")
    assert file.tensor("blk.0.ffn_down.weight").type == GGMLQuantizationType.F16
    assert file.tensor("blk.0.ffn_up.weight").type == GGMLQuantizationType.Q4_0
    assert "blk.0.ffn_down.weight and 1 more: rows of 48" in caplog.text
    np.testing.assert_array_equal(
        file.tensor("blk.0.ffn_down.weight").data, weights["model.layers.0.mlp.down_proj.weight"].astype(np.float16)
    )


def test_progress_counts_the_bytes_of_all_tensors(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    convert_checkpoint(checkpoint("hf-mistral"), tmp_path / "m.gguf", "f16", lambda *call: calls.append(call))
    file = GGUFFile(tmp_path / "m.gguf")
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    done = [call[0] for call in calls]
    assert done == sorted(done) and done[-1] == total
    assert {call[1] for call in calls} == {total}
    assert {call[2] for call in calls} == set(file.tensors)


def test_an_lm_head_beside_tied_weights_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("hf-llama-gqa"), folder)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    convert_checkpoint(folder, tmp_path / "model.gguf")
    assert "output.weight" not in GGUFFile(tmp_path / "model.gguf").tensors


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = tmp_path / "hf-llama3-rope-tied-shards"
    shutil.copytree(checkpoint(folder.name), folder)
    (folder / "model.safetensors.index.json").unlink()
    convert_checkpoint(folder, tmp_path / "a.gguf")
    convert_checkpoint(checkpoint(folder.name), tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_chat_template_file(tmp_path: Path) -> None:
    convert_checkpoint(checkpoint("hf-qwen2"), tmp_path / "model.gguf")
    template = (checkpoint("hf-qwen2") / "chat_template.jinja").read_text()
    assert GGUFFile(tmp_path / "model.gguf").get("tokenizer.chat_template", str) == template


def test_the_newer_place_of_rope_parameters(tmp_path: Path) -> None:
    folder = tmp_path / "hf-llama-yarn"
    shutil.copytree(checkpoint("hf-llama-yarn"), folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_scaling"] | {"rope_theta": config["rope_theta"]}
    edit_json(folder / "config.json", rope_scaling=..., rope_theta=..., rope_parameters=rope)
    convert_checkpoint(folder, tmp_path / "a.gguf")
    convert_checkpoint(checkpoint("hf-llama-yarn"), tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
