"""``scripts/gpu_decode_check.py`` on the CPU's emulation: it ends well, and a wrong product does not pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import gpu_decode_check
from slimrt.ops.cuda.gemv import FewRows
from tests import emulation

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="running CUDA sources on the CPU needs g++")


def rows(monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    out = path / "rows.json"
    # The script's own patch is for its own process: here the stand-in for CuPy must go when the test ends.
    monkeypatch.setattr(pytest, "MonkeyPatch", lambda: monkeypatch)
    monkeypatch.setattr("sys.argv", ["gpu_decode_check.py", "--dry", "--types", "Q4_0", "--out", str(out), *options])
    return gpu_decode_check.main(), json.loads(out.read_text())


def test_it_ends_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, found = rows(monkeypatch, tmp_path)
    assert status == 0 and found[-1]["failures"] == 0
    assert {row["what"] for row in found} == {"limits", "right", "speed", "variants", "token", "done"}
    (token,) = (row for row in found if "launches" in row)
    assert token["launches_per_layer"] <= 7


def test_a_wrong_product_does_not_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = FewRows.few_linear

    def wrong(self: FewRows, *args: Any) -> Any:
        result = right(self, *args)
        result[:, 17:18] = 0
        return result

    monkeypatch.setattr(FewRows, "few_linear", wrong)
    status, found = rows(monkeypatch, tmp_path, "--only", "right")
    assert status == 1 and [row["verdict"] for row in found if "error" in row] == [False, False]
