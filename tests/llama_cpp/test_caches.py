"""Caches of ``slimrt.Llama`` where prompts take turns, files are damaged, and models differ; where it computes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimrt
from slimrt.errors import SettingError
from slimrt.llama_cpp import BaseLlamaCache, LlamaDiskCache, LlamaRAMCache
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import logits_apart

FIRST, SECOND = "hello world " * 5, "the hello " * 7
GREEDY: dict[str, Any] = {"max_tokens": 3, "temperature": 0.0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("cached") / "tiny.gguf", seed=3)


def loaded(path: Path, **options: Any) -> slimrt.Llama:
    return slimrt.Llama(path, n_ctx=256, n_threads=1, device="numpy", **options)


def text_of(completion: Any) -> str:
    return str(completion["choices"][0]["text"])


def reads(llama: slimrt.Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each prompt that is read from now on has again."""
    counts: list[int] = []
    prefill = type(llama._session).prefill

    def counted(self: Any, ids: Any, *given: Any, **options: Any) -> Any:
        reading = prefill(self, ids, *given, **options)
        counts.append(len(ids) - reading.reused)
        return reading

    monkeypatch.setattr(type(llama._session), "prefill", counted)
    return counts


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_prompts_that_take_turns_are_read_once(
    kind: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = loaded(path)
    wanted = [text_of(llama(prompt, **GREEDY)) for prompt in (FIRST, SECOND)]
    cache: Any = LlamaRAMCache() if kind == "memory" else LlamaDiskCache(tmp_path / "cache")
    llama.reset()
    llama.set_cache(cache)
    counts = reads(llama, monkeypatch)
    found = [text_of(llama(prompt, **GREEDY)) for prompt in (FIRST, SECOND, FIRST, SECOND)]
    assert found == wanted * 2
    # A prompt that is known is read from its last token on, whose logits are wanted.
    assert counts[0] > 10 and counts[1] > 10 and counts[2:] == [1, 1]
    streamed = [text_of(piece) for piece in llama(FIRST, stream=True, **GREEDY)]
    assert "".join(streamed) == wanted[0] and counts[-1] == 1
    if kind == "disk":  # another process
        other = loaded(path)
        other.set_cache(LlamaDiskCache(tmp_path / "cache"))
        assert text_of(other(FIRST, **GREEDY)) == wanted[0] and counts[-1] == 1


def test_files_that_are_damaged_or_of_others(path: Path, tmp_path: Path) -> None:
    llama, cache = loaded(path), LlamaDiskCache(tmp_path / "cache")
    with pytest.raises(SettingError, match="set_cache first"):
        cache[[1, 2]]
    llama.set_cache(cache)
    wanted = text_of(llama(FIRST, **GREEDY))
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry.stat().st_mode & 0o077 == 0
    prompt = llama.tokenize(FIRST.encode())
    other = slimrt.Llama(write_tiny_llama(tmp_path / "other.gguf", seed=4), n_ctx=256, device="numpy")
    other.set_cache(cache)
    with cache.used_by(other):
        assert prompt not in cache
    assert text_of(other(FIRST, **GREEDY)) == text_of(loaded(tmp_path / "other.gguf")(FIRST, **GREEDY))
    short = slimrt.Llama(path, n_ctx=16, device="numpy")
    short.set_cache(cache)
    short("hello", max_tokens=1)
    assert entry.exists()  # too long for this context, and whole
    data = bytearray(entry.read_bytes())
    data[-5] ^= 1
    entry.write_bytes(data)
    llama.reset()
    assert text_of(llama(FIRST, **GREEDY)) == wanted  # read again, and kept again
    entry.write_bytes(b"nonsense")
    llama.reset()
    assert text_of(llama(FIRST, **GREEDY)) == wanted
    with cache.used_by(llama):
        assert prompt in cache


def test_a_full_disk_cache_drops_what_was_used_longest_ago(path: Path, tmp_path: Path) -> None:
    llama, cache = loaded(path), LlamaDiskCache(tmp_path / "cache")
    llama.set_cache(cache)
    llama(FIRST, **GREEDY)
    llama(SECOND, **GREEDY)
    for at, entry in enumerate(sorted((tmp_path / "cache").iterdir(), key=lambda one: one.stat().st_mtime_ns)):
        os.utime(entry, ns=(at, at))
    cache.capacity_bytes = int(cache.cache_size * 1.2)
    llama(FIRST, **GREEDY)  # which is used and so stays
    llama("in the " * 6, **GREEDY)
    with cache.used_by(llama):
        assert llama.tokenize(FIRST.encode()) in cache and llama.tokenize(SECOND.encode()) not in cache
    assert cache.cache_size <= cache.capacity_bytes
    with pytest.raises(SettingError, match="name a folder to write to"):
        LlamaDiskCache(path / "x")


def test_a_cache_of_the_programs_own(path: Path) -> None:
    class Mine(BaseLlamaCache):
        kept: dict[Any, Any] = {}  # noqa: RUF012

        @property
        def cache_size(self) -> int:
            return len(self.kept)

        def __getitem__(self, key: Any) -> Any:
            return self.kept[tuple(key)[:4]]

        def __contains__(self, key: Any) -> bool:
            return tuple(key)[:4] in self.kept

        def __setitem__(self, key: Any, value: Any) -> None:
            self.kept[tuple(key)[:4]] = value

    llama, cache = loaded(path), Mine()
    llama.set_cache(cache)
    wanted = text_of(llama(FIRST, **GREEDY))
    llama.reset()
    assert text_of(llama(FIRST, **GREEDY)) == wanted and cache.cache_size == 1
    other = slimrt.Llama(path, n_ctx=256, device="numpy", rope_freq_base=5e5)
    other.set_cache(cache)
    assert text_of(other(FIRST, **GREEDY))  # a state under other settings is not used


def test_where_it_computes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    from slimrt.llama_cpp import context

    real = context.LLM

    def loaded_on_numpy(file: Any, options: Any) -> Any:
        asked.append(options.device)
        return real(file, dataclasses.replace(options, device="numpy"))

    monkeypatch.setattr(context, "LLM", loaded_on_numpy)
    for options in ({}, {"n_gpu_layers": 0}, {"n_gpu_layers": -1}, {"n_gpu_layers": 20}, {"device": "numpy"}):
        slimrt.Llama(path, n_ctx=64, **options)
    assert asked == ["cpu", "cpu", "auto", "auto", "numpy"]
    with pytest.raises(slimrt.SlimrtError, match="device 'tpu'"):
        slimrt.load(path, device="tpu")


def test_a_budget_of_keys_and_values(path: Path) -> None:
    llama = loaded(path, kv_budget=128)
    done = llama(FIRST * 6, max_tokens=8, temperature=0.0)
    assert done["usage"]["completion_tokens"] == 8 and llama._model.kv_budget == 128
    state = llama.save_state()
    llama.reset()
    llama.load_state(state)
    assert llama.n_tokens == state.n_tokens
    with pytest.raises(SettingError, match="kv_budget with logits_all"):
        loaded(path, kv_budget=128, logits_all=True)


def test_embeddings_are_those_of_the_python_interface(path: Path) -> None:
    llm = slimrt.load(path, device="numpy", prune="off")
    texts = ["hello world", "the"]
    for kind, pooling in ((1, "mean"), (2, "cls"), (3, "last")):
        llama = loaded(path, embedding=True, pooling_type=kind)
        assert llama.embed(texts, normalize=True) == llm.embed(texts, pooling=pooling).tolist()  # type: ignore[arg-type]
        assert llama.embed("the") == llm.embed("the", pooling=pooling, normalize=False)[0].tolist()  # type: ignore[arg-type]
    every = loaded(path, embedding=True)
    states = every.embed(texts)
    first = llm.embed(texts[0], pooling="cls", normalize=False)[0]
    # A BLAS library sums by the number of rows, which differs where texts are read together; a hidden state here is of
    # the size of a logit.
    apart = logits_apart(llm, llm.tokenize(texts[0]))
    assert np.abs(np.array(states[0][0]) - first).max() <= apart
    alone, together = (llm.token_states(llm.tokenize(text)) for text in ("hello", "hello world"))
    assert np.abs(alone - together[:1]).max() <= apart
    assert [len(one) for one in states] == [len(llm.tokenize(text)) for text in texts]
    last = llm.embed(texts[0], pooling="last", normalize=False)[0]
    assert np.abs(np.array(states[0][-1]) - last).max() <= apart
    small = slimrt.Llama(path, n_ctx=64, n_batch=2, device="numpy")
    assert len(small.embed("hello world hello")) == 2
    with pytest.raises(SettingError, match="n_batch is 2"):
        small.embed("hello world hello", truncate=False)
