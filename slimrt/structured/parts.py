"""Where schemas stand within a JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["DEFINITIONS", "subschemas"]

DEFINITIONS = ("$defs", "definitions")
_NAMED = ("properties", "patternProperties", "dependentSchemas", *DEFINITIONS)  # objects of schemas
_INNER = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else",
          "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")


def subschemas(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas that stand directly within ``node``, each with its keyword; not what a reference names."""
    for key, value in node.items():
        if key in _NAMED and isinstance(value, Mapping):
            for part in value.values():
                yield key, part
        elif key in _LISTS and isinstance(value, list):
            for part in value:
                yield key, part
        elif key in _INNER:
            yield key, value
