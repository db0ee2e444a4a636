"""The server from its first request to its end: told to stop, it takes no more, and lets answers end for a while."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from slimrt.server.scheduler import Scheduler

__all__ = ["run_server"]

_LAST_S = 3  # after the grace: for the last words of streams to go out


def run_server(app: Starlette, listening: socket.socket, grace: float, say: Callable[[str], None]) -> None:
    """Serve ``app`` at ``listening`` until SIGTERM or SIGINT. Answers then have ``grace`` seconds to end; those that
    have not end with an error that says so. A second SIGINT ends at once. ``say``: a line for the log."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=round(grace) + _LAST_S
    )
    _Server(config, app.state.scheduler, grace, say).run(sockets=[listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._scheduler, self._grace, self._say = scheduler, grace, say

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop; see ``run_server``."""
        log = logging.getLogger("uvicorn.error")
        log.addFilter(self._worth_telling)
        try:
            super().run(sockets)
        finally:
            log.removeFilter(self._worth_telling)

    def _worth_telling(self, record: logging.LogRecord) -> bool:
        """Not what being cut off looks like from within, where the server was told to stop: tracebacks of requests that
        did not end in time, and of the server's own end."""
        if not self.should_exit:
            return True
        cause = record.exc_info[1] if record.exc_info else None
        text = record.getMessage()
        cut = isinstance(cause, (asyncio.CancelledError, KeyboardInterrupt)) or "without completing response" in text
        return not (cut or text.rstrip().endswith(("CancelledError", "KeyboardInterrupt")))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Told to stop: nobody new is let in, and those who are in have their time."""
        drain = asyncio.create_task(self._drain())
        try:
            await super().shutdown(sockets)
        finally:
            drain.cancel()

    async def _drain(self) -> None:
        scheduler, deadline = self._scheduler, time.monotonic() + self._grace
        jobs = scheduler.running + scheduler.waiting
        if jobs:
            self._say(f"stopping: {jobs} {'request has' if jobs == 1 else 'requests have'} {self._grace:g} s to end")
        while (scheduler.running or scheduler.waiting) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(scheduler.close)
