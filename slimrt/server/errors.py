"""What a client is told: a status and one line, in OpenAI's or in Anthropic's shape."""

from __future__ import annotations

from typing import Any

__all__ = ["ApiError"]

_ANTHROPIC = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused. ``param``: the field at fault, ``code``: OpenAI's word for it, ``retry_after``:
    seconds."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self, *, anthropic: bool = False) -> dict[str, Any]:
        """The JSON of the answer."""
        if anthropic:
            kind = _ANTHROPIC.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_exceeded"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
