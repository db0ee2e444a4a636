"""Files whose metadata and tensors contradict each other, or ask for what the family's layer lacks: one line."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gguf
import numpy as np
import pytest

from slimrt.convert import convert_checkpoint
from slimrt.errors import ModelFileError
from slimrt.memory import cuda
from slimrt.models import build, read_config
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.weights.gguf import GGUFFile, TensorInfo
from tests.families import write_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GGUFFile]:
    folder = tmp_path_factory.mktemp("bad")
    found = {}
    for name in ("qwen3", "gemma2", "qwen3moe", "phi3", "smollm3"):
        convert_checkpoint(write_checkpoint(name, folder / name), folder / f"{name}.gguf", "f32")
        found[name] = GGUFFile(folder / f"{name}.gguf")
    return found


class Changed:
    """A file with other metadata, without some tensors or with others."""

    def __init__(self, file: GGUFFile, metadata: dict[str, Any], tensors: dict[str, TensorInfo | None]) -> None:
        self.path, self._file = file.path, file
        self.metadata = {key: value for key, value in (file.metadata | metadata).items() if value is not None}
        self.tensors = {name: one for name, one in (file.tensors | tensors).items() if one is not None}

    get, tensor = GGUFFile.get, GGUFFile.tensor


def vector(name: str, size: int) -> TensorInfo:
    return TensorInfo(name, (size,), gguf.GGMLQuantizationType.F32, np.zeros(size, np.float32))


CASES: list[tuple[str, dict[str, Any], dict[str, TensorInfo | None], str]] = [
    ("qwen3moe", {"qwen3moe.expert_count": 0}, {}, "expert_count is 0; it must lie in 1..4096"),
    ("qwen3moe", {"qwen3moe.expert_count": 10**9}, {}, "expert_count is 1000000000; it must lie in 1..4096"),
    ("qwen3moe", {"qwen3moe.expert_count": 7}, {}, "has shape .* the metadata calls for"),
    ("qwen3moe", {"qwen3moe.expert_used_count": 7}, {}, "expert_used_count is 7 of 6 experts"),
    ("qwen3moe", {"qwen3moe.expert_gating_func": 2}, {}, "expert_gating_func is 2; slimrt runs experts that a softmax"),
    ("qwen3moe", {"qwen3moe.expert_shared_count": 1}, {}, "slimrt runs qwen3moe without expert shared count"),
    ("qwen3moe", {}, {"blk.1.ffn_up_exps.weight": None}, "tensor 'blk.1.ffn_up_exps.weight' is missing"),
    ("qwen3moe", {"qwen3moe.expert_weights_scale": 2.5}, {}, "expert_weights_scale is 2.5"),
    ("gemma2", {"gemma2.attention.sliding_window": 0}, {}, "sliding_window is 0; a window has at least one token"),
    ("gemma2", {"gemma2.attention.sliding_window": -3}, {}, "sliding_window is -3; a window"),
    ("gemma2", {"gemma2.attn_logit_softcapping": math.nan}, {}, "attn_logit_softcapping is nan; it must be above 0"),
    ("gemma2", {"gemma2.final_logit_softcapping": math.inf}, {}, "final_logit_softcapping is inf; it must be above 0"),
    (
        "gemma2",
        {"gemma2.attention.sliding_window_pattern": "x"},
        {},
        "sliding_window_pattern is x; it must be a number",
    ),
    ("gemma2", {}, {"blk.0.post_ffw_norm.weight": vector("n", 9)}, "has shape \\(9,\\), the metadata calls for"),
    ("qwen3", {"qwen3.final_logit_softcapping": 30.0}, {}, "slimrt runs qwen3 without a logit cap"),
    ("qwen3", {"qwen3.expert_count": 8}, {}, "slimrt runs qwen3 without experts"),
    ("qwen3", {"qwen3.block_count": 1 << 30}, {}, "block_count is 1073741824, and there is no tensor blk.1073741823"),
    ("qwen3", {"qwen3.rope.freq_base": math.nan}, {}, "RoPE base nan must be above 1"),
    (
        "qwen3",
        {},
        {"blk.0.attn_sinks.weight": vector("s", 4)},
        "'blk.0.attn_sinks.weight': slimrt runs qwen3 without it",
    ),
    ("qwen3", {}, {"blk.2.attn_q_norm.weight": None}, "tensor 'blk.2.attn_q_norm.weight' is missing"),
    ("phi3", {}, {"blk.0.attn_qkv.weight": None}, "tensor 'blk.0.attn_q.weight' is missing"),
    ("smollm3", {"smollm3.attention.clamp_kqv": 8.0}, {}, "slimrt runs smollm3 without attention clamp kqv"),
]


@pytest.mark.parametrize(("name", "metadata", "tensors", "message"), CASES, ids=[case[3][:40] for case in CASES])
def test_one_line(
    files: dict[str, GGUFFile],
    name: str,
    metadata: dict[str, Any],
    tensors: dict[str, TensorInfo | None],
    message: str,
) -> None:
    file: Any = Changed(files[name], metadata, tensors)
    with pytest.raises(ModelFileError, match=message) as raised:
        build(read_config(file), file, NumpyOps(1))
    assert "\n" not in str(raised.value)


def test_phi_states_a_window_of_0_for_none(files: dict[str, GGUFFile]) -> None:
    file: Any = Changed(files["phi3"], {"phi3.attention.sliding_window": 0}, {})
    assert read_config(file).windows == ()
    assert read_config(files["phi3"]).windows == (24,) * 3


def test_what_the_gpu_lacks_is_said(files: dict[str, GGUFFile]) -> None:
    gemma = read_config(files["gemma2"])  # windows, soft caps, norms behind: its kernels have them
    assert "heads are 16 wide" in str(cuda.unsupported(gemma))
    assert cuda.unsupported(dataclasses.replace(gemma, head_dim=64)) is None
    side_by_side = cuda.unsupported(dataclasses.replace(gemma, head_dim=64, parallel=True))
    assert "lacks attention and feed-forward side by side, which gemma2 has" in str(side_by_side)
    assert "lacks mixtures of experts" in str(cuda.unsupported(read_config(files["qwen3moe"])))
