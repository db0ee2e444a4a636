"""The plan beside what a process takes: the peak of its resident memory, as Linux counts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_announced_and_seen_agree(default_model: Path) -> None:
    for _ in range(2):  # the first may have to compile kernels
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(default_model)], capture_output=True, text=True, check=True, timeout=300
        )
    announced, seen = json.loads(done.stdout)
    assert 0.9 <= announced / seen <= 1.1, (announced >> 20, seen >> 20)
