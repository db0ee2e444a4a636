"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """``body``: bytes of a request; ``seconds``: that one may take; ``queue``: requests that may wait; ``sessions``:
    that are answered at once; ``key``: what clients must send, None: nothing; ``origins``: web pages of other hosts
    that may ask (none: no CORS headers)."""

    body: int = 32 << 20
    seconds: float = 3600.0
    queue: int = 64
    sessions: int = 4
    key: str | None = None
    origins: tuple[str, ...] = ()
