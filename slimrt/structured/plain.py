"""A JSON schema said in the words that the grammar's compiler knows, with the same meaning."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from slimrt.config import is_whole
from slimrt.structured.apart import apart
from slimrt.structured.large import bound_within, check_kept
from slimrt.structured.parts import subschemas

__all__ = ["plain"]

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_MOST_BRANCHES = 200  # of a oneOf, which are compared in pairs
# Formats that the grammar enforces (llguidance's list).
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
# JSON Schema's own formats that it does not: a schema that asks for one is refused.
_LACKING = frozenset(
    ("idn-email", "idn-hostname", "iri", "iri-reference", "uri-reference", "uri-template", "json-pointer",
     "relative-json-pointer", "regex")
)  # fmt: skip


def plain(schema: Mapping[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """A copy of ``schema`` in which a format that JSON Schema does not know says nothing (programs have some of their
    languages' own, such as int64 or password), a ``oneOf`` no two branches of which can hold at once is an ``anyOf``,
    and bounds past 2^53 are moved inwards to numbers that the compiler keeps. ``lenient``: nor do JSON Schema's formats
    that the compiler lacks say anything.

    Raises SettingError for numbers that would be written as others."""
    kept = _FORMATS if lenient else _FORMATS | _LACKING
    root = copy.deepcopy(dict(schema))
    order: list[dict[str, Any]] = []
    left: list[Any] = [root]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            order.append(node)
            left += [part for _, part in subschemas(node)]
    single = [node for node in order if "anyOf" not in node and _told_apart(root, node.get("oneOf"))]
    for node in order:
        if isinstance(node.get("format"), str) and node["format"] not in kept:
            del node["format"]
        for name in _BOUNDS:
            if is_whole(node.get(name)):
                node[name] = bound_within(name, node[name])
        for name in ("const", "enum"):
            check_kept(node.get(name))
    for node in single:
        node["anyOf"] = node.pop("oneOf")
    return root


def _told_apart(root: dict[str, Any], branches: Any) -> bool:
    if not isinstance(branches, list) or not 1 <= len(branches) <= _MOST_BRANCHES:
        return False
    return all(apart(root, *pair) for pair in combinations(branches, 2))
