"""The suite on lesser processors: which sets of features there are, and llama.cpp's answers on NumPy alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import masked

ROOT = Path(__file__).parents[2]
ZEN_3 = {"avx", "avx2", "fma", "f16c", "sse4.2", "popcnt"}
ZEN_4 = ZEN_3 | {"avx512f", "avx512bw", "avx512vnni", "avx512bf16"}
SAPPHIRE_RAPIDS = ZEN_4 | {"avxvnni", "amx-tile", "amx-bf16"}


@pytest.mark.parametrize(
    ("present", "names"),
    [
        (SAPPHIRE_RAPIDS, ["no AMX", "no BF16", "no VNNI", "AVX2", "NumPy"]),
        (ZEN_4, ["no BF16", "no VNNI", "AVX2", "NumPy"]),
        (ZEN_3, ["NumPy"]),
    ],
)
def test_each_set_leaves_out_more_than_the_one_before(
    monkeypatch: pytest.MonkeyPatch, present: set[str], names: list[str]
) -> None:
    binding = pytest.importorskip("llvmlite.binding")
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: dict.fromkeys(present, True) | {"avx10": False})
    found = masked.sets()
    assert list(found) == names
    left = present
    for environment in found.values():
        words = environment["NUMBA_CPU_FEATURES"].split(",")
        kept = {word[1:] for word in words if word[0] == "+"}
        assert kept < left and present - kept == {word[1:] for word in words if word[0] == "-"}
        left = kept
    assert left == {"sse4.2", "popcnt", "fma", "f16c"}
    assert list(masked.sets("AVX2")) == ["AVX2"]


def test_llama_cpp_is_agreed_with_on_numpy_alone() -> None:
    """The masked run itself; instructions that this processor lacks cannot be tried here, the least set always can."""
    pytest.importorskip("numba")
    tests = ("-p", "no:cacheprovider", "tests/llama_cpp/test_beside_llama_cpp.py", "-k", "logprobs_agree")
    done = subprocess.run(
        [sys.executable, "scripts/masked.py", "--only", "NumPy", *tests], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout and ", NumPy" in done.stdout
