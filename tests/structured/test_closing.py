"""Objects that list their properties: which of them get no others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slimrt.structured.closing import closed
from slimrt.structured.grammar import Grammar
from slimrt.structured.plain import plain

A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}}


def shut(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "additionalProperties": False}


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
        ({"oneOf": [A]}, {"oneOf": [shut(A)]}),
        ({"$defs": {"d": A}, "allOf": [B, B], "properties": {"z": {"$ref": "#/$defs/d"}}},
         {"$defs": {"d": A}, "allOf": [B, B], "properties": {"z": {"$ref": "#/$defs/d"}}}),
    ],
)  # fmt: skip
def test_who_lists_properties_means_these(schema: dict[str, Any], wanted: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert closed(schema) == wanted and json.dumps(schema) == before
    assert closed(plain(schema)) == json.loads(Grammar.json_schema(schema).text)


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
