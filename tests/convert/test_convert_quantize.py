"""GGUF files into other types: values against gguf's quantisers, metadata kept to the last bit and type."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants

from slimrt.convert import OUTPUT_TYPES, convert_checkpoint, quantize_file
from slimrt.errors import ModelFileError, SettingError
from slimrt.weights.gguf import GGUFFile
from tests.convert_cases import checkpoint
from tests.tiny_gguf import write_tiny_llama


def _fields(path: Path) -> dict[str, tuple[Any, list[GGUFValueType]]]:
    reader = gguf.GGUFReader(path)
    return {key: (field.contents(), field.types) for key, field in reader.fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("kind", OUTPUT_TYPES)
def test_quantising_is_converting_to_that_type(kind: str, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint("hf-llama3-rope-tied-shards"), tmp_path / "f32.gguf", "f32")
    convert_checkpoint(checkpoint("hf-llama3-rope-tied-shards"), tmp_path / "direct.gguf", kind)
    quantize_file(tmp_path / "f32.gguf", tmp_path / "model.gguf", kind)
    direct, ours = GGUFFile(tmp_path / "direct.gguf"), GGUFFile(tmp_path / "model.gguf")
    assert ours.tensors.keys() == direct.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert tensor.type == direct.tensors[name].type, name
        assert tensor.data.tobytes() == direct.tensors[name].data.tobytes(), name
    assert _fields(tmp_path / "model.gguf") == _fields(tmp_path / "direct.gguf")


@pytest.mark.parametrize("source", ["BF16", "Q8_0", "Q4_0", "Q6_K", "Q4_K", "IQ4_XS"])
def test_from_other_types(source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tiny_llama(tmp_path / "source.gguf", type=source, d_model=256, d_ff=256, n_layers=1)
    before = GGUFFile(path)
    with caplog.at_level(logging.WARNING):
        quantize_file(path, tmp_path / "model.gguf", "q5_1")
    after = GGUFFile(tmp_path / "model.gguf")
    assert ("is quantised already" in caplog.text) == (source != "BF16")
    seen = set()
    for name, tensor in after.tensors.items():
        old = before.tensors[name]
        seen.add((old.type.name, tensor.type.name))
        if old.type == tensor.type:
            assert tensor.data.tobytes() == old.data.tobytes()
        else:
            rows = quants.dequantize(old.data.view(np.uint8), old.type)
            assert tensor.data.tobytes() == quants.quantize(rows, tensor.type).tobytes()
    assert (source, "Q5_1") in seen


def test_metadata_keeps_values_and_types(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    writer = GGUFWriter(source, "llama")
    writer.add_custom_alignment(64)
    kinds = {
        GGUFValueType.UINT8: 200, GGUFValueType.INT8: -3, GGUFValueType.UINT16: 60000, GGUFValueType.INT16: -300,
        GGUFValueType.UINT32: 4_000_000_000, GGUFValueType.INT32: -70000, GGUFValueType.FLOAT32: 0.1,
        GGUFValueType.BOOL: True, GGUFValueType.STRING: "Größe 狐", GGUFValueType.UINT64: 1 << 63,
        GGUFValueType.INT64: -(1 << 40), GGUFValueType.FLOAT64: 0.1,
    }  # fmt: skip
    for kind, value in kinds.items():
        writer.add_key_value(f"a.{kind.name}", value, kind)
        writer.add_key_value(f"b.{kind.name}", [value] * 3, GGUFValueType.ARRAY, kind)
    writer.add_key_value("split.count", 0, GGUFValueType.UINT16)
    writer.add_file_type(1)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((5, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    quantize_file(source, tmp_path / "model.gguf", "q8_0")
    before, after = _fields(source), _fields(tmp_path / "model.gguf")
    assert after.pop("general.file_type")[0] == 7
    assert after.pop("general.quantization_version")[0] == gguf.GGML_QUANT_VERSION
    del before["general.file_type"], before["split.count"]
    assert after == before
    assert GGUFFile(tmp_path / "model.gguf").tensor("blk.0.attn_q.weight").type == GGMLQuantizationType.Q8_0


def test_parts_become_one_file(tmp_path: Path) -> None:
    whole = write_tiny_llama(tmp_path / "whole.gguf")
    first = write_tiny_llama(tmp_path / "model.gguf", split_max_tensors=8)
    assert first.name.startswith("model-00001-of-0000")
    quantize_file(first, tmp_path / "joined.gguf", "q4_1")
    quantize_file(whole, tmp_path / "expected.gguf", "q4_1")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


def test_bad_sources(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"

    def write(arch: str, weights: np.ndarray, **options: Any) -> None:
        writer = GGUFWriter(source, arch)
        writer.add_key_value("nested", [[1], [2]], GGUFValueType.ARRAY) if options.get("nested") else None
        writer.add_tensor("blk.0.attn_q.weight", weights)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def refused(message: str, kind: str = "q8_0") -> None:
        with pytest.raises((ModelFileError, SettingError), match=message) as caught:
            quantize_file(source, tmp_path / "model.gguf", kind)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source.gguf"]

    write("gpt2", np.ones((2, 32), np.float32))
    refused("architecture 'gpt2'; models that slimrt runs can be quantised: llama, qwen2")
    write("llama", np.full((2, 32), np.nan, np.float32))
    refused("tensor 'blk.0.attn_q.weight': row 0 holds NaN")
    refused("type 'q2_k': must be one of f32", "q2_k")
    refused("type 'q4_k_l': must be one of f32", "q4_k_l")
    write("llama", np.ones((2, 32), np.int32))
    refused("has type I32, which cannot be unpacked")
    write("llama", np.ones((2, 32), np.float32), nested=True)
    refused("metadata key 'nested' is an array of arrays")
    source.write_bytes(source.read_bytes()[:-64])
    refused("truncated")
