"""The JSON of a request's body, no larger than is allowed."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request

from slimrt.server.errors import ApiError

__all__ = ["read_json"]


async def read_json(request: Request, limit: int) -> Any:
    """What is in the body, of at most ``limit`` bytes. Raises ApiError."""
    body = bytearray()
    length = request.headers.get("content-length", "0")
    too_large = ApiError(413, f"the body is larger than {limit:,} bytes; send less, or raise --max-body")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON ({' '.join(str(error).split())[:200]})") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")
