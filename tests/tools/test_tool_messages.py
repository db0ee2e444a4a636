"""Tools, calls and results in prompts: which form a template tells, and the same text as Transformers writes."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slimrt.errors import SettingError
from slimrt.text.chat_template import ChatTemplate, Written
from slimrt.tools.messages import ToolForm
from slimrt.tools.tool import tools_of

GOLDENS = Path(__file__).parents[1] / "goldens/chat"
GOLDEN = json.loads((GOLDENS / "transformers_tools.json").read_text())
TOOLS = tools_of(GOLDEN["cases"][4]["extra"]["tools"])

# What each template's model writes, whether the template has a place for tools, how it takes arguments, whether it
# takes several calls in a message, whether answers may begin with thoughts.
FORMS = {
    "qwen2.5": ("hermes", True, "object", True, "no"),
    "qwen3": ("hermes", True, "object", True, "may"),
    "granite-4.0": ("hermes", True, "object", True, "no"),
    "hermes-2-pro": ("hermes", True, "object", True, "no"),
    "qwen3-coder": ("qwen3-coder", True, "object", True, "no"),
    "granite-3.3": ("granite-3", True, "", True, "may"),
    "llama-3.1": ("llama-3", True, "object", False, "no"),
    "llama-3.2": ("llama-3", True, "object", False, "no"),
    "mistral-nemo": ("mistral-list", True, "object", True, "no"),
    "mistral-small-3.2": ("mistral-id", True, "object", True, "no"),
    "ministral-3": ("mistral", True, "object", True, "no"),
    "functionary-3.1": ("functionary-3.1", True, "object", True, "no"),
    "functionary-3.2": ("functionary-3.2", True, "text", True, "no"),
    "command-r7b": ("command-r7b", True, "object", True, "no"),
    "smollm2": ("smollm2", False, "", True, "no"),
    "smollm3": ("hermes", False, "", True, "may"),
    "gemma-2": ("hermes", False, "", True, "no"),
    "phi-3.5": ("hermes", False, "", True, "no"),
    "deepseek-r1": ("hermes", False, "", True, "open"),
    "deepseek-v3.1": ("hermes", False, "", True, "may"),  # its own form is not known
    "gpt-oss": ("hermes", False, "", True, "no"),
}


class Spelling:
    """A tokenizer that keeps texts: ids are the characters, and nothing is a control token but <|tool_call|>."""

    bos_id = None

    def mark_control(self, text: str, mark: str, *, whole: bool) -> str:
        return text.replace("<|tool_call|>", mark + "<|tool_call|>")

    def encode(self, text: str, *, special: bool, add_bos: bool | None, literal: str) -> str:
        return text.replace(literal + "<|tool_call|>", "(text)").replace("<|tool_call|>", "(token)")

    def split_control(self, text: str) -> list[str | int]:
        head, found, tail = text.partition("<|tool_call|>")
        return [part for part in (head, 1 if found else "", tail) if part]

    def token_text(self, id: int) -> str:
        return "<|tool_call|>"


def template(name: str) -> ChatTemplate:
    return ChatTemplate(GOLDEN["day"] + (GOLDENS / f"{name}.jinja").read_text(), GOLDEN["bos"], GOLDEN["eos"])


def prompt(name: str, messages: list[dict[str, Any]], tools: Any = ()) -> Any:
    model = template(name)
    return ToolForm.of(model).prompt(model, Spelling(), messages, tools)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(FORMS))
def test_the_form_is_told_by_what_the_template_writes(name: str) -> None:
    form = ToolForm.of(template(name))
    assert (form.format.name, form.native, form.arguments, form.many, form.thinking) == FORMS[name]


@pytest.mark.parametrize("name", sorted(name for name in FORMS if FORMS[name][1] and FORMS[name][2]))
def test_messages_as_openai_has_them_render_as_in_transformers(name: str) -> None:
    """Arguments are JSON text at OpenAI; Transformers is given objects, or text where the template wants it."""
    compared = 0
    for case, wanted in zip(GOLDEN["cases"], GOLDEN["templates"][name][::2], strict=True):
        called = any(message.get("tool_calls") for message in case["messages"])
        if not (case["extra"].keys() <= {"tools"} and (called or case["extra"])) or isinstance(wanted, str):
            continue
        messages = copy.deepcopy(case["messages"])
        kinds = set()
        for call in (call for message in messages for call in message.get("tool_calls", ())):
            kinds.add(type(call["function"]["arguments"]))
            if not isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if kinds - {str if FORMS[name][2] == "text" else dict}:
            continue
        for message in messages:
            message.pop("name", None)  # OpenAI's clients send the id alone
        text = prompt(name, messages, TOOLS if case["extra"] else ())
        assert [len(text), hashlib.sha256(text.encode()).hexdigest()[:32]] == wanted, text
        compared += 1
    assert compared >= 2


def test_calls_that_a_template_has_no_place_for_are_written_out() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": "<|tool_call|>"}'}}
    talk = [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "3"},
        {"role": "tool", "tool_call_id": "x", "content": "4"},
    ]
    granite = prompt("granite-3.3", talk, TOOLS)
    # The form's own token counts; the one in the arguments, which anybody may have written, is text.
    assert '(token)[{"name": "add", "arguments": {"a": "(text)"}}]<|end_of_text|>' in granite
    assert "<|start_of_role|>tool<|end_of_role|>3" in granite
    gemma = prompt("gemma-2", [{"role": "system", "content": "Be brief."}, *talk][1:], TOOLS)
    assert gemma.count("# Tools") == 1 and '"name": "get_weather"' in gemma and "\n\nAdd<end_of_turn>" in gemma
    assert "<start_of_turn>model\n<tool_call>\n" in gemma
    assert "<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>" in gemma
    smol = prompt("smollm2", [{"role": "system", "content": "Be brief."}, *talk], TOOLS)
    assert smol.startswith("<|im_start|>system\nBe brief.\n\nYou are an expert in composing functions.")
    assert '<tool_call>[{"name": "add", "arguments": {"a": "(text)"}}]</tool_call><|im_end|>' in smol


def test_ids_and_names_that_templates_demand() -> None:
    call = {"id": "call_0123456789", "function": {"name": "add", "arguments": {"a": 1}}}
    result = {"role": "tool", "tool_call_id": "call_0123456789", "content": "3"}
    talk = [{"role": "user", "content": "Add"}, {"role": "assistant", "tool_calls": [call]}, result]
    text = prompt("mistral-nemo", talk, TOOLS)
    (id,) = {part.partition('"')[0] for part in text.split('"call_id": "')[1:]}
    assert len(id) == 9 and text.count(id) == 2
    older = [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "add", "content": "3"},
    ]
    assert prompt("qwen2.5", older, TOOLS) == prompt("qwen2.5", talk, TOOLS)


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        ("x", "must be a list"),
        ([1], "tool call is 1; it must be an object"),
        ([{"function": {"arguments": "{}"}}], "must be an object such as"),
        ([{"function": {"name": "add", "arguments": '{"a": '}}], "arguments of a call of 'add' are no JSON object"),
        ([{"function": {"name": "add", "arguments": "[1]"}}], "are no JSON object"),
    ],
)
def test_calls_in_messages_that_are_none(calls: Any, says: str) -> None:
    with pytest.raises(SettingError, match=says) as caught:
        prompt("qwen2.5", [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}])
    assert "\n" not in str(caught.value)


def test_what_the_program_writes_into_a_message_counts() -> None:
    text = Written([("<|tool_call|>", True), ("<|tool_call|>", False)])
    assert text == "<|tool_call|>" * 2 and isinstance(text, str)
    plain = ChatTemplate("{{ messages[0].content }}")
    stand_in: Any = SimpleNamespace(
        **{name: getattr(Spelling(), name) for name in ("mark_control", "encode", "bos_id")}
    )
    assert plain.tokens([{"role": "user", "content": text}], stand_in) == "(token)(text)"
