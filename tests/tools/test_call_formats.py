"""Calls read back: published examples of every form, and random calls in random pieces."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrt.results import ToolCall
from slimrt.tools.formats import FORMATS, SMOLLM2, Format
from slimrt.tools.parser import Answer, Arguments, CallEnded, CallParser, CallStarted, TextDelta, Thinking
from slimrt.tools.tool import tools_of

ALL = {form.name: form for form in (*FORMATS, SMOLLM2)}
ANYTHING = {"type": "object", "properties": {}}
TEXTS = {"type": "object", "properties": {name: {"type": "string"} for name in ("code", "markup", "text")}}
TOOLS = tools_of(
    [
        *({"name": name, "parameters": ANYTHING} for name in ("special_function", "special_function_with_opt", "add")),
        *({"name": name, "parameters": TEXTS} for name in ("python", "html", "get_age", "get_current_weather", "note")),
    ]
)
CALL = [("special_function", {"arg1": 1})]
BOTH = [*CALL, ("special_function_with_opt", {"arg1": 1, "arg2": 2})]
PLACE = {"city": "San Francisco", "state": "CA", "unit": "celsius"}
SUM = ("add", {"a": 3.5, "b": 4})
CODER = "<function=special_function>\n<parameter=arg1>\n1\n</parameter>\n</function>\n</tool_call>"
CODE = 'def hello():\n    print("Hello, world!")\n\nhello()'

# Each example says where it is from: llama.cpp's tests/test-chat.cpp, vLLM's tests of its Mistral parser
# (test_mistral_tool_parser.py), or the model's own documentation.
LLAMA_CPP: list[tuple[str, str, str, list[Any]]] = [
    ("hermes", '<tool_call>\n{"name": "special_function", "arguments": {"arg1": 1}}</tool_call>', "", CALL),
    (
        "hermes",
        'Hello, world!\nWhat\'s up?<tool_call>\n{"name": "special_function", "arguments": {"arg1": 1}}</tool_call>',
        "Hello, world!\nWhat's up?",
        CALL,
    ),
    ("hermes", '<tool_call>\n{"name": "special_function", "arguments": {"arg1": 1}}\n</tool_call>', "", CALL),
    (
        "mistral-list",
        '[TOOL_CALLS][{"name": "special_function", "arguments": {"arg1": 1}, "id": "123456789"}]',
        "",
        CALL,
    ),
    ("mistral-id", '[TOOL_CALLS]special_function[CALL_ID]123456789[ARGS]{"arg1": 1}', "", CALL),
    (
        "mistral-id",
        '[TOOL_CALLS]special_function[CALL_ID]000000001[ARGS]{"arg1": 1}'
        '[TOOL_CALLS]special_function_with_opt[CALL_ID]000000002[ARGS]{"arg1": 1, "arg2": 2}',
        "",
        BOTH,
    ),
    ("mistral", '[TOOL_CALLS]special_function[ARGS]{"arg1":1}', "", CALL),
    (
        "mistral",
        'Hello, world!\nWhat\'s up?[TOOL_CALLS]special_function[ARGS]{"arg1": 1}',
        "Hello, world!\nWhat's up?",
        CALL,
    ),
    ("functionary-3.1", '<function=special_function>{"arg1": 1}</function>', "", CALL),
    ("functionary-3.2", 'special_function\n{"arg1": 1}', "", CALL),
    ("functionary-3.2", "all\nHello, world!\nWhat's up?", "Hello, world!\nWhat's up?", []),
    ("qwen3-coder", f"<tool_call>\n{CODER}", "", CALL),
    ("qwen3-coder", CODER, "", CALL),
    ("qwen3-coder", f"Let me call it.\n{CODER}", "Let me call it.\n", CALL),
    (
        "qwen3-coder",
        f"{CODER}\n<tool_call>\n<function=special_function_with_opt>\n<parameter=arg1>\n1\n</parameter>\n"
        "<parameter=arg2>\n2\n</parameter>\n</function>\n</tool_call>",
        "",
        BOTH,
    ),
    (
        "qwen3-coder",
        f"<tool_call>\n<function=python>\n<parameter=code>\n{CODE}\n</parameter>\n</function>\n</tool_call>",
        "",
        [("python", {"code": CODE})],
    ),
    (
        "qwen3-coder",
        "<tool_call>\n<function=html>\n<parameter=markup>\n<html>\n <head>\n  <title>Hello!</title>\n </head>\n"
        "</html>\n</parameter>\n</function>\n</tool_call>",
        "",
        [("html", {"markup": "<html>\n <head>\n  <title>Hello!</title>\n </head>\n</html>"})],
    ),
]
VLLM: list[tuple[str, str, str, list[Any]]] = [
    ("mistral-list", "This is a test", "This is a test", []),
    ("mistral-list", '[TOOL_CALLS][{"name": "add", "arguments":{"a": 3.5, "b": 4}}]', "", [SUM]),
    (
        "mistral-list",
        '[TOOL_CALLS] [{"arguments":{"city": "San Francisco", "state": "CA", "unit": "celsius"}, '
        '"name": "get_current_weather"}]',
        "",
        [("get_current_weather", PLACE)],
    ),
    (
        "mistral-list",
        '[TOOL_CALLS] [{"arguments":{"name": "John Doe"}, "name": "get_age"}]',
        "",
        [("get_age", {"name": "John Doe"})],
    ),
    (
        "mistral-list",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 3.5, "b": 4}}, {"name": "get_current_weather", '
        '"arguments":{"city": "San Francisco", "state": "CA", "unit": "celsius"}}]',
        "",
        [SUM, ("get_current_weather", PLACE)],
    ),
    ("mistral-list", 'Hello[TOOL_CALLS] [{"name": "add", "arguments":{"a": 3.5, "b": 4}}]', "Hello", [SUM]),
    ("mistral-list", '[TOOL_CALLS]  [ {"name":"add" , "arguments" : {"a": 3.5, "b": 4} } ]', "", [SUM]),
]  # fmt: skip
DOCUMENTED: list[tuple[str, str, str, list[Any]]] = [
    # Granite 3's prompt guide; Meta's page on Llama 3.1 (with and without the tag); SmolLM2's and Cohere's model cards.
    ("granite-3", '<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]', "", [("add", {"a": 1})]),
    ("llama-3", '{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    ("llama-3", '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    (
        "smollm2",
        '<tool_call>[\n{"name": "add", "arguments": {"a": "1"}},\n{"name": "add", "arguments": {}}\n]</tool_call>',
        "",
        [("add", {"a": "1"}), ("add", {})],
    ),
    ("smollm2", "<tool_call>[]</tool_call>", "", []),
    (
        "command-r7b",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "add", "parameters": {"a": 1}}\n]<|END_ACTION|>',
        "",
        [("add", {"a": 1})],
    ),
]


def read(form: Format, pieces: list[str], thinking: Thinking = "no") -> Answer:
    parser, answer = CallParser(form, TOOLS, thinking), Answer()
    for piece in pieces:
        answer.take(parser.push(piece))
    answer.take(parser.finish())
    return answer


def values(answer: Answer) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


@pytest.mark.parametrize(("name", "written", "text", "calls"), [*LLAMA_CPP, *VLLM, *DOCUMENTED])
def test_published_examples(name: str, written: str, text: str, calls: list[Any]) -> None:
    for pieces in ([written], list(written), [written[at : at + 7] for at in range(0, len(written), 7)]):
        answer = read(ALL[name], pieces)
        assert (answer.text, values(answer), answer.cut) == (text, calls, False)


NASTY = [
    "", "\n", "Zü\n<x> 日本 😀", 'a"b\\', "}{[]", "</tool_call>", "<tool_call>", "[TOOL_CALLS]", ">>>add\n", "</think>",
    "<parameter=", "</parameter>", "x\n\n", "</function>", "<|tool_call|>", '{"name": "add", "arguments": {}}',
]  # fmt: skip
PLAIN = ["", "Hello\n", "a < b <to", "x [TOOL", "{", "[1, 2]", "think <think> no", ">>> x = 1", '"name"']


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_calls_in_random_pieces(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(sorted(ALL)).map(ALL.__getitem__))
    word = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    value = word | st.integers() | st.booleans() | st.lists(word, max_size=2) | st.dictionaries(word, word, max_size=2)
    texts = st.dictionaries(st.sampled_from(["code", "markup", "text"]), word, max_size=3).map(lambda v: ("note", v))
    names = st.sampled_from(["arg1", "arg2", "x-y"])
    others = st.dictionaries(names, value.filter(lambda v: not isinstance(v, str)), max_size=3).map(
        lambda v: ("add", v)
    )
    made = data.draw(st.lists(texts | others, max_size=1 if form.single else 3))
    calls = [ToolCall("7" if form.id.startswith("[0") else "abcdefgh1", name, json.dumps(v)) for name, v in made]
    text = "" if form.single and calls else data.draw(st.sampled_from(PLAIN))
    thought = data.draw(st.sampled_from(["", "<think>why <tool_call> <function= [TOOL_CALLS] </think>\n"]))
    written = text + (form.write(calls) if calls else "")
    if form.given:
        thought, begun = "", form.text_mark + text if text or not calls else ""
        written = (begun + (form.write(calls) if calls else "")).removeprefix(form.given)
    whole, rng = thought + written, data.draw(st.randoms())
    answer = read(form, pieces_of(whole, rng), "may")
    assert (answer.text, values(answer)) == (thought + text, made), whole


def pieces_of(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        count = rng.choice([1, 1, 2, 3, 5, 8, 40])
        pieces.append(text[:count])
        text = text[count:]
    return pieces


@pytest.mark.parametrize("name", sorted(ALL))
def test_no_character_of_what_is_no_call_is_lost(name: str) -> None:
    form = ALL[name]
    whole = form.write([ToolCall("123456789", "add", '{"a": {"b": [1, "}"]}}')])
    if form.given:
        whole = whole.removeprefix(form.given)
    full = read(form, [whole])
    assert values(full) == [("add", {"a": {"b": [1, "}"]}})] and not full.text
    for cut in range(len(whole)):
        answer = read(form, list(whole[:cut]))
        assert answer.text == ("" if answer.calls else whole[:cut]), cut
    other = whole.replace("add", "sub")  # which nobody offers
    assert read(form, list(other)).text == other and not read(form, list(other)).calls
    for broken in ("[TOOL_CALLS] not json at all", "<tool_call>{'name': 1}</tool_call> x", "<function=add", "{}", "["):
        assert read(form, list(broken)).text == broken.removeprefix(form.text_mark)
    assert not read(form, [whole], "open").calls  # a thought


def test_a_stream_tells_names_first_and_arguments_in_pieces() -> None:
    parser = CallParser(ALL["hermes"], TOOLS)
    told = [
        parser.push(piece) for piece in ("Hi <to", 'ol_call>\n{"name": "add", "argum', 'ents": {"a"', ": 1}", "}\n</")
    ]
    assert told[0] == [TextDelta("Hi ")] and told[1] == []
    started, first = told[2]
    assert isinstance(started, CallStarted) and (started.index, started.name) == (0, "add") and len(started.id) == 9
    assert first == Arguments(0, '{"a"') and told[3] == [Arguments(0, ": 1}"), CallEnded(0)]
    assert told[4] == [] and parser.finish() == []


def test_a_call_that_a_limit_cuts_is_text() -> None:
    parser, answer = CallParser(ALL["hermes"], TOOLS), Answer()
    written = 'Hi<tool_call>\n{"name": "add", "arguments": {"a": "x'
    answer.take(parser.push(written))
    answer.take(parser.finish())
    assert (answer.text, answer.calls, answer.cut) == (written, [], True)
