"""A call as the raw lines that arrived at a socket."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from ..gateway import ROUTING_KEY_HEADER, TARGET_WORKER_HEADER

# RFC 9113, section 3.4. sglang-router asks each worker in HTTP/2 first, and in HTTP/1.1 once that
# connection is closed.
_HTTP_2_PREFACE = b"PRI * HTTP/2.0"


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the bytes that arrived.

    >>> call = recorder.last
    >>> call.method, call.path, call.keys
    ('POST', '/v1/chat/completions', [b's-17'])
    >>> call.start_line, len(call.header_lines) > 3, len(call.body) > 0
    (b'POST /v1/chat/completions HTTP/1.1', True, True)
    """

    start_line: bytes
    """The first line: method, path and version."""
    header_lines: tuple[bytes, ...]
    """The header lines as they came, in their order."""
    body: bytes
    """The body, without the framing of chunks."""

    @property
    def method(self) -> str:
        """The method, such as ``POST``."""
        return self.start_line.split()[0].decode()

    @property
    def path(self) -> str:
        """The path and query as they were sent."""
        return self.start_line.split()[1].decode()

    @property
    def keys(self) -> list[bytes]:
        """The values of ``X-SMG-Routing-Key``: exactly one on a call that carries a key."""
        return self.values(ROUTING_KEY_HEADER)

    def values(self, name: str) -> list[bytes]:
        """Return the raw values of all header lines of that name, in upper or lower case.

        >>> recorder.last.values("content-type")
        [b'application/json']
        """
        pairs = (line.split(b":", 1) for line in self.header_lines)
        return [value.strip() for key, value in pairs if key.lower() == name.lower().encode()]

    def others(self, header: str) -> tuple[bytes, ...]:
        """Return all other headers that could choose the worker, if ``header`` carries the key.

        >>> recorder.last.others("X-SMG-Routing-Key")
        ()
        """
        names = {ROUTING_KEY_HEADER.lower(), TARGET_WORKER_HEADER.lower()} - {header.lower()}
        return tuple(value for name in sorted(names) for value in self.values(name))

    def json(self) -> Any:
        """Return the document in the body. Raises ``ValueError`` if it is no JSON.

        >>> recorder.last.json()["model"]
        'stub'
        """
        return json.loads(self.body)


async def read_call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Call:
    """Read the next call of a connection; raise ``ConnectionAbortedError`` if it is HTTP/2."""
    head = await reader.readuntil(b"\r\n\r\n")
    start_line, *lines = head[:-4].split(b"\r\n")
    if start_line == _HTTP_2_PREFACE:
        raise ConnectionAbortedError("the client asks for HTTP/2, but the recorder speaks HTTP/1.1")
    call = Call(start_line, tuple(lines), b"")
    if call.values("Expect"):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    if b"chunked" in b",".join(call.values("Transfer-Encoding")).lower():
        while size := int((await reader.readline()).partition(b";")[0], 16):
            body += await reader.readexactly(size)
            await reader.readline()
        while (await reader.readline()).strip():  # trailers
            pass
    elif length := call.values("Content-Length"):
        body += await reader.readexactly(int(length[0]))
    return Call(start_line, tuple(lines), bytes(body))
