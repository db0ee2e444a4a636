"""Every family computes what Transformers computes with the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from slimrt.config import CacheConfig
from slimrt.convert import convert_checkpoint
from slimrt.embedding import Pooling, embedded
from slimrt.engine import Engine
from slimrt.errors import SettingError
from slimrt.llm import LLM
from slimrt.load_options import LoadOptions
from slimrt.models import build, read_config, stretch_rope
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.prune.asked import Asked
from slimrt.prune.plan import PrunePlan, Stage, Window, check_plan
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


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3"])
def test_embeddings(name: str, files: dict[str, Path]) -> None:
    with (
        np.load(GOLDENS / "families" / "embeddings.npz") as expected,
        LLM(GGUFFile(files[name]), LoadOptions(ctx=128, device="numpy", threads=1)) as llm,
    ):
        unit = float(expected[f"{name}/error"])
        for pooling in ("mean", "last", "cls"):
            exact = expected[f"{name}/{pooling}"]
            found = llm.embed(prompts(), pooling=pooling, normalize=False)
            error = np.abs(found - exact).max()
            assert error <= K * unit, f"{pooling}: {error:g} > {K} * {unit:g}"
            lengths = np.linalg.norm(llm.embed(prompts(), pooling=pooling), axis=1)
            assert np.abs(lengths - 1).max() <= K * np.finfo(np.float32).eps


@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels(name: str, files: dict[str, Path]) -> None:
    """A prompt longer than the windows, then tokens one by one, in the precision of the kernels."""
    pytest.importorskip("numba")
    from slimrt.ops.fast.fast_ops import FastOps
    from slimrt.ops.fast.features import detect
    from tests.rounded_ops import SLACK, errors, session_on

    if not detect().avx2:
        pytest.skip("this processor has no fast path")
    ours = session_on(FastOps(2), files[name], 128)
    found, naive = errors(files[name], ours, prompts()[0], 70)
    assert ours.engine._decoder is not None
    assert found.max() <= SLACK * naive.max(), f"{found.max():g} > {SLACK} * {naive.max():g}"
    # Several tokens in one pass give what they give one by one.
    one = np.stack([ours.engine.decode_one_token(ours.context, token) for token in prompts()[0][:5]])
    ours.context.truncate(ours.context.length - 5)
    assert np.array_equal(ours.engine.decode(ours.context, prompts()[0][:5]), one)
    # Texts that pass together have the vectors that they have alone; a single token passes as in decode, alone.
    texts = [prompts()[0][at : at + length] for at, length in ((0, 2), (3, 1), (4, 75), (7, 9), (20, 33))]
    for pooling in get_args(Pooling):
        alone = [embedded(ours.engine, [ids], pooling, normalize=False)[0] for ids in texts]
        assert np.array_equal(embedded(ours.engine, texts, pooling, normalize=False), np.stack(alone))


@pytest.mark.parametrize("name", CASES)
def test_pruning(name: str, files: dict[str, Path]) -> None:
    """A plan that keeps everything is dense bit for bit, also for what follows; one that cuts keeps windows right."""
    config, ids = read_config(GGUFFile(files[name])), prompts()[0]
    layers = [layer for layer in config.sees_all() if layer < config.n_layers - 1]
    if not layers:
        # Every layer before the last has a window: there is none that could choose.
        with pytest.raises(SettingError, match=r"sees the last \d+ tokens only"):
            check_plan(PrunePlan((Stage(1, 0.5),)), config)
        return
    keeps_all = PrunePlan(tuple(Stage(layer, 1.0) for layer in layers), block=16)
    dense, kept = (session(files[name], NumpyOps(1), 128) for _ in range(2))
    for plan, one in ((None, dense), (keeps_all, kept)):
        one.prefill(ids[:60], plan)
        one.extend(ids[60:61])
    np.testing.assert_array_equal(dense.logits, kept.logits)
    kept.prefill(ids, keeps_all)  # computes the stages behind the cut again, in products of other sizes
    dense.prefill(ids)
    # Sums in another order: what that does to a prompt that is read in parts, and without a plan, is the unit.
    whole = session(files[name], NumpyOps(1), 128)
    whole.prefill(ids)
    unit = max(np.abs(whole.logits - dense.logits).max(), np.finfo(np.float32).eps * np.abs(whole.logits).max())
    assert np.abs(dense.logits - kept.logits).max() <= 4 * unit
    cuts = PrunePlan((Stage(layers[0], 0.5),), block=16, query_window=8)
    one, again = (session(files[name], NumpyOps(1), 128) for _ in range(2))
    assert one.prefill(ids, cuts).stages == (43,)  # two whole blocks and the last one
    again.prefill(ids[:60], cuts)
    again.prefill(ids, cuts)  # a further question reuses the layers up to the cut
    assert np.abs(one.logits - again.logits).max() <= 4 * unit
    one.extend(ids[:1])
    assert one.logits is not None and np.isfinite(one.logits).all()


@pytest.mark.parametrize("name", ["gemma2", "cohere2", "mistral", "qwen3moe"])
def test_kv_budget(name: str, files: dict[str, Path]) -> None:
    """A budget that everything fits into after all changes nothing; a smaller one runs."""
    ids = prompts()[0]
    whole, roomy, tight = (session(files[name], NumpyOps(1), 128, budget) for budget in (None, 112, 96))
    for one in (whole, roomy, tight):
        one.prefill(ids)
        for token in ids[:25]:
            one.extend([token])
    np.testing.assert_array_equal(roomy.logits, whole.logits)
    assert tight.logits is not None and np.isfinite(tight.logits).all()


def test_plans_respect_windows(files: dict[str, Path]) -> None:
    config = read_config(GGUFFile(files["gemma2"]))
    assert config.windows == (20, 0, 20, 0)
    with pytest.raises(SettingError, match=r"layer 2 sees the last 20 tokens only.*layer 1 sees everything"):
        check_plan(PrunePlan((Stage(2, 0.5),)), config)
    with pytest.raises(SettingError, match="window of layer 0, which has one of 20 tokens of its own"):
        check_plan(PrunePlan(windows=(Window(0, (64, 64)),)), config)
    check_plan(PrunePlan((Stage(1, 0.5),)), config)


# Heads as wide as the GPU's kernels take: 256 as Gemma's, 96 as Phi-3's; a layer of each kind.
ON_GPU: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 256},
    "gemma3": {"head_dim": 96, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"head_dim": 96, "hidden_size": 192, "num_hidden_layers": 2},
    "mistral": {"head_dim": 96, "num_hidden_layers": 2},
    "qwen3": {"head_dim": 64, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    "granite": {"head_dim": 64, "hidden_size": 128, "num_hidden_layers": 2},
    "olmo2": {"head_dim": 64, "hidden_size": 128, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("name", ON_GPU)
def test_cuda(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU's kernels, in emulation: a prompt longer than the windows, decode, a pruned prompt, embeddings."""
    from tests import emulation
    from tests.fake_cupy import FakeCupy
    from tests.half_ops import HalfOps
    from tests.rounded_ops import read_and_decoded

    if emulation.compiler() is None:
        pytest.skip("running CUDA sources on the CPU needs g++")
    fake = FakeCupy(monkeypatch)
    from slimrt.ops.cuda.cupy_ops import CupyOps

    path, changes = tmp_path / "model.gguf", {"num_attention_heads": 2, "num_key_value_heads": 1, **ON_GPU[name]}
    convert_checkpoint(write_checkpoint(name, tmp_path / name, **changes), path, "f16")
    ids = prompts()[0]
    every = NumpyOps(1), HalfOps(), CupyOps()
    truth, naive, found = (read_and_decoded(session(path, ops, 128), ids, 70) for ops in every)
    assert np.abs(found - truth).max() <= 3 * np.abs(naive - truth).max()
    assert fake.graphs  # each token of decode was one
    if name == "gemma2":  # a cut behind capped scores
        cut, results = PrunePlan((Stage(1, 0.5),), block=16, score="asked"), []
        for ops in every:
            one = session(path, ops, 128)
            one.asking = lambda tokens: Asked(head=(0.0,) * 20, tail=(1.0,) * 8)
            assert one.prefill(ids, cut).stages == (43,)
            results.append(one.logits)
        truth, naive, found = results
        assert np.abs(found - truth).max() <= 3 * np.abs(naive - truth).max()
    if name == "mistral":
        with LLM(GGUFFile(path), LoadOptions(ctx=128, device="cuda")) as llm:
            truth, naive = (
                embedded(session(path, ops, 128).engine, [ids], "mean", normalize=True) for ops in every[:2]
            )
            error = np.abs(llm.embed([ids], pooling="mean") - truth).max()
            assert error <= 3 * np.abs(naive - truth).max() and "rmsnorm" in fake.launches
