"""References within a JSON schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

__all__ = ["target"]


def target(root: Any, reference: str) -> Any:
    """What a pointer within the schema names; True (anything) for others, which the compiler judges."""
    if not reference.startswith("#"):
        return True
    value = root
    for part in unquote(reference[1:]).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return True
    return value if reference == "#" or reference.startswith("#/") else True
