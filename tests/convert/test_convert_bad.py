"""Checkpoints that cannot be converted: one clear line, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from slimrt.convert import convert_checkpoint, quantize_file
from slimrt.convert.safetensors_reader import read_safetensors
from slimrt.errors import ModelFileError, OutputError, SettingError, SlimrtError
from tests.convert_cases import checkpoint, edit_json, read_header, write_safetensors

WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"


def _edit_header(folder: Path, change: Callable[[dict], None]) -> None:
    header, data = read_header(folder / WEIGHTS)
    change(header)
    write_safetensors(folder / WEIGHTS, header, data)


def _poison(folder: Path, name: str, row: int, value: float) -> None:
    header, data = read_header(folder / WEIGHTS)
    begin, end = header[name]["data_offsets"]
    weights = np.frombuffer(data[begin:end], "<f4").reshape(header[name]["shape"]).copy()
    weights[row] = value
    write_safetensors(folder / WEIGHTS, header, data[:begin] + weights.tobytes() + data[end:])


def _config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def _entry(name: str, **changes: object) -> Callable[[Path], object]:
    return lambda folder: _edit_header(folder, lambda header: header[name].update(changes))


def _duplicate_key(folder: Path) -> None:
    header, data = read_header(folder / WEIGHTS)
    text = json.dumps(header)
    again = json.dumps({NORM: header[NORM]})[1:-1]
    write_safetensors(folder / WEIGHTS, text[:-1] + ", " + again + "}", data)


def _truncate(name: str, keep: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def _tokenizer(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "tokenizer.json", **changes)


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


# hf-llama-linear, float32, one shard, tokenizer.json: what is done to it, and what the error must say.
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"neither config.json .* nor params.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json: not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"holds a JSON list"),
    "missing key": (_config(hidden_size=...), r"config.json: 'hidden_size' is missing"),
    "text for a number": (_config(hidden_size="32"), r"'hidden_size' is '32'; it must be a number"),
    "fraction": (_config(num_hidden_layers=2.5), r"'num_hidden_layers' is 2.5; it must be a whole number"),
    "text for a flag": (_config(tie_word_embeddings="no"), r"'tie_word_embeddings' is 'no'; it must be true or false"),
    "no architecture": (_config(architectures=...), r"architecture 'None'; slimrt converts and runs LlamaForCausalLM"),
    "unknown architecture": (_config(architectures=["GPT2LMHeadModel"]), r"architecture 'GPT2LMHeadModel'"),
    "unknown architecture, weights not fetched yet": (
        lambda folder: (_config(architectures=["MambaForCausalLM"])(folder), (folder / WEIGHTS).unlink()),
        r"architecture 'MambaForCausalLM'",
    ),
    "absurd layers": (_config(num_hidden_layers=2_000_000_000), r"2000000000 layers need at least"),
    "more layers than there are": (_config(num_hidden_layers=3), r"3 layers need at least 27 tensors"),
    "fewer layers than there are": (_config(num_hidden_layers=1), r"tensor 'model.layers.1.* does not belong"),
    "absurd vocabulary": (_config(vocab_size=2_000_000_000), r"has shape \(384, 32\); .* says \(2000000000, 32\)"),
    "absurd width": (_config(hidden_size=1 << 40), r"'hidden_size' is .*; it must be a number from 1 to"),
    "heads do not divide": (_config(num_key_value_heads=3), r"4 query heads do not divide into 3 KV heads"),
    "quantised already": (_config(quantization_config={"quant_method": "gptq"}), r"already quantised"),
    "other activation": (_config(hidden_act="gelu"), r"hidden_act 'gelu'"),
    "unknown RoPE": (_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), r"rope scaling 'dynamic'"),
    "RoPE without factor": (_config(rope_scaling={"rope_type": "yarn"}), r"'factor' is missing"),
    "RoPE NaN": (_config(rope_theta=float("nan")), r"'rope_theta' is 'nan'"),
    "RoPE a text": (_config(rope_scaling="yarn"), r"rope scaling is a str"),
    "bias promised": (_config(attention_bias=True), r"8 tensors are missing \(first: blk.0.attn_q.bias\)"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"no model.safetensors and no model.safetensors.index.json"),
    "weights empty": (_truncate(WEIGHTS, 0), r"0 bytes, and the header should have"),
    "weights truncated": (_truncate(WEIGHTS, 100_000), r"claims bytes .* the file is truncated"),
    "header truncated": (_truncate(WEIGHTS, 500), r"the header should have \d+; the file is truncated"),
    "header absurd": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), r"should have 18446744073709551615"),
    "header not JSON": (lambda f: write_safetensors(f / WEIGHTS, "{,}", b""), r"the header: not valid JSON"),
    "header nested": (lambda f: write_safetensors(f / WEIGHTS, "[" * 99_999, b""), r"the header: not valid JSON"),
    "header a list": (lambda f: write_safetensors(f / WEIGHTS, "[]", b""), r"the header is not a JSON object"),
    "tensor twice": (_duplicate_key, r"'model.norm.weight' occurs twice"),
    "offset outside": (_entry(NORM, data_offsets=[10**15, 10**15 + 128]), r"claims bytes 1000000000000000"),
    "offset negative": (_entry(NORM, data_offsets=[-128, 0]), r"the file is corrupt"),
    "shape absurd": (_entry(NORM, shape=[1 << 62]), r"they must hold it exactly"),
    "shape wrong": (_entry("lm_head.weight", shape=[32, 384]), r"output.weight has shape \(32, 384\).*\(384, 32\)"),
    "shape true": (_entry(NORM, shape=[True]), r"has shape \[True\]"),
    "type a list": (_entry(NORM, dtype=[]), r"has type \[\]; F64, F32, F16, BF16"),
    "license a list of numbers": (
        lambda f: (f / "README.md").write_text("---\nlicense: [1]\n---\n"),
        r"README.md",
    ),
    "model card nested": (lambda f: (f / "README.md").write_text("---\na: " + "[" * 5000 + "\n---\n"), r"README.md"),
    "model card absurd": (lambda f: _sparse(f / "README.md"), r"README.md: \d+ bytes; such a file has at most"),
    "model card a pipe": (lambda f: os.mkfifo(f / "README.md"), r"README.md: not a regular file"),
    "generation config a pipe": (lambda f: _pipe(f / "generation_config.json"), r"not a regular file"),
    "config a pipe": (lambda f: _pipe(f / "config.json"), r"config.json: not a regular file"),
    "config absurd": (lambda f: _sparse(f / "config.json"), r"config.json: \d+ bytes; such a file has at most"),
    "weights a pipe": (lambda f: _pipe(f / WEIGHTS), r"model.safetensors: not a regular file"),
    "tokenizer a pipe": (lambda f: _pipe(f / "tokenizer.json"), r"tokenizer.json: not a regular file"),
    "tokenizer.model a pipe": (lambda f: os.mkfifo(f / "tokenizer.model"), r"tokenizer.model: not a regular file"),
    "tokenizer.model absurd": (lambda f: _sparse(f / "tokenizer.model"), r"tokenizer.model: \d+ bytes; such a file"),
    "tokenizer of brackets": (
        lambda f: (f / "tokenizer.json").write_bytes(b"[" + b"[]," * 2_100_000 + b"1]"),
        r"tokenizer.json: 2100001 arrays and objects; a checkpoint has at most",
    ),
    "template a pipe": (
        lambda f: os.mkfifo(f / "chat_template.jinja") or edit_json(f / "tokenizer_config.json", chat_template=None),
        r"chat_template.jinja: not a regular file",
    ),
    "type unknown": (_entry(NORM, dtype="F8_E4M3"), r"has type F8_E4M3; F64, F32, F16, BF16"),
    "entry a number": (lambda f: _edit_header(f, lambda h: h.update({NORM: 1})), r"lacks dtype, shape or data_offsets"),
    "tensor missing": (
        lambda f: _edit_header(f, lambda h: h.update({"model.layers.0.self_attn.rotary_emb.inv_freq": h.pop(NORM)})),
        r"1 tensors are missing \(first: output_norm.weight\)",
    ),
    "tensor unknown": (
        lambda f: _edit_header(f, lambda h: h.update({"model.layers.0.mlp.router.weight": h[NORM]})),
        r"blk.0.ffn_gate_inp.weight has no place in a llama model",
    ),
    "NaN": (
        lambda f: _poison(f, "model.layers.1.mlp.up_proj.weight", 37, np.nan),
        r"tensor 'model.layers.1.mlp.up_proj.weight': row 37 holds NaN",
    ),
    "NaN in a permuted tensor": (
        lambda f: _poison(f, "model.layers.1.self_attn.q_proj.weight", 0, np.nan),
        r"tensor 'model.layers.1.self_attn.q_proj.weight': row 0 holds NaN",
    ),
    "infinite norm": (lambda f: _poison(f, NORM, 5, -np.inf), r"'model.norm.weight': row 5 holds NaN or infinite"),
    "too large for f16": (
        lambda f: _poison(f, "lm_head.weight", 2, 70000.0),
        r"lm_head.weight': a weight of 70000 exceeds what float16 holds .* convert output.weight as f32 or bf16",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"none of tokenizer.model, tokenizer.json and"),
    "tokenizer.model corrupt": (lambda f: (f / "tokenizer.model").write_bytes(b"\0"), r"not a SentencePiece model"),
    "tokenizer unigram": (_tokenizer(model={"type": "Unigram", "vocab": []}), r"the tokenizer model is Unigram"),
    "merge of three": (
        _tokenizer(model={"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": ["a b c"]}),
        r"merge 'a b c' is not a pair",
    ),
    "token id twice": (
        _tokenizer(model={"type": "BPE", "byte_fallback": True, "vocab": {"a": 3, "b": 3}, "merges": []}),
        r"token ids must be distinct",
    ),
    "token id absurd": (
        _tokenizer(model={"type": "BPE", "byte_fallback": True, "vocab": {"a": 1 << 40}, "merges": []}),
        r"ids must be dense",
    ),
    "token id a list": (
        _tokenizer(model={"type": "BPE", "byte_fallback": True, "vocab": {"a": []}, "merges": []}),
        r"token ids must be distinct whole numbers",
    ),
    "added tokens a text": (_tokenizer(added_tokens="<s>"), r"'added_tokens' must be a list"),
    "lone surrogate": (
        lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}'),
        r"the metadata cannot be stored .* not valid Unicode",
    ),
    "template a number": (
        lambda f: edit_json(f / "tokenizer_config.json", chat_template=7),
        r"chat_template is a int; a text or a list",
    ),
    "generation config": (
        lambda f: (f / "generation_config.json").write_text('{"temperature": "hot"}'),
        r"the metadata cannot be stored",
    ),
    "model card": (
        lambda f: (f / "README.md").write_text("---\na: [\n---\n"),
        r"README.md, config.json or generation_config.json cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(case: str, tmp_path: Path) -> None:
    spoil, message = BAD[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("hf-llama-linear"), folder)
    spoil(folder)
    _refused(folder, message)


def _refused(folder: Path, message: str) -> None:
    output = folder.parent / "output"
    output.mkdir()
    with pytest.raises(SlimrtError, match=message) as caught:
        convert_checkpoint(folder, output / "model.gguf", "q8_0")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert list(output.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), r"1 of 3 shards are missing .*00002-of-00003"),
        (
            lambda f: shutil.copy(f / "model-00001-of-00003.safetensors", f / "model-00003-of-00003.safetensors"),
            r"tensor '.*' is in model-00001-of-00003.safetensors too",
        ),
        (
            lambda f: edit_json(f / "model.safetensors.index.json", weight_map={"a": "../model.safetensors"}),
            r"shard '../model.safetensors' must be the plain name",
        ),
        (lambda f: edit_json(f / "model.safetensors.index.json", weight_map={}), r"'weight_map' is missing or empty"),
        (
            lambda f: edit_json(
                f / "model.safetensors.index.json", weight_map={"a.weight": "model-00001-of-00003.safetensors"}
            ),
            r"tensor 'a.weight' should be in model-00001-of-00003.safetensors and is not",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").unlink()
            or (f / "model-00003-of-00003.safetensors").unlink(),
            r"1 of 3 shards are missing",
        ),
    ],
)  # fmt: skip
def test_bad_shards(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("hf-llama3-rope-tied-shards"), folder)
    spoil(folder)
    _refused(folder, message)


def test_bad_names(tmp_path: Path) -> None:
    good = checkpoint("hf-qwen2")
    with pytest.raises(SettingError, match="type 'q3_k': must be one of f32, f16, bf16, q8_0"):
        convert_checkpoint(good, tmp_path / "m.gguf", "q3_k")
    with pytest.raises(OutputError, match="a folder; the result is one file"):
        convert_checkpoint(good, tmp_path)
    with pytest.raises(OutputError, match=r"the folder .* does not exist; create it first"):
        convert_checkpoint(good, tmp_path / "missing" / "m.gguf")
    with pytest.raises(ModelFileError, match="does not exist; name a folder with"):
        convert_checkpoint(tmp_path / "missing", tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match="is a file; name a folder with"):
        convert_checkpoint(good / "config.json", tmp_path / "m.gguf")


@pytest.mark.parametrize("force", [False, True])
def test_sources_are_never_replaced(force: bool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("hf-qwen2"), folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for path in before:
        with pytest.raises(OutputError, match="source and result are the same file"):
            convert_checkpoint(folder, path, force=force)
    convert_checkpoint(folder, folder / "00001.gguf")
    shutil.copy(folder / "00001.gguf", tmp_path / "m.gguf")
    (tmp_path / "link.gguf").symlink_to("m.gguf")
    for target in ("m.gguf", "link.gguf"):
        with pytest.raises(OutputError, match="source and result are the same file"):
            quantize_file(tmp_path / "m.gguf", tmp_path / target, "q8_0", force=force)
    assert (tmp_path / "m.gguf").read_bytes() == (folder / "00001.gguf").read_bytes()
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("force", [False, True])
def test_another_part_of_a_split_source_is_never_replaced(force: bool, tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    for path, names in ((first, ("a.weight", "b.weight")), (second, ("c.weight",))):
        writer = GGUFWriter(path, "llama")
        writer.add_uint16("split.no", int(path is second))
        writer.add_uint16("split.count", 2)
        for name in names:
            writer.add_tensor(name, np.ones((2, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    before = second.read_bytes()
    with pytest.raises(OutputError, match="source and result are the same file"):
        quantize_file(first, second, "q8_0", force=force)
    assert second.read_bytes() == before


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_regular_file_is_never_replaced(force: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(OutputError, match="a device or a pipe"):
            convert_checkpoint(checkpoint("hf-qwen2"), tmp_path / name, force=force)


def test_results_are_replaced_when_asked_to(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    convert_checkpoint(checkpoint("hf-qwen2"), target, "f32")
    before = target.read_bytes()
    for write in (convert_checkpoint, quantize_file):
        source = checkpoint("hf-qwen2") if write is convert_checkpoint else tmp_path / "source.gguf"
        if write is quantize_file:
            shutil.copy(target, source)
        with pytest.raises(OutputError, match=r"exists already; .* --force"):
            write(source, target, "f16")
        assert target.read_bytes() == before
        write(source, target, "f16", force=True)
        assert target.read_bytes() != before
        convert_checkpoint(checkpoint("hf-qwen2"), target, "f32", force=True)


ORIGINAL = (checkpoint("hf-qwen2") / WEIGHTS).read_bytes()
HEADER_BYTES = 8 + struct.unpack_from("<Q", ORIGINAL)[0]


@given(
    st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, len(ORIGINAL)),
)
def test_mutated_safetensors_never_crash(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], keep: int
) -> None:
    raw = bytearray(ORIGINAL[: max(keep, 1)])
    for position, value in changes:
        raw[position % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw)
    try:
        tensors = read_safetensors(path)
    except ModelFileError:
        return
    for tensor in tensors.values():
        assert tensor.rows(0, tensor.shape[0]).shape == tensor.shape
