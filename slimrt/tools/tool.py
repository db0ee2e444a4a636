"""Tools and which of them an answer may or must call, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slimrt.errors import SettingError
from slimrt.structured.closing import closed
from slimrt.structured.grammar import Grammar
from slimrt.structured.plain import plain

__all__ = ["Choice", "Tool", "choice_of", "tools_of"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}", re.ASCII)
_MOST = 128  # tools; so many OpenAI takes


@dataclass(frozen=True)
class Tool:
    """What may be called. ``parameters``: a JSON schema of type object, by which the arguments are bound."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @classmethod
    def checked(cls, value: Any, where: str = "tool") -> Tool:
        """A tool as OpenAI writes it, {"type": "function", "function": {name, description, parameters}}, or the inner
        part alone. ``where``: what a message calls it. Raises SettingError for what is none."""
        if isinstance(value, Tool):
            return value
        inner = value.get("function", value) if isinstance(value, Mapping) else None
        if not isinstance(inner, Mapping) or value.get("type", "function") != "function":
            raise SettingError(
                f"{where} is {_short(value)}; it must be an object such as "
                '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
            )
        name, about = inner.get("name"), inner.get("description")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SettingError(
                f"{where} has the name {_short(name)}; a name is 1 to 128 letters, digits, '_', '-' and '.'"
            )
        if about is not None and not isinstance(about, str):
            raise SettingError(f"tool '{name}': its description is {_short(about)}; it must be a text")
        return cls(name, about or "", _object_schema(name, inner.get("parameters")))

    def as_openai(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        about = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": about}

    def arguments_schema(self) -> dict[str, Any]:
        """What the arguments are bound to: ``parameters``, without properties that it does not name unless it says
        that there may be some."""
        return closed(plain(self.parameters, lenient=True))


@dataclass(frozen=True)
class Choice:
    """``mode`` none: text alone; auto: text or calls; required: calls. ``tools``: those that may be called; ``named``:
    the request names one, which is called once unless it asks for parallel calls."""

    mode: Literal["none", "auto", "required"]
    tools: tuple[Tool, ...]
    named: bool = False


def tools_of(given: Any) -> tuple[Tool, ...]:
    """The tools of a request. Raises SettingError for what is no list of tools, for too many, and for a name twice."""
    if given is None:
        return ()
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence):
        raise SettingError(f"tools {_short(given)}: must be a list of tools")
    if len(given) > _MOST:
        raise SettingError(f"{len(given)} tools: at most {_MOST} are taken; leave some out")
    tools = tuple(Tool.checked(value, f"tools[{at}]") for at, value in enumerate(given))
    names = [tool.name for tool in tools]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise SettingError(f"two tools are called '{twice}'; give each a name of its own")
    return tools


def choice_of(tools: Sequence[Tool], choice: Any = None) -> Choice:
    """``tool_choice`` as OpenAI and Anthropic write it: None, "none", "auto", "required" ("any"), or an object that
    names a function. Raises SettingError for anything else, and for a name that no tool has."""
    tools = tuple(tools)
    kind, name = choice, None
    if isinstance(choice, Mapping):
        kind, inner = choice.get("type"), choice.get("function")
        named = inner if isinstance(inner, Mapping) else choice
        name = named.get("name") if kind in ("function", "tool", None) else None
    if kind == "allowed_tools" and isinstance(choice, Mapping):
        allowed = choice.get("allowed_tools", choice)
        names = [_name(one) for one in allowed.get("tools") or ()]
        return choice_of([_named(tools, one) for one in names], allowed.get("mode", "auto"))
    if name is not None:
        return Choice("required", (_named(tools, name),), True)
    if kind in (None, "auto", "none"):
        return Choice("auto" if tools and kind != "none" else "none", tools)
    if kind in ("required", "any"):
        if not tools:
            raise SettingError(f"tool_choice {_short(choice)}: there are no tools; give some, or leave it out")
        return Choice("required", tools)
    raise SettingError(
        f"tool_choice {_short(choice)}: must be 'none', 'auto', 'required' or "
        '{"type": "function", "function": {"name": ...}}'
    )


def _name(one: Any) -> Any:
    inner = one.get("function", one) if isinstance(one, Mapping) else None
    return inner.get("name") if isinstance(inner, Mapping) else None


def _named(tools: Sequence[Tool], name: Any) -> Tool:
    for tool in tools:
        if tool.name == name:
            return tool
    known = ", ".join(tool.name for tool in tools)[:200] or "none"
    raise SettingError(f"tool_choice {_short(name)}: no tool has this name; there are: {known}")


def _object_schema(name: str, schema: Any) -> Mapping[str, Any]:
    """``parameters`` as an object's schema; nothing at all means no parameters, as at OpenAI."""
    if schema is None or schema == {}:
        return {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping):
        raise SettingError(
            f"tool '{name}': its parameters are {_short(schema)}; they must be a JSON schema of type object"
        )
    if schema.get("type", "object") != "object":
        raise SettingError(
            f"tool '{name}': its parameters are of type {_short(schema['type'])}; arguments are an object, "
            'so the schema must be of type "object"'
        )
    if not isinstance(schema.get("properties", {}), Mapping):
        raise SettingError(f"tool '{name}': its properties are {_short(schema['properties'])}; they must be an object")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(one, str) for one in required):
        raise SettingError(f"tool '{name}': 'required' is {_short(required)}; it must be a list of names")
    schema = {"type": "object", **schema}
    try:
        Grammar.json_schema(schema)
    except SettingError as error:
        raise SettingError(f"tool '{name}': {error}") from None
    return schema


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 80 else text[:80] + "..."
