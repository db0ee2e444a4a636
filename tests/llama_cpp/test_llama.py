"""``slimrt.Llama`` beside ``llama_cpp.Llama``: the same parameters, the same answers, and programs written for it."""

from __future__ import annotations

import inspect
import json
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimrt
from slimrt.errors import ContextError, FetchError, SettingError
from slimrt.hub import store
from slimrt.llama_cpp import LlamaGrammar, missing
from slimrt.llama_cpp.llama import LogitsProcessorList, StoppingCriteriaList
from slimrt.memory.plan import available_memory
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.sampler import log_softmax
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import logits_apart

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens/llama_compat/llama_cpp.json").read_text())
TALK = [{"role": "user", "content": "hello"}]
ANY_TEXT = object()


@pytest.fixture(scope="module")
def real(default_model: Path) -> slimrt.Llama:
    return slimrt.Llama(str(default_model), n_ctx=256, verbose=False)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama") / "tiny.gguf", seed=3)


@pytest.fixture
def tiny(tiny_path: Path) -> slimrt.Llama:
    return slimrt.Llama(tiny_path, n_ctx=64, seed=5)


@pytest.fixture
def scored(tiny_path: Path) -> slimrt.Llama:
    return slimrt.Llama(tiny_path, n_ctx=64, logits_all=True)


# -- against llama_cpp -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", GOLDEN["signatures"])
def test_every_parameter_is_taken_with_the_same_default(method: str) -> None:
    theirs = GOLDEN["signatures"][method]
    ours = inspect.signature(getattr(slimrt.Llama, method)).parameters
    assert [name for name in theirs if name not in ours] == []
    assert list(theirs) == [name for name in ours if name in theirs]  # positional calls
    for name, default in theirs.items():
        own = ours[name].default
        if own is not inspect.Parameter.empty:
            assert (list(own) if isinstance(own, tuple) else own) == default, name
        else:
            assert default is None, name


def shape(value: Any, key: str = "") -> Any:
    """Keys, nesting and types of an answer; texts that are keys (of top_logprobs) count as any text."""
    if isinstance(value, dict):
        if value and all(isinstance(item, float) for item in value.values()):
            return {ANY_TEXT: float}
        return {name: shape(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return value if key in ("object", "role", "finish_reason", "index") else type(value)


def ids_aside(answer: dict[str, Any]) -> dict[str, Any]:
    assert answer["id"].startswith(("cmpl-", "chatcmpl-"))
    assert isinstance(answer["created"], int)
    return {key: value for key, value in answer.items() if key not in ("id", "created", "model")}


def says_something(choice: dict[str, Any]) -> bool:
    return choice["finish_reason"] is not None or choice["logprobs"] is not None


def without_numbers(value: Any) -> Any:
    """``value`` without log-probabilities (llama.cpp's are those of rounded activations) and their order."""
    if isinstance(value, dict):
        return {key: without_numbers(item) for key, item in value.items() if not isinstance(item, float)}
    if isinstance(value, list):
        return [without_numbers(item) for item in value if not isinstance(item, float)]
    return value


@pytest.mark.parametrize("call", GOLDEN["calls"], ids=lambda call: f"{call['method']}-{call['arguments']}"[:90])
def test_answers_as_llama_cpp(real: slimrt.Llama, call: dict[str, Any]) -> None:
    answer = getattr(real, call["method"])(**call["arguments"])
    answers = list(answer) if call["arguments"].get("stream") else [answer]
    expected = call["answer"] if call["arguments"].get("stream") else [call["answer"]]
    # llama_cpp sends a last piece of no length where a stop string cut all of it away.
    expected = [item for item in expected if item["choices"][0].get("text") != "" or says_something(item["choices"][0])]
    assert [shape(item) for item in answers] == [shape(item) for item in expected]
    assert len({item["id"] for item in answers}) == 1
    assert answers[0]["model"] == call["arguments"].get("model", real.model_path)
    json.dumps(answers)
    if call["robust"]:
        assert [without_numbers(ids_aside(a)) for a in answers] == [without_numbers(ids_aside(e)) for e in expected]


def test_metadata_and_numbers_as_llama_cpp(real: slimrt.Llama) -> None:
    assert real.metadata == GOLDEN["metadata"]
    assert {name: getattr(real, name)() for name in GOLDEN["numbers"]} == GOLDEN["numbers"]


def test_tokens_as_llama_cpp(real: slimrt.Llama) -> None:
    for case in GOLDEN["tokens"]:
        ids = real.tokenize(case["text"].encode(), special=case["special"])
        assert ids == case["ids"]
        assert real.detokenize(ids).decode() == case["plain"]
        assert real.detokenize(ids, special=True).decode() == case["shown"]
    tokenizer = real.tokenizer()
    assert tokenizer.decode(tokenizer.encode("<|im_start|>ä図")) == "ä図"
    assert real.tokenizer().encode("<|im_start|>")[0] == 1


def test_logprobs_agree_with_llama_cpp(real: slimrt.Llama, default_model: Path) -> None:
    """Both round a token's activations to int8, so both may err as a naive computation of that precision does."""
    pytest.importorskip("numba")
    from tests.rounded_ops import RoundedOps, read_and_decoded, session_on

    call = next(call for call in GOLDEN["calls"] if call["arguments"].get("logprobs") == 2)
    ours = real.create_completion(**call["arguments"])["choices"][0]["logprobs"]
    theirs = call["answer"]["choices"][0]["logprobs"]
    ids = real.tokenize(call["arguments"]["prompt"].encode())
    tokens = [real.tokenize(piece.encode(), add_bos=False)[0] for piece in theirs["tokens"]]
    exact, naive = (
        np.stack([log_softmax(row) for row in read_and_decoded(session, [*ids, *tokens[:-1]], len(ids))])
        for session in (session_on(ops, default_model, 256) for ops in (NumpyOps(1), RoundedOps()))
    )
    unit = np.sqrt(np.mean(np.square(naive - exact)))  # of single tokens, of which there are three
    for found in (ours["token_logprobs"], theirs["token_logprobs"]):
        assert np.abs(found - exact[range(len(tokens)), tokens]).max() <= 4 * unit


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
    assert part["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
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


# -- the running context ---------------------------------------------------------------------------------------------


def test_eval_and_sample_by_hand_write_what_a_completion_writes(tiny: slimrt.Llama) -> None:
    expected = text_of(tiny("hello world", max_tokens=8, temperature=0))
    tiny.reset()
    tiny.eval(tiny.tokenize(b"hello world"))
    tokens = []
    while len(tokens) < 8 and (token := tiny.sample(temp=0)) != tiny.token_eos():
        tokens.append(token)
        tiny.eval([token])
    assert tiny.detokenize(tokens).decode() == expected
    assert tiny.n_tokens == len(tiny.tokenize(b"hello world")) + len(tokens)
    assert list(tiny.eval_tokens)[-len(tokens) :] == tokens


def test_generate_reads_what_is_sent(tiny: slimrt.Llama) -> None:
    plain = tiny.generate([70, 71], temp=0)
    first = next(plain)
    tokens = tiny.generate([70, 71], temp=0)
    assert next(tokens) == first
    assert tokens.send([72, 73]) == next(tiny.generate([70, 71, first, 72, 73], temp=0))
    tiny.reset()
    tiny.eval([70])
    assert next(tiny.generate([71], temp=0, reset=False)) == first
    assert list(tiny.generate([70, 71], temp=0, stopping_criteria=lambda ids, logits: len(ids) >= 5))[:1] == [first]


@pytest.fixture
def numpy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """For comparisons of tokens read one by one with tokens read together: elsewhere the two differ in precision."""
    monkeypatch.setattr("slimrt.ops.backend.fast_features", lambda: (None, "NumPy: for this test"))


def test_scores_of_single_tokens_are_their_logits(scored: slimrt.Llama) -> None:
    """On whatever computes here, which may have a way of its own to read one token."""
    scored.eval([70, 71, 72])
    for count, token in enumerate([73, 74, 75], 4):
        scored.eval([token])
        assert np.array_equal(scored._scores[-1], scored._current.logits)
        assert scored.sample(temp=0) == scored.sample(temp=0, idx=count - 1) == int(scored.scores[count - 1].argmax())
    assert np.abs(scored.scores[:6]).max(axis=1).min() > 0
    scored.n_tokens = 4
    scored.eval([90])
    assert np.array_equal(scored._scores[-1], scored._current.logits)


@pytest.mark.usefixtures("numpy_only")
def test_scores_are_the_logits_after_every_token(scored: slimrt.Llama, tiny_path: Path) -> None:
    ids = [70, 71, 72, 73, 74]
    scored.eval(ids[:3])
    scored.eval(ids[3:])
    assert scored.scores.shape == (64, scored.n_vocab()) and scored._scores.shape == (5, scored.n_vocab())
    llm = slimrt.load(tiny_path, ctx=64, prune="off")
    for length in range(1, 6):
        assert np.abs(scored._scores[length - 1] - llm.logits(ids[:length])).max() <= logits_apart(llm, ids)
    assert len(scored.eval_logits) == 5
    assert scored.sample(temp=0, idx=1) == int(scored.scores[1].argmax())


def test_without_logits_all_only_the_last_logits_are_kept(tiny: slimrt.Llama) -> None:
    assert len(tiny.eval_logits) == 0
    tiny.eval([70, 71])
    assert len(tiny.eval_logits) == 1 and len(tiny.eval_logits[0]) == tiny.n_vocab()
    with pytest.raises(SettingError, match="logits_all=True"):
        tiny.scores  # noqa: B018


@pytest.mark.usefixtures("numpy_only")
def test_going_back_and_states(tiny: slimrt.Llama, scored: slimrt.Llama, tiny_path: Path) -> None:
    for llama in (tiny, scored):
        llama.eval([70, 71, 72, 73])
        kept, after = llama.save_state(), list(llama.eval_logits)[-1]
        llama.n_tokens = 2
        assert llama._input_ids.tolist() == [70, 71] and llama.input_ids.shape == (64,)
        with pytest.raises(SettingError, match="eval before sample"):
            llama.sample()
        llama.eval([80])
        assert list(llama.eval_logits)[-1] != after
        for state in (kept, pickle.loads(pickle.dumps(kept))):
            llama.load_state(state)
            assert llama.n_tokens == 4 and list(llama.eval_logits)[-1] == after
            llama.eval([75])  # must not reach into the state
        llama.n_tokens = 3
        llama.eval([73])
        again = np.array(list(llama.eval_logits)[-1])
        assert np.abs(again - after).max() <= logits_apart(llama._model, [70, 71, 72, 73])
        with pytest.raises(SettingError, match=r"0\.\.4"):
            llama.n_tokens = 9


def test_a_state_too_long_is_refused(tiny: slimrt.Llama, tiny_path: Path) -> None:
    tiny.eval(range(70, 100))
    with pytest.raises(ContextError, match="30 tokens, the context 16"):
        slimrt.Llama(tiny_path, n_ctx=16).load_state(tiny.save_state())


def test_the_context_does_not_overflow(tiny: slimrt.Llama) -> None:
    tiny.eval([70] * 60)
    with pytest.raises(ValueError, match="the context holds 64"):
        tiny.eval([70] * 5)
    assert tiny.n_tokens == 60
    tiny.eval([])
    with pytest.raises(ContextError):
        list(tiny.generate([70] * 62, temp=0, logits_processor=None))


# -- loading ---------------------------------------------------------------------------------------------------------


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


# -- what is missing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["slimrt", "slimrt.llama_cpp"])
def test_missing_names_say_why(module: str) -> None:
    for name, reason in missing.NAMES.items():
        with pytest.raises(ImportError) as caught:
            exec(f"from {module} import {name}")
        assert str(caught.value) == f"{name}: slimrt has none: {reason}"
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        exec(f"from {module} import Nonsense")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import slimrt.llama_cpp.server", "slimrt serve"),
        ("import slimrt.llama_cpp.server.app", "slimrt serve"),
        ("from slimrt.llama_cpp.llama_chat_format import Llava15ChatHandler", "give chat_format"),
        ("from slimrt.llama_cpp.llama_types import ChatCompletion", "plain dicts"),
        ("import slimrt.llama_cpp.llama_cpp", "no C interface"),
        ("from slimrt.llama_cpp import llama_decode", "no C interface"),
        ("from slimrt.llama_cpp import Llava15ChatHandler", "text only"),
        ("from slimrt.llama_cpp.llama_tokenizer import LlamaHFTokenizer", "come from the model file"),
    ],
)
def test_missing_modules_say_why(line: str, reason: str) -> None:
    with pytest.raises(ImportError, match=f"slimrt has none: .*{reason}"):
        exec(line)


def test_modules_have_llama_cpps_names() -> None:
    for name, module in {
        "LlamaDiskCache": "llama_cache", "LlamaGrammar": "llama_grammar", "LlamaTokenizer": "llama_tokenizer",
        "LlamaPromptLookupDecoding": "llama_speculative", "Llama": "llama", "StoppingCriteriaList": "llama",
    }.items():  # fmt: skip
        exec(f"from slimrt.llama_cpp.{module} import {name}")
    with pytest.raises(ModuleNotFoundError):
        exec("import slimrt.llama_cpp.nonsense")


def test_the_names_of_llama_cpp_are_there() -> None:
    import slimrt.llama_cpp as package

    for name in package.__all__:
        assert getattr(package, name).__name__ == ("LlamaRAMCache" if name == "LlamaCache" else name)
    assert (package.LLAMA_POOLING_TYPE_MEAN, package.LLAMA_ROPE_SCALING_TYPE_YARN, package.GGML_TYPE_Q8_0) == (1, 2, 8)


def test_missing_methods_say_why(tiny: slimrt.Llama) -> None:
    for name, reason in missing.METHODS.items():
        with pytest.raises(AttributeError) as caught:
            getattr(tiny, name)
        assert str(caught.value) == f"Llama.{name}: {reason}"
    with pytest.raises(AttributeError, match="'Llama' object has no attribute 'nonsense'"):
        tiny.nonsense  # noqa: B018
