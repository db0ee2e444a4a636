"""Which web pages may ask: a browser sends a page's requests to any address, also to this machine's own."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.requests import Request

from slimrt.server.errors import ApiError
from slimrt.server.limits import Limits

__all__ = ["check_caller"]


def check_caller(request: Request, limits: Limits) -> None:
    """Raise ApiError (403) for a page of another host that ``limits.origins`` does not name.

    CORS keeps such a page from reading an answer, but not from asking: a form's content type needs no leave. And a
    name that its owner lets point to this machine makes a page one of this host to a browser: where no key is asked
    for, a server that is reached at an address of this machine alone must be called by an address, or by localhost.
    """
    if "*" in limits.origins:
        return
    origin, host = request.headers.get("origin", ""), request.headers.get("host", "")
    own = not origin or origin in limits.origins or _parts(origin)[0] == host.lower()
    # A browser says so itself where a proxy gave the request another host; no page can.
    if not own and request.headers.get("sec-fetch-site") != "same-origin":
        raise ApiError(403, f"web pages of {origin[:100]} may not ask this server; --cors {origin[:100]} lets them")
    if limits.key is None and _is_loopback((request.scope.get("server") or ("",))[0]):
        name = _parts(f"//{host}")[1]
        if not _is_local(name) and name not in _names(limits.origins):
            raise ApiError(
                403, f"the host {name[:100]!r} is not this machine's; ask for 127.0.0.1 or localhost, or start the "
                f"server with --cors http://{name[:100]} or with --api-key",
            )  # fmt: skip


def _names(origins: Sequence[str]) -> set[str]:
    return {_parts(origin)[1] for origin in origins}


def _parts(address: str) -> tuple[str | None, str]:
    """The host and port, and the host alone, of an address; (None, "?") of what is none."""
    try:
        parts = urlsplit(address)
        return parts.netloc.lower(), parts.hostname or ""
    except ValueError:
        return None, "?"


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_local(name: str) -> bool:
    if not name or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
