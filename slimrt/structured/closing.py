"""Objects that list their properties have no others, unless the schema says that there may be some.

By JSON Schema an object may have any further property where nothing forbids it, and a model that may go on often does,
until the tokens run out. Whoever lists properties means these. What is valid by the closed schema is valid by the open
one; where closing could leave nothing valid, or accept what the open one refuses, an object stays open.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from slimrt.structured.pointer import target

__all__ = ["closed"]

_SAID = ("additionalProperties", "patternProperties", "unevaluatedProperties")
_TOGETHER = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "$ref", "$dynamicRef")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # objects of schemas
_INNER = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else",
          "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_ABOUT = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "type", "$schema",
          "$id", "$comment", "$defs", "definitions", "discriminator", "nullable")  # fmt: skip


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``schema`` with ``additionalProperties: false`` in every object that lists properties, requires no
    other and says nothing about others, unless its parts are joined with others' (``allOf``, ``oneOf`` whose branches
    are not told apart by a constant or a type, ``anyOf`` or ``$ref`` beside properties)."""
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
    parts: list[tuple[Any, bool]] = []
    for key, value in node.items():
        definitions = key in ("$defs", "definitions")
        apart = within and not definitions  # what is defined within something joined is joined where it is named
        if key in together:
            branches = value if isinstance(value, list) else [value]
            one = len(branches) == 1 and key in ("anyOf", "oneOf", "allOf")
            free = alone and (one or key in ("anyOf", "$ref") or (key == "oneOf" and _told_apart(root, branches)))
            apart = within or not free
        elif together and not alone and not definitions:
            apart = True
        if key == "$ref" and isinstance(value, str):
            parts.append((target(root, value), apart))
        elif key in _NAMED and isinstance(value, dict):
            parts += [(part, apart) for part in value.values()]
        elif key in _INNER:
            parts.append((value, apart))
        elif key in _LISTS and isinstance(value, list):
            parts += [(part, apart) for part in value]
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


def _told_apart(root: dict[str, Any], branches: list[Any]) -> bool:
    """Whether no value is valid by two of ``branches``, by their types or by a constant that each requires."""
    found = [_resolved(root, branch) for branch in branches]
    kinds = [node.get("type") for node in found]
    if all(isinstance(kind, str) for kind in kinds) and len(set(kinds)) == len(kinds) and "number" not in kinds:
        return True
    names = set.intersection(*(set(_constants(root, node)) for node in found)) if found else set()
    return any(len({_constants(root, node)[name] for node in found}) == len(found) for name in names)


def _constants(root: dict[str, Any], node: dict[str, Any]) -> dict[str, str]:
    """The required properties that can only be one text, and that text."""
    names, required = node.get("properties"), node.get("required")
    result: dict[str, str] = {}
    if isinstance(names, dict) and isinstance(required, list) and node.get("type") == "object":
        for name in required:
            value = _resolved(root, names.get(name)) if isinstance(name, str) else {}
            only = value.get("enum", [value.get("const")])
            if isinstance(only, list) and len(only) == 1 and isinstance(only[0], str):
                result[name] = only[0]
    return result


def _resolved(root: dict[str, Any], node: Any) -> dict[str, Any]:
    for _ in range(8):
        if not isinstance(node, dict) or not isinstance(node.get("$ref"), str):
            break
        node = target(root, node["$ref"])
    return node if isinstance(node, dict) else {}
