"""What programs do with ``llama_cpp.Llama``: this file runs unchanged against llama-cpp-python, too.

    LLAMA_PACKAGE=llama_cpp LLAMA_MODEL=SmolLM2-135M-Instruct.Q4_1.gguf pytest --noconftest -o addopts= FILE

Without these variables it tests ``slimrt.llama_cpp`` on slimrt's default model. It was run against llama-cpp-python
0.3.36.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PACKAGE = os.environ.get("LLAMA_PACKAGE", "slimrt.llama_cpp")
package = importlib.import_module(PACKAGE)

CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]
COUNT = "1, 2, 3, 4, 5,"
SCHEMA = {
    "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False,
}  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def model_path() -> str:
    named = os.environ.get("LLAMA_MODEL")
    if named is not None:
        return named
    from slimrt.hub import store

    return str(store.resolve(None))


@pytest.fixture(scope="module")
def llama(model_path: str) -> Any:
    return package.Llama(
        model_path=model_path, n_ctx=1024, n_gpu_layers=0, n_threads=1, seed=1, verbose=False,
        chat_format="chatml-function-calling",
    )  # fmt: skip


def text_of(completion: Any) -> str:
    return str(completion["choices"][0]["text"])


def test_completion(llama: Any) -> None:
    done = llama(COUNT, max_tokens=12, temperature=0.0)
    assert text_of(done).startswith(" 6, 7, 8") and done["object"] == "text_completion"
    assert done["usage"] == {"prompt_tokens": done["usage"]["prompt_tokens"], "completion_tokens": 12,
                             "total_tokens": done["usage"]["prompt_tokens"] + 12}  # fmt: skip
    assert done["choices"][0]["finish_reason"] == "length" and done["model"] == llama.model_path
    pieces = list(llama.create_completion(COUNT, max_tokens=12, temperature=0.0, stream=True))
    assert "".join(text_of(piece) for piece in pieces) == text_of(done)
    stopped = llama(COUNT, max_tokens=12, temperature=0.0, stop=["8"], echo=True)
    assert text_of(stopped).startswith(COUNT) and "8" not in text_of(stopped)
    assert stopped["choices"][0]["finish_reason"] == "stop"


def test_chat(llama: Any) -> None:
    done = llama.create_chat_completion(CHAT, max_tokens=8, temperature=0.0)
    message = done["choices"][0]["message"]
    assert message["role"] == "assistant" and message["content"] and done["object"] == "chat.completion"
    parts = [
        part["choices"][0] for part in llama.create_chat_completion(CHAT, max_tokens=8, temperature=0.0, stream=True)
    ]
    assert parts[0]["delta"] == {"role": "assistant"} and parts[-1]["delta"] == {}
    assert "".join(part["delta"].get("content", "") for part in parts) == message["content"]
    assert parts[-1]["finish_reason"] == done["choices"][0]["finish_reason"]


def test_chat_in_the_classes_of_openai(llama: Any) -> None:
    chat = pytest.importorskip("openai.types.chat")
    done = llama.create_chat_completion_openai_v1(CHAT, max_tokens=4, temperature=0.0)
    assert isinstance(done, chat.ChatCompletion) and done.choices[0].message.content
    parts = list(llama.create_chat_completion_openai_v1(CHAT, max_tokens=4, temperature=0.0, stream=True))
    assert all(isinstance(part, chat.ChatCompletionChunk) for part in parts)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == done.choices[0].message.content


def test_answers_in_a_form(llama: Any) -> None:
    form = {"type": "json_object", "schema": SCHEMA}
    done = llama.create_chat_completion(CHAT, max_tokens=60, temperature=0.0, response_format=form)
    assert isinstance(json.loads(done["choices"][0]["message"]["content"])["n"], int)
    grammar = package.LlamaGrammar.from_string('root ::= " yes" | " no"', verbose=False)
    assert text_of(llama("Is water wet?", max_tokens=8, temperature=0.0, grammar=grammar)) in (" yes", " no")
    by_schema = package.LlamaGrammar.from_json_schema(json.dumps(SCHEMA), verbose=False)
    assert "n" in json.loads(text_of(llama("JSON:", max_tokens=60, temperature=0.0, grammar=by_schema)))


def test_a_tool_is_called(llama: Any) -> None:
    talk = [{"role": "user", "content": "What is the weather in Paris?"}]
    choice = {"type": "function", "function": {"name": "weather"}}
    done = llama.create_chat_completion(talk, tools=[WEATHER], tool_choice=choice, max_tokens=60, temperature=0.0)
    (call,) = done["choices"][0]["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "weather"
    assert "city" in json.loads(call["function"]["arguments"])


def test_tokens(llama: Any) -> None:
    ids = llama.tokenize(b"Hello world", add_bos=False)
    assert llama.detokenize(ids) == b"Hello world" and llama.tokenizer().decode(ids) == "Hello world"
    end = llama.tokenize(b"<|im_end|>", add_bos=False, special=True)
    assert end == [llama.token_eos()] and llama.n_vocab() > llama.token_eos() >= 0
    assert llama.n_ctx() == 1024 and llama.n_embd() == 576
    assert llama.longest_token_prefix([1, 2, 3], [1, 2, 4]) == 2


def test_processors_and_criteria(llama: Any) -> None:
    (banned,) = llama.tokenize(b" 6", add_bos=False)[-1:]
    calls = []

    def ban(ids: Any, scores: Any) -> Any:
        calls.append(len(ids))
        scores[banned] = -np.inf
        return scores

    processors = package.LogitsProcessorList([ban])
    plain = text_of(llama(COUNT, max_tokens=6, temperature=0.0))
    assert text_of(llama(COUNT, max_tokens=6, temperature=0.0, logits_processor=processors)) != plain
    assert len(calls) == 6
    prompt = llama.tokenize(COUNT.encode())
    short = package.StoppingCriteriaList([lambda ids, logits: len(ids) >= len(prompt) + 3])
    done = llama(COUNT, max_tokens=12, temperature=0.0, stopping_criteria=short)
    assert done["choices"][0]["finish_reason"] == "stop" and plain.startswith(text_of(done)) and text_of(done)
    least = package.LogitsProcessorList([package.llama.MinTokensLogitsProcessor(4, llama.token_eos())])
    bias = {llama.token_eos(): 100.0}
    ended = llama(COUNT, max_tokens=12, temperature=0.0, logit_bias=bias)
    held = llama(COUNT, max_tokens=12, temperature=0.0, logit_bias=bias, logits_processor=least)
    assert ended["usage"]["completion_tokens"] == 0 or text_of(ended) == ""
    assert held["usage"]["completion_tokens"] >= 4


def test_low_level_loop(llama: Any) -> None:
    llama.reset()
    prompt = llama.tokenize(COUNT.encode())
    llama.eval(prompt)
    assert llama.n_tokens == len(prompt)
    first = llama.sample(temp=0.0)
    written = []
    for token in llama.generate(prompt, temp=0.0):
        written.append(token)
        if len(written) == 4:
            break
    assert written[0] == first and llama.detokenize(written).startswith(b" 6,")


def test_states(llama: Any) -> None:
    prompt = llama.tokenize(COUNT.encode())
    llama.reset()
    llama.eval(prompt)
    state = llama.save_state()
    assert state.n_tokens == len(prompt) and state.llama_state_size > 0
    llama.reset()
    llama.eval(prompt[:2])
    llama.load_state(state)
    assert llama.n_tokens == len(prompt)
    assert text_of(llama(COUNT, max_tokens=4, temperature=0.0)).startswith(" 6,")


@pytest.mark.parametrize("kind", ["LlamaRAMCache", "LlamaDiskCache"])
def test_caches(kind: str, llama: Any, tmp_path: Path) -> None:
    cache: Any = getattr(package, kind, None) or getattr(importlib.import_module(f"{PACKAGE}.llama_cache"), kind)
    kept = cache(capacity_bytes=1 << 28) if kind == "LlamaRAMCache" else cache(str(tmp_path), capacity_bytes=1 << 28)
    assert isinstance(kept, getattr(package, "BaseLlamaCache"))  # noqa: B009
    llama.set_cache(kept)
    assert llama.cache is kept
    try:
        wanted = text_of(llama(COUNT, max_tokens=4, temperature=0.0))
        assert kept.cache_size > 0
        llama("Something else entirely", max_tokens=2, temperature=0.0)
        prompt = llama.tokenize(COUNT.encode())
        assert prompt in kept
        assert text_of(llama(COUNT, max_tokens=4, temperature=0.0)) == wanted
        with pytest.raises(KeyError):
            kept[[llama.n_vocab() - 1]]
    finally:
        llama.set_cache(None)


def test_a_small_cache_keeps_what_was_used_last(llama: Any) -> None:
    kept = package.LlamaRAMCache()
    llama.set_cache(kept)
    try:
        llama(COUNT, max_tokens=2, temperature=0.0)
        kept.capacity_bytes = int(1.5 * kept.cache_size)
        llama("Something else entirely, " * 3, max_tokens=2, temperature=0.0)
        assert len(kept.cache_state) == 1
        assert llama.tokenize(b"Something else") in kept and llama.tokenize(COUNT.encode()) not in kept
    finally:
        llama.set_cache(None)


def test_embeddings(model_path: str) -> None:
    llama = package.Llama(
        model_path=model_path, embedding=True, pooling_type=package.LLAMA_POOLING_TYPE_MEAN, n_ctx=256, n_threads=1,
        verbose=False,
    )  # fmt: skip
    assert llama.pooling_type() == package.LLAMA_POOLING_TYPE_MEAN
    texts = ["The cat sits on the mat.", "A cat is on a mat.", "Stocks fell sharply on Monday."]
    found = llama.create_embedding(texts)
    assert found["object"] == "list" and [one["index"] for one in found["data"]] == [0, 1, 2]
    assert found["usage"]["prompt_tokens"] == sum(len(llama.tokenize(text.encode())) for text in texts)
    vectors = np.array([one["embedding"] for one in found["data"]])
    assert vectors.shape == (3, llama.n_embd())
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    single, count = llama.embed(texts[0], normalize=True, return_count=True)
    assert (
        count == len(llama.tokenize(texts[0].encode()))
        and abs(np.linalg.norm(single) - 1) <= 8 * np.finfo(np.float32).eps
    )
    # llama.cpp keeps keys and values in float16, and rounds a text alone otherwise than one of several.
    assert abs(np.dot(single, unit[0]) - 1) <= np.finfo(np.float16).eps
    near, far = np.dot(unit[0], unit[1]), np.dot(unit[0], unit[2])
    assert near > far


def test_embeddings_of_every_token(model_path: str) -> None:
    llama = package.Llama(model_path=model_path, embedding=True, n_ctx=64, n_threads=1, verbose=False)
    text = "Hello world"
    assert np.array(llama.embed(text)).shape == (len(llama.tokenize(text.encode())), llama.n_embd())


def test_a_pickled_copy(model_path: str) -> None:
    words = package.Llama(model_path=model_path, vocab_only=True, verbose=False)
    again = pickle.loads(pickle.dumps(words))
    assert again.tokenize(b"Hello world") == words.tokenize(b"Hello world")


def test_what_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"\d+"):
        llama("word " * 1200, max_tokens=4)
    with pytest.raises(ValueError, match="does not exist"):
        package.Llama(model_path="/nowhere/model.gguf", verbose=False)
