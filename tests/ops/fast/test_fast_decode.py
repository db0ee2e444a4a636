"""Decode on compiled kernels: attention of few rows, and a whole token as one program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

pytest.importorskip("numba")

from slimrt.config import CacheConfig
from slimrt.context import Context
from slimrt.engine import Engine
from slimrt.models import build, read_config
from slimrt.ops.fast import attend_few
from slimrt.ops.fast.fast_ops import FastOps, FastWeight
from slimrt.ops.fast.features import detect
from slimrt.ops.fast.team import Team
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.session import Session
from slimrt.weights.gguf import GGUFFile, TensorInfo
from tests.fast_cases import MASKS, unpacked, usable
from tests.rounded_ops import SLACK as ROUNDED_SLACK
from tests.rounded_ops import errors
from tests.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.skipif(not detect().avx2, reason="this processor has no fast path")

SHAPES = ((1, 1, 0), (1, 63, 0), (1, 130, 64), (1, 3000, 0), (1, 3000, 256), (5, 700, 128), (15, 15, 0))
SLACK = 4  # times the error of the naive float32 computation, see test_engine


class LayerByLayer(FastOps):
    """The same kernels without the program for a whole token: what the program is held against."""

    def decoder(self, model: object, *, budget: bool = False) -> None:  # type: ignore[override]
        return None


def reading(keys: int, row: int, reach: int) -> np.ndarray:
    """Which of ``keys`` rows a query at ``row`` sees: the rule of ``slimrt.prune.reach`` in its own words."""
    at = np.arange(keys)
    return (at <= row) & ((at < 64) | (at >= row // 128 * 128 - reach) if reach else True)


# -- attention of few rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS[::2], ids="-".join)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 80), (14, 2, 32), (6, 2, 96), (16, 2, 128), (2, 1, 16)]
)
def test_attention(heads: int, kv_heads: int, width: int, threads: int, mask: tuple[str, ...]) -> None:
    ops = SimpleNamespace(features=usable(mask), threads=threads, team=Team(threads))
    rng = np.random.default_rng(heads)
    for tokens, keys, reach in SHAPES:
        q = rng.standard_normal((tokens, heads, width)).astype(np.float32)
        # Heads further apart than their rows, as in a cache with room to grow.
        store = (rng.standard_normal((2, kv_heads, keys + 7, width)) * 2).astype(np.float16)
        k, v = store[:, :, :keys]
        windows = None if not reach else [reach * (head % 2) for head in range(kv_heads)]
        ours = attend_few.attend(ops, q, k, v, windows)
        truth, naive = np.empty(q.shape), np.empty_like(q)
        for result, dtype in ((truth, np.float64), (naive, np.float32)):
            for head in range(heads):
                kv = head // (heads // kv_heads)
                for t in range(tokens):
                    seen = reading(keys, keys - tokens + t, 0 if windows is None else windows[kv])
                    scores = k[kv, seen].astype(dtype) @ q[t, head].astype(dtype) / np.sqrt(dtype(width))
                    weights = np.exp(scores - scores.max())
                    result[t, head] = weights @ v[kv, seen].astype(dtype) / weights.sum()
        unit = max(np.abs(naive - truth).max(), np.finfo(np.float32).eps * np.abs(v).max())
        assert np.abs(ours - truth).max() <= SLACK * unit


def test_attention_to_one_key_far_above_the_others() -> None:
    ops = SimpleNamespace(features=detect(), threads=2, team=Team(2))
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 2, 64)).astype(np.float32)
    k, v = (rng.standard_normal((1, 1000, 64)).astype(np.float16) for _ in range(2))
    k[0, 500] = q[0, 0] * 60  # its score is about 480: exp of any other score less that is 0
    assert np.abs(attend_few.attend(ops, q, k, v)[0, 0] - v[0, 500]).max() <= np.finfo(np.float32).eps * 4


# -- a whole token ---------------------------------------------------------------------------------------------------


def engine_of(path: Path, ops: NumpyOps) -> Engine:
    file = GGUFFile(path)
    config = read_config(file)
    return Engine(build(config, file, ops), ops)


def decoded(engine: Engine, ids: list[int], read: int) -> tuple[np.ndarray, Context]:
    """Logits after each of the tokens behind the first ``read``, which are read at once."""
    context = engine.new_context()
    engine.prefill(context, ids[:read])
    return np.stack([engine.decode_one_token(context, token) for token in ids[read:]]), context


def together(engine: Engine, context: Context, ids: list[int], read: int, parts: Sequence[int]) -> np.ndarray:
    """What ``decoded`` returns, by passes of as many tokens as ``parts`` say."""
    context.truncate(read)
    assert engine.together >= max(parts)
    ends = np.cumsum(parts).tolist()
    rows = [engine.decode(context, ids[read + end - part : read + end]) for part, end in zip(parts, ends, strict=True)]
    return np.concatenate(rows)


def near(ours: np.ndarray, layers: np.ndarray, truth: np.ndarray) -> bool:
    """No further from NumPy's result than the same kernels layer by layer, which round where the program rounds."""
    unit = np.abs(layers - truth).max()
    return bool(np.abs(ours - truth).max() <= 2 * unit + SLACK * np.finfo(np.float32).eps * np.abs(truth).max())


QWEN = {"arch": "qwen2", "d_model": 224, "n_heads": 7, "n_kv_heads": 1, "d_ff": 288}


# Widths and groups of heads that other tests compile as well.
@pytest.mark.parametrize(
    ("kind", "threads", "mask", "shape"),
    [
        ("F32", 1, (), {"d_model": 96, "n_heads": 4, "n_kv_heads": 2, "d_ff": 112, "head_dim": 16}),
        ("F16", 3, (), {"arch": "qwen2", "d_model": 320, "n_heads": 4, "n_kv_heads": 4, "d_ff": 200}),
        ("Q4_1", 1, (), {"d_model": 192, "n_heads": 3, "n_kv_heads": 1, "d_ff": 160, "tied": False}),
        ("Q6_K", 3, (), {"d_model": 256, "n_heads": 4, "n_kv_heads": 2, "d_ff": 512, "rope_freqs": True}),
        *(("Q8_0", 2, mask, QWEN) for mask in MASKS),
    ],
)
def test_tokens(tmp_path: Path, kind: str, threads: int, mask: tuple[str, ...], shape: dict) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", type=kind, n_layers=3, **shape)
    features = usable(mask)
    ids = np.random.default_rng(0).integers(3, 200, 30).tolist()
    truth, _ = decoded(engine_of(path, NumpyOps(1)), ids, 20)
    layers, _ = decoded(engine_of(path, LayerByLayer(threads, features=features)), ids, 20)
    engine = engine_of(path, FastOps(threads, features=features))
    assert engine._decoder is not None
    ours, context = decoded(engine, ids, 20)
    assert near(ours, layers, truth)
    assert context.length == len(ids)
    assert all(context.cache.rows(layer)[2].tolist() == list(range(30)) for layer in range(3))
    for parts in ((4, 1, 5), (10,)):
        assert np.array_equal(together(engine, context, ids, 20, parts), ours)
    # Beside another conversation, before and behind it in the pass, at other positions and in another cache.
    other, beside = decoded(engine, ids[::-1], 24)
    for turn, (mine, theirs) in enumerate([(3, 1), (5, 4), (2, 1)]):
        done, held = (0, 3, 8)[turn], (0, 1, 5)[turn]
        context.truncate(20 + done)
        beside.truncate(24 + held)
        reads = [(context, ids[20 + done :][:mine]), (beside, ids[::-1][24 + held :][:theirs])]
        rows = engine.decode_together(reads if turn % 2 else reads[::-1])[:: 1 if turn % 2 else -1]
        assert np.array_equal(rows[0], ours[done : done + mine])
        assert np.array_equal(rows[1], other[held : held + theirs])


def test_parts_of_several_types(tmp_path: Path) -> None:
    """Llama.cpp's mixtures: values and down projections in a better type than the rest."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", d_model=96, n_heads=6, n_kv_heads=3, d_ff=160)

    def mixed(engine: Engine) -> Engine:
        def part(tensor: TensorInfo, kind: GGMLQuantizationType) -> TensorInfo:
            return TensorInfo(tensor.name, tensor.shape, kind, gguf.quantize(unpacked(tensor), kind))

        kinds = (GGMLQuantizationType.Q4_1, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0)
        for number, layer in enumerate(engine.model.layers):
            qkv = FastWeight(tuple(map(part, layer.qkv.parts, kinds)))
            down = FastWeight((part(layer.down.parts[0], GGMLQuantizationType.Q8_0),))
            engine.model.layers[number] = replace(layer, qkv=qkv, down=down)
        return engine

    ids = np.random.default_rng(0).integers(3, 200, 24).tolist()
    truth, _ = decoded(engine_of(path, NumpyOps(1)), ids, 20)
    layers, _ = decoded(mixed(engine_of(path, LayerByLayer(2))), ids, 20)
    ours, _ = decoded(mixed(engine_of(path, FastOps(2))), ids, 20)
    assert near(ours, layers, truth)


def test_a_head_width_that_the_kernels_do_not_take(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", d_model=64, n_heads=4, n_kv_heads=2, head_dim=24)
    engine = engine_of(path, FastOps(2))
    assert engine._decoder is None
    ours, naive = errors(path, Session(engine, 64), list(range(3, 23)), 18)
    assert ours.max() <= ROUNDED_SLACK * naive.max()


def test_tokens_together_are_those_one_by_one(default_model: Path) -> None:
    """Bit for bit, also where the keys' shares change within a pass (after 682), and in what they leave."""
    engine, rng = engine_of(default_model, FastOps()), np.random.default_rng(1)
    for read, parts in ((3, (16, 2)), (675, (3, 13))):
        ids = rng.integers(3, 49000, read + sum(parts)).tolist()
        ours, context = decoded(engine, ids, read)
        left = [row.copy() for row in context.cache.rows(29)]
        assert np.array_equal(together(engine, context, ids, read, parts), ours)
        assert all(map(np.array_equal, left, context.cache.rows(29)))


def test_more_tokens_than_fit_a_pass_and_caches_that_choose(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", type="Q8_0", n_layers=3, ctx=2048, **QWEN)
    ids = np.random.default_rng(2).integers(3, 200, 330).tolist()
    for budget in (None, 256):
        file, ops = GGUFFile(path), FastOps(2)
        engine = Engine(build(read_config(file), file, ops), ops, CacheConfig(2048, budget, block=16))
        ours, _ = decoded(engine, ids, 290)
        again = engine.new_context()
        engine.prefill(again, ids[:290])
        assert engine.together == 16
        assert np.array_equal(engine.decode(again, ids[290:]), ours)


@pytest.mark.parametrize("choice", [{}, {"choose_every": 1}, {"choose_every": 3, "decay": 0.0}])
def test_caches_that_choose_forget_tokens_as_if_they_had_never_come(tmp_path: Path, choice: dict[str, Any]) -> None:
    """Passes of several tokens whose last ones are taken back, while blocks come and go: bit for bit those one by
    one."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", type="Q8_0", n_layers=3, ctx=2048, **QWEN)
    rng = np.random.default_rng(3)
    for read in (140, 290):  # all rows are resident at first; or they never were
        file, ops = GGUFFile(path), FastOps(2)
        config = CacheConfig(2048, 160, block=16, overlap=1.0, **choice)
        engine = Engine(build(read_config(file), file, ops), ops, config)
        ids = rng.integers(3, 200, read + 90).tolist()
        ours, context = decoded(engine, ids, read)
        assert context.cache.fetched.waits > 10
        again, taken_back = engine.new_context(), 0
        engine.prefill(again, ids[:read])
        while again.length < len(ids):
            at = again.length
            right = ids[at : at + int(rng.integers(1, 17))]
            wrong = rng.integers(3, 200, rng.integers(0, 17 - len(right))).tolist() if len(right) < 16 else []
            logits = engine.decode(again, right + wrong)[: len(right)]
            assert np.array_equal(logits, ours[at - read : at - read + len(right)])
            again.truncate(at + len(right))
            taken_back += len(wrong)
        assert taken_back > 20


def test_interrupted_while_the_program_changes_its_number_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a Ctrl-C broke off, or a fork of the process left half done, is done again by the next step."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", type="Q8_0", n_layers=3, ctx=2048, **QWEN)
    ids = np.random.default_rng(4).integers(3, 200, 40).tolist()
    engine = engine_of(path, FastOps(2))
    ours, context = decoded(engine, ids, 30)
    context.truncate(30)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("slimrt.ops.fast.decode.gemv_kernel", interrupted)
        engine.decode(context, ids[30:])
    context.truncate(30)
    for at in range(30, 40):
        assert np.array_equal(engine.decode(context, ids[at : at + 1])[0], ours[at - 30])
