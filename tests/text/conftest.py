"""LLaMA 3's vocabulary as a file, made once for all workers: its 280,000 merges take seconds to write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.vocabularies import llama3_metadata, write_vocabulary


@pytest.fixture(scope="session")
def llama3_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of LLaMA 3's vocabulary, in the folder that the workers of a run share."""
    own = tmp_path_factory.getbasetemp()
    path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "llama3.gguf"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            write_vocabulary(path.with_suffix(".part"), llama3_metadata()).replace(path)
    return path
