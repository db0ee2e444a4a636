"""The benchmark of guesses: its cases, its numbers, its tables."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from click_cli import cli
from slimrt.bench import drafting
from slimrt.bench.drafting import Case, DraftRow, cases
from slimrt.errors import SettingError
from slimrt.ops.backend import fast_features
from tests.tiny_gguf import write_tiny_llama

# Sizes and type of tests/drafting, whose kernels are compiled.
SHAPE = {"arch": "qwen2", "d_model": 224, "n_heads": 7, "n_kv_heads": 1, "d_ff": 288, "type": "Q8_0"}


def test_cases_repeat_what_stands_in_the_prompt() -> None:
    for case in cases():
        beginning = case.prompt[-200:]
        assert case.repeats == (case.name in ("quote a passage", "edit code", "fill in records"))
        if case.name == "quote a passage":
            assert case.prompt.count(beginning) == 2
        if case.name == "edit code":
            assert "first" in beginning and case.prompt.count(beginning) == 1
            assert case.prompt.count(beginning.replace("first", "lo")) == 1
        if case.name == "fill in records":
            assert all(name in case.prompt for name in ("Kenji Morita", "Nagoya", "clocks"))


@pytest.mark.skipif(fast_features()[0] is None, reason="this processor has no fast path")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", n_layers=2, ctx=1024, **SHAPE)
    some = [
        Case("again", True, "one two three one two three one two", {"temperature": 0.0}),
        Case("never", False, "a story", {"temperature": 50.0, "seed": 1}),
    ]
    monkeypatch.setattr(drafting, "cases", lambda: some)
    arguments = ["bench", "draft", "--model", str(path), "--tokens", "16", "--repeats", "1", "--threads", "1"]
    done = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert [row["name"] for row in result["texts"]] == ["again", "never"]
    for row in result["texts"]:
        assert min(row["plain_tok_s"], row["drafted_tok_s"], row["plain_cpu_ms"], row["drafted_cpu_ms"]) > 0
        assert 0 <= row["accepted"] <= row["drafted"]
    assert list(result["pass_s"]) == ["1", "2", "4", "8", "16"] and min(result["pass_s"].values()) > 0
    table = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
    assert "again" in table and "of one token's time" in table


def test_a_text_that_differs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import slimrt
    from slimrt.sampler import Sampler

    llm = slimrt.load(write_tiny_llama(tmp_path / "tiny.gguf"), device="numpy", prune="off")
    monkeypatch.setattr(drafting, "cases", lambda: [Case("x", True, "one", {"temperature": 50.0})])
    drawn = itertools.count()
    monkeypatch.setattr(Sampler, "__call__", lambda self, *args: next(drawn) % 200 + 3)
    with pytest.raises(SettingError, match="x: the text differs"):
        drafting.measure(llm, tokens=8, repeats=1)


def test_factors() -> None:
    row = DraftRow("x", True, 10, 20.0, 50.0, 30.0, 20.0, 9, 8)
    assert (row.factor, row.cpu_factor) == (2.5, 1.5)
