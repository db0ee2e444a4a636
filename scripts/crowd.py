"""Many clients of a server at once, most of them ill-behaved: is anybody else disturbed, does memory stay flat?

    python scripts/crowd.py http://127.0.0.1:8080 --connections 100 --rounds 5 [--pid PID]

In every round all connections ask at the same time: some read their answer, some leave in the middle of it, within
their prompt, or within their own request, some reset the connection, some read slowly, some send what is no request.
Meanwhile two watchers ask the same again and again, one streaming and one not, and must get the same answer every time
(or be told to come back: 429).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CHAT, LIMIT_S = "/v1/chat/completions", 120


@dataclass
class Found:
    """``statuses`` by what a client did; ``wrong``: in words; ``slowest``: the longest time between two pieces of the
    watcher's stream; ``memory``: of the server's process after each round, bytes (none where unknown)."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    watched: int = 0
    slowest: float = 0.0
    memory: list[int] = field(default_factory=list)


class Connection:
    """One request over one connection, in HTTP/1.0: an answer ends where the connection does, so nothing is framed."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80

    async def __aenter__(self) -> Connection:
        self.reader, self.writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.writer.close()

    async def send(self, path: str, body: bytes, part: float = 1.0) -> None:
        """The request, or the first ``part`` of its body."""
        head = f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body[: int(len(body) * part)])
        await self.writer.drain()

    async def status(self) -> int:
        """The status line, with the headers behind it."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), LIMIT_S)
        return int(head.split(b" ", 2)[1])

    async def rest(self) -> bytes:
        """What else comes."""
        return await asyncio.wait_for(self.reader.read(), LIMIT_S)

    def reset(self) -> None:
        """End the connection as a killed process does that left bytes unread."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def body(text: str, tokens: int, *, stream: bool) -> bytes:
    """A chat request with one answer only, whatever happens."""
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
    return json.dumps({**asked, "stream": stream, "ignore_eos": True}).encode()


async def whole(url: str, text: str, tokens: int, *, stream: bool) -> tuple[int, str, float]:
    """Status, answer, and the longest time between two pieces."""
    async with Connection(url) as connection:
        await connection.send(CHAT, body(text, tokens, stream=stream))
        status = await connection.status()
        if not stream or status != 200:
            data = json.loads(await connection.rest())
            return status, data["choices"][0]["message"]["content"] if status == 200 else "", 0.0
        pieces, slowest, before, ended = [], 0.0, 0.0, False
        while line := await asyncio.wait_for(connection.reader.readline(), LIMIT_S):
            if not line.startswith(b"data: ") or (ended := line.strip() == b"data: [DONE]"):
                continue
            now = time.monotonic()
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return 500, chunk["error"]["message"], slowest
            slowest, before = max(slowest, now - before if before else 0.0), now
            pieces += [choice["delta"].get("content", "") for choice in chunk["choices"]]
        return (200 if ended else 0), "".join(pieces), slowest


async def client(url: str, kind: str, text: str) -> str:
    """What one client of the crowd was told: a status, or how it left."""
    if kind in ("reads", "reads a stream"):
        return str((await whole(url, text, 8, stream=kind == "reads a stream"))[0])
    async with Connection(url) as connection:
        if kind == "sends nonsense":
            await connection.send(CHAT, text.encode())
            return str(await connection.status())
        if kind == "leaves within its request":
            await connection.send(CHAT, body(text, 8, stream=True), part=0.5)
            return "left"
        long = text * 40 if kind == "leaves within its prompt" else text
        await connection.send(CHAT, body(long, 200, stream=True))
        if kind == "leaves within its prompt":
            await asyncio.sleep(0.05)
            return "left"
        if (status := await connection.status()) != 200:
            return str(status)
        if kind == "reads slowly":
            for _ in range(5):
                await connection.reader.read(64)
                await asyncio.sleep(0.1)
            return "left"
        await connection.reader.read(200)
        if kind == "resets":
            connection.reset()
        return "left"


KINDS = (
    "reads", "reads a stream", "leaves within its answer", "leaves within its prompt", "leaves within its request",
    "resets", "reads slowly", "sends nonsense",
)  # fmt: skip
EXPECTED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(KINDS, ("200", "429", "left")), "sends nonsense": ("400",),
}  # fmt: skip


async def crowd(url: str, found: Found, connections: int, rng: random.Random) -> None:
    """One round."""

    async def one(number: int, kind: str) -> None:
        text = f"client {number} says {rng.random()} "
        try:
            told = await client(url, kind, text)
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            told = type(error).__name__
        found.statuses[f"{kind}: {told}"] += 1
        if told not in EXPECTED[kind]:
            found.wrong.append(f"a client that {kind} was told {told}")

    kinds = [KINDS[number % len(KINDS)] for number in range(connections)]
    rng.shuffle(kinds)
    await asyncio.gather(*(one(number, kind) for number, kind in enumerate(kinds)))


async def watch(url: str, found: Found, stop: asyncio.Event, *, stream: bool) -> None:
    """Ask the same again and again until the crowd is gone."""
    asked = ("the world is", 24)
    _, expected, _ = await whole(url, *asked, stream=stream)
    while not stop.is_set():
        status, text, slowest = await whole(url, *asked, stream=stream)
        if status == 429:
            await asyncio.sleep(0.2)
            continue
        found.watched += 1
        found.slowest = max(found.slowest, slowest)
        if (status, text) != (200, expected):
            found.wrong.append(f"a watcher was told {status} {text!r}, alone {expected!r}")


def resident(pid: int | None) -> int | None:
    """Bytes of memory of a process, where Linux tells."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


async def idle(url: str, found: Found) -> None:
    """Wait until the server has nothing left to do."""
    state: Any = None
    for _ in range(300):
        async with Connection(url) as connection:
            connection.writer.write(b"GET /health HTTP/1.0\r\n\r\n")
            await connection.status()
            state = json.loads(await connection.rest())
        if state["running"] == state["waiting"] == 0:
            return
        await asyncio.sleep(0.1)
    found.wrong.append(f"the server goes on for clients that are gone: {state}")


async def soak(url: str, *, connections: int, rounds: int, pid: int | None = None, seed: int = 0) -> Found:
    """``rounds`` of a crowd; between them the server comes to rest."""
    found, rng = Found(), random.Random(seed)
    for _ in range(rounds):
        stop = asyncio.Event()
        watchers = [asyncio.create_task(watch(url, found, stop, stream=stream)) for stream in (True, False)]
        await crowd(url, found, connections, rng)
        stop.set()
        await asyncio.gather(*watchers)
        await idle(url, found)
        if (bytes_ := resident(pid)) is not None:
            found.memory.append(bytes_)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pid", type=int)
    options = parser.parse_args()
    found = asyncio.run(soak(options.url, connections=options.connections, rounds=options.rounds, pid=options.pid))
    for told, count in sorted(found.statuses.items()):
        print(f"{count:5}  {told}")
    print(f"{found.watched} answers beside them as alone; longest wait between pieces {found.slowest:.3f} s")
    if found.memory:
        print("memory, MiB:", *(f"{one / 2**20:.1f}" for one in found.memory))
    if found.wrong:
        print(*found.wrong[:20], sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
