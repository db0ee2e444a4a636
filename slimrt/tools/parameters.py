"""Arguments written as elements, ``<parameter=NAME>`` VALUE ``</parameter>``, as Qwen3-Coder does.

A value is a text as it stands where the schema says text and no more, else JSON: a text that must match something is
bound, and told from others, by its quotes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from slimrt.errors import SettingError
from slimrt.tools.scan import Failed, More, after_blanks
from slimrt.tools.tool import Tool

__all__ = ["argument", "is_plain_text", "next_element", "properties", "words"]

_BEGIN, _END, _LAST = "<parameter=", "</parameter>", "</function>"
_TOGETHER = (
    "anyOf", "oneOf", "allOf", "$ref", "not", "if", "patternProperties", "propertyNames", "minProperties",
    "maxProperties", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties",
)  # fmt: skip
_BOUND = ("enum", "const", "pattern", "format", "minLength", "maxLength", "anyOf", "oneOf", "allOf", "$ref")


def properties(tool: Tool) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """A tool's parameters: name, schema with the definitions that it may refer to, whether it must be there.

    Raises SettingError for a schema that binds arguments together: elements are written one by one."""
    schema = tool.arguments_schema()
    bound = next((key for key in _TOGETHER if key in schema), None)
    if bound is not None:
        raise SettingError(
            f"tool '{tool.name}': this model writes arguments one by one, and {bound} binds them together; "
            "list them under properties"
        )
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    required = schema.get("required") or ()
    listed = schema.get("properties", {})
    for name, own in {**listed, **{name: True for name in required if name not in listed}}.items():
        if any(char in name for char in "<>\n"):
            raise SettingError(f"tool '{tool.name}': a parameter is called {name!r}; leave out '<', '>' and line ends")
        one = {**own, **shared} if isinstance(own, Mapping) else {}
        yield name, one, name in required


def is_plain_text(schema: Mapping[str, Any]) -> bool:
    """Whether a value is any text."""
    return schema.get("type") == "string" and not any(key in schema for key in _BOUND)


def words(schema: Mapping[str, Any]) -> list[str]:
    """The texts of which a value is one, which stand as they are; none where it may be something else."""
    listed = schema.get("enum", [schema["const"]] if "const" in schema else [])
    plain = isinstance(listed, list) and all(isinstance(word, str) and "\n" not in word for word in listed)
    others = any(key in schema for key in _BOUND if key not in ("enum", "const"))
    return listed if plain and not others else []


def argument(tool: Tool, name: str, text: str) -> Any:
    """The value that ``text`` spells: JSON by the schema, else the text itself."""
    own = tool.parameters.get("properties", {}).get(name)
    if isinstance(own, Mapping) and (is_plain_text(own) or text in words(own)):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def next_element(text: str) -> tuple[str, str, int] | None:
    """The next element at the beginning of ``text``: name, value, the place behind it; None where the last one was.

    Raises More and Failed."""
    at = after_blanks(text, 0)
    for mark in (_LAST, _BEGIN):
        if mark.startswith(text[at : at + len(mark)]) and len(text) - at < len(mark):
            raise More
    if text.startswith(_LAST, at):
        return None
    if not text.startswith(_BEGIN, at):
        raise Failed
    begin = at + len(_BEGIN)
    close = text.find(">", begin)
    if close < 0:
        if "\n" in text[begin:]:
            raise Failed
        raise More
    if close + 1 == len(text):
        raise More
    # A value on lines of its own ends with its line, so that a text may hold what ends an element.
    blank = "\n" if text[close + 1] == "\n" else ""
    value = close + 1 + len(blank)
    end = text.find(blank + _END, value)
    if end < 0:
        raise More
    return text[begin:close], text[value:end], end + len(blank + _END)
