"""Every family computes what Transformers computes with the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slimrt.config import CacheConfig
from slimrt.convert import convert_checkpoint
from slimrt.engine import Engine
from slimrt.models import build, read_config, stretch_rope
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.session import Session
from slimrt.weights.gguf import GGUFFile
from tests.families import CASES, GOLDENS, prompts, write_checkpoint

# float32 rounding differs with the order of sums; the unit is Transformers' own error in float32 against float64.
K = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted files by case, made when asked for."""
    folder = tmp_path_factory.mktemp("families")

    class Files(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            target = self[name] = folder / f"{name}.gguf"
            convert_checkpoint(write_checkpoint(name, folder / name), target, "f32")
            return target

    return Files()


def session(path: Path, ops: NumpyOps, ctx: int, budget: int | None = None) -> Session:
    file = GGUFFile(path)
    config = stretch_rope(read_config(file), ctx)
    return Session(Engine(build(config, file, ops), ops, CacheConfig(ctx, budget)), ctx)


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, files: dict[str, Path]) -> None:
    with np.load(GOLDENS / "families" / "logits.npz") as expected:
        for i, ids in enumerate(prompts()):
            exact, unit = expected[f"{name}/{i}"], float(expected[f"{name}/error{i}"])
            # Factors are chosen by the context here, and by the prompt's length there.
            one = session(files[name], NumpyOps(1), 128 if name != "phi3-long" or len(ids) > 32 else 32)
            one.prefill(ids)
            assert one.logits is not None
            error = np.abs(one.logits - exact).max()
            assert error <= K * unit, f"prompt {i}: {error:g} > {K} * {unit:g}"
