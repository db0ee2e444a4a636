"""``slimrt serve``: the server of ``slimrt.server``, from options to the first line that says where it listens."""

from __future__ import annotations

import importlib.util
import socket
from dataclasses import dataclass

import click

from slimrt.errors import SettingError
from slimrt.llm import LLM
from slimrt.terminal.guard import note
from slimrt.terminal.loading import load_model
from slimrt.terminal.options import LoadSettings

__all__ = ["ServeSettings", "serve"]

_SESSIONS = 4
_PACKAGES = ("starlette", "uvicorn", "sse_starlette", "prometheus_client")


@dataclass(frozen=True)
class ServeSettings:
    """Where to listen, for whom, and how much at once; as the command's options."""

    host: str
    port: int
    api_key: str | None
    sessions: int | None
    queue: int
    timeout: float
    max_body: int
    origins: tuple[str, ...]
    grace: float = 10.0


def serve(load: LoadSettings, settings: ServeSettings) -> None:
    """Load the model and serve it until Ctrl-C or SIGTERM."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingError(
            f"the server needs {', '.join(missing)}, not installed here; run: pip install 'slimrt[server]'"
        )
    if settings.api_key is not None and not settings.api_key.isascii():
        raise SettingError("--api-key: has characters that a header cannot carry; use ASCII letters and digits")
    listening = _listen(settings.host, settings.port)  # before the model is loaded: a port in use is told at once
    from slimrt.server.app import create_app
    from slimrt.server.limits import Limits
    from slimrt.server.run import run_server

    with listening:
        llm = load_model(load)
        sessions = settings.sessions or _affordable(llm)
        limits = Limits(
            settings.max_body, settings.timeout, settings.queue, sessions, settings.api_key, settings.origins
        )
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"serving {llm.config.name} at http://{shown}:{port} (context {llm.ctx:,}, {sessions} at once)")
        if settings.api_key is None and host not in ("127.0.0.1", "::1"):
            note("anyone who reaches this address may use the model; --api-key asks for a key")
        run_server(create_app(llm, limits), listening, settings.grace, note)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises SettingError for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise SettingError(
            f"--host {host} --port {port}: {error.strerror or error}; choose another (--port 0: a free one)"
        ) from None


def _affordable(llm: LLM) -> int:
    """How many conversations may be held at once: four, as far as memory goes; the plan counts one."""
    memory = llm.memory
    each = memory.kv + memory.boundary
    if memory.available is None or each <= 0:
        return _SESSIONS
    more = int(max(0, memory.available - memory.total) // each)
    return min(_SESSIONS, 1 + more)
