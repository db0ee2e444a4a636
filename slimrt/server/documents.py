"""A file as text, for the page: what ``slimrt generate --file`` reads of it."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from slimrt.documents import LARGEST, document_text
from slimrt.errors import SettingError
from slimrt.server.errors import ApiError
from slimrt.server.fields import Field, checked
from slimrt.server.generation import STRING

__all__ = ["DOCUMENT", "document"]

DOCUMENT: dict[str, Field] = {
    "name": Field(STRING, "the file's name, whose ending tells a web page", required=True),
    "data": Field(STRING, "its bytes in base64", required=True),
}
_LONGEST_NAME = 200


def document(data: Any) -> dict[str, Any]:
    """What /document answers. Raises ApiError."""
    values = checked(DOCUMENT, data)
    name = "".join(char if char.isprintable() else "?" for char in values["name"][-_LONGEST_NAME:]) or "the file"
    try:
        raw = base64.b64decode(values["data"], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "'data' is not base64", param="data") from None
    if len(raw) > LARGEST:
        raise ApiError(413, f"{name}: larger than {LARGEST >> 20} MiB; send a part of it", param="data")
    try:
        return {"name": name, "content": document_text(raw, name)}
    except SettingError as error:
        raise ApiError(400, str(error), param="data") from None
