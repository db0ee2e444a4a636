"""Whether a JSON schema can be met by something that ends: one that requires itself within itself cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from slimrt.structured.pointer import target

__all__ = ["ends"]

_ROUNDS = 64  # what is not decided by then counts as ending: such a schema is cut by max_tokens


def ends(schema: Mapping[str, Any]) -> bool:
    """False where every instance of ``schema`` would be infinite; True where one may be finite, and in doubt.

    The least fixed point of "an instance exists": what only leads back to itself stays False. Of the schemas true and
    false the compiler judges.
    """
    order: list[Mapping[str, Any]] = []
    seen: set[int] = set()
    stack: list[tuple[Mapping[str, Any], bool]] = [(schema, False)]
    while stack:  # what a schema needs stands before it, but for circles
        node, left = stack.pop()
        if left:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack += [(part, False) for group in _needs(schema, node) for part in group if isinstance(part, Mapping)]
    finite: set[int] = set()
    for _ in range(_ROUNDS):
        before = len(finite)
        for node in order:
            if id(node) not in finite and all(
                any(not isinstance(part, Mapping) or id(part) in finite for part in group)
                for group in _needs(schema, node)
            ):
                finite.add(id(node))
        if len(finite) == before:
            return id(schema) in finite
    return True


def _needs(root: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[list[Any]]:
    """For an instance of ``node`` to be finite, of each of these lists one schema must have a finite instance."""
    if isinstance(node.get("$ref"), str):
        yield [target(root, node["$ref"])]
    for name in ("anyOf", "oneOf"):
        if isinstance(node.get(name), list):
            yield node[name]
    if isinstance(node.get("allOf"), list):
        yield from ([part] for part in node["allOf"])
    properties, required = node.get("properties"), node.get("required")
    if node.get("type") == "object" and isinstance(properties, Mapping) and isinstance(required, list):
        yield from ([properties[name]] for name in required if isinstance(name, str) and name in properties)
    least = node.get("minItems", 0)
    if node.get("type") == "array" and isinstance(least, (int, float)) and least >= 1:
        first = node.get("prefixItems")
        first = first[: int(min(least, len(first)))] if isinstance(first, list) else []
        yield from ([part] for part in first)
        if least > len(first) and "items" in node:
            yield [node["items"]]
