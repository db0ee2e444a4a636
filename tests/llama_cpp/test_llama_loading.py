"""How a ``slimrt.Llama`` is loaded, pickled and closed, and which parameters it refuses."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest

import slimrt
from slimrt.errors import FetchError, SettingError
from slimrt.hub import store
from slimrt.memory.plan import available_memory
from tests.tiny_gguf import write_tiny_llama

TALK = [{"role": "user", "content": "hello"}]


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["text"]


def test_parameters_without_effect_are_taken(tiny_path: Path) -> None:
    slimrt.Llama(
        model_path=str(tiny_path), n_gpu_layers=-1, main_gpu=0, tensor_split=[1.0], use_mmap=False, use_mlock=True,
        n_batch=8, n_ubatch=8, n_threads=1, n_threads_batch=1, offload_kqv=False, flash_attn=True, no_perf=True,
        numa=True, type_k=8, type_v=8, verbose=False, n_ctx=16, op_offload=True, swa_full=True,
    )  # fmt: skip
    with pytest.warns(RuntimeWarning, match="unknown parameters f16_kv"):
        slimrt.Llama(tiny_path, f16_kv=True)


@pytest.mark.parametrize(
    "option",
    [
        {"lora_base": "x"}, {"draft_model": object()}, {"kv_overrides": {"a": 1}},
        {"tokenizer": object()}, {"chat_handler": print}, {"yarn_ext_factor": 0.5}, {"pooling_type": 7},
        {"rope_scaling_type": 3}, {"rope_freq_scale": -1},
    ],
)  # fmt: skip
def test_parameters_that_change_the_answer_are_refused(tiny_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(option))) as error:
        slimrt.Llama(tiny_path, **option)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_rope_parameters(tiny_path: Path) -> None:
    def rope(**options: Any) -> Any:
        return slimrt.Llama(tiny_path, **options)._model.config.rope

    assert rope(n_ctx=2048).scaling == "none"  # as llama.cpp, no stretching that was not asked for
    assert rope(rope_freq_base=5e4).base == 5e4
    assert (rope(rope_freq_scale=0.25).scaling, rope(rope_freq_scale=0.25).factor) == ("linear", 4.0)
    assert (rope(rope_scaling_type=2, rope_freq_scale=0.5).scaling, rope(rope_scaling_type=1).factor) == ("yarn", 1.0)
    assert slimrt.Llama(tiny_path, n_ctx=0).n_ctx() == 512


def test_bad_models(tmp_path: Path, tiny_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        slimrt.Llama(str(tmp_path / "missing.gguf"))
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"not a model at all")
    with pytest.raises(slimrt.SlimrtError, match=r"junk\.gguf"):
        slimrt.Llama(junk)
    wide = write_tiny_llama(tmp_path / "wide.gguf", vocab_size=20_000)
    free = available_memory()
    assert free is not None
    with pytest.raises(SettingError, match=r"logits_all=True: logits of \d+ tokens"):
        slimrt.Llama(wide, n_ctx=2 * free // (4 * 20_000), logits_all=True)


def test_vocab_only_and_close(tiny_path: Path) -> None:
    words = slimrt.Llama(tiny_path, vocab_only=True)
    assert words.detokenize(words.tokenize(b"hello world")) == b"hello world"
    with pytest.raises(SettingError, match="vocab_only"):
        words("hello")
    with slimrt.Llama(tiny_path) as llama:
        assert llama("hello", max_tokens=1)
    llama.close()
    with pytest.raises(SettingError, match="closed"):
        llama.eval([1])


def test_a_pickled_llama_loads_itself_again(tiny_path: Path) -> None:
    llama = slimrt.Llama(tiny_path, n_ctx=48)
    again = pickle.loads(pickle.dumps(llama))
    assert again.n_ctx() == 48
    assert text_of(again("hello", max_tokens=4, temperature=0)) == text_of(llama("hello", max_tokens=4, temperature=0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": None}, "prompt of type NoneType"),
        ({"temperature": "hot"}, "temperature 'hot'"),
        ({"max_tokens": "5"}, "max_tokens '5'"),
        ({"top_p": -1}, "top_p -1"),
        ({"logprobs": -1}, "logprobs -1"),
        ({"stop": [""]}, "stop '': must be a text"),
        ({"suffix": "end"}, "suffix='end'"),
        ({"repeat_penalty": 0}, "repeat_penalty 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(
    tiny: slimrt.Llama, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingError, match=f"^{re.escape(words)}"):
        tiny(**{"prompt": "hello", **options})
    assert tiny.n_tokens == 0


def test_invalid_utf8_is_refused(tiny: slimrt.Llama) -> None:
    with pytest.raises(SettingError, match="byte 2 of the text is not UTF-8"):
        tiny.tokenize(b"ab\xff")


def test_from_pretrained(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    hf = pytest.importorskip("huggingface_hub")
    asked = []
    files = ["README.md", "model-q4.gguf", "model-q8.gguf", "big/a-00001-of-00002.gguf", "big/a-00002-of-00002.gguf"]
    monkeypatch.setattr(store, "resolve", lambda name: asked.append(name) or tiny_path)
    monkeypatch.setattr(hf.HfApi, "list_repo_files", lambda self, repo: files)
    for filename, found in (("model-q4.gguf", "model-q4.gguf"), ("*q8.gguf", "model-q8.gguf"), ("big/*", files[3])):
        llama = slimrt.Llama.from_pretrained("owner/repo", filename=filename, n_ctx=32, verbose=False)
        assert asked.pop() == f"hf:owner/repo/{found}" and llama.n_ctx() == 32
    with pytest.raises(FetchError, match="2 files match"):
        slimrt.Llama.from_pretrained("owner/repo", filename="model*")
    fetched = []
    monkeypatch.setattr(hf, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(
        hf, "hf_hub_download", lambda repo, file, **where: fetched.append((file, where)) or str(tiny_path)
    )
    slimrt.Llama.from_pretrained(
        "owner/repo", filename="big/*", additional_files=["*q8.gguf"], local_dir="here", cache_dir=Path("there")
    )
    where = {"local_dir": "here", "cache_dir": "there"}
    assert fetched == [(files[3], where), (files[4], where), ("model-q8.gguf", where)]
