"""Whether two JSON schemas can hold of one value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slimrt.structured.pointer import target

__all__ = ["apart"]

_DEEP = 6  # properties within properties, and references to references, that are looked at


def apart(root: Mapping[str, Any], one: Any, other: Any, deep: int = _DEEP) -> bool:
    """True where no value is valid by both: by their types, values, ranges, or a property that tells them apart. False
    in doubt. ``root``: what references point into."""
    one, other = _resolved(root, one), _resolved(root, other)
    if one is False or other is False:
        return True
    if not isinstance(one, Mapping) or not isinstance(other, Mapping) or not deep:
        return False
    values, others = _values(one), _values(other)
    if values is not None and others is not None:
        return values.isdisjoint(others)
    kinds, other_kinds = _kinds(one), _kinds(other)
    if kinds.isdisjoint(other_kinds):
        return True
    numbers = {"integer", "number"}
    if kinds <= numbers and other_kinds <= numbers:
        return _above(one, other) or _above(other, one)
    if kinds == {"object"} == other_kinds:
        return _by_property(root, one, other, deep) or _excludes(one, other) or _excludes(other, one)
    return False


def _by_property(root: Mapping[str, Any], one: Mapping[str, Any], other: Mapping[str, Any], deep: int) -> bool:
    named, others = _properties(one), _properties(other)
    both = _required(one) & _required(other) & named.keys() & others.keys()
    return any(apart(root, named[name], others[name], deep - 1) for name in both)


def _excludes(closed: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether ``other`` requires what ``closed`` does not let in."""
    if closed.get("additionalProperties") is not False or "patternProperties" in closed:
        return False
    return not _required(other) <= _properties(closed).keys()


def _resolved(root: Mapping[str, Any], node: Any) -> Any:
    for _ in range(_DEEP):
        if not isinstance(node, Mapping) or not isinstance(node.get("$ref"), str):
            break
        node = target(root, node["$ref"])
    return node


def _properties(node: Mapping[str, Any]) -> Mapping[str, Any]:
    named = node.get("properties", {})
    return named if isinstance(named, Mapping) else {}


def _required(node: Mapping[str, Any]) -> set[str]:
    names = node.get("required", [])
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _values(node: Mapping[str, Any]) -> set[tuple[str, Any]] | None:
    """The only values, where they are named and can be compared: each with its kind, for True is no 1, but 1.0 is."""
    given = [node["const"]] if "const" in node else node.get("enum")
    if not isinstance(given, list) or any(isinstance(value, (list, dict)) for value in given):
        return None
    return {(_kind(value), value) for value in given}


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "null"


def _kinds(node: Mapping[str, Any]) -> set[str]:
    """The types of its values; a number may be whole."""
    given = node.get("type")
    values = _values(node)
    if values is not None:
        kinds = {kind for kind, _ in values}
    elif isinstance(given, str):
        kinds = {given}
    elif isinstance(given, list) and all(isinstance(kind, str) for kind in given):
        kinds = set(given)
    else:
        kinds = {"null", "boolean", "integer", "number", "string", "array", "object"}
    return kinds | {"integer"} if "number" in kinds else kinds


def _above(low: Mapping[str, Any], high: Mapping[str, Any]) -> bool:
    """Whether all numbers of ``high`` are above those of ``low``."""
    top = min(_bound(low, "maximum", math.inf), _bound(low, "exclusiveMaximum", math.inf))
    bottom = max(_bound(high, "minimum", -math.inf), _bound(high, "exclusiveMinimum", -math.inf))
    return top < bottom


def _bound(node: Mapping[str, Any], name: str, none: float) -> float:
    value = node.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else none
