"""The workers of ``servers``: bare protocols. Their process imports this file, and no aiohttp."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import cast

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


def content_length(head: bytes) -> int:
    """Return how many bytes follow the head of a request or an answer."""
    length = _LENGTH.search(head)
    return int(length[1]) if length else 0


class Requests(asyncio.Protocol):
    """A keep-alive connection to a worker; a subclass answers each ``request``."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """Pass on each request that is complete."""
        self._buffer += data
        while len(self._buffer) >= self._needed:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end])
            self._needed = end + 4 + content_length(head)
            if len(self._buffer) >= self._needed:
                body = bytes(self._buffer[end + 4 : self._needed])
                del self._buffer[: self._needed]
                self._needed = 0
                self.request(head, body)

    def request(self, head: bytes, body: bytes) -> None:
        """Take a request."""
        raise NotImplementedError


class _Worker(Requests):
    """A connection to a worker that does as little work as possible."""

    def __init__(
        self, received: Counter[tuple[int, str, str | None]] | None, models: object
    ) -> None:
        super().__init__()
        self._received = received
        self._models = models

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the answer that names this worker."""
        super().connection_made(transport)
        self._port: int = self.transport.get_extra_info("sockname")[1]
        worker = f"x-smg-routed-worker-id: http://127.0.0.1:{self._port}\r\n"
        self._completion = answer(_COMPLETION, worker)

    def request(self, head: bytes, body: bytes) -> None:
        """Answer at once."""
        self.transport.write(self._answer_to(head, body))

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
            return answer(lines)
        return answer(self._models)


def answer(document: object, headers: str = "", status: str = "200 OK") -> bytes:
    """Return a whole HTTP answer; a document that is not bytes goes out as JSON."""
    if not isinstance(document, bytes):
        headers = f"content-type: application/json\r\n{headers}"
        document = json.dumps(document).encode()
    head = f"HTTP/1.1 {status}\r\n{headers}content-length: {len(document)}\r\n\r\n"
    return head.encode() + document


async def _run(ports: Sequence[int], record: bool, models: object) -> None:
    received: Counter[tuple[int, str, str | None]] | None = Counter() if record else None
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda: _Worker(received, models), "127.0.0.1", port, backlog=1024)
        for port in ports
    ]
    await servers[-1].serve_forever()  # until it is killed


def main(ports: Sequence[int], record: bool, models: object) -> None:
    """Run the workers in this process until it is killed.

    With ``record`` they keep the session and key of each turn. ``models`` is what they answer to
    ``GET /v1/models``.
    """
    asyncio.run(_run(ports, record, models))
