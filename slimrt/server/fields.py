"""Fields of a request: what each may hold, checked before anything is computed, and told in the OpenAPI description."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slimrt.server.errors import ApiError

__all__ = ["Field", "checked", "schema"]

_NAMES: dict[str, Any] = {
    "string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """``kinds``: JSON types that it may have, "any" for all. ``low``, ``high``: bounds of a number. ``default``: where
    the request says nothing (or null, which every field may be). ``choices``: the strings that it may be. ``inside``:
    what JSON schema says of its parts, for the description; who reads the field checks them."""

    kinds: tuple[str, ...]
    about: str
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    required: bool = False
    inside: Mapping[str, Any] | None = None


def checked(fields: Mapping[str, Field], data: Any) -> dict[str, Any]:
    """Every field of a request's JSON ``data``, with defaults. Raises ApiError for what is not as ``fields`` say."""
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is JSON of type {_kind(data)}; it must be an object")
    for name in data:
        if name not in fields:
            raise ApiError(400, f"Unknown parameter: '{name[:80]}'.", param=name[:80], code="unknown_parameter")
    found = {}
    for name, field in fields.items():
        value = data.get(name)
        if value is None:
            if field.required:
                raise ApiError(
                    400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
                )
            found[name] = field.default
            continue
        found[name] = _value(name, field, value)
    return found


def _value(name: str, field: Field, value: Any) -> Any:
    if field.kinds != ("any",) and not any(_is(value, kind) for kind in field.kinds):
        raise ApiError(
            400, f"'{name}' is of type {_kind(value)}; it must be {' or '.join(field.kinds)}", param=name,
            code="invalid_type",
        )  # fmt: skip
    if isinstance(value, int | float) and not isinstance(value, bool) and not field.low <= value <= field.high:
        raise ApiError(
            400,
            f"'{name}' is {value}; it must lie in {_written(field.low)} to {_written(field.high)}",
            param=name,
            code="invalid_value",
        )
    if field.choices and isinstance(value, str) and value not in field.choices:
        raise ApiError(
            400, f"'{name}' is '{value[:80]}'; it must be one of {', '.join(field.choices)}", param=name,
            code="invalid_value",
        )  # fmt: skip
    return value


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, _NAMES[kind])


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return next((kind for kind in _NAMES if _is(value, kind)), "number past all range")


def schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    """The JSON schema of a request."""
    properties = {}
    for name, field in fields.items():
        one: dict[str, Any] = {"description": field.about, **(field.inside or {})}
        if field.kinds != ("any",):
            one["type"] = [*field.kinds, *([] if field.required else ["null"])]
        if field.default is not None:
            one["default"] = field.default
        if math.isfinite(field.low):
            one["minimum"] = field.low
        if math.isfinite(field.high):
            one["maximum"] = field.high
        if field.choices and field.kinds == ("string",):
            one["enum"] = [*field.choices, *([] if field.required else [None])]
        properties[name] = one
    required = [name for name, field in fields.items() if field.required]
    return {
        "type": "object", "properties": properties, "additionalProperties": False,
        **({"required": required} if required else {}),
    }  # fmt: skip


def _written(bound: float) -> str:
    return f"{int(bound):,}" if float(bound).is_integer() else f"{bound:g}"
