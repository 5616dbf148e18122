"""What stands behind a session server in a measurement: an upstream, or workers for the gateway.

They are another process, and bare protocols, so that the machine's time goes to what is measured.
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
    """How many turns a worker received from one session; ``user`` is what the body says it is."""

    worker: int
    user: str
    key: str | None
    turns: int


@dataclass(frozen=True, slots=True)
class Workers:
    """Stub workers, all in one other process."""

    urls: tuple[URL, ...]

    async def received(self) -> list[Counted]:
        """Return what the workers have received since they were last asked."""
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
    """Run what stands in for a gateway until the block ends; enter the block once it answers.

    Every POST gets the same chat completion, and the header that names a worker.
    """
    async with _workers(1, record=False) as workers:
        yield workers.urls[0]


@asynccontextmanager
async def stub_workers(count: int) -> AsyncIterator[Workers]:
    """Run ``count`` workers for the real gateway, which note who called."""
    async with _workers(count, record=True) as workers:
        yield workers


@asynccontextmanager
async def _workers(count: int, *, record: bool) -> AsyncIterator[Workers]:
    ports = free_ports(count)
    urls = tuple(map(local_url, ports))
    async with answering(urls[-1] / "health", *command(main, ports=ports, record=record)):
        yield Workers(urls)


class _Worker(asyncio.Protocol):
    """One keep-alive connection to a worker: as little work as an answer takes."""

    def __init__(self, received: Counter[tuple[int, str, str | None]] | None) -> None:
        self._received = received
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, and the answer that names this worker."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own kind is no subclass
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
    """Be the other process, until it is killed."""
    asyncio.run(_run(ports, record))
