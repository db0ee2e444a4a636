"""Objects that list their properties have no others, unless the schema says that there may be some.

By JSON Schema an object may have any further property where nothing forbids it, and a model that may go on often does,
until the tokens run out. Whoever lists properties means these. What is valid by the closed schema is valid by the open
one; where closing could leave nothing valid, or accept what the open one refuses, an object stays open.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from slimrt.structured.parts import DEFINITIONS, subschemas
from slimrt.structured.pointer import target

__all__ = ["closed"]

_SAID = ("additionalProperties", "patternProperties", "unevaluatedProperties")
_TOGETHER = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "$ref", "$dynamicRef")
_ABOUT = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "type", "$schema",
          "$id", "$comment", "$defs", "definitions", "discriminator", "nullable")  # fmt: skip


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``schema`` with ``additionalProperties: false`` in every object that lists properties, requires no
    other and says nothing about others, unless its parts are joined with others' (``allOf``, ``oneOf``, ``anyOf`` or
    ``$ref`` beside properties)."""
    root = copy.deepcopy(dict(schema))
    order: list[dict[str, Any]] = []
    joined: set[int] = set()
    seen: set[tuple[int, bool]] = set()
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, within = stack.pop()
        if not isinstance(node, dict) or (id(node), within) in seen:
            continue
        seen.add((id(node), within))
        if _refers_elsewhere(root, node):  # who else is named by what this names cannot be told
            return dict(schema)
        order.append(node)
        if within:
            joined.add(id(node))
        stack += _parts(root, node, within)
    for node in order:
        if id(node) not in joined and _lists_all(node):
            node["additionalProperties"] = False
    return root


def _refers_elsewhere(root: dict[str, Any], node: dict[str, Any]) -> bool:
    reference = node.get("$ref")
    named = isinstance(reference, str) and not isinstance(target(root, reference), Mapping)
    return named or "$dynamicRef" in node or (node is not root and isinstance(node.get("$id"), str))


def _parts(root: dict[str, Any], node: dict[str, Any], within: bool) -> list[tuple[Any, bool]]:
    """The schemas of ``node``, each with whether it is joined with others."""
    together = [key for key in _TOGETHER if key in node]
    alone = len(together) == 1 and all(key in _ABOUT or key in together or key.startswith("x-") for key in node)
    apart = {}
    for key in node:
        definitions = key in DEFINITIONS  # what is defined within something joined is joined where it is named
        apart[key] = not definitions and (within or (bool(together) and not alone))
    for key in together:
        branches = node[key] if isinstance(node[key], list) else [node[key]]
        one = len(branches) == 1 and key in ("anyOf", "oneOf", "allOf")
        apart[key] = within or not (alone and (one or key in ("anyOf", "$ref")))
    parts = [(part, apart[key]) for key, part in subschemas(node)]
    if isinstance(node.get("$ref"), str):
        parts.append((target(root, node["$ref"]), apart["$ref"]))
    return parts


def _lists_all(node: dict[str, Any]) -> bool:
    """Whether the object's properties are all listed, as far as the schema says."""
    names, kind = node.get("properties"), node.get("type", "object")
    if not isinstance(names, dict) or any(key in node for key in (*_SAID, *_TOGETHER)):
        return False
    required, least = node.get("required", []), node.get("minProperties", 0)
    kinds = kind if isinstance(kind, list) else [kind]
    return (
        "object" in kinds
        and isinstance(required, list)
        and all(isinstance(name, str) and name in names for name in required)
        and isinstance(least, int)
        and least <= len(names)
    )
