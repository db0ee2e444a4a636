"""The memory plan against what a prefill really allocates, and free memory as systems report it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import slimrt
from slimrt.errors import SettingError
from slimrt.inspect import describe
from slimrt.memory.plan import available_memory, largest_context, plan
from slimrt.models import read_config
from slimrt.weights.gguf import GGUFFile
from tests.tiny_gguf import write_tiny_llama

CTX = 3072


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "m.gguf"
    return write_tiny_llama(path, n_layers=3, d_model=256, n_heads=8, n_kv_heads=2, d_ff=512, type="Q8_0", ctx=CTX)


def test_a_budget_splits_the_cache(tmp_path: Path) -> None:
    file = GGUFFile(write_tiny_llama(tmp_path / "tiny.gguf"))
    config = read_config(file)
    whole = plan(config, file, 4096, available=1 << 40)
    split = plan(config, file, 4096, available=1 << 40, kv_budget=512)
    row = config.kv_bytes_per_token
    assert (whole.kv, whole.kv_host) == (4096 * row, 0)
    # Mean keys: one a unit of 8 rows, one a group of 8 blocks of 16; two staging slots of one layer each.
    assert split.kv == 512 * row + (4096 // 8 + 4096 // 128) * row // 2
    assert split.kv_host == 4096 * row + 2 * 4096 * row // config.n_layers
    assert plan(config, file, 512, available=1 << 40, kv_budget=512).kv_host == 0
    assert [r.part for r in split.rows()][2:4] == ["KV cache, resident", "KV cache, behind it"]
    assert largest_context(config, file, 4096, available=split.total - 1, kv_budget=512) < 4096


def test_plan_is_what_load_and_prefill_allocate(model: Path) -> None:
    file = GGUFFile(model)
    config = read_config(file)
    planned = plan(config, file, CTX, threads=1, packed=False)
    ids = np.random.default_rng(0).integers(3, 200, CTX).tolist()
    slimrt.load(model, ctx=64, threads=1, device="numpy").logits([1])  # what is imported on the way is not in the plan
    tracemalloc.start()
    try:
        llm = slimrt.load(model, ctx=CTX, threads=1, device="numpy")
        llm.logits([1])
        loaded = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        llm.logits(ids)
        peak = tracemalloc.get_traced_memory()[1] - loaded
    finally:
        tracemalloc.stop()
    # What is not in the plan: the tokenizer's tables, lists of ids, the cache's slack of rows.
    assert planned.weights == sum(4 * np.prod(t.shape) for t in file.tensors.values())
    assert planned.weights <= loaded <= planned.weights + (2 << 20)
    assert 0.75 * (planned.kv + planned.scratch) <= peak <= 1.15 * (planned.kv + planned.scratch)


def test_plan_in_numbers(model: Path) -> None:
    file = GGUFFile(model)
    config = read_config(file)
    dense = plan(config, file, 1000, available=1 << 30)
    assert not dense.packed
    assert dense.kv_per_token == 3 * 2 * 2 * 32 * 4
    assert dense.kv == 1000 * dense.kv_per_token
    assert dense.fits()
    parts = dense.weights, dense.kv, dense.boundary, dense.scratch, dense.runtime
    assert dense.rows()[-1].nbytes == dense.total == sum(parts)
    assert "fits into the 1.0 GiB" in dense.rows()[-1].note
    tight = plan(config, file, 1000, available=2 * dense.weights - 1)
    assert tight.packed, "float32 weights would take more than half of what is free"
    assert tight.weights == sum(tensor.nbytes for tensor in file.tensors.values())
    nothing = plan(config, file, 1000, available=1 << 20)
    assert not nothing.fits()
    assert "exceeds the 0.0 GiB" in nothing.rows()[-1].note
    with pytest.raises(SettingError, match="ctx 0: must be at least 1"):
        plan(config, file, 0)


# -- free memory -------------------------------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 32000000 kB\nMemAvailable:    20000000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 20000000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "5000\n",
                "sys/fs/cgroup/a/memory.max": "8000000\n",
                "sys/fs/cgroup/a/memory.current": "5000000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 1000000\n",
            },
            4000000,
        ),
        (
            {
                "proc/self/cgroup": "3:cpuset:/\n4:memory:/gone/in/the/container\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9000000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 500000\n",
            },
            7500000,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "2000\n",
            },
            0,
        ),
    ],
    ids=["no groups", "v2, parent's limit", "v1 in a container", "over the limit"],
)
@pytest.mark.skipif("sys.platform == 'win32'")
def test_available_memory_on_linux(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_memory(tree(tmp_path, MEMINFO | files)) == expected


def test_available_memory_here_is_plausible() -> None:
    available = available_memory()
    assert available is None or 1 << 26 < available < 1 << 50


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_describe_the_default_model(default_model: Path) -> None:
    """Figures as Hugging Face states them: config.json of HuggingFaceTB/SmolLM2-135M-Instruct."""
    data = describe(GGUFFile(default_model), 4096, device="numpy")
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["runnable"]
    assert data["architecture"] == "llama"
    assert data["parameters"] == 134515008
    assert data["sizes"] == {
        "layers": 30,
        "width": 576,
        "heads": 9,
        "kv_heads": 3,
        "head_width": 64,
        "feed_forward": 1536,
        "vocabulary": 49152,
        "tied_output": True,
    }
    assert data["context_length"] == 8192
    assert data["rope"]["base"] == 100000
    assert data["chat_template"]
    assert data["tokenizer"]["tokens"] == 49152
    assert list(data["tensor_types"]) == ["Q4_1", "Q8_0", "F32"]
    assert data["memory"]["kv"] == 4096 * 30 * 2 * 3 * 64 * 4


def test_describe_a_file_that_cannot_run(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", arch="mamba", **{"tokenizer.chat_template": None})
    data = describe(GGUFFile(path))
    assert not data["runnable"]
    assert "architecture 'mamba'" in data["problem"]
    assert data["sizes"] is data["rope"] is data["memory"] is None
    assert data["context_length"] == 512
    assert not data["chat_template"]
    assert data["tensor_types"]["F32"]["tensors"] == len(GGUFFile(path).tensors)


def test_a_budget_that_saves_nothing_says_so(model: Path) -> None:
    for budget, said in ((None, 0), (256, 1), (1024, 0)):
        with slimrt.load(model, ctx=512, device="numpy", kv_budget=budget) as llm:
            assert len([note for note in llm.notes if "saves no memory" in note]) == said
