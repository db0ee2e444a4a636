"""Models for the tests of ``slimrt.Llama``."""

from __future__ import annotations

from pathlib import Path

import pytest

import slimrt
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="package")
def real(default_model: Path) -> slimrt.Llama:
    return slimrt.Llama(str(default_model), n_ctx=256, verbose=False)


@pytest.fixture(scope="package")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama") / "tiny.gguf", seed=3)


@pytest.fixture
def tiny(tiny_path: Path) -> slimrt.Llama:
    return slimrt.Llama(tiny_path, n_ctx=64, seed=5)


@pytest.fixture
def scored(tiny_path: Path) -> slimrt.Llama:
    return slimrt.Llama(tiny_path, n_ctx=64, logits_all=True)
