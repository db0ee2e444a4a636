"""``slimrt.Llama`` beside ``llama_cpp.Llama``: the same parameters, answers, and names to import."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimrt
from slimrt.llama_cpp import missing
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.sampler import log_softmax

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens/llama_compat/llama_cpp.json").read_text())
ANY_TEXT = object()


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
