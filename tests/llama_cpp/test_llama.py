"""Completions and chats of ``slimrt.Llama``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimrt
from slimrt.errors import SettingError
from slimrt.llama_cpp import LlamaGrammar
from slimrt.llama_cpp.llama import LogitsProcessorList, StoppingCriteriaList
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import logprobs_apart

TALK = [{"role": "user", "content": "hello"}]


# -- completions -----------------------------------------------------------------------------------------------------


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["text"]


def test_a_stream_adds_up_to_the_whole(tiny: slimrt.Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.2, "seed": 9}
    whole = tiny("hello world", **options)
    for logprobs in (None, 1):
        chunks = list(tiny("hello world", stream=True, logprobs=logprobs, **options))
        assert "".join(text_of(chunk) for chunk in chunks) == text_of(whole)
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_seeds(tiny: slimrt.Llama, tiny_path: Path) -> None:
    def text(llama: slimrt.Llama, **options: Any) -> str:
        return text_of(llama("hello", max_tokens=12, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, **options))

    assert text(tiny, seed=1) == text(tiny, seed=1) != text(tiny, seed=2)
    tiny.set_seed(7)
    first = [text(tiny), text(tiny)]
    assert first[0] != first[1]
    tiny.set_seed(7)
    assert [text(tiny), text(tiny)] == first
    fresh = slimrt.Llama(tiny_path, n_ctx=64)
    assert text(fresh) != text(fresh) and text(fresh, seed=-1) != text(fresh, seed=-1)


def test_stop_strings_never_show(real: slimrt.Llama) -> None:
    for stop in (" 7, 8", ["zzz", ", 8"]):
        options: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "stop": stop}
        whole = real("1, 2, 3, 4, 5,", **options)
        chunks = list(real("1, 2, 3, 4, 5,", stream=True, **options))
        assert (
            text_of(whole)
            == "".join(text_of(chunk) for chunk in chunks)
            == " 6, 7, 8, 9".split(stop if isinstance(stop, str) else ", 8")[0]
        )
        assert whole["choices"][0]["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_answer_ends_with_the_context(tiny: slimrt.Llama) -> None:
    ban = {tiny.token_eos(): -math.inf}
    for unlimited in (None, -1, 0, 1000):
        answer = tiny("hello world", max_tokens=unlimited, temperature=0, logit_bias=ban)
        assert answer["usage"]["total_tokens"] == 64
        assert answer["choices"][0]["finish_reason"] == "length"
    with pytest.raises(ValueError, match=r"64 tokens.*context window is 64"):
        tiny([5] * 64)
    assert tiny([5] * 63, max_tokens=9, logit_bias=ban)["usage"]["completion_tokens"] == 1


def test_logit_bias_takes_keys_as_text(tiny: slimrt.Llama) -> None:
    assert tiny("hello", max_tokens=3, temperature=0, logit_bias={"70": 100})["usage"]["completion_tokens"] == 3
    assert (
        text_of(tiny("hello", max_tokens=3, temperature=0, logit_bias={"70": 100}))
        == tiny.detokenize([70] * 3).decode()
    )
    with pytest.raises(SettingError, match="token id -> number"):
        tiny("hello", logit_bias={"x": 1})


def test_processors_and_criteria(tiny: slimrt.Llama) -> None:
    lengths = []

    def only_seventy(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        lengths.append(len(ids))
        scores[np.arange(len(scores)) != 70] = -np.inf
        return scores

    def four_read(ids: np.ndarray, logits: np.ndarray) -> bool:
        return len(ids) >= read + 4

    read = len(tiny.tokenize(b"hello"))
    seventy = tiny.detokenize([70]).decode()
    for processors in (LogitsProcessorList([only_seventy]), [only_seventy], only_seventy):
        lengths.clear()
        answer = tiny(
            "hello", max_tokens=10, logits_processor=processors, stopping_criteria=StoppingCriteriaList([four_read])
        )
        assert text_of(answer) == seventy * 4
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert lengths == [read + n for n in range(5)]
    chunks = tiny(
        "hello",
        max_tokens=10,
        logits_processor=only_seventy,
        stopping_criteria=four_read,
        stop=seventy * 9,
        stream=True,
    )
    assert "".join(text_of(chunk) for chunk in chunks) == seventy * 4  # also what was held back


def test_penalties_look_at_generated_tokens_only(tiny: slimrt.Llama) -> None:
    free = [token for token, _ in zip(tiny.generate([70, 71, 72], temp=0), range(1), strict=False)]
    prompt = [*free, 71, 72]
    first = next(tiny.generate(prompt, temp=0))
    again = [first, 71, 72]
    assert next(tiny.generate(again, temp=0, repeat_penalty=100.0)) == next(tiny.generate(again, temp=0))
    many = [token for token, _ in zip(tiny.generate(again, temp=0, presence_penalty=1e6), range(20), strict=False)]
    assert len(set(many)) == 20


def test_echo_and_logprobs(scored: slimrt.Llama) -> None:
    ids = scored.tokenize(b"hello world")
    answer = scored("hello world", max_tokens=3, temperature=0, echo=True, logprobs=2)["choices"][0]
    part = answer["logprobs"]
    assert answer["text"].startswith("hello world")
    assert "".join(part["tokens"]) == answer["text"]
    assert part["text_offset"] == [len("".join(part["tokens"][:at])) for at in range(len(ids) + 3)]
    assert part["token_logprobs"][0] is None and part["top_logprobs"][0] is None
    scored.reset()
    scored.eval(ids)
    table = scored.logits_to_logprobs(scored._scores)
    expected = [table[at, ids[at + 1]] for at in range(len(ids) - 1)]
    assert part["token_logprobs"][1 : len(ids)] == pytest.approx(
        expected, rel=0, abs=logprobs_apart(scored._model, ids)
    )
    assert all(part["tokens"][at] in part["top_logprobs"][at] for at in range(1, len(ids) + 3))


def test_echo_of_a_prompt_of_tokens(tiny: slimrt.Llama) -> None:
    ids = tiny.tokenize(b"hello world")
    assert text_of(tiny(ids, max_tokens=2, echo=True)).startswith("hello world")
    with pytest.raises(SettingError, match="logits_all=True"):
        tiny("hello", echo=True, logprobs=1)


def test_an_empty_prompt_starts_from_bos(tiny: slimrt.Llama) -> None:
    assert tiny("", max_tokens=2)["usage"]["prompt_tokens"] == 1
    assert tiny.input_ids[0] == tiny.token_bos()


# -- chats -----------------------------------------------------------------------------------------------------------


def test_chat_formats(tiny_path: Path, tmp_path: Path) -> None:
    def prompt(**options: Any) -> str:
        llama = slimrt.Llama(tiny_path, n_ctx=128, **options)
        llama.create_chat_completion(TALK, max_tokens=1)
        return llama.detokenize(llama._input_ids.tolist(), special=True).decode()

    assert prompt() == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(chat_format="chatml") == prompt()
    assert prompt(chat_format="llama-2") == "<|endoftext|>[INST] hello [/INST]"
    assert prompt(chat_format="{{ messages[0].content }}!") == "hello!"
    assert slimrt.Llama(tiny_path).chat_format == "chat_template.default"
    with pytest.raises(SettingError, match=r"chat_format 'nothing': must be one of .*chatml.*llama-2"):
        slimrt.Llama(tiny_path, chat_format="nothing")
    bare = write_tiny_llama(tmp_path / "bare.gguf", **{"tokenizer.chat_template": None})
    with pytest.raises(SettingError, match="no chat template"):
        slimrt.Llama(bare).create_chat_completion(TALK)
    named = write_tiny_llama(tmp_path / "named.gguf", **{"tokenizer.chat_template.short": "{{ messages[0].role }}"})
    llama = slimrt.Llama(named, chat_format="chat_template.short")
    llama.create_chat_completion(TALK, max_tokens=1)
    assert llama.detokenize(llama._input_ids.tolist()) == b"user"


def test_a_chat_streams_what_it_answers(tiny: slimrt.Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "seed": 4, "temperature": 1.0}
    whole = tiny.create_chat_completion(TALK, **options)["choices"][0]
    chunks: Iterator[dict[str, Any]] = tiny.create_chat_completion(TALK, stream=True, **options)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"} and deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == whole["message"]["content"]


def test_harmless_chat_options_are_taken(tiny: slimrt.Llama) -> None:
    tiny.create_chat_completion(
        TALK, max_tokens=1, tools=[], functions=None, tool_choice="auto", response_format={"type": "text"}, tfs_z=0.5
    )


PLACE = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}
WEATHER = {"name": "weather", "parameters": PLACE}


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"tools": [{"type": "function"}]}, "has the name null"),
        ({"functions": [{"name": "a b"}]}, "1 to 128 letters"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "no tool has this name"),
        ({"tools": [WEATHER], "grammar": LlamaGrammar.from_string('root ::= "a"')}, "tools with a GBNF grammar"),
        ({"mirostat_mode": 3}, "^mirostat_mode="),
    ],
)
def test_chat_options_that_cannot_be_met_are_refused(tiny: slimrt.Llama, option: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says) as error:
        tiny.create_chat_completion(TALK, **option)
    assert "\n" not in str(error.value)


def test_a_chat_calls_tools(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    tiny = slimrt.Llama(write_tiny_llama(tmp_path / "long.gguf", seed=3, ctx=2048), n_ctx=2048)
    how: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_tokens": 200}
    tools = {"tools": [{"type": "function", "function": WEATHER}], "tool_choice": "required"}
    (choice,) = tiny.create_chat_completion(TALK, **tools, **how)["choices"]
    calls = choice["message"]["tool_calls"]
    assert all(len(json.loads(call["function"]["arguments"])["city"]) <= 5 for call in calls)
    assert choice["finish_reason"] in ("tool_calls", "length")
    deltas = [one["choices"][0]["delta"] for one in tiny.create_chat_completion(TALK, **tools, stream=True, **how)]
    told = [call for delta in deltas for call in delta.get("tool_calls", ()) if call["index"] == 0]
    assert told[0]["function"]["name"] == "weather" and deltas[0] == {"role": "assistant"}
    assert "".join(one["function"]["arguments"] for one in told) == calls[0]["function"]["arguments"]
    older = {"functions": [WEATHER], "function_call": {"name": "weather"}}
    (choice,) = tiny.create_chat_completion(TALK, **older, **how)["choices"]
    assert choice["finish_reason"] == "function_call" and choice["message"]["function_call"]["name"] == "weather"
    parts = [one["choices"][0] for one in tiny.create_chat_completion(TALK, **older, stream=True, **how)]
    text = "".join(part["delta"].get("function_call", {}).get("arguments", "") for part in parts)
    assert text == choice["message"]["function_call"]["arguments"] and parts[-1]["finish_reason"] == "function_call"
