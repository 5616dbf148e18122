"""Stand-ins for the servers behind a session server: an upstream, or workers for the gateway.

They are bare protocols in another process, to leave the machine's time to the measured code.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

import aiohttp
from yarl import URL

from aiohttp_smg_routing.testing import free_ports
from harness.processes import answering, command, local_url
from harness.workers import models

REPLY = "It is 42. " * 20

_COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "stub",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLY},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 900, "completion_tokens": 80, "total_tokens": 980},
}
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_ROUTING_KEY = re.compile(rb"\r\nx-smg-routing-key: *([^\r]*)", re.IGNORECASE)
_USER = re.compile(rb'"user": ?"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Counted:
    """How many turns a worker received from one session; ``user`` is the session in the body."""

    worker: int
    user: str
    key: str | None
    turns: int


@dataclass(frozen=True, slots=True)
class Workers:
    """Stub workers, all in one child process."""

    urls: tuple[URL, ...]

    async def received(self) -> list[Counted]:
        """Return the turns that the workers received since the last call of this method."""
        async with (
            aiohttp.ClientSession(raise_for_status=True) as session,
            session.get(self.urls[0] / "received") as response,
        ):
            return [Counted(*line) for line in await response.json()]


def content_length(head: bytes) -> int:
    """Return how many bytes follow the head of a request or an answer."""
    length = _LENGTH.search(head)
    return int(length[1]) if length else 0


@asynccontextmanager
async def upstream() -> AsyncIterator[URL]:
    """Run a stand-in for a gateway until the block ends; enter the block once it answers.

    It answers every POST with the same chat completion, and a header that names a worker.
    """
    async with _workers(1, record=False) as workers:
        yield workers.urls[0]


@asynccontextmanager
async def stub_workers(count: int) -> AsyncIterator[Workers]:
    """Run ``count`` workers for the real gateway; they record the session and key of each turn."""
    async with _workers(count, record=True) as workers:
        yield workers


@asynccontextmanager
async def _workers(count: int, *, record: bool) -> AsyncIterator[Workers]:
    ports = free_ports(count)
    urls = tuple(map(local_url, ports))
    async with answering(urls[-1] / "health", *command(main, ports=ports, record=record)):
        yield Workers(urls)


class _Worker(asyncio.Protocol):
    """A keep-alive connection to a worker that does as little work as possible."""

    def __init__(self, received: Counter[tuple[int, str, str | None]] | None) -> None:
        self._received = received
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, and the answer that names this worker."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._port: int = self._transport.get_extra_info("sockname")[1]
        worker = f"x-smg-routed-worker-id: http://127.0.0.1:{self._port}\r\n"
        self._completion = _answer(_COMPLETION, worker)

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            end += 4 + content_length(head)
            if len(self._buffer) < end:
                return
            body, self._buffer = self._buffer[len(head) + 4 : end], self._buffer[end:]
            self._transport.write(self._answer_to(head, body))

    def _answer_to(self, head: bytes, body: bytes) -> bytes:
        if head.startswith(b"POST"):
            if self._received is not None:
                user, key = _USER.search(body), _ROUTING_KEY.search(head)
                self._received[
                    self._port,
                    user[1].decode() if user else "",
                    key[1].decode() if key else None,
                ] += 1
            return self._completion
        if head.startswith(b"GET /received") and self._received is not None:
            lines = [[*key, turns] for key, turns in self._received.items()]
            self._received.clear()
            return _answer(lines)
        return _answer(models())


def _answer(document: object, headers: str = "") -> bytes:
    body = json.dumps(document)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{headers}"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


async def _run(ports: Sequence[int], record: bool) -> None:
    received: Counter[tuple[int, str, str | None]] | None = Counter() if record else None
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda: _Worker(received), "127.0.0.1", port, backlog=1024)
        for port in ports
    ]
    await servers[-1].serve_forever()  # until it is killed


def main(ports: Sequence[int], record: bool) -> None:
    """Run the workers in this process until it is killed."""
    asyncio.run(_run(ports, record))
