"""The plan beside what a process takes: the peak of its resident memory, as Linux counts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_gguf import write_tiny_llama

PROGRAM = """
import json, re, sys
import numpy as np, slimrt
llm = slimrt.load(sys.argv[1], ctx=1024, rope_scaling="none", prune="off", device="cpu")
ids = np.random.default_rng(0).integers(3, 200, 1016).tolist()
llm.generate(ids, max_tokens=4, temperature=0, ignore_eos=True)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(json.dumps([llm.memory.total, peak]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["default", "IQ4_XS"])
def test_announced_and_seen_agree(kind: str, default_model: Path, tmp_path: Path) -> None:
    """IQ4_XS has no product of its own: its matrices are held as bfloat16, four times as large as in the file."""
    sizes = {"n_layers": 8, "d_model": 1024, "n_heads": 16, "n_kv_heads": 4, "d_ff": 4096, "ctx": 1024}
    path = default_model
    if kind != "default":
        path = write_tiny_llama(tmp_path / "m.gguf", type=kind, **sizes)  # type: ignore[arg-type]
    for _ in range(2):  # the first may have to compile kernels
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True, timeout=300
        )
    announced, seen = json.loads(done.stdout)
    if kind != "default":
        seen -= path.stat().st_size  # pages of the file that were read once: the system takes them back when it likes
    assert 0.9 <= announced / seen <= 1.1, (announced >> 20, seen >> 20)
