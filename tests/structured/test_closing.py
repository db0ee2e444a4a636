"""Objects that list their properties: which of them get no others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slimrt.structured.closing import closed
from slimrt.structured.grammar import Grammar

A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}}


def shut(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "additionalProperties": False}


def kind(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": name}, "n": {}}, "required": ["kind"]}


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        (A, shut(A)),
        ({"type": "array", "items": A}, {"type": "array", "items": shut(A)}),
        ({"properties": {"x": A, "y": {"anyOf": [B, {"type": "null"}]}}, "$defs": {}},
         shut({"properties": {"x": shut(A), "y": {"anyOf": [shut(B), {"type": "null"}]}}, "$defs": {}})),
        ({"$ref": "#/$defs/t", "$defs": {"t": {"properties": {"next": {"$ref": "#/$defs/t"}}}}},
         {"$ref": "#/$defs/t", "$defs": {"t": shut({"properties": {"next": {"$ref": "#/$defs/t"}}})}}),
        ({"allOf": [A], "description": "as pydantic 1 wrote a reference"},
         {"allOf": [shut(A)], "description": "as pydantic 1 wrote a reference"}),
        ({"oneOf": [kind("x"), kind("y")]}, {"oneOf": [shut(kind("x")), shut(kind("y"))]}),
        ({"oneOf": [A, {"type": "string"}]}, {"oneOf": [shut(A), {"type": "string"}]}),
    ],
)  # fmt: skip
def test_who_lists_properties_means_these(schema: dict[str, Any], wanted: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert closed(schema) == wanted and json.dumps(schema) == before
    assert json.loads(Grammar.json_schema(schema).text) == wanted
    assert json.loads(Grammar.json_schema(schema, closed=False).text) == schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**A, "additionalProperties": True},
        {**A, "additionalProperties": {"type": "string"}},
        {**A, "patternProperties": {"^x": {}}},
        {**A, "required": ["a", "other"]},
        {**A, "minProperties": 2},
        {"allOf": [A, B]},
        {"allOf": [{"$ref": "#/$defs/a"}, B], "$defs": {"a": A}},
        {**A, "anyOf": [{"required": ["x"]}, {"required": ["y"]}]},
        {**B, "$ref": "#/$defs/a", "$defs": {"a": A}},
        {"allOf": [{"properties": {"x": A}}, {"properties": {"x": B}}]},
        {"allOf": [{"$ref": "#a"}, B], "$defs": {"a": {**A, "$anchor": "a"}}},
        {"oneOf": [A, B]},
        {"oneOf": [True, A]},
        {"if": A, "then": B},
        {"not": {"properties": {"a": {"const": 1}}, "required": ["a"]}},
        {"properties": 5, "allOf": {}, "required": {}},
    ],
)
def test_what_is_joined_with_others_or_says_otherwise_stays_open(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema
