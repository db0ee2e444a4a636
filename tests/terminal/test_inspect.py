"""``slimrt inspect`` of files that do not run, and the same line where one of them is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

import slimrt
from click_cli import cli
from slimrt.errors import ModelFileError
from slimrt.models import ARCHITECTURES
from tests.tiny_gguf import write_tiny_llama

RUNS = f"slimrt runs {', '.join(ARCHITECTURES)}; use a model of one of these"


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def about(path: Path) -> dict[str, Any]:
    result = run("inspect", path, "--json", "--device", "numpy")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def written(path: Path, arch: str | None, **keys: str) -> Path:
    """A GGUF file of one tensor; ``arch`` None leaves the key out."""
    writer = gguf.GGUFWriter(path, arch or "x")
    if arch is None:
        del writer.kv_data[0]["general.architecture"]
    for key, value in keys.items():
        writer.add_string(key, value)
    writer.add_string("general.description", "a file")
    writer.add_tensor("t", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("arch", "keys", "what"),
    [
        ("mamba", {}, "architecture 'mamba' is a state-space or recurrent model"),
        ("jamba", {}, "architecture 'jamba' is a hybrid of attention and recurrent layers"),
        ("bert", {}, "architecture 'bert' is an encoder, which makes embeddings and writes no text"),
        ("t5", {}, "architecture 't5' is an encoder with a decoder"),
        ("clip", {"general.type": "mmproj"}, "is the vision or sound part of a model"),
        ("clip", {}, "architecture 'clip' is the vision or sound part of a model"),
        ("flux", {}, "architecture 'flux' is a model that makes images or video"),
        ("llama", {"general.type": "adapter"}, "a LoRA adapter, which changes another model (architecture 'llama')"),
        (None, {"general.type": "imatrix"}, "an importance matrix, a by-product of quantisation; it names no arch"),
        ("bloom", {}, "architecture 'bloom' is another one"),
        ("zork", {}, "architecture 'zork' is not a known one"),
        (None, {}, "metadata key 'general.architecture' is missing"),
    ],
)
def test_other_kinds_of_files_say_what_they_are(
    arch: str | None, keys: dict[str, str], what: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "m.gguf", arch, **keys)
    data = about(path)
    assert not data["runnable"] and data["supported"] == list(ARCHITECTURES)
    assert what in data["problem"] and data["problem"].endswith(RUNS) and "\n" not in data["problem"]
    assert data["tensor_types"] == {"F32": {"tensors": 1, "parameters": 64, "bytes": 256}}
    shown = run("inspect", path, "--device", "numpy")
    assert data["problem"] in shown.stdout and shown.exit_code == 0
    with pytest.raises(ModelFileError) as caught:
        slimrt.load(path, device="numpy")
    assert str(caught.value) == data["problem"]


def part_of_three(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path.rename(path.with_name("m-00002-of-00003.gguf"))


def first_of_two(path: Path) -> Path:
    write_tiny_llama(path, **{"split.count": 2})
    return path.rename(path.with_name("m-00001-of-00002.gguf"))


def unknown_type(path: Path) -> Path:
    written(path, "llama")
    raw = path.read_bytes()
    at = raw.rindex(b"t" + (2).to_bytes(4, "little") + (32).to_bytes(8, "little")) + 1 + 4 + 16
    path.write_bytes(raw[:at] + (99).to_bytes(4, "little") + raw[at + 4 :])
    return path


def cut_short(path: Path) -> Path:
    write_tiny_llama(path)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def cut_in_metadata(path: Path) -> Path:
    write_tiny_llama(path)
    path.write_bytes(path.read_bytes()[:1500])
    return path


@pytest.mark.parametrize(
    ("make", "problem", "arch", "tensors"),
    [
        (part_of_three, "part 2 of 3; a model is opened by its first part", "llama", 0),
        (first_of_two, "1 of 2 parts are missing (first: m-00002-of-00002.gguf)", "llama", 20),
        (unknown_type, "tensor 't' has type number 99, which the installed gguf package does not know", "llama", 1),
        (cut_short, "it is truncated or corrupt; fetch it again", "llama", 20),
        (cut_in_metadata, "are left; the file is truncated or corrupt", "llama", 0),
    ],
)
def test_files_that_cannot_be_opened_are_described_as_far_as_they_can(
    make: Callable[[Path], Path], problem: str, arch: str, tensors: int, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.gguf")
    data = about(path)
    assert not data["runnable"] and problem in data["problem"] and "\n" not in data["problem"]
    assert data["architecture"] == arch and data["memory"] is None
    assert sum(entry["tensors"] for entry in data["tensor_types"].values()) >= tensors
    shown = run("inspect", path, "--device", "numpy", "--tensors", "--metadata")
    assert problem in shown.stdout and f"slimrt runs {', '.join(ARCHITECTURES)}" in shown.stdout
    listed = json.loads(run("inspect", path, "--json", "--tensors", "--device", "numpy").stdout)["tensors"]
    assert len(listed) >= tensors
    if make is unknown_type:
        assert "type 99" in shown.stdout and listed[0]["type"] == "type 99"
    with pytest.raises(ModelFileError) as caught:
        slimrt.load(path, device="numpy")
    assert str(caught.value) == data["problem"]


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"PK\x03\x04" + bytes(40), "as a PyTorch checkpoint does"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, whose file was not fetched"),
        (b"<!DOCTYPE html><html>" + bytes(20), "as a web page does"),
        (b"tjgg" + bytes(40), "a GGML file from before GGUF"),
        (bytes(40), "a GGUF file starts with b'GGUF'"),
    ],
)
def test_what_is_no_gguf_file_is_one_line(raw: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    result = run("inspect", path)
    assert result.exit_code == 1 and result.stdout == ""
    assert what in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_vocabulary_of_another_kind_is_told(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", **{"tokenizer.ggml.model": "rwkv"})
    data = about(path)
    assert not data["runnable"] and "tokenizer.ggml.model is 'rwkv'; known are llama" in data["problem"]


def test_chat_templates_by_name_are_listed(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", **{"tokenizer.chat_template.tool_use": "x"})
    assert about(path)["chat_templates"] == ["tool_use"]
    assert "yes, and by name: tool_use" in run("inspect", path, "--device", "numpy").stdout


def test_the_type_of_a_mix_has_its_name(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", **{"general.file_type": 15})
    assert about(path)["file_type"] == "Q4_K_M"
    assert about(written(tmp_path / "none.gguf", "llama"))["file_type"] is None
    strange = write_tiny_llama(tmp_path / "strange.gguf", **{"general.file_type": 4_000_000_000})
    assert about(strange)["file_type"] == "4000000000"
