"""Schemas in the compiler's words: formats that nobody knows, and ``oneOf`` whose branches exclude each other."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slimrt.errors import SettingError
from slimrt.structured.apart import apart
from slimrt.structured.grammar import Grammar
from slimrt.structured.plain import plain


def named(kind: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {kind: {"const": value}, **more}, "required": [kind]}


def only(name: str) -> dict[str, Any]:
    """As serde writes a variant of an enum in Rust."""
    return {"type": "object", "properties": {name: {}}, "required": [name], "additionalProperties": False}


APART: list[list[Any]] = [
    [{"const": 1}, {"const": 2}, {"enum": ["x", None]}, {"const": True}],
    [{"type": "integer", "maximum": 5}, {"type": "number", "exclusiveMinimum": 5.5}],
    [{"type": "object"}, {"type": ["string", "null"]}, {"type": "number"}],
    [named("kind", "a", n={}), named("kind", "b")],
    [named("at", 1), {"$ref": "#/$defs/two"}],
    [only("A"), only("B"), {"const": "C"}],
    [{"type": "string", "enum": ["a", "b"]}, {"type": "string", "const": "c"}],
]
TOGETHER: list[list[Any]] = [
    [{"const": 1}, {"const": 1.0}],
    [{"type": "number"}, {"type": "integer"}],
    [{"type": "integer", "maximum": 5}, {"type": "integer", "minimum": 5}],
    [{"maximum": 5}, {"minimum": 6}],  # a text is valid by both
    [{"const": [1]}, {"const": [1.0]}],
    [named("kind", "a"), {**named("kind", "b"), "required": []}],
    [{**only("A"), "additionalProperties": True}, {**only("B"), "additionalProperties": {}}],
    [{**only("A"), "patternProperties": {"B": {}}}, {**only("B"), "additionalProperties": True}],
    [True, {"type": "string"}],
    [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}],
]
DEFS = {"two": named("at", 2), "loop": {"$ref": "#/$defs/loop"}}


@pytest.mark.parametrize("branches", APART)
def test_branches_of_which_one_at_most_holds(branches: list[Any]) -> None:
    schema = {"oneOf": branches, "$defs": DEFS}
    assert plain(schema) == {"anyOf": branches, "$defs": DEFS}
    assert plain({"properties": {"p": {"oneOf": branches}}, "$defs": DEFS})["properties"]["p"] == {"anyOf": branches}
    assert "oneOf" in schema


@pytest.mark.parametrize("branches", TOGETHER)
def test_branches_that_may_hold_at_once_stay(branches: list[Any]) -> None:
    schema = {"oneOf": branches, "$defs": DEFS}
    assert plain(schema) == schema
    assert not apart(schema, *branches) and not apart(schema, *reversed(branches))


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"minimum": 2**53 + 1, "maximum": 2**53 + 3}, {"minimum": 2**53 + 2, "maximum": 2**53 + 2}),
        ({"minimum": -(2**53) - 3, "maximum": -(2**53) - 1}, {"minimum": -(2**53) - 2, "maximum": -(2**53) - 2}),
        ({"minimum": 0, "maximum": 2**64 - 1}, {"minimum": 0, "maximum": 2**63 - 1024}),
        ({"exclusiveMinimum": -(2**70)}, {"exclusiveMinimum": -(2**63)}),
        ({"minimum": 1.5, "maximum": 1e300}, {"minimum": 1.5, "maximum": 1e300}),
        ({"const": 2**60}, {"const": 2**60}),
    ],
)  # fmt: skip
def test_large_bounds_let_nothing_invalid_in(schema: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The compiler counts in float64: 2^53 would be let in by a minimum of 2^53 + 1."""
    assert plain(schema) == wanted


@pytest.mark.parametrize(
    "schema",
    [{"const": 2**53 + 1}, {"enum": ["a", [{"b": 2**60 + 1}]]}, {"const": 2**70}, {"minimum": 2**63}],
)  # fmt: skip
def test_numbers_that_would_be_written_as_others_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="ask for a string of digits instead"):
        Grammar.json_schema({"properties": {"id": schema}})


def test_formats_that_nobody_knows_say_nothing() -> None:
    inner = {"type": "string", "format": "password"}
    schema = {"properties": {"format": inner, "day": {"format": "date"}}, "items": [inner], "enum": [{"format": "x"}]}
    wanted = {"properties": {"format": {"type": "string"}, "day": {"format": "date"}}, "items": [{"type": "string"}]}
    assert plain(schema) == {**wanted, "enum": [{"format": "x"}]}
    iri = {"type": "string", "format": "iri"}  # JSON Schema's own, which the compiler lacks and refuses
    assert plain(iri) == iri and plain(iri, lenient=True) == {"type": "string"}
    assert json.loads(Grammar.json_schema(inner).text) == {"type": "string"} and inner["format"] == "password"
