"""Importance matrices: what goes into a model's products while it reads, and files quantised by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from click_cli import cli
from slimrt.convert import convert_checkpoint, quantize_file
from slimrt.engine import Engine
from slimrt.errors import SettingError
from slimrt.importance import measure_importance
from slimrt.models import build, read_config
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile
from tests.families import write_checkpoint
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import SLACK

TEXT = "hello world, there in the interior one cell lore tore the wall and told on " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("m") / "m.gguf", d_model=256, d_ff=512, n_layers=2)


def test_first_layer_sees_normed_embeddings(model: Path) -> None:
    """What the first products take in can be told without the engine: the normed rows of the embedding."""
    file = GGUFFile(model)
    measured = measure_importance(file, TEXT)
    ids = Tokenizer.from_gguf(file).encode(TEXT, add_bos=False)
    length = min(512, read_config(file).ctx_train)
    pieces = [ids[at : at + length] for at in range(0, max(1, len(ids) - length + 1), length)]
    assert measured.pieces == len(pieces)
    rows = file.tensor("token_embd.weight").data[np.concatenate(pieces)].astype(np.float64)
    normed = rows / np.sqrt(np.square(rows).mean(1, keepdims=True) + read_config(file).norm_eps)
    normed *= file.tensor("blk.0.attn_norm.weight").data
    expected = np.square(normed).mean(0)
    single = rows.astype(np.float32)
    single /= np.sqrt(np.square(single).mean(1, keepdims=True) + np.float32(read_config(file).norm_eps))
    single *= file.tensor("blk.0.attn_norm.weight").data
    naive = np.square(single).mean(
        0, dtype=np.float64
    )  # the rows in float32, as the products see them; sums in float64
    for part in ("attn_q", "attn_k", "attn_v"):
        found = measured.columns[f"blk.0.{part}.weight"]
        assert (np.abs(found - expected) / expected).max() <= SLACK * (np.abs(naive - expected) / expected).max()
    named = {name for name in file.tensors if name.startswith("blk.") and len(file.tensor(name).shape) > 1}
    assert measured.columns.keys() == named
    assert measured.columns["blk.1.ffn_down.weight"].shape == (512,)


def products(model: Path, kept: Path) -> float:
    """The squared error of all weights, each counted by the mean square of its input."""
    file, other = GGUFFile(model), GGUFFile(kept)
    counts = measure_importance(file, TEXT).columns
    total = 0.0
    for name, values in counts.items():
        exact = file.tensor(name).data.astype(np.float64)
        tensor = other.tensor(name)
        ours = gguf.dequantize(tensor.data, tensor.type)
        total += float((np.square(exact - ours) * values).sum())
    return total


def test_products_lose_less(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    plain, counted = tmp_path / "plain.gguf", tmp_path / "counted.gguf"
    quantize_file(model, plain, "q4_k_s")
    arguments = ["quantize", str(model), str(counted), "--type", "q4_k_s", "--imatrix-text", str(tmp_path / "text.txt")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    # How much less depends on how unlike the columns are; in random weights they are nearly alike.
    assert products(model, counted) < 0.99 * products(model, plain)
    file = GGUFFile(counted)
    assert file.get("quantize.imatrix.dataset", str) == "text.txt"
    assert file.get("quantize.imatrix.chunks_count", int) == measure_importance(GGUFFile(model), TEXT).pieces
    assert {n: t.type for n, t in file.tensors.items()} == {n: t.type for n, t in GGUFFile(plain).tensors.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--type", "q4_0"], "type q4_0: an importance matrix serves q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s; take one"),
        (["--type", "q4_k_m", "--short"], "has 2 tokens; at least 32 are needed"),
    ],
)
def test_what_cannot_be_is_told_at_once(arguments: list[str], message: str, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one" if "--short" in arguments else TEXT)
    arguments = [argument for argument in arguments if argument != "--short"]
    command = ["quantize", str(model), str(tmp_path / "out.gguf"), *arguments, "--imatrix-text", str(text)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("values", [np.ones(7, np.float32), np.full(256, np.nan), -np.ones(256), np.full(256, np.inf)])
def test_importance_of_another_model_is_refused(values: Any, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"importance of 'blk.0.attn_q.weight': it must be 256 numbers that are not"):
        quantize_file(model, tmp_path / "o.gguf", "q4_k_m", importance={"blk.0.attn_q.weight": values})
    assert not (tmp_path / "o.gguf").exists()


def test_counting_changes_no_result(model: Path) -> None:
    from slimrt.importance import _CountingOps

    file = GGUFFile(model)
    ids = Tokenizer.from_gguf(file).encode(TEXT, add_bos=False)[:40]
    results = []
    for ops in (NumpyOps(), _CountingOps(packed=False)):
        engine = Engine(build(read_config(file), file, ops), ops)
        results.append(engine.prefill(engine.new_context(), ids, wanted=len(ids))[0])
    assert np.array_equal(*results)


@pytest.mark.parametrize("family", ["qwen3moe", "phi3", "gemma2", "command-r"])
def test_families_are_read_whole(family: str, tmp_path: Path) -> None:
    """Every matrix of every layer is counted, fused ones and experts' too, whatever stands between."""
    convert_checkpoint(write_checkpoint(family, tmp_path / "checkpoint"), tmp_path / "m.gguf", "f32")
    file = GGUFFile(tmp_path / "m.gguf")
    measured = measure_importance(file, TEXT)
    matrices = {name: t.shape for name, t in file.tensors.items() if name.startswith("blk.") and len(t.shape) > 1}
    assert {name: (shape[-1],) for name, shape in matrices.items()} == {
        name: values.shape for name, values in measured.columns.items()
    }
