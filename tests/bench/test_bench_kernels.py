"""``slimrt bench kernels`` and ``slimrt bench shape``: on the CPU, and on the stand-in for a GPU."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from click_cli import cli
from slimrt.bench import kernels, shaped
from slimrt.bench.synthetic import SHAPES, random_tensor
from slimrt.bench.timing import Peaks
from slimrt.errors import SettingError
from slimrt.weights.quants import dequantize
from tests import emulation
from tests.fake_cupy import FakeCupy
from tests.tolerance import doubles

NAMES = {
    "embed", "rmsnorm", "rope", "swiglu", "dequantize", "gemv", "gemm", "attention_prefill", "attention_decode",
    "unit_means", "block_scores", "compact",
}  # fmt: skip
needs_compiler = pytest.mark.skipif(emulation.compiler() is None, reason="running CUDA sources on the CPU needs g++")


def test_the_cpu_has_every_kernel_and_a_roofline() -> None:
    done = CliRunner().invoke(cli, ["bench", "kernels", "--device", "cpu", "--shape", "tiny", "--tokens", "128",
                                    "--repeats", "1", "--json"])  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {row["kernel"] for row in found["rows"]} == NAMES
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["roofline_s"] > 0
        assert row["peak_share"] == doubles(row["roofline_s"] / row["seconds"])
        assert row["unit"] == {"memory": "GB/s", "compute": "TFLOP/s"}[row["bound"]]
    shown = CliRunner().invoke(cli, ["bench", "kernels", "--device", "cpu", "--shape", "tiny", "--tokens", "64",
                                     "--repeats", "1", "--kernel", "rmsnorm"])  # fmt: skip
    assert "roofline us" in shown.stdout and "rmsnorm" in shown.stdout and "swiglu" not in shown.stdout


@needs_compiler
def test_the_gpu_has_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCupy(monkeypatch)
    result = kernels.run("cuda", "tiny", 64, 1, [name for name in NAMES if name != "gemm"])
    assert {row.kernel for row in result.rows} == NAMES - {"gemm"}
    assert "Emulated GPU" in result.environment["device"]


def test_the_roofline() -> None:
    measured = Peaks(100.0, 10.0)
    assert measured.roofline(1000, 10) == (10, "compute")
    assert measured.roofline(10, 100) == (10, "memory")
    assert Peaks(100.0, 10.0, 200.0, 20.0).roofline(10, 100) == (5, "memory")  # the data sheet counts where it is known


def test_values_out_of_range() -> None:
    for options, said in (
        ({"shape": "gpt-5"}, "must be one of llama-3.1-8b"),
        ({"tokens": 3}, "tokens 3: must be at least 64"),
        ({"kernels": ["conv"]}, "kernel 'conv': must be one of embed"),
    ):
        with pytest.raises(SettingError, match=said):
            kernels.run("cpu", **{"shape": "tiny", **options})  # type: ignore[arg-type]
    for options, said in (
        ({"plans": ["none"]}, "plan 'none': must be one of off"),
        ({"kind": "Q9"}, "type 'Q9': must be one of F32"),
        ({"kind": "Q4_K"}, "rows of 128 do not divide into blocks of 256"),
        ({"lengths": []}, "lengths"),
        ({"plans": ["8k/4k/2k"]}, "layer 10; this model has layers 0..3"),
    ):
        with pytest.raises(SettingError, match=said):
            shaped.run("cpu", "tiny", **{"lengths": [100], **options})  # type: ignore[arg-type]


def test_random_tensors_are_finite_and_of_the_right_size() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    for kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"):
        values = dequantize(random_tensor("w", kind, (64, 512), rng))
        assert values.shape == (64, 512) and 0.05 < np.abs(values).mean() * np.sqrt(512) < 3, kind
    assert SHAPES["llama-3.1-8b"].n_params == 8030261248


@needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_shaped_model(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    FakeCupy(monkeypatch)
    done = CliRunner().invoke(cli, ["bench", "shape", "--device", device, "--shape", "tiny", "--type", "Q8_0",
                                    "--length", "160", "--prune", "off", "--prune", "tiny", "--kv-budget", "128",
                                    "--decode-tokens", "2", "--json"])  # fmt: skip
    assert done.exit_code == 0, done.output
    off, pruned = json.loads(done.stdout)["rows"]
    assert (off["kept"], pruned["kept"]) == ([], [80, 48])
    assert off["bytes_moved"] > 0 and off["decode_tok_s"] > 0
    assert (off["copy_s"] is None) == (device == "cpu")
    if device == "cuda":
        assert off["copy_s"] > 0 and 0 <= off["hidden_share"] <= 1
