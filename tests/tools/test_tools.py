"""Tools and choices of a request, checked."""

from __future__ import annotations

from typing import Any

import pytest

from slimrt.errors import SettingError
from slimrt.tools.tool import Tool, choice_of, tools_of

ADD = {"name": "add", "description": "Sum", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
NOW = {"type": "function", "function": {"name": "now"}}


def test_tools_in_both_spellings() -> None:
    add, now = tools_of([ADD, NOW])
    assert add.as_openai() == {"type": "function", "function": ADD}
    assert add.arguments_schema() == {**ADD["parameters"], "additionalProperties": False}  # type: ignore[dict-item]
    assert now == Tool("now", "", {"type": "object", "properties": {}})
    free = Tool.checked({"name": "f", "parameters": {"properties": {}, "additionalProperties": True}})
    assert free.arguments_schema() == {"type": "object", "properties": {}, "additionalProperties": True}
    assert tools_of(None) == tools_of([]) == () and tools_of([add]) == (add,)


def test_formats_of_other_languages_say_nothing() -> None:
    """A property may be called format, and a default may look like a schema: these stay."""
    inner = {"type": "array", "items": {"type": "number", "format": "double"}}
    about = {"a": {"type": "integer", "format": "int64"}, "format": {"type": "string", "format": "uri"}, "b": inner}
    (tool,) = tools_of([{"name": "f", "parameters": {"properties": about, "default": {"format": "x"}}}])
    bound = tool.arguments_schema()
    assert bound["properties"] == {
        "a": {"type": "integer"}, "format": {"type": "string", "format": "uri"},
        "b": {"type": "array", "items": {"type": "number"}},
    }  # fmt: skip
    assert bound["default"] == {"format": "x"} and tool.parameters["properties"] == about
    (missing,) = tools_of([{"name": "f", "parameters": {"properties": {"a": {}}, "required": ["b"]}}])
    assert "additionalProperties" not in missing.arguments_schema()


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("x", "must be a list"),
        ({"a": 1}, "must be a list"),
        ([ADD] * 2, "two tools are called 'add'"),
        ([{"name": f"t{at}"} for at in range(129)], "129 tools: at most 128"),
        ([1], r"tools\[0\] is 1; it must be an object"),
        ([NOW, {"type": "web_search"}], r"tools\[1\] is .*web_search.*; it must be an object"),
        ([{"type": "function", "function": "x"}], "must be an object"),
        ([{"name": "a b"}], "has the name \"a b\"; a name is 1 to 128 letters"),
        ([{}], "has the name null"),
        ([{"name": "f", "description": 1}], "its description is 1; it must be a text"),
        ([{"name": "f", "parameters": []}], r"its parameters are \[\]; they must be a JSON schema of type object"),
        ([{"name": "f", "parameters": "x"}], "must be a JSON schema of type object"),
        ([{"name": "f", "parameters": {"type": "string"}}], 'are of type "string"; arguments are an object'),
        ([{"name": "f", "parameters": {"properties": [1]}}], r"its properties are \[1\]"),
        ([{"name": "f", "parameters": {"required": 5}}], "'required' is 5; it must be a list of names"),
        ([{"name": "f", "parameters": {"properties": {"a": {1, 2}}}}], "tool 'f': schema .* must be JSON"),
        (
            [{"name": "f", "parameters": {"properties": {"a": {"$ref": "#"}}, "required": ["a"]}}],
            "tool 'f': .* requires itself within itself",
        ),
        ([{"name": "f", "parameters": {"properties": {"a": {"enum": ["x" * 1100000]}}}}], "tool 'f': .* at most"),
    ],
)  # fmt: skip
def test_tools_that_are_none(tools: Any, says: str) -> None:
    with pytest.raises(SettingError, match=says) as caught:
        tools_of(tools)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_schema_that_is_nested_too_deeply() -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(3000):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(SettingError, match="nested too deeply"):
        tools_of([{"name": "f", "parameters": schema}])


def test_choices_as_the_interfaces_write_them() -> None:
    both = tools_of([ADD, NOW])
    assert choice_of(both).mode == choice_of(both, "auto").mode == choice_of(both, {"type": "auto"}).mode == "auto"
    assert choice_of(both, "none").mode == choice_of((), "none").mode == choice_of(()).mode == "none"
    assert choice_of(both, "required") == choice_of(both, {"type": "any"})
    for named in (
        {"type": "function", "function": {"name": "now"}}, {"type": "function", "name": "now"},
        {"type": "tool", "name": "now"}, {"name": "now"},
    ):  # fmt: skip
        assert choice_of(both, named).tools == both[1:] and choice_of(both, named).mode == "required"
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    assert (choice_of(both, allowed).mode, choice_of(both, allowed).tools) == ("required", both[:1])


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("sometimes", "tool_choice \"sometimes\": must be 'none', 'auto', 'required' or"),
        (3, "tool_choice 3: must be"),
        ({"type": "function", "function": {"name": "sub"}}, 'tool_choice "sub": no tool has this name; there are: add'),
        ({"type": "tool", "name": "sub"}, "no tool has this name"),
        ({"type": "file_search"}, "must be 'none', 'auto'"),
    ],
)
def test_choices_that_are_none(choice: Any, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        choice_of(tools_of([ADD]), choice)
    with pytest.raises(SettingError, match="there are no tools"):
        choice_of((), "required")
